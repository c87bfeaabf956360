"""The public ops that take tokens from logits: the best ones, or drawn by every row's own settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benthic.errors import ShapeError
from benthic.kernels.table import (
    Case,
    Implementation,
    Op,
    device_type,
    inference_only,
    reference,
    triton_runs,
)

if TYPE_CHECKING:
    from torch import Tensor

    from benthic.kernels.reference.sampling import Filters, Notes

_BEST = inference_only(
    triton_runs(
        torch.bfloat16,
        torch.float16,
        torch.float32,
        reason="logits read once, piece by piece, where torch takes a dozen kernels",
    )
)
BEST_TOKENS = Op(
    "best_tokens",
    (
        Implementation("triton", _BEST, "benthic.kernels.triton_best:best_tokens"),
        reference("benthic.kernels.reference.sampling:best_tokens"),
    ),
    typical_dims=(163_840,),
    trains=False,
)
JUDGE_GREEDY = Op(
    "judge_greedy",
    (
        Implementation("triton", _BEST, "benthic.kernels.triton_best:judge_greedy"),
        reference("benthic.kernels.reference.sampling:judge_greedy"),
    ),
    typical_dims=(163_840,),
    trains=False,
)
DRAW_TOKENS = Op(
    "draw_tokens",
    (
        Implementation(
            "triton",
            inference_only(
                triton_runs(
                    torch.bfloat16,
                    torch.float16,
                    torch.float32,
                    reason="logits read once, filters by their bits instead of a sort",
                )
            ),
            "benthic.kernels.triton_sample:draw_tokens",
        ),
        reference("benthic.kernels.reference.sampling:draw_tokens"),
    ),
    typical_dims=(163_840,),
    trains=False,
)


def draw_tokens(
    logits_SV: Tensor,
    temperature_S: Tensor,
    seed_S: Tensor,
    position_S: Tensor,
    filters: Filters | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """One token a row: the likeliest at temperature 0, else a draw from `softmax(logits / temperature)`.

    The draw inverts the distribution, in vocabulary order, at a uniform number that is a hash of seed and
    position (`benthic.kernels.reference.sampling`), so that it depends on nothing else. Filters come first;
    where a row draws at temperature 0 they change nothing. Implementations differ where rounding does: a
    draw then moves to a neighbour with a probability of the size of the error, about 1e-6.

    Shapes: logits [S, V] float, last dim contiguous; temperature float32 [S]; seed and position int64 [S].
    Returns: int64 [S], `NO_TOKEN` where the greatest logit is not finite (a NaN is the greatest).
    Raises: ShapeError when rows disagree.
    """
    rows = logits_SV.shape[0]
    settings = (temperature_S, seed_S, position_S, *(() if filters is None else filters[:3]))
    wrong = [tuple(each.shape) for each in settings if each.shape != (rows,)]
    if wrong or logits_SV.dim() != 2:
        msg = (
            f"draw_tokens: logits are {tuple(logits_SV.shape)}, so that every setting has {rows} numbers, "
            f"but some are {wrong}"
        )
        raise ShapeError(msg)
    out: Tensor = DRAW_TOKENS.choose(_case(logits_SV), impl)(
        logits_SV, temperature_S, seed_S, position_S, filters
    )
    return out


def best_tokens(logits_SV: Tensor, *, impl: str | None = None) -> Tensor:
    """The token of each row's greatest logit, of equals the first.

    Shapes: logits [S, V] float. Returns: int64 [S], `NO_TOKEN` where the greatest is not finite (a NaN is).
    Raises: ShapeError unless there are two dims.
    """
    if logits_SV.dim() != 2:
        msg = f"best_tokens: logits are {tuple(logits_SV.shape)}, but expected [S, V]"
        raise ShapeError(msg)
    out: Tensor = BEST_TOKENS.choose(_case(logits_SV), impl)(logits_SV)
    return out


def judge_greedy(logits_TV: Tensor, fed_SQ: Tensor, notes: Notes, *, impl: str | None = None) -> None:
    """`best_tokens` of sequences with Q rows each, up to the first that the next row was not fed: in place.

    Row q + 1 was fed a draft of what row q gives. The drafts before the first other one hold, and the row
    behind them is its sequence's newest. Owners of sequences are distinct, or share a line that nobody reads.
    Shapes: logits [T, V] float, T = S * Q; fed int64 [S, Q]; see `Notes`, with strides of 1 in its last dims.
    Raises: ShapeError when they disagree.
    """
    (sequences, queries), rows = fed_SQ.shape, logits_TV.shape[0]
    found = rows, *(len(each) for each in notes[:4])
    if found != (sequences * queries, rows + sequences, sequences, sequences, sequences):
        msg = (
            f"judge_greedy: {sequences} sequences of {queries} rows, but logits, home, newest, row and owner "
            f"have {found}"
        )
        raise ShapeError(msg)
    JUDGE_GREEDY.choose(_case(logits_TV), impl)(logits_TV, fed_SQ, notes)


def _case(logits_SV: Tensor) -> Case:
    return Case(
        device_type(logits_SV),
        logits_SV.dtype,
        (logits_SV.shape[1],),
        grad=torch.is_grad_enabled() and logits_SV.requires_grad,
    )
