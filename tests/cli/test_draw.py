"""`benthic draw schedule` prints a picture and writes files."""

from __future__ import annotations

import csv
import json
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from benthic.cli import main
from benthic.errors import ConfigError, ScheduleError, UnknownFieldError
from benthic.plan.schedule import number
from benthic.sched.pipeline.schedules import BUILDERS, build
from benthic.sched.pipeline.simulate import Costs, simulate
from benthic.sched.pipeline.spans import Span, write_spans

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


@pytest.mark.parametrize(
    ("option", "cost", "message"),
    [
        ("--forward-cost", "inf", "finite"),
        ("--transfer-cost", "inf", "finite"),
        ("--input-cost", "5", "more than the whole backward's 2.0"),
        ("--weight-cost", "5", "more than the whole backward's 2.0"),
    ],
)
def test_costs_that_cannot_be_drawn_are_refused_by_the_option(option, cost, message):
    with pytest.raises(ConfigError, match=f"{option} {float(cost)} .*{message}"):
        RUN.invoke(main.app, ["draw", "schedule", "zb-h1", option, cost], catch_exceptions=False)


def test_an_unknown_schedule_is_named_with_its_neighbour():
    with pytest.raises(UnknownFieldError, match="Did you mean 'gpipe'"):
        RUN.invoke(main.app, ["draw", "schedule", "gpip"], catch_exceptions=False)


@pytest.mark.parametrize("name", BUILDERS)
def test_every_schedule_is_drawn(name):
    result = RUN.invoke(main.app, ["draw", "schedule", name], catch_exceptions=False)
    assert result.exit_code == 0
    assert result.output.startswith(f"{name}, 4 ranks, 8 microbatches")


def test_parts_of_the_backward_and_overlap_have_costs_of_their_own():
    args = ["draw", "schedule", "dualpipe", "--ranks", "8", "--microbatches", "20"]
    assert "makespan 66, idle 6" in RUN.invoke(main.app, args).output
    assert "makespan 59, idle 4.5" in RUN.invoke(main.app, [*args, "--overlap-cost", "2.5"]).output
    args = ["draw", "schedule", "zb-h1", "--ranks", "8", "--microbatches", "20"]
    assert "idle 7 a rank" in RUN.invoke(main.app, args).output
    assert "idle 10.5 a rank" in RUN.invoke(main.app, [*args, "--weight-cost", "0.75"]).output
    assert "idle 12.6 a rank" in RUN.invoke(main.app, [*args, "--input-cost", "1.4"]).output
    args = ["draw", "schedule", "interleaved", "--virtual-stages", "4"]
    assert "stages are 1/4 of a rank's share" in RUN.invoke(main.app, args).output


def test_a_written_table_is_drawn_again(tmp_path):
    table, again, torch = tmp_path / "t.csv", tmp_path / "u.csv", tmp_path / "torch.csv"
    args = ["draw", "schedule", "zb-v", "--table", str(table), "--torch", str(torch)]
    first = RUN.invoke(main.app, args).output.split("wrote")[0]
    assert RUN.invoke(main.app, ["draw", "schedule", str(table), "--table", str(again)]).output.startswith(
        first
    )
    assert table.read_text() == again.read_text()
    assert torch.read_text().startswith("0F0,0F1,")


def test_an_edited_table_that_deadlocks_is_refused(tmp_path):
    table = tmp_path / "t.csv"
    RUN.invoke(
        main.app, ["draw", "schedule", "1f1b", "--ranks", "2", "--microbatches", "2", "--table", str(table)]
    )
    table.write_text(table.read_text().replace("1F0,1B0", "1B0,1F0"))
    with pytest.raises(ScheduleError, match="rank 1 waits at 1B0 for 1F0"):
        RUN.invoke(main.app, ["draw", "schedule", str(table)], catch_exceptions=False)


def test_schedules_are_compared_in_one_table_and_one_picture(tmp_path):
    svg, page = tmp_path / "a.svg", tmp_path / "a.html"
    args = ["draw", "compare", "1f1b", "zb-h1", "dualpipe", "--ranks", "8", "--microbatches", "20"]
    result = RUN.invoke(main.app, [*args, "--svg", str(svg), "--html", str(page)], catch_exceptions=False)
    rows = [line.split() for line in result.output.splitlines() if line.strip().endswith("x")]
    assert rows == [
        ["1f1b", "81", "25.9%", "21", "8", "1x"],
        ["zb-h1", "67", "10.4%", "7", "8", "1x"],
        ["dualpipe", "66", "9.1%", "6", "9", "2x"],
    ]
    titles = [t.text for t in ElementTree.parse(svg).getroot().findall("{*}text[@class='title']")]  # noqa: S314
    assert titles == [f"{name}, 8 ranks, 20 microbatches" for name in ("1f1b", "zb-h1", "dualpipe")]
    assert page.read_text().count("<h2>") == 3


def test_a_measured_run_is_drawn_below_what_its_medians_predict(tmp_path):
    spans, trace = tmp_path / "spans.jsonl", tmp_path / "trace.json"
    table = build("1f1b", 2, 3)
    run = simulate(table, Costs(forward=0.01, backward=0.02, transfer=0.005))
    measured = [Span(r, t.slot, 7 + t.start, 7 + t.end) for r, row in enumerate(run.slots) for t in row]
    spans.write_text(write_spans(measured))
    args = ["draw", "schedule", "1f1b", "--ranks", "2", "--microbatches", "3", "--measured", str(spans)]
    result = RUN.invoke(main.app, [*args, "--perfetto", str(trace)], catch_exceptions=False)
    above, below = result.output.split("1f1b, measured, 2 ranks")
    assert above.startswith("1f1b, predicted, 2 ranks, 3 microbatches")
    assert "makespan 0.12, idle 0.03" in above
    assert f"makespan {number(run.makespan)}" in below
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    assert [sum(event["pid"] == pid for event in events) for pid in (0, 1)] == [12, 12]
    assert max(event["ts"] + event["dur"] for event in events if event["pid"] == 1) == pytest.approx(
        1e6 * run.makespan
    )
