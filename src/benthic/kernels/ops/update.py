"""Public ops of the optimizer: AdamW, of masters in one piece or two, or with the FP8 copy of a weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benthic.errors import ShapeError
from benthic.kernels.reference.fp8_linear import TILE
from benthic.kernels.table import Case, Implementation, Op, device_type, reference, triton_runs

if TYPE_CHECKING:
    from torch import Tensor

    from benthic.kernels.reference.fp8_linear import Fp8
    from benthic.kernels.reference.update import AdamWStep

ADAMW = Op(
    "adamw",
    (
        Implementation(
            "triton",
            triton_runs(torch.float32, reason="one kernel that reads and writes everything once"),
            "benthic.kernels.triton_update:adamw",
        ),
        reference("benthic.kernels.reference.update:adamw"),
    ),
)
ADAMW_SPLIT = Op(
    "adamw_split",
    (
        Implementation(
            "triton",
            triton_runs(torch.bfloat16, reason="one kernel that reads and writes everything once"),
            "benthic.kernels.triton_update:adamw_split",
        ),
        reference("benthic.kernels.reference.update:adamw_split"),
    ),
)
ADAMW_FP8 = Op(
    "adamw_fp8",
    (
        Implementation(
            "triton",
            triton_runs(torch.float32, reason="one kernel: a block is quantised while it is cached"),
            "benthic.kernels.triton_update:adamw_fp8",
        ),
        reference("benthic.kernels.reference.update:adamw_fp8"),
    ),
)


def adamw(
    master: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    by: AdamWStep,
    *,
    running: Tensor | None = None,
    impl: str | None = None,
) -> None:
    """Update `master` and both moments in place (Loshchilov and Hutter, 2019, algorithm 2).

    With `g = scale gradient`: `first += (1 - beta1) (g - first)`, `second = beta2 second + (1 - beta2) g^2`,
    `master = (1 - decay) master - step_size first / (sqrt(second / correction) + eps)`, all in float32; a
    moment that is stored narrower is rounded after it was used. The new master is rounded into `running`, the
    weight that is multiplied, if it is given.

    Shapes: all alike and contiguous; master and gradient float32, moments float32 or bfloat16, running any
    float.
    Raises: ShapeError when shapes disagree; BackendError when `impl` cannot run.
    Cost: 28 bytes an element are moved with float32 moments, 20 with bfloat16, and those of `running`.
    """
    _check_alike("adamw", master, gradient, first, second, *(() if running is None else (running,)))
    ADAMW.choose(Case(device_type(master), master.dtype), impl)(master, gradient, first, second, by, running)


def adamw_split(
    weight: Tensor,
    remainder: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    by: AdamWStep,
    *,
    impl: str | None = None,
) -> None:
    """`adamw` of masters that are kept as `weight` and `remainder`, all updated in place.

    They are joined and split as `join_master` and `split_master` do it: masters have the bits that `adamw`
    gives them.

    Shapes: all alike and contiguous; weight bfloat16, remainder int16, gradient float32, moments float32 or
    bfloat16.
    Raises: ShapeError when shapes disagree; BackendError when `impl` cannot run.
    Cost: 28 bytes an element are moved with float32 moments, 20 with bfloat16.
    """
    _check_alike("adamw_split", weight, remainder, gradient, first, second)
    ADAMW_SPLIT.choose(Case(device_type(weight), weight.dtype), impl)(
        weight, remainder, gradient, first, second, by
    )


def adamw_fp8(  # noqa: PLR0913 (AdamW's operands and the copy)
    master: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    by: AdamWStep,
    copy: Fp8,
    *,
    power_of_two: bool = False,
    seed: int | None = None,
    impl: str | None = None,
) -> None:
    """`adamw`, and the new master's block tiles into `copy`: those of `quantise_fp8_weight`.

    With a seed values are rounded to one of their two neighbours at random, each with the probability of its
    nearness, so that updates smaller than a step of E4M3 are not lost on average. Element i is decided by a
    hash of (seed, i): give each step and each weight a seed of its own.

    Shapes: as `adamw`, of 2 dims or 3 with experts; copy as `quantise_fp8_weight` gives it, contiguous.
    Raises: ShapeError when shapes disagree; BackendError when `impl` cannot run.
    Cost: that of `adamw`, and 1 byte an element is written.
    """
    _check_alike("adamw_fp8", master, gradient, first, second)
    tiles = (*master.shape[:-2], *(-(-width // TILE) for width in master.shape[-2:]))
    fits = master.dim() in (2, 3) and copy.values.shape == master.shape and copy.scale.shape == tiles
    if not fits or not all(part.is_contiguous() for part in copy):
        msg = (
            f"adamw_fp8: a weight of 2 dims, or 3 with experts, has a contiguous copy; {tuple(master.shape)} "
            f"with scales {tiles}, not {tuple(copy.values.shape)} with {tuple(copy.scale.shape)}"
        )
        raise ShapeError(msg)
    ADAMW_FP8.choose(Case(device_type(master), master.dtype), impl)(
        master, gradient, first, second, by, copy, power_of_two=power_of_two, seed=seed
    )


def _check_alike(op: str, *operands: Tensor) -> None:
    shapes = [tuple(t.shape) for t in operands]
    if len(set(shapes)) > 1 or not all(t.is_contiguous() for t in operands):
        msg = f"{op}: master, gradient, moments and weight must be contiguous and of one shape, not {shapes}"
        raise ShapeError(msg)
