"""Each schedule is the one that its paper draws, and torch's where torch has it."""

from __future__ import annotations

import re
from collections import Counter
from types import SimpleNamespace

import pytest

from benthic.errors import ConfigError
from benthic.sched.pipeline.check import check
from benthic.sched.pipeline.schedules import BUILDERS, build


def test_interleaved_1f1b_sends_groups_of_microbatches_round_the_ranks():
    assert str(build("interleaved", 2, 4)).splitlines() == [
        "0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3",
        "1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3",
    ]


def test_zb_h1_lets_as_many_weights_wait_as_ranks_come_before():
    assert str(build("zb-h1", 3, 4)).splitlines() == [
        "0F0 0F1 0F2 0I0 0W0 0F3 0I1 0W1 0I2 0W2 0I3 0W3",
        "1F0 1F1 1I0 1F2 1I1 1W0 1F3 1I2 1W1 1I3 1W2 1W3",
        "2F0 2I0 2F1 2I1 2F2 2I2 2W0 2F3 2I3 2W1 2W2 2W3",
    ]


def test_zb_v_turns_round_on_the_last_rank():
    table = build("zb-v", 2, 3)
    assert table.routes == ((0, 1, 1, 0),)
    assert str(table).splitlines() == [
        "0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0I0 0W0 3F2 3I2 3W2 0I1 0W1 0I2 0W2",
        "1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1I1 2I2 1I2 1W1 2W2 1W2",
    ]


def test_chimera_of_four_ranks_is_the_figure_of_the_paper():
    table = build("chimera", 4, 4)
    assert table.routes == ((0, 1, 2, 3), (3, 2, 1, 0))
    assert table.route_of == (0, 0, 1, 1)
    assert str(table).splitlines()[:2] == [
        "0F0 0F1 3F2 3B2 3F3 3B3 0B0 0B1",
        "1F0 2F2 1F1 2F3 2B2 1B0 2B3 1B1",
    ]


def test_dualpipe_of_four_ranks_is_the_reference_structure():
    assert str(build("dualpipe", 4, 8)).splitlines()[:2] == [
        "0F0 0F1 0F2 3F4 3I4 3W4 3F5 0F3|3B5 3F6|0B0 3B6 3F7|0B1 3B7 0I2 0W2 0I3 0W3",
        "1F0 2F4 1F1 2F5 1F2 2B4 2F6|1B0 1F3|2B5 2F7|1B1 2B6 1B2 2I7 1I3 2W7 1W3",
    ]


def test_dualpipe_is_the_same_from_either_end():
    table = build("dualpipe", 6, 14)
    for rank, slots in enumerate(table.slots):
        mirrored = [
            tuple((a.kind, a.stage, (a.microbatch + 7) % 14) for a in slot.actions)
            for slot in table.slots[5 - rank]
        ]
        assert mirrored == [tuple((a.kind, a.stage, a.microbatch) for a in slot.actions) for slot in slots]


@pytest.mark.parametrize(
    ("ranks", "microbatches", "rank", "counts"),
    [
        (8, 20, 0, {"F": 11, "I": 7, "W": 7, "FB": 9, "B": 4}),
        (8, 20, 7, {"F": 11, "I": 7, "W": 7, "FB": 9, "B": 4}),
        (8, 20, 3, {"F": 9, "B": 5, "FB": 11, "I": 4, "W": 4}),
        (8, 20, 4, {"F": 9, "B": 5, "FB": 11, "I": 4, "W": 4}),
        (16, 120, 0, {"F": 23, "I": 15, "W": 15, "FB": 97, "B": 8}),
        (16, 120, 7, {"F": 17, "B": 9, "FB": 103, "I": 8, "W": 8}),
    ],
)
def test_dualpipe_does_each_kind_of_slot_as_often_as_the_reference(ranks, microbatches, rank, counts):
    slots = build("dualpipe", ranks, microbatches).slots[rank]
    assert Counter("".join(a.kind for a in slot.actions) for slot in slots) == counts


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches", "words"),
    [
        ("interleaved", 4, 6, "microbatches = 6, but .* multiple of 4 .* Set microbatches to 4 or 8"),
        ("chimera", 3, 6, "ranks = 3, but .* multiple of 2 .* Set ranks to 2 or 4"),
        ("chimera", 4, 2, "microbatches = 2, but .* multiple of 4 .* Set microbatches to 4"),
        ("dualpipe", 5, 20, "ranks = 5, but .* multiple of 2"),
        ("dualpipe", 4, 9, "microbatches = 9, but .* multiple of 2 .* Set microbatches to 8 or 10"),
        ("dualpipe", 8, 14, "microbatches = 14, but .* at least 16 .* Set microbatches to 16 or more"),
        ("dualpipev", 4, 7, "microbatches = 7, but .* at least 8"),
        ("zb-h1", 0, 7, "ranks = 0, but .* at least 1"),
        ("zb-v", 4, 0, "microbatches = 0, but .* at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_both_numbers_and_the_remedy(name, ranks, microbatches, words):
    with pytest.raises(ConfigError, match=words):
        build(name, ranks, microbatches)


def test_virtual_stages_are_chosen_for_interleaved_1f1b_alone():
    assert build("interleaved", 2, 4, virtual_stages=3).stages == 6
    assert build("zb-v", 2, 4, virtual_stages=2).stages == 4
    with pytest.raises(ConfigError, match=r"virtual_stages = 2, but .* 1 a rank"):
        build("1f1b", 2, 4, virtual_stages=2)
    with pytest.raises(ConfigError, match=r"virtual_stages = 1, but .* at least 2"):
        build("interleaved", 2, 4, virtual_stages=1)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_table_of_a_large_run_is_a_schedule(name):
    table = build(name, 16, 128)
    check(table)
    assert table.stages == 16 * (BUILDERS[name].virtual_stages or 2)
    paired = any(slot.second is not None for slots in table.slots for slot in slots)
    assert paired == BUILDERS[name].pairs


def _torch_order(schedules, name, size):
    """What torch's own builder makes for every rank: actions, or tuples of overlapped ones."""
    maker = {
        "interleaved": lambda rank: schedules._get_1f1b_rank_ops(**_looped(size, rank)),
        "zb-v": lambda rank: schedules.ScheduleZBVZeroBubble._calculate_single_rank_operations(size, rank),
        "dualpipev": lambda rank: schedules.ScheduleDualPipeV._calculate_single_rank_operations(size, rank),
    }[name]
    for rank in range(size.pp_group_size):
        yield [_slot_text(action) for action in maker(rank) if action is not None]


def _looped(size, rank):
    ranks, chunks = size.pp_group_size, size.num_stages // size.pp_group_size
    total = chunks * size._n_microbatches
    warmup = min((chunks - 1) * ranks + 2 * (ranks - 1 - rank), total)
    return {
        "n_local_stages": chunks,
        "pp_group_size": ranks,
        "warmup_ops": warmup,
        "fwd_bwd_ops": total - warmup,
        "cooldown_ops": warmup,
        "rank": rank,
        "forward_stage_index": lambda step: (step // ranks) % chunks * ranks + rank,
        "backward_stage_index": lambda step: (chunks - 1 - (step - warmup) // ranks % chunks) * ranks + rank,
    }


def _slot_text(action):
    return "|".join(map(str, action.sub_actions)) if action.sub_actions else str(action)


@pytest.mark.parametrize("name", ["interleaved", "zb-v", "dualpipev"])
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (3, 6), (4, 8), (4, 20)])
def test_torch_builds_the_same_slots(name, ranks, microbatches):
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    size = SimpleNamespace(pp_group_size=ranks, num_stages=2 * ranks, _n_microbatches=microbatches)
    ours = [[str(slot) for slot in row] for row in build(name, ranks, microbatches).slots]
    theirs = list(_torch_order(schedules, name, size))
    if name == "zb-v":  # of the weights that wait we take the oldest, torch the lower stage's
        ours, theirs = ([[re.sub(r".*W.*", "W", slot) for slot in row] for row in t] for t in (ours, theirs))
    assert ours == theirs


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8), (8, 20)])
def test_torch_runs_the_same_order(ranks, microbatches):
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    size = SimpleNamespace(_num_stages=ranks, _n_microbatches=microbatches)
    for ours, theirs in (("gpipe", schedules.ScheduleGPipe), ("1f1b", schedules.Schedule1F1B)):
        order = theirs._get_pipeline_order(size)
        table = build(ours, ranks, microbatches)
        # torch numbers the forwards of the last 1F1B rank from 1; that rank simply alternates
        for rank in range(ranks - (ours == "1f1b")):
            expected = [(a.computation_type.value, a.microbatch_index) for a in order[rank] if a is not None]
            got = [(s.first.kind, s.first.microbatch) for s in table.slots[rank]]
            assert got == [action for action in expected if action[0] in "FB"]
