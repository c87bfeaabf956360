from __future__ import annotations

import sys
from pathlib import Path

# Welds between rooms use the small models of tests/model and the small engines of tests/serve.
for room in ("model", "serve"):
    sys.path.insert(0, str(Path(__file__).parents[1] / room))
