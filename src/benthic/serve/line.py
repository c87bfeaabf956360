"""Requests that wait to be placed: one is looked at, the most urgent, and of equals the first that came."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(order=True)
class Spot:
    """One request's place in line; `turn` is set when it may have become the first."""

    priority: int
    number: int
    turn: asyncio.Event = field(compare=False, default_factory=asyncio.Event)
    left: bool = field(compare=False, default=False)


class Line:
    """Belongs to one event loop. A request that is more urgent than the first takes its place."""

    def __init__(self) -> None:
        self._spots: list[Spot] = []

    @contextlib.contextmanager
    def spot(self, priority: int, number: int) -> Iterator[Spot]:
        """Stand in line; lower priorities go first, then lower numbers."""
        spot = Spot(priority, number)
        heapq.heappush(self._spots, spot)
        try:
            yield spot
        finally:
            spot.left = True
            while self._spots and self._spots[0].left:
                heapq.heappop(self._spots)
            if self._spots:
                self._spots[0].turn.set()

    async def first(self, spot: Spot) -> None:
        """Wait until `spot` is the first."""
        while self._spots[0] is not spot:
            spot.turn.clear()
            await spot.turn.wait()
