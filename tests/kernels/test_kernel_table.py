"""Lines of kernels as a table, and the command that times them."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest

from benthic.cli.main import main
from benthic.kernels.bench.table import compared
from benthic.kernels.bench.timing import Line

if TYPE_CHECKING:
    from pathlib import Path


def line(op: str, implementation: str, rate: float, unit: str = "TB/s", shape: str = "4x4") -> Line:
    return Line(op, shape, implementation, 1.0, rate, unit, None)


def test_ours_stands_beside_the_best_other_one_and_below_the_roof_of_its_unit() -> None:
    rows = compared(
        [
            line("roof: copy", "torch", 4.0),
            line("roof: product", "torch", 800.0, "TFLOP/s"),
            line("norm", "triton", 3.0),
            line("norm", "torch (peer)", 2.0),
            line("norm", "reference", 0.5),
            line("attention", "gluon", 600.0, "TFLOP/s"),
            line("attention", "triton", 300.0, "TFLOP/s"),
            line("attention", "cudnn", 500.0, "TFLOP/s"),
            line("grouped", "grouped_mm", 400.0, "TFLOP/s"),
        ]
    )
    assert [row.op for row in rows] == ["norm", "attention", "grouped"]
    assert [row.ratio for row in rows] == [1.5, 1.2, None]
    assert [row.of_roof for row in rows] == [0.75, 0.75, 0.5]


def test_without_a_roof_there_is_no_share_of_it() -> None:
    (row,) = compared([line("norm", "triton", 3.0)])
    assert (row.ratio, row.of_roof) == (None, None)


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["benthic", "bench", "kernels", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_the_command_prints_a_table_and_writes_lines_and_a_picture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "lines.json", tmp_path / "shares.svg"
    assert not run(monkeypatch, "--small", "--only", "sampling", "--out", str(out), "--plot", str(plot))
    shown = capsys.readouterr().out
    assert "draw_tokens" in shown
    assert "roofs of this run: copy" in shown
    assert {row["op"] for row in json.loads(out.read_text())["rows"]} >= {"roof: copy", "draw_tokens"}
    assert "<svg" in plot.read_text()


def test_an_unknown_suite_is_answered_with_those_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--only", "atention") == 2
    assert "attention" in capsys.readouterr().err
