"""Training speed on one GPU beside `transformers`: `python benchmarks/train_gpu.py [--small]`.

A slice of Moonlight (one dense and five mixture layers of full width, vocabulary 163,840), four rows of 4,096
tokens a step, the same tokens of Python sources for everyone. `transformers` trains as its users do when they
want speed: bfloat16 weights and moments, fused AdamW, SDPA, with the grouped experts it offers. Ours keep
float32 masters and gradients beside bfloat16 weights and moments, and clip the gradient. Every line is a
process of its own; a step's time is from its loss to the next one's, which both know before they update, and
times are medians of the steps after three. Ours say how uneven experts were (the rows of the busiest over the
mean, and experts without, of every mixture): a gate may learn faster than its biases, which `--lr 1e-6` rules
out. MFU counts causal attention, against the published dense bfloat16 peak.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

sys.path.insert(0, str(Path(__file__).parent))

from provenance import write_result
from stdlib_corpus import make_data
from train_ranks import load

from benthic.cli.settings import apply
from benthic.spec import flops, hf, presets
from benthic.train.config import LogConfig, LoopConfig, RunConfig
from benthic.train.data.microbatch import Batches
from benthic.train.data.packing import Packing
from benthic.train.data.shards import TokenShards, read_meta
from benthic.train.hardware import detect
from benthic.train.resolve import resolve
from benthic.train.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from benthic.spec.model import ModelConfig

    Step = Callable[[], tuple[float, list[Tensor]]]
    """Loss of a step, and rows of every expert of every mixture where somebody counts them."""

OURS: Final[dict[str, tuple[str, ...]]] = {
    "benthic bf16": (),
    "benthic bf16, rows one by one": ("train.local_batch_size=1",),
    "benthic fp8": ("precision.matmul=fp8",),
}
THEIRS: Final = ("eager", "grouped_mm")
CONTESTANTS: Final = (*OURS, *(f"transformers, {experts} experts" for experts in THEIRS))
ROWS: Final = 4
TIMED: Final = 3
"""Steps before those that are timed."""


def main() -> None:
    """Each contestant in a process of its own, then the table."""
    words = parse()
    if words.one is not None:
        print(json.dumps(contestant(words.one, words)))
        return
    names = [name for name in CONTESTANTS if not words.only or name in words.only]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, parts = (512, ("json", "email")) if words.small else (32768, (".",))
        data = make_data(Path(folder), vocabulary, parts=parts)
        rows: list[dict[str, Any]] = []
        for name in names:  # written each time, so that a run that is cut off keeps what it has
            rows.append(apart(name, data, words))
            said = {"steps": words.steps, "lr": words.lr, "model": model_of(words).name}
            write_result("train_gpu", rows, out=words.out, **said)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--small", action="store_true", help="rehearse with a small model on the CPU")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, help="some of the contestants")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def apart(name: str, data: Path, words: argparse.Namespace) -> dict[str, Any]:
    """One contestant's line, printed; what failed is a line too."""
    command = [sys.executable, __file__, "--one", name, "--data", str(data)]
    command += ["--steps", str(words.steps), "--lr", str(words.lr)]
    command += ["--small"] if words.small else []
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    if done.returncode:
        row = {"who": name, "failed": done.stderr.strip().splitlines()[-1][:300]}
        print(f"{name:<34} failed: {row['failed']}", flush=True)
        return row
    row = json.loads(done.stdout.strip().splitlines()[-1])
    mfu = "" if row["mfu"] is None else f"mfu {100 * row['mfu']:5.1f} %"
    print(
        f"{name:<34} loss {row['losses'][0]:.4f} -> {row['losses'][-1]:.4f}  "
        f"{row['tokens_per_second']:9,.0f} tokens/s  {mfu}  {row['peak_bytes'] / 2**30:5.1f} GiB",
        flush=True,
    )
    return row


def contestant(name: str, words: argparse.Namespace) -> dict[str, Any]:
    """Train, and say how fast."""
    trainer = ours(OURS[name], words) if name in OURS else None
    step = theirs(name.split()[1], words) if trainer is None else stepping(trainer)
    cuda = not words.small
    losses, seconds, counts = [], [], []
    for _ in range(words.steps):
        began = time.perf_counter()
        loss, rows = step()  # reads the loss, so the device is at the update
        seconds.append(time.perf_counter() - began)
        losses.append(loss)
        counts.append(rows)
    tokens = ROWS * seq_len(words)
    rate = tokens / statistics.median(seconds[TIMED:])
    peak = detect("cuda" if cuda else "cpu").peak_flops.get("bfloat16")
    done = flops.training(model_of(words), seq_len(words)).value * rate
    return {
        "who": name,
        "losses": losses,
        "tokens_per_second": rate,
        "flops_per_second": done,
        "mfu": None if peak is None else done / peak,
        "cuda_graph": trainer is not None and trainer.recorded,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
        "busiest_and_empty_experts": [
            load(torch.stack(rows).float()) for rows in zip(*counts[TIMED:], strict=True)
        ],
    }


def ours(settings: tuple[str, ...], words: argparse.Namespace) -> Trainer:
    """Our trainer of those rows."""
    loop = LoopConfig(
        steps=words.steps,
        seq_len=seq_len(words),
        local_batch_size=ROWS,
        global_batch_size=ROWS,
        lr=words.lr,
        schedule="constant",
    )
    config = RunConfig(
        model=model_of(words),
        train=loop,
        log=LogConfig(tensorboard=False, pictures=False),
        device="cpu" if words.small else "cuda",
    )
    meta = read_meta(words.data)
    config = apply(config, ["optimizer.moment_dtype=bfloat16", "data.mask_documents=false", *settings])
    resolved = resolve(config, detect(config.device), meta).config
    return Trainer(resolved, TokenShards(words.data, meta, "train"))


def stepping(trainer: Trainer) -> Step:
    """Its step, as the loop here takes it."""

    def step() -> tuple[float, list[Tensor]]:
        result = trainer.step()
        return result.loss, list(result.counts.values())

    return step


def theirs(experts: str, words: argparse.Namespace) -> Step:
    """One step of `transformers` with the same rows."""
    import transformers

    device, dtype = ("cpu", torch.float32) if words.small else ("cuda", torch.bfloat16)
    model_config = transformers.DeepseekV3Config(**hf.to_hf(model_of(words)))
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            model_config, dtype=dtype, attn_implementation="sdpa", experts_implementation=experts
        ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=words.lr, betas=(0.9, 0.95), fused=not words.small)
    shards, length = TokenShards(words.data, read_meta(words.data), "train"), seq_len(words)
    batches = Batches(shards, Packing(shards.lengths, length, 0), mtp_depth=0, mask_documents=False)
    starts = itertools.count(step=ROWS)

    def step() -> tuple[float, list[Tensor]]:
        rows = batches.microbatch(next(starts), ROWS).tokens_T.view(ROWS, length).to(device)
        loss = model(rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        found = float(loss)
        optimizer.step()
        optimizer.zero_grad()
        return found, []

    return step


def seq_len(words: argparse.Namespace) -> int:
    """Tokens of a row."""
    return 64 if words.small else 4096


def model_of(words: argparse.Namespace) -> ModelConfig:
    """Six layers of Moonlight, or something small."""
    if words.small:
        return dataclasses.replace(presets.get("nano"), vocab_size=512, num_nextn_predict_layers=0)
    moonlight = presets.get("moonlight-16b-a3b")
    return dataclasses.replace(
        moonlight, name="moonlight-6-layers", num_hidden_layers=6, bos_token_id=0, eos_token_id=1
    )


if __name__ == "__main__":
    main()
