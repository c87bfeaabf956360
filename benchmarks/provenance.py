"""Where a number came from: every result file carries the machine, the versions and the commit."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DESTINATIONS = ("--folder", "--out", "--spans")
PACKAGES = ("torch", "triton", "transformers", "numpy")


def write_result(name: str, rows: Any, *, out: Path | None = None, **settings: Any) -> Path:
    """Write `rows` to `results/NAME.json` (or `out`) beside hardware, versions, commit and settings."""
    path = out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"benchmark": name, **provenance(), "settings": settings, "rows": rows}
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def provenance() -> dict[str, Any]:
    """Hardware, versions, commit and command of this process."""
    return {
        "hardware": {"cpu": _cpu_name(), "cores": os.cpu_count(), "gpus": _gpu_names()},
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": _commit(),
        "command": " ".join(["python", *_relative(sys.argv)]),
    }


def _relative(words: list[str]) -> list[str]:
    """The command without where its results went and its files lay: neither changes what was measured."""
    kept = [w for i, w in enumerate(words) if w not in DESTINATIONS and words[i - 1] not in DESTINATIONS]
    inside = [word.replace(f"{ROOT}/", "") for word in kept]
    return [Path(word).name if word.startswith("/") else word for word in inside]


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _gpu_names() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """The commit of the tree, marked when it has changes; `BENTHIC_COMMIT` where a copy of it has no git."""
    if named := os.environ.get("BENTHIC_COMMIT"):
        return named
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    return done.stdout.strip() or "unknown"
