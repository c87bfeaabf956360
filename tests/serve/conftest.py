from __future__ import annotations

import sys
from pathlib import Path

# The engine process is a fresh interpreter that imports `fake_engine` by name.
sys.path.insert(0, str(Path(__file__).parent))
