"""Lets tests of this folder import the launcher and the small models by name, in spawned processes too."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in (Path(__file__).parent, Path(__file__).parents[1] / "model"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
