from __future__ import annotations

import sys
from pathlib import Path

# Tests of this folder share `made_up`.
sys.path.insert(0, str(Path(__file__).parent))
