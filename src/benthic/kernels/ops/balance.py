"""Public ops that watch over how evenly experts are loaded: the balance loss, and counts for the bias."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benthic.errors import ShapeError
from benthic.kernels.table import Case, Implementation, Op, device_type, reference, triton_runs

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

BALANCE_LOSS = Op(
    "balance_loss",
    (
        Implementation(
            "triton",
            triton_runs(torch.float32, reason="scores read once each way, where torch takes fifty kernels"),
            "benthic.kernels.triton_balance:balance_loss",
        ),
        reference("benthic.kernels.reference.balance:balance_loss"),
    ),
)
COUNT_EXPERTS = Op(
    "count_experts",
    (
        Implementation(
            "triton",
            triton_runs(torch.int32, reason="one kernel, one program an expert, no atomics"),
            "benthic.kernels.triton_balance:count_experts",
        ),
        reference("benthic.kernels.reference.balance:count_experts"),
    ),
    trains=False,
)


def balance_loss(
    scores_TE: Tensor,
    *,
    top_k: int,
    rows: int,
    factor: float = 1.0,
    mean: Callable[[Tensor], Tensor] | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over sequences of `sum_i f_i P_i`, DeepSeek-V3 report eq. (17)-(20) without its factor α.

    f_i counts how often expert i is among the `top_k` highest scores (without bias and without groups), times
    experts / (top_k * tokens); P_i is the mean share of expert i in a token's scores. The gradient flows
    through P alone. Each sequence contributes 1 when perfectly balanced.
    Where several ranks share the tokens of a sequence in equal parts, `mean` averages f over them, and the
    results of these ranks add up to the loss times their number, as P is linear in the tokens.
    Shapes: scores_TE float32 [rows * tokens, experts], the sequences one after another, all of one length.
    Returns: `factor` times the loss, differentiable, and the loss, which is not; float32 scalars.
    Raises: ShapeError when the tokens do not divide into `rows`.
    """
    tokens = scores_TE.shape[0]
    if tokens % rows:
        message = f"{tokens} tokens do not divide into {rows} sequences; every sequence has one length."
        raise ShapeError(message)
    grad = torch.is_grad_enabled() and scores_TE.requires_grad
    case = Case(device_type(scores_TE), scores_TE.dtype, grad=grad)
    found: tuple[Tensor, Tensor] = BALANCE_LOSS.choose(case, impl)(
        scores_TE, top_k=top_k, rows=rows, factor=factor, mean=mean
    )
    return found


def count_experts(count_E: Tensor, expert_TK: Tensor, *, impl: str | None = None) -> None:
    """Add to `count_E` how many rows each expert got.

    Shapes: count int64 [experts]; expert_TK integer [tokens, top_k].
    Raises: ShapeError for counts of another dtype.
    """
    if count_E.dtype != torch.int64:
        msg = f"count_experts: rows are counted in int64, not {count_E.dtype}"
        raise ShapeError(msg)
    COUNT_EXPERTS.choose(Case(device_type(expert_TK), expert_TK.dtype), impl)(count_E, expert_TK)
