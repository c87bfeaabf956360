"""`benthic draw schedule` prints a picture and writes files."""

from __future__ import annotations

import csv
import json
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from benthic.cli import main
from benthic.errors import UnknownFieldError

RUN = CliRunner(env={"COLUMNS": "80", "TERM": "dumb"})


def test_a_schedule_is_drawn_in_eighty_columns_with_its_figures():
    result = RUN.invoke(main.app, ["draw", "schedule", "1f1b", "--ranks", "4", "--microbatches", "8"])
    assert result.exit_code == 0
    assert "rank 3       0-0===1-1===" in result.output
    assert "bubble 27.3% of the time" in result.output
    assert "peak activations: 4 3 2 1" in result.output
    assert all(len(line) <= 80 for line in result.output.splitlines())


def test_costs_change_the_picture():
    args = ["draw", "schedule", "gpipe", "--ranks", "2", "--microbatches", "2", "--backward-cost", "3"]
    assert "makespan 12, idle 4" in RUN.invoke(main.app, args).output
    assert "makespan 14" in RUN.invoke(main.app, [*args, "--transfer-cost", "1"]).output


def test_svg_perfetto_and_csv_are_written(tmp_path):
    svg, trace, table = tmp_path / "a.svg", tmp_path / "a.json", tmp_path / "a.csv"
    args = ["draw", "schedule", "1f1b", "--svg", str(svg), "--perfetto", str(trace), "--csv", str(table)]
    result = RUN.invoke(main.app, args)
    assert result.exit_code == 0
    root = ElementTree.parse(svg).getroot()  # noqa: S314 (our own output)
    assert root.tag.endswith("svg")
    assert len([e for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"]) == 64
    assert len(list(csv.DictReader(table.open()))) == 64
    assert result.output.replace("\n", "").count("wrote ") == 3


@pytest.mark.parametrize("args", [["--ranks", "0"], ["--microbatches", "-3"], ["--forward-cost", "-1"]])
def test_impossible_numbers_are_refused_by_the_option(args):
    result = RUN.invoke(main.app, ["draw", "schedule", "1f1b", *args])
    assert result.exit_code == 2
    assert args[0] in result.output


def test_an_unknown_schedule_is_named_with_its_neighbour():
    with pytest.raises(UnknownFieldError, match="Did you mean 'gpipe'"):
        RUN.invoke(main.app, ["draw", "schedule", "gpip"], catch_exceptions=False)
