"""How often processes that ended are started again."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

WINDOW_S: Final = 3600.0


class Restarts:
    """At most so many in an hour: what ends now and then is always replaced, what cannot run is not for ever.

    Args:
        most: in an hour; 0 replaces nothing.
        clock: seconds, monotonic.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.most = most
        self._clock = clock
        self._taken_s: deque[float] = deque()

    def take(self) -> bool:
        """Use one; False when there is none now."""
        now = self._clock()
        while self._taken_s and now - self._taken_s[0] > WINDOW_S:
            self._taken_s.popleft()
        if len(self._taken_s) >= self.most:
            return False
        self._taken_s.append(now)
        return True
