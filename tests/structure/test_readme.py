"""What README tells a stranger to type exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import typer

from benthic.cli.main import app

if TYPE_CHECKING:
    import click

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = sorted(
    {
        line.strip().removeprefix("$ ")
        for page in PAGES
        for line in re.findall(
            r"^ {4}\$? ?(?:benthic|make) .*|^(?:\$ )?(?:benthic|make) .*", page.read_text(), re.M
        )
    }
)


def _resolve(words: list[str]) -> tuple[click.Command, list[str]]:
    command: click.Command = typer.main.get_command(app)
    while words and hasattr(command, "commands"):
        assert words[0] in command.commands, f"no command {words[0]!r}; there are {sorted(command.commands)}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("benthic ")])
def test_a_documented_command_and_its_options_exist(line: str) -> None:
    words = shlex.split(re.split(r"\s#|\s\|\s|\s&|\s>|\s<", line)[0])[1:]
    command, rest = _resolve(words)
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    options |= {"--help", "-h"}
    asked = {word.split("=")[0] for word in rest if word.startswith("--")}
    assert asked <= options, f"{line}: {sorted(asked - options)} unknown"


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("make ")])
def test_a_documented_make_target_exists(line: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in line.split("#", maxsplit=1)[0].split()[1:]:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.M), target


def test_readme_shows_the_two_set_up_commands_first() -> None:
    first = re.findall(r"^ {4}(\S.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)[:3]
    assert any(c.startswith("make demo") for c in first)
    assert any(c.startswith("make test") for c in first)


def test_every_benchmark_and_every_result_is_in_the_table_and_every_row_exists() -> None:
    folder = ROOT / "benchmarks"
    named = set(re.findall(r"`([a-z0-9_]+\.(?:py|json))`", (folder / "README.md").read_text()))
    there = {path.name for path in (*folder.glob("*.py"), *(folder / "results").glob("*.json"))}
    assert named == there, f"not in the table: {sorted(there - named)}; not there: {sorted(named - there)}"


def test_every_file_that_the_map_of_the_code_names_exists() -> None:
    text = (ROOT / "docs" / "guide" / "reading.md").read_text()
    named = re.findall(r"`([\w/]+(?:\.py|/))`", text)
    assert len(named) > 40
    missing = [name for name in named if not (ROOT / "src" / "benthic" / name).exists()]
    assert [name for name in missing if not (ROOT / name).exists()] == []
