"""Python's garbage collector, kept out of steps: it walks every object of the process, for up to seconds.

What a step makes is freed by reference counts alone (a test watches that), so that nothing waits for it.
"""

from __future__ import annotations

import contextlib
import gc
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """No collection inside, if there would be any."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def settle() -> None:
    """Collect once, and never look again at what is there now: modules, weights, a server that runs."""
    gc.collect()
    gc.freeze()
