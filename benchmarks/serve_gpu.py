"""Prefill and decode tokens/s of the engine on one GPU, at the shape of Moonlight-16B, beside transformers.

Weights are random, made on the GPU so that random tokens spread over the experts (weights that route most
tokens to few experts flatter decode); how evenly they do is part of the result. Every number goes through
`Engine.step`, scheduler and sampler included. For decode there are three times of a step: of the overlapped
loop, of the plain loop on the same requests, and of the GPU alone (the step's graph replayed back to back),
so that the share of a step outside the GPU is a measurement. Prompts, and prompts beside decodes, are
measured with their CUDA graphs and as written.

Roofs are of this card, measured in the same run: a step of decode reads its weights (those of the experts
that balanced routing touches) and its latent cache at the speed of a device copy; prefill multiplies at the
speed of an 8192^3 bfloat16 product.

    python benchmarks/serve_gpu.py             # about four minutes on an H100
    python benchmarks/serve_gpu.py --small     # the same on a CPU, tiny: a rehearsal
    python benchmarks/serve_gpu.py --temperature 1    # drawn as for `benthic bench serve`, to fit an engine
"""

from __future__ import annotations

import argparse
import gc
import itertools
import logging
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import torch
from provenance import write_result
from serve_gpu_peer import Peer

from benthic.model.dummy import random_weights
from benthic.model.local import LocalExchange, plain_linear
from benthic.model.sockets import Sockets
from benthic.serve.attend import PagedAttend, PrefillRows, StepLayout
from benthic.serve.cache import CacheLayout, LatentCache
from benthic.serve.engine import Engine
from benthic.serve.messages import Generate, SamplingParams
from benthic.serve.options import EngineOptions
from benthic.spec import presets
from benthic.spec.parameters import parameters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benthic.model.network import DeepSeek
    from benthic.spec.model import ModelConfig


PARTS: Final = {"bf16": ("none", "auto"), "fp8-weights": ("fp8", "auto"), "fp8": ("fp8", "fp8")}
"""How weights and cache are kept: in bfloat16, weights in FP8, both in FP8."""
HOT_S: Final = 3.0
"""Of steps with a prompt before they are timed."""


@dataclass(frozen=True)
class Sizes:
    """What is measured: prompts (so many, so long), batches at one context, a prompt beside decodes."""

    config: ModelConfig
    device: str
    prompts: tuple[tuple[int, int], ...] = ((1, 128), (1, 512), (1, 2048), (1, 4096), (4, 4096), (16, 4096))
    context: int = 1024
    batches: tuple[int, ...] = (1, 8, 32, 64, 256, 512)
    beside: tuple[tuple[int, int], ...] = (
        *((512, 64), (2048, 64), (512, 384)),
        *((128, 0), (512, 0), (2048, 0), (4096, 0)),
    )
    steps: int = 48
    budget: int = 16384
    repeats: int = 3
    temperature: float = 0.0

    @classmethod
    def small(cls, device: str) -> Sizes:
        """A rehearsal: everything happens, nothing takes long."""
        config = replace(
            presets.get("nano"),
            hidden_size=128,
            intermediate_size=256,
            moe_intermediate_size=128,
            kv_lora_rank=64,
            q_lora_rank=None,
            num_nextn_predict_layers=0,
            max_position_embeddings=512,
        )
        prompts = ((1, 32), (2, 96))
        return cls(config, device, prompts, 32, (1, 4), ((16, 4), (16, 0)), steps=6, budget=128, repeats=1)


def main() -> None:
    """Measure ours in bfloat16 and in FP8, then the peer; write after each, so that a lost run keeps some."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", nargs="+", default=[*PARTS, "transformers"])
    parser.add_argument("--temperature", type=float, default=0.0, help="1 draws as servers do unasked")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)8d ms %(message)s")
    device = arguments.device if torch.cuda.is_available() else "cpu"
    moonlight = presets.get("moonlight-16b-a3b")
    sizes = Sizes.small(device) if arguments.small else Sizes(moonlight, device)
    sizes = replace(sizes, temperature=arguments.temperature)
    roofs = measure_roofs(sizes)
    rows: list[dict[str, Any]] = [{"what": "roofs", **roofs}]
    print(rows[-1], flush=True)
    for part in arguments.parts:
        rows += peer_rows(sizes) if part == "transformers" else our_rows(sizes, part, roofs)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        path = write_result(
            "serve_gpu", rows, out=arguments.out, small=arguments.small, model=sizes.config.name,
            temperature=sizes.temperature,
        )  # fmt: skip
    print(path)


@torch.inference_mode()
def balance(model: DeepSeek, device: str, tokens: int) -> dict[str, float]:
    """How evenly random tokens spread: load of the busiest expert over the mean, worst layer and mean."""
    config = model.config
    bounds = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    layout = CacheLayout.of(config, block_size=64, dtype=model.head_weight().dtype)
    cache = LatentCache(layout, 1, torch.device(device))
    nowhere = torch.full((tokens,), -1, dtype=torch.int64, device=device)
    attend = PagedAttend(cache, StepLayout(nowhere, None, PrefillRows(bounds, bounds, tokens, tokens, None)))
    sockets = Sockets(attend, LocalExchange(config.n_routed_experts), plain_linear)
    ids = torch.randint(0, config.vocab_size, (tokens,), device=device)
    routing = model(ids, torch.arange(tokens, device=device), sockets).routing
    loads = [r.expert_TK.flatten().bincount(minlength=config.n_routed_experts).float() for _, r in routing]
    busiest = [float(load.max() / load.mean()) for load in loads]
    return {"busiest_expert_worst": max(busiest), "busiest_expert_mean": statistics.mean(busiest)}


def our_rows(sizes: Sizes, part: str, roofs: dict[str, float]) -> list[dict[str, Any]]:
    """Prefill and decode of the engine with weights and cache as the part has them."""
    on_gpu = sizes.device == "cuda"
    model = random_weights(
        sizes.config, torch.device(sizes.device), torch.bfloat16 if on_gpu else torch.float32, seed=0
    )
    spread = balance(model, sizes.device, sizes.prompts[-1][1])
    options = EngineOptions(
        device=sizes.device,
        quantization=PARTS[part][0],
        kv_cache_dtype=PARTS[part][1],
        max_num_seqs=max(sizes.batches),
        max_num_batched_tokens=sizes.budget,
        enable_prefix_caching=False,
        cudagraph_capture_sizes=sizes.batches,
        async_scheduling=True,
        num_blocks=None if on_gpu else 512,
    )
    began = time.perf_counter()
    engine = Engine.of(model, options, eos=())
    start = {"what": "start", "weights": part, "seconds": time.perf_counter() - began, **spread}
    rows = [start | memory_of(engine)]
    print(rows[-1], flush=True)
    for count, length in sizes.prompts:
        rows.append({"weights": part, **prefill_row(engine, sizes, count, length, roofs)})
        print(rows[-1], flush=True)
    for batch in sizes.batches:
        rows.append({"weights": part, **decode_row(engine, options, sizes, batch, roofs)})
        print(rows[-1], flush=True)
    for length, batch in sizes.beside:
        rows.append({"weights": part, **beside_row(engine, sizes, length, batch)})
        print(rows[-1], flush=True)
    return rows


def memory_of(engine: Engine) -> dict[str, Any]:
    """The account of the GPU's memory in bytes, and what the graphs took in the end."""
    use, graphs = engine.parts.memory, engine.parts.runner.all_graphs
    if use is None:
        return {}
    return {
        "memory": {
            "weights": use.weights,
            "activations": use.activations,
            "graphs_expected": use.graphs,
            "graphs": sum(each.num_bytes for each in graphs),
            "num_graphs": sum(map(len, graphs)),
            "cache": engine.parts.runner.cache.num_bytes,
        }
    }


def requests(sizes: Sizes, count: int, length: int, new: int, seed: int) -> list[Generate]:
    """Requests with random prompts of one length, greedy or with seeds."""
    generator = torch.Generator().manual_seed(seed)
    params = SamplingParams(temperature=sizes.temperature, seed=seed, max_tokens=new, ignore_eos=True)
    return [
        Generate(
            request_id=str(i),
            prompt=tuple(torch.randint(0, sizes.config.vocab_size, (length,), generator=generator).tolist()),
            params=params,
        )
        for i in range(count)
    ]


def prefill_row(
    engine: Engine, sizes: Sizes, count: int, length: int, roofs: dict[str, float]
) -> dict[str, Any]:
    """From the first `add` to the last first token, and the same without graphs."""

    def run(turn: int) -> None:
        for each in requests(sizes, count, length, 1, seed=turn):
            engine.add(each)
        while engine.has_work:
            engine.step()

    took, plain = (repeated(run, sizes.repeats) for _ in with_and_without_graphs(engine))
    flops = prefill_flops(sizes.config, count, length)
    return {
        "what": "prefill",
        "prompts": f"{count} x {length}",
        "tokens_per_second": count * length / took,
        "ms": took * 1e3,
        "as_written_ms": plain * 1e3,
        "of_bf16_product": flops / took / roofs["product_flops"],
    }


def repeated(run: Callable[[int], None], repeats: int) -> float:
    """Median seconds of `run(1)`, `run(2)` and so on, after `run(0)`."""
    seconds = []
    for turn in range(repeats + 1):
        began = time.perf_counter()
        run(turn)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def with_and_without_graphs(engine: Engine) -> Iterator[None]:
    """Once as the engine is, once without the graphs of steps with prompts."""
    runner = engine.parts.runner
    yield
    graphs, runner.prompts = runner.prompts, ()
    yield
    runner.prompts = graphs


def beside_row(engine: Engine, sizes: Sizes, length: int, batch: int) -> dict[str, Any]:
    """A step in which a prompt is taken in while others decode, or none do, with graphs and as written.

    Such steps follow each other, so that the host's part hides behind them, as it does under load, and do so
    for `HOT_S` before they are timed: a GPU that has rested has a higher clock than one under load.
    """
    hot_s = iter((HOT_S if sizes.device == "cuda" else 0.0, 0.0))
    took, plain = (
        mixed_step(engine, sizes, length, batch, next(hot_s)) for _ in with_and_without_graphs(engine)
    )
    return {
        "what": "a prompt beside decodes",
        "prompt": length,
        "batch": batch,
        "context": sizes.context,
        "step_ms": took * 1e3,
        "as_written_ms": plain * 1e3,
    }


def mixed_step(engine: Engine, sizes: Sizes, length: int, batch: int, hot_s: float) -> float:
    """Seconds of such a step: one prompt is added before each, and ends with its first token."""
    steps, waiting, numbers = sizes.steps // 3, set(), itertools.count()
    for each in requests(sizes, batch, sizes.context, 1000, seed=7):
        engine.add(each)
        waiting.add(each.request_id)
    while waiting:
        waiting -= {delta.request_id for delta in engine.step()}

    def one() -> None:
        number = next(numbers)
        (each,) = requests(sizes, 1, length, 1, seed=8 + number)
        engine.add(msgspec.structs.replace(each, request_id=f"prompt {number}"))
        engine.step()

    for _ in range(2):
        one()
    hot = time.perf_counter() + hot_s
    while time.perf_counter() < hot:
        one()
    began = time.perf_counter()
    for _ in range(steps):
        one()
    seconds = (time.perf_counter() - began) / steps
    for number in range(batch):
        engine.abort(str(number))
    while engine.has_work:
        engine.step()
    return seconds


def decode_row(
    engine: Engine, options: EngineOptions, sizes: Sizes, batch: int, roofs: dict[str, float]
) -> dict[str, Any]:
    """The same requests through the overlapped and the plain loop, and the GPU's part of a step."""
    plain = Engine(engine.parts, replace(options, async_scheduling=False))
    overlapped_s, overlapped_tokens = decode(engine, sizes, batch)
    plain_s, plain_tokens = decode(plain, sizes, batch)
    alone_s = alone(engine, batch)
    roof = step_bytes(engine, sizes, batch) / roofs["copy_bytes_per_second"]
    pairs = [
        pair for name, own in plain_tokens.items() for pair in zip(own, overlapped_tokens[name], strict=False)
    ]
    row = {
        "what": "decode",
        "batch": batch,
        "context": sizes.context,
        "tokens_per_second": batch / overlapped_s,
        "step_ms": overlapped_s * 1e3,
        "plain_step_ms": plain_s * 1e3,
        "roof_ms": roof * 1e3,
        "of_roof": roof / overlapped_s,
        "overlapped_equals_plain": sum(a == b for a, b in pairs) / len(pairs),
    }
    if alone_s is not None:
        row |= {
            "gpu_ms": alone_s * 1e3,
            "outside_gpu": max(0.0, 1 - alone_s / overlapped_s),
            "outside_gpu_plain": max(0.0, 1 - alone_s / plain_s),
        }
    return row


def decode(engine: Engine, sizes: Sizes, batch: int) -> tuple[float, dict[str, list[int]]]:
    """Seconds of a step with all requests decoding, and the tokens so far; the requests are then aborted."""
    tokens: dict[str, list[int]] = {}
    new = sizes.steps + 8 + 2 * (batch * sizes.context // sizes.budget + 2)
    for each in requests(sizes, batch, sizes.context, new, seed=7):
        engine.add(each)
        tokens[each.request_id] = []

    def step() -> None:
        for delta in engine.step():
            tokens[delta.request_id].extend(delta.tokens)

    while min(map(len, tokens.values())) < 4:
        step()
    began = time.perf_counter()
    for _ in range(sizes.steps):
        step()
    seconds = (time.perf_counter() - began) / sizes.steps
    for name in tokens:
        engine.abort(name)
    while engine.has_work:
        engine.step()
    return seconds, tokens


def alone(engine: Engine, batch: int) -> float | None:
    """Seconds that the GPU takes for the graph of the last step of this size, replayed back to back."""
    graphs = engine.parts.runner.graphs.get(1)
    size = None if graphs is None else graphs.size_for(batch)
    if graphs is None or size is None:
        return None
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graphs.replay(size)
    torch.cuda.synchronize()
    start.record()
    for _ in range(20):
        graphs.replay(size)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 20 / 1e3


def step_bytes(engine: Engine, sizes: Sizes, batch: int) -> float:
    """Bytes that a decode step must read: weights that balanced routing touches, and the latent cache."""
    config = sizes.config
    touched = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** batch
    total = 0.0
    for name, weight in engine.parts.runner.model.named_parameters():
        if name == "embed.weight":
            continue
        total += weight.nbytes * (touched if ".experts." in name else 1.0)
    layout = engine.parts.runner.cache.layout
    return total + batch * (sizes.context + sizes.steps / 2) * layout.token_bytes


def prefill_flops(config: ModelConfig, count: int, length: int) -> float:
    """2 FLOPs a parameter that a token uses (the head for one token a prompt), and causal attention."""
    tables = ("embedding", "head")
    used = sum(float(p.active * p.numel) for p in parameters(config) if p.part not in tables and not p.mtp)
    heads = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    attention = config.num_hidden_layers * length * length * heads
    return count * (2.0 * used * length + attention + 2.0 * config.vocab_size * config.hidden_size)


def measure_roofs(sizes: Sizes) -> dict[str, float]:
    """Bytes a second of a device copy (read and written), FLOPs a second of a large bfloat16 product."""
    small = sizes.device == "cpu"
    source = torch.randn(1 << (20 if small else 29), device=sizes.device)
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source), sizes.device)
    side = 256 if small else 8192
    dtype = torch.float32 if small else torch.bfloat16
    a, b = (torch.randn(side, side, device=sizes.device, dtype=dtype) for _ in range(2))
    product = timed(lambda: torch.mm(a, b), sizes.device)
    return {"copy_bytes_per_second": 2 * source.nbytes / copy, "product_flops": 2.0 * side**3 / product}


def timed(call: Any, device: str) -> float:
    """Median seconds of ten calls after three."""
    seconds = []
    for _ in range(13):
        began = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[3:])


def peer_rows(sizes: Sizes) -> list[dict[str, Any]]:
    """The same shapes through transformers, in bfloat16 (float32 on a CPU)."""
    peer, rows = Peer(sizes.config, sizes.device), []
    for count, length in sizes.prompts:
        seconds = peer.prefill(count, length, sizes.repeats)
        rate = None if seconds is None else count * length / seconds
        rows.append(
            {"weights": "transformers", "what": "prefill", "prompts": f"{count} x {length}"}
            | {"tokens_per_second": rate}
        )
        print(rows[-1], flush=True)
    for batch in sizes.batches:
        seconds = peer.decode(batch, sizes.context, max(4, sizes.steps // 3))
        rows.append(
            {"weights": "transformers", "what": "decode", "batch": batch, "context": sizes.context}
            | {"tokens_per_second": None if seconds is None else batch / seconds}
        )
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    main()
