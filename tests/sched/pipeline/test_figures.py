"""Bubbles and peaks of every schedule are the published ones, wherever the closed form is exact."""

from __future__ import annotations

from fractions import Fraction

import pytest
from any_schedule import tables
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from benthic.sched.pipeline.schedules import build
from benthic.sched.pipeline.simulate import Costs, peak_activations, simulate, stages_held

COST = st.integers(1, 30)
SPLIT = {"forward": 1, "backward": 2, "input": 1, "weight": 1}


def bubbles(table, costs):
    timeline = simulate(table, costs)
    return [timeline.bubble(rank) for rank in range(table.ranks)]


def paired(time):
    return lambda forward, backward: time


@pytest.mark.parametrize(
    ("ranks", "microbatches", "pair", "total", "bubble"),
    [(4, 12, 3, 38, 2), (8, 20, 3, 66, 6), (16, 40, 3, 134, 14), (8, 20, 2.5, 59, 4.5)],
)
def test_dualpipe_takes_the_time_of_the_reference(ranks, microbatches, pair, total, bubble):
    timeline = simulate(build("dualpipe", ranks, microbatches), Costs(**SPLIT, overlap=paired(pair)))
    assert timeline.makespan == total
    assert max(timeline.bubble(rank) for rank in range(ranks)) == bubble


def test_dualpipe_idles_less_than_zero_bubble_which_idles_less_than_1f1b():
    worst = [max(bubbles(build(name, 8, 20), Costs(**SPLIT))) for name in ("1f1b", "zb-h1", "dualpipe")]
    assert worst == [21, 7, 6]


@given(
    table=tables(["dualpipe", "dualpipev"]),
    forward=COST,
    weight=st.integers(0, 30),
    spared=st.integers(0, 30),
)
@settings(max_examples=80, deadline=None)
def test_dualpipes_closed_form_is_exact_when_forward_and_input_gradient_take_the_same(
    table, forward, weight, spared
):
    assume(weight <= forward and spared <= forward)
    backward = forward + weight
    pair = forward + backward - spared
    costs = Costs(forward=forward, backward=backward, input=forward, weight=weight, overlap=paired(pair))
    expected = (table.stages // 2 - 1) * (pair + backward - 3 * weight)
    assert max(bubbles(table, costs)) == expected


@given(
    table=tables(["dualpipe", "dualpipev"]),
    forward=COST,
    more=st.integers(0, 10),
    less=st.integers(0, 30),
    spared=st.integers(0, 30),
)
@settings(max_examples=80, deadline=None)
def test_dualpipes_closed_form_bounds_the_bubble_of_longer_backwards(table, forward, more, less, spared):
    part = forward + more
    weight = max(part - less, 0)
    backward, pair = part + weight, max(forward + part + weight - spared, part + weight)
    costs = Costs(forward=forward, backward=backward, input=part, weight=weight, overlap=paired(pair))
    assert max(bubbles(table, costs)) <= (table.stages // 2 - 1) * (pair + backward - 3 * weight)


@pytest.mark.parametrize(
    ("backward", "weight", "pair", "found", "formula"), [(3, 1, 4, 11, 12), (2, 1, 3, 6, 6)]
)
def test_dualpipes_closed_form_is_above_what_happens_by_this_much(backward, weight, pair, found, formula):
    costs = Costs(forward=1, backward=backward, input=backward - weight, weight=weight, overlap=paired(pair))
    assert max(bubbles(build("dualpipe", 8, 20), costs)) == found
    assert 3 * (pair + backward - 3 * weight) == formula


@given(table=tables(["dualpipe", "dualpipev"]))
@settings(max_examples=60, deadline=None)
def test_dualpipe_holds_one_activation_more_than_stages_on_every_rank(table):
    assert peak_activations(table) == (table.stages + 1,) * table.ranks
    assert stages_held(table) == (2,) * table.ranks


@given(table=tables(["interleaved"]), forward=COST, backward=COST)
@settings(max_examples=80, deadline=None)
def test_interleaving_divides_the_bubble_by_the_virtual_stages(table, forward, backward):
    virtual = table.stages // table.ranks
    costs = Costs(forward=Fraction(forward, virtual), backward=Fraction(backward, virtual))
    expected = Fraction((table.ranks - 1) * (forward + backward), virtual)
    timeline = simulate(table, costs)
    assert [timeline.bubble(rank) for rank in range(table.ranks)] == [expected] * table.ranks
    assert timeline.bubble_ratio == Fraction(table.ranks - 1, virtual * table.microbatches)


def test_two_virtual_stages_halve_the_published_ratio():
    assert simulate(build("1f1b", 8, 20), Costs()).bubble_ratio == 0.35
    assert simulate(build("interleaved", 4, 20), Costs()).bubble_ratio == 3 / (2 * 20)
    assert simulate(build("interleaved", 8, 40), Costs()).bubble_ratio == pytest.approx(0.175 / 2)


@given(table=tables(["interleaved"]))
@settings(max_examples=60, deadline=None)
def test_interleaving_holds_more_by_its_longer_way(table):
    ranks, virtual = table.ranks, table.stages // table.ranks
    expected = [
        min(2 * (ranks - 1 - r) + (virtual - 1) * ranks + 1, virtual * table.microbatches)
        for r in range(ranks)
    ]
    assert peak_activations(table) == tuple(expected)
    if table.microbatches > ranks:
        in_microbatches = Fraction(expected[0], virtual)
        assert in_microbatches == ranks * (1 + Fraction(ranks - 1, ranks * virtual))


@given(table=tables(["zb-h1"]), forward=COST, backward_input=COST, weight=COST)
@settings(max_examples=100, deadline=None)
def test_zb_h1_idles_for_p_minus_one_forwards_and_backwards_less_two_weights(
    table, forward, backward_input, weight
):
    assume(table.microbatches >= table.ranks)
    backward = backward_input + weight
    costs = Costs(forward=forward, backward=backward, input=backward_input, weight=weight)
    formula = (table.ranks - 1) * (forward + backward - 2 * weight)
    floor = (table.ranks - 1) * max(forward, backward_input)
    assert bubbles(table, costs) == [max(formula, floor)] * table.ranks
    if weight <= min(forward, backward_input):
        assert formula >= floor


@given(table=tables(["zb-h1"]))
@settings(max_examples=40, deadline=None)
def test_zb_h1_holds_as_much_as_the_first_rank_of_1f1b_everywhere(table):
    assert peak_activations(table) == (min(table.ranks, table.microbatches),) * table.ranks


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 3), (4, 7), (4, 12), (8, 20)])
def test_zb_v_never_idles_once_it_has_begun_if_all_parts_take_the_same(ranks, microbatches):
    timeline = simulate(build("zb-v", ranks, microbatches), Costs(**SPLIT))
    assert [timeline.stall(rank) for rank in range(ranks)] == [0] * ranks
    assert timeline.makespan == 6 * microbatches + ranks - 1
    assert peak_activations(timeline.table) == (2 * ranks,) * ranks


@given(table=tables(["zb-v"]))
@settings(max_examples=40, deadline=None)
def test_zb_v_never_holds_more_than_1f1b_at_its_first_rank(table):
    halves = peak_activations(table)
    assert max(halves) <= 2 * min(table.ranks, table.microbatches)


@pytest.mark.parametrize(
    ("ranks", "microbatches", "ratio", "of_1f1b"), [(4, 4, 0.2, 0.4286), (8, 16, 0.1579, 0.3043)]
)
def test_chimera_idles_for_the_published_share(ranks, microbatches, ratio, of_1f1b):
    costs = Costs(forward=1, backward=1)
    assert round(simulate(build("chimera", ranks, microbatches), costs).bubble_fraction, 4) == ratio
    assert round(simulate(build("1f1b", ranks, microbatches), costs).bubble_fraction, 4) == of_1f1b


@given(table=tables(["chimera"]), forward=COST, more=st.integers(0, 30))
@settings(max_examples=80, deadline=None)
def test_chimera_idles_longer_when_backwards_are_longer_than_forwards(table, forward, more):
    ranks, microbatches = table.ranks, table.microbatches
    timeline = simulate(table, Costs(forward=Fraction(forward), backward=Fraction(forward + more)))
    expected = (ranks - 2) * (forward + more + (microbatches // ranks - 1) * more)
    assert [timeline.bubble(rank) for rank in range(ranks)] == [expected] * ranks
    if not more:
        assert timeline.bubble_fraction == Fraction(ranks - 2, 2 * microbatches + ranks - 2)


@given(table=tables(["chimera"]))
@settings(max_examples=40, deadline=None)
def test_chimera_holds_between_half_the_ranks_and_all(table):
    peaks = peak_activations(table)
    assert (min(peaks), max(peaks)) == (table.ranks // 2 + 1, table.ranks)
    assert stages_held(table) == (2,) * table.ranks
