"""Python's garbage collector, kept out of steps and measured runs: it walks all objects, for up to seconds.

What a step or a request makes is freed by reference counts alone (tests watch that): nothing waits for it.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import sys
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
    """Collect once, and never look again at what is there now: modules, weights, a server that runs.

    The end of the process gets it back where Triton is loaded, whose bindings print what the last collection
    does not free as leaks.
    """
    gc.collect()
    gc.freeze()
    if "triton" in sys.modules:
        atexit.register(gc.unfreeze)
