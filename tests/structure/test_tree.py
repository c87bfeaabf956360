"""The tree keeps its own promises: sizes, names, imports, and nothing that speaks of where it was written."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
PURE = (
    "benthic.spec",
    "benthic.sched",
    "benthic.plan",
    "benthic.units",
    "benthic.errors",
    "benthic.cli.main",
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_source_file_stays_under_400_lines(path: Path) -> None:
    assert path.read_text().count("\n") <= 400


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_is_named_after_what_it_holds(path: Path) -> None:
    assert path.stem not in BANNED_NAMES


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_source_file_has_a_docstring_and_no_leftovers(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "module docstring"
    assert not re.search(r"\b(FIXME|XXX|TODO(?!\(#\d+\)))\b|raise NotImplementedError", text)


def test_pure_rooms_import_without_torch() -> None:
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {{'torch', 'triton', 'transformers', 'fastapi', 'numpy'}}:
            raise ImportError('refused: ' + name)
sys.meta_path.insert(0, Refuse())
import importlib
for name in {PURE!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_repository_speaks_of_the_project_alone() -> None:
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=False, cwd=ROOT)
    if listed.returncode:
        pytest.skip("not a git checkout")
    places = re.compile(r"/(?:work|opt|root|home)/\w|files\.pythonhosted|deb\.debian|registry\.npmjs")
    found = [
        f"{name}:{number}: {line.strip()[:80]}"
        for name in listed.stdout.split()
        if Path(name).suffix in {".py", ".md", ".toml", ".yml", ".json", ".sh", ""} and (ROOT / name).exists()
        for number, line in enumerate((ROOT / name).read_text(errors="replace").splitlines(), 1)
        if places.search(line) and "places = re.compile" not in line
    ]
    assert not found
