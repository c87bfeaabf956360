"""The worked timeline of the guide is what the example prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_example_prints_the_timeline_of_the_guide() -> None:
    script = ROOT / "examples" / "scheduler_timeline.py"
    environment = {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=True, env=environment
    )
    guide = (ROOT / "docs" / "guide" / "scheduler.md").read_text()
    assert done.stdout in guide
    for event in ("is preempted", "resumes, 8 cached", "ends (length, 9 tokens)"):
        assert event in done.stdout
