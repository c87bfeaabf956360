"""What kernels of packed attention list of one step's bounds, kept for all layers of the step."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class TileLists:
    """Lists of tiles (`triton_pack_tiles`): the first layer that asks for one makes it, the others read it.

    It stands beside the bounds of one step, and of no other: of bounds that are overwritten in place it would
    keep the old lists. What a recorded step is made of is made while it is recorded, so that a replay makes
    its lists anew, once.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[int, ...], Tensor] = {}

    def of(self, key: tuple[int, ...], make: Callable[[], Tensor]) -> Tensor:
        """The list of a key, made if no layer asked before."""
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = make()
        return found
