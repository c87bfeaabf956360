"""Folders of the user, from the environment."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """What may be made again: `$XDG_CACHE_HOME/benthic`, by default `~/.cache/benthic`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "benthic"
