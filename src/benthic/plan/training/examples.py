"""The lectures' and papers' numbers about training, worked out by the planner's own code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from benthic import units
from benthic.plan.cost import machine as machines
from benthic.plan.example import Example
from benthic.plan.training.candidate import PRECISIONS, Candidate, Rows
from benthic.plan.training.step import step
from benthic.sched.pipeline.schedules import build
from benthic.sched.pipeline.simulate import Costs, simulate
from benthic.spec import flops, hardware, presets
from benthic.spec.layout import Layout
from benthic.spec.memory import FP8_BF16_GRADIENTS, FP8_V3, MIXED_16

if TYPE_CHECKING:
    from collections.abc import Iterator

_LECTURE: Final = "lecture notes"
_V3: Final = "DeepSeek-V3 report"
_LAYOUT: Final = Layout(pp_degree=16, dp_degree=128, ep_degree=64, schedule="dualpipe")


def examples() -> Iterator[Example]:
    """All of them, in the order of the lecture."""
    yield from _attention()
    yield from _memory()
    yield from _layout()
    yield from _bubbles()
    yield from _cost()


def _attention() -> Iterator[Example]:
    """B = 1024 rows of s = 4096, n = 32 heads, h = 4096."""
    elements = flops.score_elements(1024, 4096, 32).value
    size = units.binary_bytes(2 * elements)
    yield Example(
        topic="scores of one attention layer",
        formula="b s^2 n = 1024 x 4096^2 x 32",
        value=f"{elements:,.0f} = {elements / 2**30:.0f} Gi elements, {size} in BF16",
        printed="512 GB",
        source=_LECTURE,
        note="512 Gi elements; bytes only if an element is one byte",
    )
    work = flops.attention_layer(1024, 4096, 32, 128).value
    took = units.seconds(work / hardware.get("h100").bf16_flops)
    yield Example(
        topic="products of one attention layer",
        formula="4 b s^2 h = 2^48, forward, all pairs",
        value=f"{work:,.0f} FLOP = {work / 2**40:.0f} TiFLOP, {took} at the H100's dense peak",
        printed="256 TFLOPs",
        source=_LECTURE,
        note="binary prefix; the lecture's 1979 TFLOP/s is with 2:4 sparsity, dense is 989",
    )


def _memory() -> Iterator[Example]:
    for recipe, printed, note in (
        (MIXED_16, "16 N", ""),
        (FP8_V3, "13 N", "FP32 gradients, as the report's section 3.3.3 keeps them"),
        (FP8_BF16_GRADIENTS, "13 N", "the lecture's own terms sum to 11 N"),
    ):
        terms = " + ".join(f"{term.bytes} {term.name}" for term in recipe.terms)
        total = recipe.total(671_026_419_200).value
        yield Example(
            topic=f"training state, {recipe.name}",
            formula=f"{terms} bytes a parameter",
            value=f"{recipe.bytes} N = {units.size(total)} for 671 B",
            printed=printed,
            source=_LECTURE,
            note=note,
        )


def _layout() -> Iterator[Example]:
    yield Example(
        topic="DeepSeek-V3 on 2,048 GPUs",
        formula="pp x dp = 16 x 128; dp / ep copies of an expert",
        value=f"{_LAYOUT.ranks:,} ranks, dense DP {_LAYOUT.dp_degree}, expert DP {_LAYOUT.expert_dp_degree}",
        printed="16 PP x 64 EP x 2 DP",
        source=_LECTURE,
        note="2 is the experts' degree only; ZeRO-1 divides dense state by 128",
    )


def _bubbles() -> Iterator[Example]:
    """F = 1, B = 2, W = 1, an overlapped pair 3; 8 ranks, 20 microbatches."""
    for name, printed in (("1f1b", "21"), ("zb-h1", "7"), ("dualpipe", "6"), ("chimera", "between")):
        microbatches = 24 if name == "chimera" else 20
        line = simulate(build(name, 8, microbatches), Costs(forward=1, backward=2, weight=1))
        idle = max(line.bubble(rank) for rank in range(8))
        yield Example(
            topic=f"bubble of {name}",
            formula=f"8 ranks, {microbatches} microbatches, F 1, B 2, W 1, pair 3: simulated",
            value=f"{idle:g} on the rank that idles most ({units.percent(line.bubble_fraction)} of all time)",
            printed=printed,
            source=f"{_V3}, table 2",
        )


def _cost() -> Iterator[Example]:
    for what, hours in (("pre-training", 2664e3), ("context extension", 119e3), ("post-training", 5e3)):
        yield Example(
            topic=f"cost of {what}",
            formula=f"{hours / 1e3:,.0f} K H800 hours x $2",
            value=f"${2 * hours / 1e6:.3f} M",
            printed=f"${2 * hours / 1e6:.3f} M",
            source=f"{_V3}, table 1",
        )
    candidate = Candidate(
        model=presets.get("deepseek-v3"),
        layout=_LAYOUT,
        train=Rows(),
        rows=15360,
        precision=PRECISIONS["fp8"],
        recompute=("deepseek-v3",),
    )
    found = step(candidate, machines.get("h800"))
    hours = found.seconds * 14.8e12 / candidate.step_tokens * 2048 / 3600
    yield Example(
        topic="pre-training, predicted",
        formula="the table simulated with priced slots, 14.8 T tokens",
        value=f"{hours / 1e3:,.0f} K H800 hours, {units.seconds(found.seconds)} a step",
        printed="2,664 K hours, 19.93 s",
        source=f"{_V3}, table 1; Insights into DeepSeek-V3, table 4",
        note="nothing was fitted to these rows",
    )
