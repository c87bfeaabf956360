"""docs/theory/counting.md says what the code counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from benthic.sched.pipeline.schedules import build
from benthic.sched.pipeline.simulate import Costs, simulate
from benthic.spec import flops, kv, memory, presets, totals
from benthic.spec.parameters import parameters

PAGE = (Path(__file__).parents[2] / "docs" / "theory" / "counting.md").read_text()
V3 = presets.get("deepseek-v3")


def of(prefix: str) -> int:
    return sum(p.numel for p in parameters(V3) if p.name.startswith(prefix))


@pytest.mark.parametrize(
    "value",
    [
        of("layers.0.attn."),
        of("layers.0.mlp."),
        of("layers.3.moe.shared."),
        of("layers.3.moe.gate."),
        of("layers.3."),
        of("head."),
        totals.total(V3),
        totals.active(V3, "body"),
        totals.active(V3, "head"),
        totals.active(V3, "embedding and head"),
        totals.mtp_unique(V3),
        totals.mtp_stored(V3),
        totals.stored(V3),
        totals.checkpoint_bytes(V3, fp8=True),
        kv.mla(V3).value,
        kv.mla(V3, mtp=True).value,
        kv.mla_fp8(V3).value,
        kv.grouped(61, 128, 128).value,
        kv.grouped(61, 8, 128).value,
        kv.grouped(61, 1, 128).value,
        kv.expanded(V3).value / 61 / 2,
    ],
)
def test_the_page_holds_the_number(value):
    assert f"{value:,.0f}" in PAGE


def test_the_page_holds_the_flops_the_bytes_and_the_bubble():
    assert f"= {flops.training(V3, 4096).value / 1e9:.2f} GFLOP a token" in PAGE
    assert f"gives {flops.training(V3, 4096, causal=False).value / 1e9:.2f}" in PAGE
    assert all(f"| {recipe.bytes} |" in PAGE for recipe in memory.RECIPES)
    timeline = simulate(build("1f1b", 8, 20), Costs(forward=1, backward=2))
    assert (
        f"{timeline.bubble(0)} of {timeline.makespan}: {100 * timeline.bubble_fraction:.1f}% of the time"
        in PAGE
    )
