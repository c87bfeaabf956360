"""Whether processes have ended."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def gone(pid: int) -> bool:
    """Whether a process has ended; an orphan that nobody has collected yet has."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return status.rpartition(")")[2].split()[0] in "ZX"


def wait_gone(pids: Iterable[int], seconds: float = 30.0) -> None:
    """Until all have ended."""
    until = time.monotonic() + seconds
    left = list(pids)
    while left := [pid for pid in left if not gone(pid)]:
        assert time.monotonic() < until, f"still there after {seconds:g} s: {left}"
        time.sleep(0.05)
