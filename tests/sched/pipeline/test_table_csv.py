"""A table survives being written and read, and torch's runtime gets the format it loads."""

from __future__ import annotations

import pytest
from any_schedule import tables
from hypothesis import given, settings

from benthic.errors import ConfigError
from benthic.sched.pipeline.schedules import BUILDERS, build
from benthic.sched.pipeline.table_csv import read_table, torch_csv, write_table

ONE_WAY = [name for name in BUILDERS if name not in {"chimera", "dualpipe"}]


@given(table=tables())
@settings(max_examples=80, deadline=None)
def test_a_written_table_reads_as_itself(table):
    assert read_table(write_table(table)) == table


def test_the_file_can_be_written_by_hand():
    table = read_table(
        "schedule, mine\n\nroute, 0, 1\nroute_of, 0, 0\nrank, 0F0, 0F1, 0B0, 0B1\nrank,1F0,1F1|1B0,1B1\n"
    )
    assert (table.name, table.ranks, table.stages, table.microbatches) == ("mine", 2, 2, 2)
    assert str(table.slots[1][1]) == "1F1|1B0"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stages,3\n", "line 1 starts with 'stages'; lines start with schedule"),
        ("route,0\nroute_of,0\nrank,0F0,0B0\n", "0 lines start with 'schedule', not 1"),
        ("schedule,x\nroute,a\nroute_of,0\nrank,0F0,0B0\n", "'a' in a line 'route'"),
        ("schedule,x\nroute,0,1\nroute_of,0\nrank,0F0\n", "leads to rank 1, but 1 lines"),
        ("schedule,x\nroute,0\nroute_of,0,2\nrank,0F0\n", "names route 2, but there are 1"),
        ("schedule,x\nroute,0\nroute,0,0\nroute_of,0\nrank,0F0\n", r"routes have \[1, 2\] stages"),
        ("schedule,x\nroute,0\nroute_of,0\nrank,0X0\n", "'0X0' in slot '0X0' is no action"),
    ],
)
def test_a_file_that_is_no_table_is_refused_with_the_line(text, words):
    with pytest.raises(ConfigError, match=words):
        read_table(text)


@pytest.mark.parametrize("name", ONE_WAY)
def test_torch_reads_back_every_slot(name):
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    table = build(name, 4, 12)
    for line, slots in zip(torch_csv(table).splitlines(), table.slots, strict=True):
        actions = [schedules._Action.from_str(cell) for cell in line.split(",")]
        texts = ["|".join(map(str, a.sub_actions)) if a.sub_actions else str(a) for a in actions]
        assert texts == list(map(str, slots))


def test_a_stage_on_two_ranks_is_refused_for_torch():
    with pytest.raises(ConfigError, match="ranks 0 and 3, but torch's runtime knows 1 rank a stage"):
        torch_csv(build("dualpipe", 4, 8))
