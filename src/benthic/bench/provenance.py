"""Where a result came from: this machine, these versions, this commit, this command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benthic import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence

SECRET_FLAGS = ("--api-key", "--header")


def provenance(command: Sequence[str]) -> dict[str, Any]:
    """Of this process; keys on the command line are blanked."""
    return {
        "client": {"cpu": _cpu_name(), "cores": os.cpu_count(), "platform": platform.platform()},
        "versions": {
            "benthic": __version__,
            "python": platform.python_version(),
            "aiohttp": importlib.metadata.version("aiohttp"),
        },
        "commit": _commit(),
        "command": " ".join(without_secrets(command)),
    }


def without_secrets(words: Sequence[str]) -> list[str]:
    """The words of a command, with `***` for the value of a flag that holds a secret."""
    shown: list[str] = []
    hide = False
    for word in words:
        flag, equals, _ = word.partition("=")
        if hide:
            shown.append("***")
        elif flag in SECRET_FLAGS and equals:
            shown.append(f"{flag}=***")
        else:
            shown.append(word)
        hide = word in SECRET_FLAGS and not hide
    return shown


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        line.split(":", 1)[1].strip()
        for line in (info.read_text(encoding="utf-8").splitlines() if info.exists() else ())
        if line.startswith("model name")
    )
    return next(names, platform.processor() or platform.machine())


def _commit() -> str | None:
    """Of the checkout that this package runs from; None when it was installed without one."""
    git = shutil.which("git")
    folder = Path(__file__).parent
    if git is None or not (folder.parents[2] / ".git").exists():
        return None
    done = subprocess.run(  # noqa: S603 (fixed words)
        [git, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False, cwd=folder
    )
    return done.stdout.strip() or None
