"""What host memory behind the cache saves: conversations in turn, together longer than the device's cache.

    python benchmarks/host_cache.py [--device cuda] [--conversations 8] [--turns 4] [--out FILE]

Every turn's prompt is all of the conversation so far and some new tokens. Three engines serve the same turns,
one after another: blocks for a third of what all conversations hold, the same with host memory for all of
it, and blocks for all of it on the device. On a CPU the model is `tiny`, on a GPU Moonlight-16B, with random
weights.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from provenance import write_result

from benthic.model.dummy import random_weights
from benthic.serve.cache import CacheLayout
from benthic.serve.engine import Engine
from benthic.serve.messages import Generate, SamplingParams
from benthic.serve.options import EngineOptions
from benthic.spec import presets

if TYPE_CHECKING:
    from benthic.model.network import DeepSeek

BLOCK, OUTPUT = 64, 16
Row = dict[str, float | int | str]


def main() -> None:
    """Print a row an engine and write them all."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    words.add_argument("--device", default="cpu")
    words.add_argument("--conversations", type=int, default=8)
    words.add_argument("--turns", type=int, default=4)
    words.add_argument("--turn-tokens", type=int, default=400)
    words.add_argument("--out", type=Path)
    given = words.parse_args()
    small = given.device == "cpu"
    config = replace(presets.get("tiny" if small else "moonlight-16b-a3b"), max_position_embeddings=8192)
    model = random_weights(
        config, torch.device(given.device), torch.float32 if small else torch.bfloat16, seed=0
    )
    longest = given.turns * (given.turn_tokens + OUTPUT)
    blocks = given.conversations * -(-longest // BLOCK)
    third = max(blocks // 3, -(-longest // BLOCK))
    weight = model.head_weight()
    layout = CacheLayout.of(model.config, block_size=BLOCK, dtype=weight.dtype)
    gib = (blocks + 1) * layout.block_bytes / (1 << 30)
    rows, answers = [], []
    for name, num_blocks, host in (
        ("a third of the blocks", third, 0.0),
        ("a third of the blocks, host memory for all", third, gib),
        ("all blocks on the device", blocks + 1, 0.0),
    ):
        row, tokens = serve(model, given, name=name, num_blocks=num_blocks, host_cache_gib=host)
        rows.append(row)
        answers.append(tokens)
        print(row, flush=True)
    rows[1]["equal_answers"] = sum(a == b for a, b in zip(answers[0], answers[1], strict=True)) / len(
        answers[0]
    )
    print(
        write_result(
            "host_cache", rows, out=given.out, **{k: v for k, v in vars(given).items() if k != "out"}
        )
    )


def serve(
    model: DeepSeek, given: argparse.Namespace, *, name: str, num_blocks: int, host_cache_gib: float
) -> tuple[Row, list[tuple[int, ...]]]:
    """Serve all turns; times are of whole requests, the device's work included."""
    options = EngineOptions(
        device=given.device,
        num_blocks=num_blocks,
        host_cache_gib=host_cache_gib,
        block_size=BLOCK,
        max_num_seqs=4,
        max_num_batched_tokens=2048,
    )
    engine = Engine.of(model, options, eos=())
    turns(engine, given, given.conversations + 1, 1, seed=1)  # kernels and tapes are made
    before, began = engine.stats(), time.perf_counter()
    ttft, tokens = turns(engine, given, given.conversations, given.turns, seed=0)
    seconds, stats = time.perf_counter() - began, engine.stats()
    looked_up = stats.prefix_cache_queries - before.prefix_cache_queries
    found = stats.prefix_cache_hits - before.prefix_cache_hits
    return {
        "case": name,
        "device_blocks": num_blocks,
        "host_blocks": stats.host_blocks,
        "prompt_tokens": looked_up,
        "prefilled_tokens": looked_up - found,
        "host_hit_tokens": stats.host_hits - before.host_hits,
        "bytes_out": stats.host_bytes_out - before.host_bytes_out,
        "bytes_in": stats.host_bytes_in - before.host_bytes_in,
        "mean_ttft_ms": 1e3 * sum(ttft) / len(ttft),
        "seconds": seconds,
    }, tokens


def turns(
    engine: Engine, given: argparse.Namespace, conversations: int, count: int, *, seed: int
) -> tuple[list[float], list[tuple[int, ...]]]:
    """Let conversations speak in turn; seconds to each first token, and the answers."""
    generator = torch.Generator().manual_seed(seed)
    histories: list[tuple[int, ...]] = [()] * conversations
    ttft, answers = [], []
    for turn in range(count):
        for place, history in enumerate(histories):
            new = torch.randint(2, engine.ready().vocab_size, (given.turn_tokens,), generator=generator)
            prompt = (*history, *new.tolist())
            params = SamplingParams(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True)
            engine.add(Generate(request_id=f"{seed}-{turn}-{place}", prompt=prompt, params=params))
            began, answer = time.perf_counter(), ()
            while engine.has_work:
                for delta in engine.step():
                    if not answer:
                        ttft.append(time.perf_counter() - began)
                    answer += delta.tokens
            histories[place] = (*prompt, *answer)
            answers.append(answer)
    return ttft, answers


if __name__ == "__main__":
    main()
