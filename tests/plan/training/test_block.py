"""What a block is priced to move beside its products."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benthic.plan.cost import machine as machines
from benthic.plan.training.block import block
from benthic.plan.training.candidate import PRECISIONS, Candidate, Rows
from benthic.plan.training.stage import shape_of
from benthic.spec import presets
from benthic.spec.layout import Layout

MOONLIGHT = presets.get("moonlight-16b-a3b")
ROWS = Rows()
ONE = Candidate(model=MOONLIGHT, layout=Layout(), train=ROWS, rows=1, precision=PRECISIONS["fp8"])
TOKENS = ROWS.local_batch_size * ROWS.seq_len


def moved(precision: str, *names: str, moe: bool) -> float:
    shape = shape_of(replace(ONE, precision=PRECISIONS[precision], skew=1.0), machines.get("h200"))
    steps = [step.op for step in block(shape, moe=moe)]
    return sum(getattr(op, "bytes", 0.0) for op in steps if getattr(op, "name", "") in names)


@pytest.mark.parametrize("moe", [False, True])
def test_swiglu_in_fp8_is_one_pass_each_way_and_its_gradient_is_not_quantised_once_more(*, moe: bool) -> None:
    model = MOONLIGHT
    shared, routed = model.n_shared_experts, model.num_experts_per_tok
    width = model.moe_intermediate_size * (shared + routed) if moe else model.intermediate_size
    names = ("swiglu_gradient_fp8_both", "weighted_swiglu_gradient_fp8_both")
    assert moved("fp8", *names, moe=moe) == pytest.approx(10.0 * TOKENS * width)
    assert moved("fp8", "swiglu", "swiglu backward", moe=moe) == 0
    assert moved("bf16", "swiglu_fp8", "swiglu_gradient_fp8_both", "quantise both", moe=moe) == 0
    outputs = model.num_attention_heads * (model.qk_head_dim + model.qk_nope_head_dim + model.v_head_dim)
    outputs += model.hidden_size + model.kv_lora_rank + model.qk_rope_head_dim  # of o and kv_a
    outputs += model.hidden_size  # of what leaves networks whose rows are tokens, and of no gates
    assert moved("fp8", "quantise both", moe=moe) == pytest.approx(4.0 * TOKENS * outputs)


def test_in_fp8_tokens_are_quantised_before_they_are_copied_and_experts_outputs_are_not_read_again() -> None:
    model = MOONLIGHT
    copies = (1 + model.num_experts_per_tok) * TOKENS * model.hidden_size
    assert moved("fp8", "spread_fp8", moe=True) == pytest.approx(2 * copies)
    assert moved("fp8", "permute", "unpermute backward", moe=True) == 0
    assert moved("bf16", "spread_fp8", moe=True) == 0
    assert moved("bf16", "permute", "unpermute backward", moe=True) == pytest.approx(3 * 2 * copies)
