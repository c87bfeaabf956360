"""Pictures of schedules show every slot, where the simulator put it."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from benthic.plan.compare import side_by_side, simulate_share
from benthic.plan.draw_html import draw_html
from benthic.plan.draw_svg import draw_svg
from benthic.plan.draw_text import draw_text
from benthic.plan.schedule import number, summarise
from benthic.sched.pipeline.schedules import BUILDERS, build
from benthic.sched.pipeline.simulate import Costs, simulate
from benthic.sched.pipeline.table import Table, parse_slot

SVG = "{http://www.w3.org/2000/svg}"


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)  # noqa: S314 (our own output)


def timeline(name="1f1b", ranks=4, microbatches=8, **costs):
    return simulate(build(name, ranks, microbatches), Costs(**(costs or {"forward": 1, "backward": 2})))


def test_the_plain_picture_of_1f1b_is_this_one():
    lines = draw_text(timeline(), width=80, colours=False).plain.splitlines()
    assert [line.rstrip() for line in lines] == [
        "1f1b, 4 ranks, 8 microbatches",
        "rank 0 0-1-2-3-            0===4-1===5-2===6-3===7-4===  5===  6===  7===",
        "rank 1   0-1-2-        0===3-1===4-2===5-3===6-4===7-5===  6===  7===",
        "rank 2     0-1-    0===2-1===3-2===4-3===5-4===6-5===7-6===  7===",
        "rank 3       0-0===1-1===2-2===3-3===4-4===5-5===6-6===7-7===",
        "-- forward   == backward   blank: idle; number: microbatch",
        "bubble 27.3% of the time (makespan 33, idle 9 a rank)",
        "peak activations: 4 3 2 1",
    ]


@pytest.mark.parametrize("width", [40, 80, 81, 120, 200])
@pytest.mark.parametrize("shape", [(1, 1), (4, 8), (8, 20), (16, 64), (3, 101)])
@pytest.mark.parametrize("colours", [True, False])
def test_the_picture_fits_any_terminal_and_keeps_the_proportions(width, shape, colours):
    ranks, microbatches = shape
    line = timeline("1f1b", ranks, microbatches)
    text = draw_text(line, width=width, colours=colours)
    rows = text.plain.splitlines()[1 : 1 + ranks]
    assert all(len(row) <= width for row in rows)
    assert len({len(row) for row in rows}) == 1
    label = len(f"rank {ranks - 1} ")
    columns = len(rows[0]) - label
    if not colours:
        for rank, row in enumerate(rows):
            filled = sum(c != " " for c in row[label:]) / columns
            assert filled == pytest.approx(line.busy(rank) / line.makespan, abs=1.5 * microbatches / columns)


def test_colours_mark_the_kind_and_alternate_between_microbatches():
    text = draw_text(timeline(ranks=1, microbatches=2), width=80, colours=True)
    backgrounds = [str(span.style).split(" on ")[1] for span in text.spans if " on " in str(span.style)]
    assert len(set(backgrounds[:4])) == 4


def test_numbers_are_left_out_of_a_kind_when_one_does_not_fit():
    text = draw_text(timeline("gpipe", 8, 20), width=80, colours=False).plain
    first = text.splitlines()[1]
    assert not any(c.isdigit() for c in first[len("rank 0 ") :])
    assert "number" not in text


def test_overlapped_pairs_share_their_cell():
    row = tuple(map(parse_slot, ("0F0", "0F1|0B0", "0B1")))
    table = Table(name="pairs", slots=(row,), routes=((0,),), route_of=(0, 0))
    line = simulate(table, Costs(forward=2, backward=2, overlap=max))
    assert draw_text(line, width=47, colours=False).plain.splitlines()[1] == "rank 0 0-------1---0===1======="
    bars = parse(draw_svg(line)).findall(f"{SVG}g/{SVG}rect")
    assert [bar.get("height") for bar in bars] == ["24", "12", "12", "24"]


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_the_svg_has_one_bar_per_action_where_it_happens(name):
    line = timeline(name, 4, 8)
    root = parse(draw_svg(line))
    groups = root.findall(f"{SVG}g")
    assert len(groups) == 4 * 8 * 2
    idle = root.find(f"{SVG}rect[@class='idle']")
    left, width = float(idle.get("x")), float(idle.get("width"))
    drawn = {group.find(f"{SVG}title").text: group.find(f"{SVG}rect") for group in groups}
    for slots in line.slots:
        for timed in slots:
            bar = drawn[f"{timed.slot} from {timed.start} to {timed.end}"]
            assert float(bar.get("x")) == pytest.approx(left + width * timed.start / line.makespan, abs=0.02)
            share = (timed.end - timed.start) / line.makespan
            assert float(bar.get("width")) == pytest.approx(width * share - 0.6, abs=0.02)


def test_the_svg_says_the_figures():
    text = "".join(parse(draw_svg(timeline())).itertext())
    assert "bubble 27.3% of the time" in text
    assert "peak activations: 4 3 2 1" in text


def test_a_summary_says_what_the_simulator_says():
    summary = summarise(timeline("gpipe", 8, 20))
    assert summary.idle == 21
    assert summary.lines[1] == "peak activations: 20 on every rank"
    assert summarise(timeline(ranks=1, microbatches=1)).title == "1f1b, 1 rank, 1 microbatch"


def test_a_schedule_that_takes_no_time_can_be_drawn():
    line = timeline(ranks=2, microbatches=2, forward=0, backward=0)
    assert "bubble 0.0%" in draw_text(line, width=80, colours=False).plain
    parse(draw_svg(line))
    draw_html(line)


def test_two_directions_look_different_in_text_and_colour():
    lines = draw_text(timeline("chimera", 2, 2), width=80, colours=False).plain.splitlines()
    assert lines[1:4] == [
        "rank 0 0---1...1#######0=======",
        "rank 1 1...0---0=======1#######",
        "-- forward   .. forward, other way   == backward   ## backward, other way",
    ]
    bars = parse(draw_svg(timeline("chimera", 2, 2))).findall(f"{SVG}g/{SVG}rect")
    assert len({bar.get("fill") for bar in bars}) == 4


def test_what_a_rank_holds_is_said_where_it_holds_more_than_one_stage():
    assert len(summarise(timeline("zb-h1", 4, 8)).lines) == 2
    assert (
        summarise(timeline("zb-v", 4, 8)).lines[2] == "stages are 1/2 of a rank's share; parameters held 1x"
    )
    held = "a rank holds its share of the model in two directions; parameters held 2x"
    assert summarise(timeline("dualpipe", 4, 8)).lines[2] == held


@pytest.mark.parametrize("name", BUILDERS)
def test_every_line_of_every_picture_fits_eighty_columns(name):
    text = draw_text(timeline(name, 16, 32), width=80, colours=False).plain
    assert all(len(line) <= 80 for line in text.splitlines())


def test_pictures_below_each_other_share_their_scale():
    short, long = timeline("zb-h1", 4, 8), timeline("1f1b", 4, 8)
    rows = [draw_text(t, width=80, colours=False, until=33).plain.splitlines()[1] for t in (short, long)]
    assert rows[0].startswith("rank 0 0-1-2-3-")
    assert rows[1].startswith("rank 0 0-1-2-3-")
    idle = parse(draw_svg(short, long)).findall(f"{SVG}rect[@class='idle']")
    widths = [float(bar.get("width")) for bar in idle[:8]]
    assert widths[0] / widths[4] == pytest.approx(27 / 33, abs=1e-3)


def test_small_times_keep_their_digits():
    assert [number(value) for value in (33.0, 0.25, 1 / 3, 0.000125, 0.0)] == [
        "33",
        "0.25",
        "0.3333",
        "0.000125",
        "0",
    ]


def test_schedules_side_by_side_are_of_one_model():
    lines = [
        simulate_share(build(name, 4, 12), Costs(forward=1, backward=2))
        for name in ("1f1b", "interleaved", "zb-v", "dualpipe", "dualpipev")
    ]
    assert [line.busy(0) for line in lines] == [36] * 5
    grid = side_by_side(lines)
    cells = [list(column.cells) for column in grid.columns]
    assert cells[0] == ["1f1b", "interleaved", "zb-v", "dualpipe", "dualpipev"]
    assert cells[1] == ["45", "40.5", "37.5", "38", "39"]
    assert cells[4] == ["4", "5.5", "4", "5", "4.5"]
    assert cells[5] == ["1x", "1x", "1x", "2x", "1x"]
