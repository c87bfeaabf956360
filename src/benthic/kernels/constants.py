"""Weights that tapes read, copied once into the panels of `native_c/product.h` for all tapes of a model."""

from __future__ import annotations

import math
import sys
from bisect import bisect_right
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from benthic.kernels.native import PANEL, built

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray
    from torch import Tensor

MOST_BYTES: Final = 2 << 30
"""What the panels may take by default; a larger model is decoded from its weights where they lie."""

LINE_BYTES: Final = 64


class Weight(NamedTuple):
    """A batch of matrices [inner, outer] in memory, with strides."""

    address: int
    batch_stride: int
    row_stride: int
    column_stride: int
    batch: int
    inner: int
    outer: int


class Panels(NamedTuple):
    """Where a weight lies in panels, and how far apart its matrices are."""

    address: int
    batch_stride: int


class Constants:
    """Tensors that never change, and copies of them in panels.

    Attributes:
        num_bytes: memory of the copies.

    Args:
        parameters: the tensors.
        most_bytes: what the copies may take, except those that products cannot do without.
    """

    def __init__(self, parameters: Iterable[Tensor], most_bytes: int = MOST_BYTES) -> None:
        self.num_bytes = 0
        self._most_bytes = most_bytes
        self._extents = sorted(_extent(tensor) for tensor in parameters)
        self._panels: dict[Weight, Panels] = {}
        self._memory: list[NDArray[np.uint8]] = []

    def __contains__(self, address: int) -> bool:
        """Whether memory belongs to a parameter."""
        at = bisect_right(self._extents, (address, sys.maxsize)) - 1
        return at >= 0 and address < self._extents[at][1]

    def panels(self, weight: Weight) -> Panels | None:
        """A parameter's panels, laid out when they are first asked for.

        None for what is no parameter, and for a weight that would take more than is allowed and whose columns
        lie side by side, so that it can be read as it is.
        """
        if weight in self._panels:
            return self._panels[weight]
        matrix = -(-weight.outer // PANEL) * weight.inner * PANEL
        num_bytes = 4 * weight.batch * matrix
        too_large = weight.column_stride == 1 and self.num_bytes + num_bytes > self._most_bytes
        if weight.address not in self or too_large:
            return None
        panels = Panels(self._allocate(num_bytes), matrix)
        built().lay_panels(*weight[:4], panels.address, *weight[4:])
        self._panels[weight] = panels
        return panels

    def _allocate(self, num_bytes: int) -> int:
        memory = np.empty(num_bytes + LINE_BYTES, dtype=np.uint8)
        self._memory.append(memory)
        self.num_bytes += num_bytes
        return math.ceil(memory.ctypes.data / LINE_BYTES) * LINE_BYTES


def _extent(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()
