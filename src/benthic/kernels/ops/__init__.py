"""Public ops: each checks its operands and runs the implementation that the op table chooses.

`IMPLEMENTATIONS` is that table; `explain(device)` says what it chooses on a device and why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from benthic.errors import BackendError
from benthic.kernels.ops.attention import ATTENTION, ATTENTION_OF_PARTS, attention, attention_of_parts
from benthic.kernels.ops.balance import BALANCE_LOSS, COUNT_EXPERTS, balance_loss, count_experts
from benthic.kernels.ops.by_row import (
    GROUPED_LINEAR_BY_ROW,
    HEADS_LINEAR_BY_ROW,
    LINEAR_BY_ROW,
    MLA_BY_ROW,
    grouped_linear_by_row,
    heads_linear_by_row,
    linear_by_row,
    mla_by_row,
)
from benthic.kernels.ops.copies import (
    GATHER_COPIES,
    SPREAD_FP8,
    SUM_COPIES,
    SUM_COPIES_BACKWARD,
    gather_copies,
    spread_fp8,
    sum_copies,
    sum_copies_backward,
)
from benthic.kernels.ops.decode import (
    COPY_BLOCKS,
    MLA_DECODE,
    ROPE_NORM_STORE,
    STORE_LATENT,
    copy_blocks,
    mla_decode,
    rope_norm_store,
    store_latent,
)
from benthic.kernels.ops.e5m6 import DEQUANTISE_E5M6, QUANTISE_E5M6, dequantise_e5m6, quantise_e5m6
from benthic.kernels.ops.fp8 import (
    DEQUANTISE_FP8,
    QUANTISE_FP8,
    dequantise_fp8,
    dequantise_fp8_rows,
    quantise_fp8_blocks,
    quantise_fp8_rows,
)
from benthic.kernels.ops.fp8_fused import (
    ADD_RMS_NORM_FP8,
    QUANTISE_FP8_BOTH,
    RMS_NORM_FP8,
    SWIGLU_FP8,
    SWIGLU_GRADIENT_FP8_BOTH,
    WEIGHTED_SWIGLU_GRADIENT_FP8_BOTH,
    add_rms_norm_fp8,
    quantise_fp8_both,
    rms_norm_fp8,
    swiglu_fp8,
    swiglu_gradient_fp8_both,
    weighted_swiglu_gradient_fp8_both,
)
from benthic.kernels.ops.fp8_linear import (
    ADD_FP8_WEIGHT_GRADIENT,
    ADD_GROUPED_FP8_WEIGHT_GRADIENT,
    FP8_LINEAR,
    FP8_WEIGHT_GRADIENT,
    GROUPED_FP8_LINEAR,
    GROUPED_FP8_WEIGHT_GRADIENT,
    QUANTISE_FP8_COLUMNS,
    QUANTISE_FP8_WEIGHT,
    RETILE_FP8,
    TURN_FP8,
    add_fp8_weight_gradient,
    fp8_linear,
    fp8_weight_gradient,
    quantise_fp8_columns,
    quantise_fp8_weight,
    retile_fp8,
    turn_fp8,
)
from benthic.kernels.ops.gate import GATE_GRADIENTS, GATE_LOGITS, gate_gradients, gate_logits
from benthic.kernels.ops.gradient_sums import (
    ACCUMULATE,
    ADD_GROUPED_WEIGHT_GRADIENT,
    ADD_WEIGHT_GRADIENT,
    accumulate,
    add_weight_gradient,
)
from benthic.kernels.ops.heads import (
    HEADS_LINEAR,
    JOIN_HEAD_DIMS,
    SPLIT_HEAD_DIMS,
    heads_linear,
    join_head_dims,
    split_head_dims,
)
from benthic.kernels.ops.linear import LINEAR, LINEAR_SWIGLU, linear, linear_swiglu
from benthic.kernels.ops.linear_gradients import (
    GROUPED_INPUT_GRADIENT,
    GROUPED_WEIGHT_GRADIENT,
    WEIGHT_GRADIENT,
    grouped_input_gradient,
    weight_gradient,
)
from benthic.kernels.ops.loss import (
    LINEAR_CROSS_ENTROPY,
    LINEAR_CROSS_ENTROPY_SUM,
    linear_cross_entropy,
    linear_cross_entropy_sum,
)
from benthic.kernels.ops.moe import (
    GROUPED_LINEAR,
    GROUPED_SWIGLU,
    PERMUTE,
    ROUTE,
    UNPERMUTE,
    grouped_linear,
    grouped_swiglu,
    permute,
    route,
    unpermute,
)
from benthic.kernels.ops.norm import (
    ADD_RMS_NORM,
    RMS_NORM,
    ROPE,
    ROPE_AND_NORM,
    ROPE_BOTH,
    SWIGLU,
    SWIGLU_GRADIENT,
    WEIGHTED_SWIGLU_GRADIENT,
    add_rms_norm,
    rms_norm,
    rope,
    rope_and_norm,
    rope_both,
    swiglu,
    swiglu_gradient,
    weighted_swiglu_gradient,
)
from benthic.kernels.ops.routes import (
    CHOOSE_RANKS,
    HOME_SLOTS,
    PLACE_COPIES,
    PLACE_DEPARTURES,
    choose_ranks,
    home_slots,
    place_copies,
    place_departures,
)
from benthic.kernels.ops.sampling import (
    BEST_TOKENS,
    DRAW_TOKENS,
    JUDGE_GREEDY,
    best_tokens,
    draw_tokens,
    judge_greedy,
)
from benthic.kernels.ops.unpermute_norm import UNPERMUTE_NORM, unpermute_norm
from benthic.kernels.ops.update import ADAMW, ADAMW_FP8, ADAMW_SPLIT, adamw, adamw_fp8, adamw_split
from benthic.kernels.reference.attention import Slots
from benthic.kernels.reference.fp8_linear import Fp8, spaced
from benthic.kernels.reference.moe import Permuted, Routing, RowMaps, added
from benthic.kernels.reference.sampling import Filters, Notes
from benthic.kernels.reference.update import AdamWStep, join_master, split_master
from benthic.kernels.table import Case, Implementation, Op

if TYPE_CHECKING:
    import torch

__all__ = [
    "IMPLEMENTATIONS",
    "OPS",
    "AdamWStep",
    "Choice",
    "Filters",
    "Fp8",
    "Notes",
    "Permuted",
    "Routing",
    "RowMaps",
    "Slots",
    "accumulate",
    "adamw",
    "adamw_fp8",
    "adamw_split",
    "add_fp8_weight_gradient",
    "add_rms_norm",
    "add_rms_norm_fp8",
    "add_weight_gradient",
    "added",
    "attention",
    "attention_of_parts",
    "balance_loss",
    "best_tokens",
    "choose_ranks",
    "copy_blocks",
    "count_experts",
    "dequantise_e5m6",
    "dequantise_fp8",
    "dequantise_fp8_rows",
    "draw_tokens",
    "explain",
    "fp8_linear",
    "fp8_weight_gradient",
    "gate_gradients",
    "gate_logits",
    "gather_copies",
    "grouped_input_gradient",
    "grouped_linear",
    "grouped_linear_by_row",
    "grouped_swiglu",
    "heads_linear",
    "heads_linear_by_row",
    "home_slots",
    "join_head_dims",
    "join_master",
    "judge_greedy",
    "linear",
    "linear_by_row",
    "linear_cross_entropy",
    "linear_cross_entropy_sum",
    "linear_swiglu",
    "mla_by_row",
    "mla_decode",
    "permute",
    "place_copies",
    "place_departures",
    "quantise_e5m6",
    "quantise_fp8_blocks",
    "quantise_fp8_both",
    "quantise_fp8_columns",
    "quantise_fp8_rows",
    "quantise_fp8_weight",
    "retile_fp8",
    "rms_norm",
    "rms_norm_fp8",
    "rope",
    "rope_and_norm",
    "rope_both",
    "rope_norm_store",
    "route",
    "spaced",
    "split_head_dims",
    "split_master",
    "spread_fp8",
    "store_latent",
    "sum_copies",
    "sum_copies_backward",
    "swiglu",
    "swiglu_fp8",
    "swiglu_gradient",
    "swiglu_gradient_fp8_both",
    "turn_fp8",
    "unpermute",
    "unpermute_norm",
    "weight_gradient",
    "weighted_swiglu_gradient",
    "weighted_swiglu_gradient_fp8_both",
]

OPS: tuple[Op, ...] = (
    RMS_NORM,
    ADD_RMS_NORM,
    SWIGLU,
    SWIGLU_GRADIENT,
    WEIGHTED_SWIGLU_GRADIENT,
    ROPE,
    JOIN_HEAD_DIMS,
    SPLIT_HEAD_DIMS,
    HEADS_LINEAR,
    LINEAR,
    LINEAR_SWIGLU,
    ROPE_BOTH,
    ROPE_AND_NORM,
    ATTENTION,
    ATTENTION_OF_PARTS,
    MLA_DECODE,
    STORE_LATENT,
    ROPE_NORM_STORE,
    COPY_BLOCKS,
    GATE_GRADIENTS,
    GATE_LOGITS,
    ROUTE,
    BALANCE_LOSS,
    COUNT_EXPERTS,
    PERMUTE,
    UNPERMUTE,
    UNPERMUTE_NORM,
    CHOOSE_RANKS,
    PLACE_DEPARTURES,
    PLACE_COPIES,
    HOME_SLOTS,
    GATHER_COPIES,
    SPREAD_FP8,
    SUM_COPIES,
    SUM_COPIES_BACKWARD,
    GROUPED_LINEAR,
    GROUPED_SWIGLU,
    GROUPED_INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    GROUPED_WEIGHT_GRADIENT,
    ADD_WEIGHT_GRADIENT,
    ADD_GROUPED_WEIGHT_GRADIENT,
    ACCUMULATE,
    LINEAR_CROSS_ENTROPY,
    LINEAR_CROSS_ENTROPY_SUM,
    QUANTISE_FP8,
    DEQUANTISE_FP8,
    QUANTISE_E5M6,
    DEQUANTISE_E5M6,
    QUANTISE_FP8_WEIGHT,
    QUANTISE_FP8_COLUMNS,
    RETILE_FP8,
    TURN_FP8,
    QUANTISE_FP8_BOTH,
    SWIGLU_FP8,
    SWIGLU_GRADIENT_FP8_BOTH,
    WEIGHTED_SWIGLU_GRADIENT_FP8_BOTH,
    RMS_NORM_FP8,
    ADD_RMS_NORM_FP8,
    FP8_LINEAR,
    GROUPED_FP8_LINEAR,
    FP8_WEIGHT_GRADIENT,
    GROUPED_FP8_WEIGHT_GRADIENT,
    ADD_FP8_WEIGHT_GRADIENT,
    ADD_GROUPED_FP8_WEIGHT_GRADIENT,
    ADAMW,
    ADAMW_SPLIT,
    ADAMW_FP8,
    LINEAR_BY_ROW,
    HEADS_LINEAR_BY_ROW,
    GROUPED_LINEAR_BY_ROW,
    MLA_BY_ROW,
    BEST_TOKENS,
    JUDGE_GREEDY,
    DRAW_TOKENS,
)
IMPLEMENTATIONS: dict[str, tuple[Implementation, ...]] = {op.name: op.implementations for op in OPS}


class Choice(NamedTuple):
    """What one op will run, and why; `others` are the remaining implementations with their verdicts."""

    op: str
    implementation: str
    reason: str
    others: tuple[tuple[str, str], ...]


def explain(device: str, dtype: torch.dtype) -> list[Choice]:
    """Say for every op which implementation runs on a device type ("cpu", "cuda") in a dtype, and why.

    A line named after the op alone is about inference. Where training runs something else, or a pack of equal
    lengths, or few or many rows, or weights whose outputs lie side by side, a line of its own says so.
    """
    choices = []
    for op in OPS:
        plain = Case(device, dtype, op.typical_dims)
        usual = _explain(op, op.name, plain)
        special = [_explain(op, f"{op.name} ({label})", case) for label, case in _variants(op, plain)]
        choices.append(usual)
        choices += [choice for choice in special if choice.implementation != usual.implementation]
    return choices


def _variants(op: Op, plain: Case) -> list[tuple[str, Case]]:
    """Cases of an op that may be decided otherwise than the plain one, each with what sets it apart."""
    variants = []
    if op is ATTENTION:
        variants.append(("equal lengths", plain._replace(equal=True)))
    if op is GROUPED_LINEAR:
        variants.append(("weights in columns", plain._replace(layout="columns")))
    if op in (MLA_DECODE, LINEAR, GROUPED_LINEAR, GROUPED_SWIGLU, FP8_LINEAR, GROUPED_FP8_LINEAR):
        variants.append(("few rows", plain._replace(few=True)))
    if op in (LINEAR_SWIGLU, FP8_LINEAR, GROUPED_FP8_LINEAR):
        variants.append(("many rows", plain._replace(many=True)))
    if op in (GROUPED_LINEAR, GROUPED_SWIGLU):
        variants.append(("dozens of rows", plain._replace(fastest="gluon_dozens")))
    if op.trains:
        variants.append(("training", plain._replace(grad=True)))
    return variants


def _explain(op: Op, label: str, case: Case) -> Choice:
    try:
        chosen, reason = op.select(case)
    except BackendError as error:
        return Choice(label, "none", str(error), ())
    others = tuple(
        (other.name, other.when(case).reason) for other in op.implementations if other is not chosen
    )
    return Choice(label, chosen.name, reason, others)
