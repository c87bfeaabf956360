"""Prefill and decode tokens/s of the engine on one GPU, at the shape of Moonlight-16B, beside transformers.

Weights are random, made on the GPU so that random tokens spread over the experts (weights that route most
tokens to few experts flatter decode); how evenly they do is part of the result. Every number goes through
`Engine.step`, scheduler and sampler included. For decode there are three times of a step: of the overlapped
loop, of the plain loop on the same requests, and of the GPU alone (the step's graph replayed back to back),
so that the share of a step outside the GPU is a measurement.

Roofs are of this card, measured in the same run: a step of decode reads its weights (those of the experts
that balanced routing touches) and its latent cache at the speed of a device copy; prefill multiplies at the
speed of an 8192^3 bfloat16 product.

    python benchmarks/serve_gpu.py             # about four minutes on an H100
    python benchmarks/serve_gpu.py --small     # the same on a CPU, tiny: a rehearsal
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    from benthic.model.network import DeepSeek
    from benthic.spec.model import ModelConfig


@dataclass(frozen=True)
class Sizes:
    """What is measured: prompts of one length, batches at one context."""

    config: ModelConfig
    device: str
    prompt: int = 4096
    prompts: tuple[int, ...] = (1, 4, 16)
    context: int = 1024
    batches: tuple[int, ...] = (1, 32, 64, 256)
    steps: int = 48
    budget: int = 16384
    repeats: int = 3

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
        return cls(config, device, 96, (1, 2), 32, (1, 4), steps=6, budget=128, repeats=1)


def main() -> None:
    """Measure ours in bfloat16 and in FP8, then the peer; write after each, so that a lost run keeps some."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", nargs="+", default=["bf16", "fp8", "transformers"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)8d ms %(message)s")
    device = arguments.device if torch.cuda.is_available() else "cpu"
    moonlight = presets.get("moonlight-16b-a3b")
    sizes = Sizes.small(device) if arguments.small else Sizes(moonlight, device)
    roofs = measure_roofs(sizes)
    rows: list[dict[str, Any]] = [{"what": "roofs", **roofs}]
    print(rows[-1], flush=True)
    for part in arguments.parts:
        rows += peer_rows(sizes) if part == "transformers" else our_rows(sizes, part, roofs)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        path = write_result(
            "serve_gpu", rows, out=arguments.out, small=arguments.small, model=sizes.config.name
        )
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
    """Prefill and decode of the engine with weights and cache in bfloat16, or both in FP8."""
    on_gpu = sizes.device == "cuda"
    model = random_weights(
        sizes.config, torch.device(sizes.device), torch.bfloat16 if on_gpu else torch.float32, seed=0
    )
    spread = balance(model, sizes.device, sizes.prompt)
    options = EngineOptions(
        device=sizes.device,
        quantization="fp8" if part == "fp8" else "none",
        kv_cache_dtype="fp8" if part == "fp8" else "auto",
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
    for count in sizes.prompts:
        rows.append({"weights": part, **prefill_row(engine, sizes, count, roofs)})
        print(rows[-1], flush=True)
    for batch in sizes.batches:
        rows.append({"weights": part, **decode_row(engine, options, sizes, batch, roofs)})
        print(rows[-1], flush=True)
    return rows


def memory_of(engine: Engine) -> dict[str, Any]:
    """The account of the GPU's memory in bytes, and what the graphs took in the end."""
    use, graphs = engine.parts.memory, engine.parts.runner.graphs
    if use is None or graphs is None:
        return {}
    return {
        "memory": {
            "weights": use.weights,
            "activations": use.activations,
            "graphs_expected": use.graphs,
            "graphs": graphs.num_bytes,
            "cache": engine.parts.runner.cache.num_bytes,
        }
    }


def requests(sizes: Sizes, count: int, length: int, new: int, seed: int) -> list[Generate]:
    """Greedy requests with random prompts of one length."""
    generator = torch.Generator().manual_seed(seed)
    params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
    return [
        Generate(
            request_id=str(i),
            prompt=tuple(torch.randint(0, sizes.config.vocab_size, (length,), generator=generator).tolist()),
            params=params,
        )
        for i in range(count)
    ]


def prefill_row(engine: Engine, sizes: Sizes, count: int, roofs: dict[str, float]) -> dict[str, Any]:
    """From the first `add` to the last first token."""
    seconds = []
    for turn in range(sizes.repeats + 1):
        asked = requests(sizes, count, sizes.prompt, 1, seed=turn)
        began = time.perf_counter()
        for each in asked:
            engine.add(each)
        while engine.has_work:
            engine.step()
        seconds.append(time.perf_counter() - began)
    took, tokens = statistics.median(seconds[1:]), count * sizes.prompt
    flops = prefill_flops(sizes.config, count, sizes.prompt)
    return {
        "what": "prefill",
        "prompts": f"{count} x {sizes.prompt}",
        "tokens_per_second": tokens / took,
        "of_bf16_product": flops / took / roofs["product_flops"],
    }


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
    graphs = engine.parts.runner.graphs
    if graphs is None:
        return None
    size = graphs.size_for(batch)
    if size is None:
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
    for count in sizes.prompts:
        seconds = peer.prefill(count, sizes.prompt, sizes.repeats)
        rate = None if seconds is None else count * sizes.prompt / seconds
        rows.append(
            {"weights": "transformers", "what": "prefill", "prompts": f"{count} x {sizes.prompt}"}
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
