"""Writes docs/pictures/plan_*.png: `python tests/plan/pictures.py`, from the reports under docs/plans."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "dash"))

from browser import browser

ROOT = Path(__file__).parents[2]
PICTURES = {
    "plan_train.png": ("deepseek-v3_2048_h800.html", 1180, False),
    "plan_train_dark.png": ("moonlight_2_h200.html", 1180, True),
    "plan_serving.png": ("deepseek-v3_64_h200_serving.html", 1440, False),
}


def main() -> None:
    """One window's height of each, whose whole height is what the page needs up to 1,500 pixels."""
    for name, (page, width, dark) in PICTURES.items():
        with tempfile.TemporaryDirectory() as profile, browser(Path(profile)) as window:
            window.open((ROOT / "docs" / "plans" / page).as_uri(), width=width, height=1500, dark=dark)
            window.wait("document.readyState === 'complete' && document.querySelector('svg') !== null")
            window.picture(ROOT / "docs" / "pictures" / name)
            assert window.said == [], window.said
            assert all(url.startswith("file:") for url in window.asked), window.asked


if __name__ == "__main__":
    main()
