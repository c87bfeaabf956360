"""docs/theory/pipelines.md says what the simulator says, and shows what the command line draws."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benthic.cli.main import app
from benthic.plan.schedule import number
from benthic.sched.pipeline.schedules import BUILDERS, build
from benthic.sched.pipeline.simulate import Costs, peak_activations, simulate
from benthic.sched.pipeline.spans import read_spans, write_spans

DOCS = Path(__file__).parents[3] / "docs"
PAGE = (DOCS / "theory" / "pipelines.md").read_text(encoding="utf-8")
WORDS = " ".join(PAGE.split())
SPLIT = {"forward": 1, "backward": 2, "input": 1, "weight": 1}


def rows(heading: str) -> list[list[str]]:
    """The cells of the table whose first line is `heading`."""
    lines = PAGE[PAGE.index(heading) :].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def worst(name, ranks, microbatches, **costs):
    timeline = simulate(build(name, ranks, microbatches), Costs(**costs))
    return number(max(timeline.bubble(rank) for rank in range(ranks)))


def run(line: str, *more: str) -> str:
    result = CliRunner(env={"COLUMNS": "100", "TERM": "dumb"}).invoke(app, [*line.split()[1:], *more])
    assert result.exit_code == 0, result.output
    return result.output


def test_every_schedule_has_its_line():
    assert [row[0] for row in rows("| schedule | idle time")] == list(BUILDERS)


def test_the_comparison_is_what_the_command_prints():
    block = PAGE[PAGE.index("    $ benthic draw compare") :].split("\n\nF = 1", 1)[0]
    command, shown = block.split("\n", 1)
    printed = run(command.strip().removeprefix("$ "))
    assert [line.split() for line in shown.split("\n") if line.strip()] == [
        line.split() for line in printed.splitlines() if line.strip()
    ]
    cheaper = run(command.strip().removeprefix("$ "), "--overlap-cost", "2.5")
    times = dict(re.findall(r"^ (\w+) +([\d.]+) ", cheaper, re.MULTILINE))
    assert f"`dualpipe` needs {times['dualpipe']} and `dualpipev` {times['dualpipev']}" in WORDS


def test_the_picture_is_what_the_command_draws(tmp_path):
    command = re.search(r"`(benthic draw compare [^`]*) --svg docs/pictures/schedules.svg`", PAGE)[1]
    run(command, "--svg", str(tmp_path / "again.svg"))
    drawn = (tmp_path / "again.svg").read_text(encoding="utf-8")
    assert drawn == (DOCS / "pictures" / "schedules.svg").read_text(encoding="utf-8")


def test_dualpipes_times_are_the_simulated_ones():
    for ranks, microbatches, pair, makespan, idle in rows("| p | m | F&B"):
        costs = Costs(**SPLIT, overlap=lambda f, b, pair=pair: float(pair))
        timeline = simulate(build("dualpipe", int(ranks), int(microbatches)), costs)
        assert number(timeline.makespan) == makespan
        assert worst("dualpipe", int(ranks), int(microbatches), **SPLIT, overlap=costs.overlap) == idle


@pytest.mark.parametrize("rank", range(8))
def test_the_eight_steps_make_dualpipe(rank):
    ranks, microbatches = 8, 20
    depth = min(rank, ranks - 1 - rank)
    names = {"o": ranks // 2 - 1 - depth, "d": depth, "m": microbatches, "p": ranks}
    total: Counter[str] = Counter()
    for step, slots, times in rows("| step | slots"):
        first, *terms = re.findall(r"[+-]?[^+-]+", times.replace("2o", "o+o"))
        count = sum(_term(term, names) for term in (first, *terms))
        for slot in re.split("[,;] ", slots):
            if not slot.startswith(("at", "the")):
                total["FB" if " with " in slot else slot[0]] += count
        if step == "4" and names["o"] == 0:
            total.update({"FB": -1, "F": 1, "B": 1})
        if step == "6":
            total.update({"B": -count, "I": count})
    slots = build("dualpipe", ranks, microbatches).slots[rank]
    assert total == Counter("".join(a.kind for a in slot.actions) for slot in slots)


def _term(term: str, names: dict[str, int]) -> int:
    sign = -1 if term.startswith("-") else 1
    value, _, below = term.strip("+-").partition("/")
    return sign * (names[value] if value in names else int(value)) // int(below or 1)


def test_the_counts_of_slots_are_those_of_the_table():
    for rank, text in (
        (0, "rank 0 does {F} F, {FB} overlapped pairs, {B} B, {I} I and {W} W"),
        (3, "rank 3 does {F} F, {FB} pairs, {B} B, {I} I and {W} W"),
    ):
        slots = build("dualpipe", 8, 20).slots[rank]
        counts = Counter("".join(a.kind for a in slot.actions) for slot in slots)
        assert text.format(**counts) in WORDS
    assert set(peak_activations(build("dualpipe", 8, 20))) == {9}


def test_the_figures_in_the_text_are_simulated_ones():
    timeline = simulate(build("1f1b", 8, 20), Costs())
    assert f"that is {timeline.bubble(0):g} of {timeline.makespan:g}" in WORDS
    assert f"In the example it idles {worst('zb-h1', 8, 20, **SPLIT)}." in WORDS
    zb_v = simulate(build("zb-v", 4, 8), Costs(forward=0.5, backward=1.5, input=1.0, weight=0.5))
    assert f"first of 4 ranks idles {zb_v.stall(0):g} for m = 8" in WORDS
    chimera = worst("chimera", 8, 16, forward=1, backward=2)
    assert f"(B-F)): {chimera} for p = 8, m = 16, F = 1, B = 2" in WORDS
    for ranks, microbatches in ((4, 4), (8, 16)):
        ours, theirs = (
            simulate(build(name, ranks, microbatches), Costs(forward=1, backward=1)).bubble_fraction
            for name in ("chimera", "1f1b")
        )
        assert f"{number(ours)} for p" in WORDS
        assert f"where 1F1B has {number(theirs)}" in WORDS


@pytest.mark.parametrize(("forward", "backward", "weight", "pair"), [(1, 3, 1, 4), (2, 2, 1, 4)])
def test_where_dualpipes_closed_form_is_off_the_page_says_by_how_much(forward, backward, weight, pair):
    found = worst(
        "dualpipe", 8, 20, forward=forward, backward=backward, weight=weight, overlap=lambda f, b: pair
    )
    formula = 3 * (pair + backward - 3 * weight)
    costs = f"F = {forward}, B = {backward}, W = {weight}, F&B = {pair}"
    assert f"{costs} gives {found} where the formula says {formula}" in WORDS


def test_the_line_of_spans_is_one():
    line = re.search(r'`(\{"rank".*?\})`', PAGE)[1]
    assert write_spans(read_spans(line)) == line + "\n"
