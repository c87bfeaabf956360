"""The public op that draws tokens from logits, every row by settings of its own."""

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

    from benthic.kernels.reference.sampling import Filters

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
    case = Case(
        device_type(logits_SV),
        logits_SV.dtype,
        (logits_SV.shape[1],),
        grad=torch.is_grad_enabled() and logits_SV.requires_grad,
    )
    out: Tensor = DRAW_TOKENS.choose(case, impl)(logits_SV, temperature_S, seed_S, position_S, filters)
    return out
