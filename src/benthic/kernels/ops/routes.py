"""Public ops that say where an exchange's rows lie: at the experts of a rank, and on the way home."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benthic.errors import ShapeError
from benthic.kernels.table import Case, Implementation, Op, device_type, reference, triton_runs

if TYPE_CHECKING:
    from torch import Tensor

_ONE_KERNEL = triton_runs(torch.int32, reason="one kernel, where torch takes a dozen")

CHOOSE_RANKS = Op(
    "choose_ranks",
    (
        Implementation("triton", _ONE_KERNEL, "benthic.kernels.triton_routes:choose_ranks"),
        reference("benthic.kernels.reference.routes:choose_ranks"),
    ),
    trains=False,
)
PLACE_DEPARTURES = Op(
    "place_departures",
    (
        Implementation(
            "triton",
            triton_runs(torch.bool, reason="one kernel, where torch sorts"),
            "benthic.kernels.triton_routes:place_departures",
        ),
        reference("benthic.kernels.reference.routes:place_departures"),
    ),
    trains=False,
)
PLACE_COPIES = Op(
    "place_copies",
    (
        Implementation(
            "triton",
            triton_runs(torch.int32, reason="two kernels, where torch sorts"),
            "benthic.kernels.triton_routes:place_copies",
        ),
        reference("benthic.kernels.reference.routes:place_copies"),
    ),
    trains=False,
)
HOME_SLOTS = Op(
    "home_slots",
    (
        Implementation("triton", _ONE_KERNEL, "benthic.kernels.triton_routes:home_slots"),
        reference("benthic.kernels.reference.routes:home_slots"),
    ),
    trains=False,
)


def choose_ranks(
    expert_TK: Tensor, *, per_rank: int, ranks: int, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """Who gets which token, when rank n holds experts `[n per_rank, (n + 1) per_rank)`.

    Shapes: expert_TK integer [T, K]. Returns: whether any of a token's experts is on a rank, bool [T, ranks];
    how many tokens and how many of their copies go to each rank, int64 [ranks, 2].
    """
    case = Case(device_type(expert_TK), expert_TK.dtype)
    found: tuple[Tensor, Tensor] = CHOOSE_RANKS.choose(case, impl)(expert_TK, per_rank=per_rank, ranks=ranks)
    return found


def place_departures(goes_Tn: Tensor, *, rows: int, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """Sort the `rows` copies that leave by destination; the host knows `rows`, so nothing waits for it.

    Shapes: goes_Tn bool [T, ranks], of which `rows` are true. Returns: the token that each row is a copy of,
    int64 [rows]; the row of a token for a rank, int64 [T, ranks], -1 where it does not go there.
    """
    case = Case(device_type(goes_Tn), goes_Tn.dtype)
    found: tuple[Tensor, Tensor] = PLACE_DEPARTURES.choose(case, impl)(goes_Tn, rows=rows)
    return found


def place_copies(
    expert_AK: Tensor, *, first: int, experts: int, rows: int, impl: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sort copies whose expert is in `[first, first + experts)` by expert, keeping the order of arrival.

    `rows` is at least their number. Other copies, also those of expert -1, are left out.
    Shapes: expert_AK integer [A, K].
    Returns: where each expert's rows end, int32 [experts]; the row of each copy, int64 [A, K], -1 for one
    that is left out; the copy in each row, int64 [rows], arbitrary but valid past the last end.
    """
    case = Case(device_type(expert_AK), expert_AK.dtype)
    found: tuple[Tensor, Tensor, Tensor] = PLACE_COPIES.choose(case, impl)(
        expert_AK, first=first, experts=experts, rows=rows
    )
    return found


def home_slots(
    expert_TK: Tensor,
    dweight_SK: Tensor | None,
    *,
    per_rank: int,
    ranks: int,
    max_tokens: int,
    impl: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Where the ranks of each token's experts wrote what they send home, and the gradients of its weights.

    Rank n holds experts `[n per_rank, (n + 1) per_rank)` and writes for token t in slot `n max_tokens + t`.
    Shapes: expert_TK integer [T, K]; dweight_SK float32 [ranks * max_tokens, K] or None.
    Returns: slots int64 [T, ranks], -1 where a token has no expert; gradients float32 [T, K], or None.
    Raises: ShapeError when there are more tokens than slots.
    """
    if expert_TK.shape[0] > max_tokens:
        msg = f"home_slots: {expert_TK.shape[0]} tokens, but a rank has {max_tokens} slots for them"
        raise ShapeError(msg)
    case = Case(device_type(expert_TK), expert_TK.dtype)
    found: tuple[Tensor, Tensor | None] = HOME_SLOTS.choose(case, impl)(
        expert_TK, dweight_SK, per_rank=per_rank, ranks=ranks, max_tokens=max_tokens
    )
    return found
