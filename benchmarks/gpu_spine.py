"""Serve one checkpoint on the GPU and on the CPU with the same engine: do they agree, and how fast is it?

Greedy tokens of bfloat16 on the GPU and float32 on the CPU may part where two logits are nearly equal, so
both dtypes run on the GPU and the share of equal tokens is reported for each.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import perf_counter

import torch
from provenance import write_result

from benthic.serve.engine import Engine
from benthic.serve.messages import Generate, SamplingParams
from benthic.serve.options import EngineOptions

PROMPT_TOKENS, NEW_TOKENS = 48, 64


def main() -> None:
    """Compare, time, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    prompts = make_prompts(8, vocabulary=2048)
    cpu, _ = generate(engine(arguments.checkpoint, "cpu", "float32"), prompts)
    rows = []
    for dtype in ("float32", "bfloat16"):
        gpu, _ = generate(engine(arguments.checkpoint, "cuda", dtype), prompts)
        equal = sum(a == b for one, two in zip(cpu, gpu, strict=True) for a, b in zip(one, two, strict=True))
        first = sum(one[0] == two[0] for one, two in zip(cpu, gpu, strict=True))
        rows.append({"dtype": dtype, "equal_tokens": equal / (8 * NEW_TOKENS), "equal_first": first / 8})
        print(rows[-1])
    for batch in (1, 16, 64):
        served = engine(arguments.checkpoint, "cuda", "bfloat16")
        generate(served, make_prompts(batch, vocabulary=1024))
        _, seconds = generate(served, make_prompts(batch, vocabulary=2048))
        rows.append({"dtype": "bfloat16", "batch": batch, "tokens_per_second": batch * NEW_TOKENS / seconds})
        print(rows[-1])
    print(write_result("gpu_spine", rows, out=arguments.out))


def engine(checkpoint: Path, device: str, dtype: str) -> Engine:
    """The engine as `benthic serve` builds it."""
    options = EngineOptions(device=device, dtype=dtype, kv_cache_memory=1 << 28, max_num_seqs=64)
    return Engine.from_pretrained(checkpoint, options, clock=perf_counter)


def make_prompts(count: int, *, vocabulary: int) -> list[tuple[int, ...]]:
    """Random token ids, the same every time."""
    generator = torch.Generator().manual_seed(vocabulary)
    return [
        tuple(torch.randint(3, vocabulary, (PROMPT_TOKENS,), generator=generator).tolist())
        for _ in range(count)
    ]


def generate(served: Engine, prompts: list[tuple[int, ...]]) -> tuple[list[list[int]], float]:
    """All prompts at once, greedy, `NEW_TOKENS` each: tokens and seconds."""
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    out: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    start = perf_counter()
    for index, prompt in enumerate(prompts):
        served.add(Generate(request_id=str(index), prompt=prompt, params=params))
    while served.has_work:
        for delta in served.step():
            out[delta.request_id].extend(delta.tokens)
    return list(out.values()), perf_counter() - start


if __name__ == "__main__":
    main()
