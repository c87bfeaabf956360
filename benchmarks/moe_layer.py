"""One mixture layer of Moonlight, forward and backward: `python benchmarks/moe_layer.py [--small]`.

64 experts of 1,408 and two shared ones, 16,384 tokens, one GPU: ours in bfloat16 and in FP8, made and called
as the trainer does (gradients of weights are added to float32 sums), beside `DeepseekV3MoE` of `transformers`
with grouped experts in bfloat16, which writes its gradients afresh. Everyone has the same input, gradient of
the output and weights; those of the gate are random, so routing is nearly balanced. Ours adds a residual
stream too, of zeros. FP8 copies of weights are there, as after a step's first microbatch. Errors are of ours
relative to theirs.

FLOPs: 6 a weight and row (one product forward, two backward), for each token six experts, both shared ones
and the gate. Contestants take turns behind a warm-up; times are medians between events on the stream. Memory
is the peak beyond what stays: weights, masters, FP8 copies, gradients of weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from moe_layer_peer import copy_weights, model_of, peer
from provenance import write_result
from torch import Tensor, nn

from benthic.kernels.bench.timing import relative
from benthic.model.block import Attended, MoeBlock
from benthic.model.local import packed_sockets
from benthic.model.products import WeightGradients
from benthic.parallel.mesh import Mesh
from benthic.train.config import LoopConfig, PrecisionConfig, RunConfig
from benthic.train.precision import linear_socket
from benthic.train.rows import table_of
from benthic.train.trainer import build_stages

if TYPE_CHECKING:
    from collections.abc import Callable

    from benthic.spec.model import ModelConfig

BF16, FP8, THEIRS = "bf16", "fp8", "transformers"
WORST: Final = {BF16: 0.02, FP8: 0.15}
"""Errors of output and gradients that end the run; E4M3 rounds every operand by 2 to 3 %."""
WARM_UP: Final = 3


class Layer(NamedTuple):
    """A contestant: what it computes, its module, gradients of some experts, and how it forgets gradients."""

    run: Callable[[Tensor], Tensor]
    module: nn.Module
    gradient: Callable[[], Tensor]
    forget: Callable[[], None]


class Mark:
    """Now, on the stream of a tensor or on the clock."""

    def __init__(self, x: Tensor) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if x.is_cuda else None
        self._at = time.perf_counter() if self._event is None else self._event.record()

    def until(self, end: Mark) -> float:
        """Seconds."""
        return end._at - self._at if self._event is None else self._event.elapsed_time(end._event) / 1e3


def main() -> None:
    """Build, compare, time in turns, measure memory, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny sizes: a rehearsal, figures mean nothing")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    small = words.small or device == "cpu"
    model, tokens = model_of(small=small), 128 if small else 16384
    wide = ours(model, PrecisionConfig(weights="bfloat16", matmul="bfloat16"), tokens, device)
    narrow = ours(model, PrecisionConfig(weights="fp8", matmul="fp8"), tokens, device)
    moe = peer(model, device)
    theirs = Layer(lambda x: moe(x[None])[0], moe, lambda: moe.experts.gate_up_proj.grad[:8], moe.zero_grad)
    layers = {BF16: wide, FP8: narrow, THEIRS: theirs}
    copy_weights(wide.module, narrow.module, moe)
    torch.manual_seed(0)
    x, dout = (torch.randn(tokens, model.hidden_size, device=device).bfloat16() for _ in range(2))
    chosen = wide.module.get_submodule("gate")(x).expert_TK.flatten().long()
    count = chosen.bincount(minlength=model.n_routed_experts)
    busiest, experts = float(count.max() / count.float().mean()), model.num_experts_per_tok
    each = 3 * model.moe_intermediate_size * (experts + model.n_shared_experts) + model.n_routed_experts
    work = 6.0 * tokens * model.hidden_size * each
    print(f"{tokens} tokens, {work / 1e12:.3f} TFLOP; the busiest expert has {busiest:.3f} times the mean")
    errors, seconds, rows = compare(layers, x, dout), timed(layers, x, dout, words.repeats), []
    for name, took in seconds.items():
        rate, memory = work / took / 1e12, peak(layers[name], x, dout)
        ratios = {f"times_{other}": seconds[other] / took for other in (THEIRS, BF16)}
        row = {"who": name, "milliseconds": 1e3 * took, "tflops_per_second": rate, "peak_bytes": memory}
        rows.append({**row, **ratios, "errors": errors.get(name)})
        said = ", ".join(f"{ratio:.2f} {what.replace('_', ' ')}" for what, ratio in ratios.items())
        print(f"{name:<12} {1e3 * took:8.2f} ms {rate:7.1f} TFLOP/s {memory / 2**30:6.2f} GiB; {said}")
    facts = {"model": model.name, "tokens": tokens, "busiest": busiest, "flops": work}
    write_result("moe_layer", rows, out=words.out, repeats=words.repeats, **facts)


def ours(model: ModelConfig, precision: PrecisionConfig, tokens: int, device: str) -> Layer:
    """What follows attention in a block of the trainer, with its buckets and its socket for products."""
    loop = LoopConfig(steps=1, seq_len=tokens, local_batch_size=1, global_batch_size=1)
    config = RunConfig(model=model, train=loop, precision=precision, device=device)
    stages = build_stages(config, table_of(config, 1), Mesh.of(config.layout, 0))
    buckets, sink = tuple(stages.all_buckets), WeightGradients()
    linear = linear_socket(precision, sink, stages.models.values())
    for bucket in buckets:
        bucket.collect(sink)
    starts = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    sockets = packed_sockets(starts, tokens, n_routed_experts=model.n_routed_experts, linear=linear)
    block = stages.models[0].blocks[0]
    residual = torch.zeros(tokens, model.hidden_size, dtype=torch.bfloat16, device=device)
    assert isinstance(block, MoeBlock)  # noqa: S101 (a benchmark's check)

    def run(x_TD: Tensor) -> Tensor:
        sent = block.dispatch(Attended(residual, x_TD), sockets)
        return block.combine(block.experts(sent, sockets), sockets)

    def forget() -> None:
        for bucket in buckets:
            bucket.zero()

    pieces = {piece.name: piece for bucket in buckets for piece in bucket.pieces()}
    piece = pieces["layers.0.moe.experts.gate_up"]
    return Layer(run, block.moe, lambda: piece.gradient.view(piece.shape)[:8].flatten(1, 2), forget)


def both(layer: Layer, x: Tensor, dout: Tensor) -> tuple[Tensor, Tensor | None]:
    """Forward and backward: the output and the gradient of the input."""
    leaf = x.detach().requires_grad_()
    out = layer.run(leaf)
    out.backward(dout)
    return out.detach(), leaf.grad


def compare(layers: dict[str, Layer], x: Tensor, dout: Tensor) -> dict[str, dict[str, float]]:
    """Errors of ours relative to theirs; too large ones end the run."""
    found, errors = {}, {}
    for name, layer in layers.items():
        layer.forget()
        out, dx = both(layer, x, dout)
        found[name] = {"output": out, "dx": dx, "experts' gradient": layer.gradient()}
    exact = found.pop(THEIRS)
    for name, results in found.items():
        errors[name] = {what: relative(result, exact[what]) for what, result in results.items()}
        print(f"{name}, errors: " + ", ".join(f"{what} {e:.1e}" for what, e in errors[name].items()))
        if not max(errors[name].values()) <= WORST[name]:
            raise SystemExit(name + ": an error exceeds " + str(WORST[name]))
    return errors


def timed(layers: dict[str, Layer], x: Tensor, dout: Tensor, repeats: int) -> dict[str, float]:
    """Median seconds of each, in turns."""
    marks: dict[str, list[tuple[Mark, Mark]]] = {name: [] for name in layers}
    for _ in range(WARM_UP + repeats):
        for name, layer in layers.items():
            if name == THEIRS:
                layer.forget()
            start = Mark(x)
            both(layer, x, dout)
            marks[name].append((start, Mark(x)))
    if x.is_cuda:
        torch.cuda.synchronize()
    return {name: statistics.median(a.until(b) for a, b in pairs[WARM_UP:]) for name, pairs in marks.items()}


def peak(layer: Layer, x: Tensor, dout: Tensor) -> int:
    """Bytes of a call beyond what is there after it; 0 on a CPU."""
    if not x.is_cuda:
        return 0
    layer.forget()
    torch.cuda.reset_peak_memory_stats()
    both(layer, x, dout)
    return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()


if __name__ == "__main__":
    main()
