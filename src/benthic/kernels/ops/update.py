"""Public op of the optimizer: AdamW."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benthic.errors import ShapeError
from benthic.kernels.table import Case, Implementation, Op, device_type, reference, triton_runs

if TYPE_CHECKING:
    from torch import Tensor

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


def adamw(
    master: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    by: AdamWStep,
    *,
    impl: str | None = None,
) -> None:
    """Update `master` and both moments in place (Loshchilov and Hutter, 2019, algorithm 2).

    With `g = scale gradient`: `first += (1 - beta1) (g - first)`, `second = beta2 second + (1 - beta2) g^2`,
    `master = (1 - decay) master - step_size first / (sqrt(second / correction) + eps)`, all in float32; a
    moment that is stored narrower is rounded after it was used.

    Shapes: all alike and contiguous; master and gradient float32, moments float32 or bfloat16.
    Raises: ShapeError when shapes disagree; BackendError when `impl` cannot run.
    """
    operands = (master, gradient, first, second)
    shapes = [tuple(t.shape) for t in operands]
    if len(set(shapes)) > 1 or not all(t.is_contiguous() for t in operands):
        msg = f"adamw: master, gradient and moments must be contiguous and of one shape, not {shapes}"
        raise ShapeError(msg)
    ADAMW.choose(Case(device_type(master), master.dtype), impl)(*operands, by)
