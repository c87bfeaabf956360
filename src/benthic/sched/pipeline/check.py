"""Whether a table is a schedule: complete, in the right places, and free of deadlock."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from benthic.errors import ScheduleError
from benthic.sched.pipeline.dependencies import needs
from benthic.sched.pipeline.lower import Compute, Program, Recv, Send, lower_rounds
from benthic.sched.pipeline.order import rounds
from benthic.sched.pipeline.table import KINDS, Action

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benthic.sched.pipeline.table import Slot, Table


def check(table: Table) -> None:
    """Raise unless every action is there exactly once, on the right rank, and all ranks run to their end.

    The end must also be reached after sends and receives are lowered, when each channel between two ranks
    keeps its order and a send waits for its receive.

    Raises:
        ScheduleError: the problems, at most ten of them.
    """
    problems = [*_misplaced(table), *_malformed_slots(table), *_miscounted(table)]
    if not problems:
        ran = list(rounds(table))
        problems = [*_stuck(table, ran)] or [*channel_problems(lower_rounds(table, ran))]
    if problems:
        shown = "".join(f"\n  - {line}" for line in problems[:10])
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        message = f"table {table.name!r} is no schedule:{shown}{more}"
        raise ScheduleError(message)


def _misplaced(table: Table) -> Iterator[str]:
    for rank, action in table.actions():
        if not (0 <= action.stage < table.stages and 0 <= action.microbatch < table.microbatches):
            size = f"{table.stages} stages x {table.microbatches} microbatches"
            yield f"{action} on rank {rank} is outside {size}"
        elif (home := table.rank_of(action.stage, action.microbatch)) != rank:
            yield f"{action} is on rank {rank}, but its stage is on rank {home}"


def _malformed_slots(table: Table) -> Iterator[str]:
    for rank, slots in enumerate(table.slots):
        for slot in slots:
            if slot.second is not None and not _may_overlap(slot):
                yield f"{slot} on rank {rank} overlaps, but only an F with a B or I of another microbatch may"


def _may_overlap(slot: Slot) -> bool:
    first, second = slot.actions
    forward = first.kind == "F" and second.kind in "BI"
    return forward and first.microbatch != second.microbatch


def _miscounted(table: Table) -> Iterator[str]:
    """Every (stage, microbatch) has one F, and one B or one I and one W."""
    count = Counter(action for _, action in table.actions())
    for stage in range(table.stages):
        for microbatch in range(table.microbatches):
            f, b, i, w = (count[Action(kind, stage, microbatch)] for kind in KINDS)
            if f != 1:
                yield f"{stage}F{microbatch} occurs {f} times, not once"
            if (b, i, w) not in {(1, 0, 0), (0, 1, 1)}:
                found = f"{b} B, {i} I, {w} W"
                yield f"stage {stage}, microbatch {microbatch}: {found}; not one B or one I and one W"


def _stuck(table: Table, ran: list[list[tuple[int, Slot]]]) -> Iterator[str]:
    """Ranks that never end: the slot they wait at and what it waits for."""
    done = {action for together in ran for _, slot in together for action in slot.actions}
    present = {action for _, action in table.actions()}
    if len(done) == len(present):
        return
    for rank, slots in enumerate(table.slots):
        waiting = next((slot for slot in slots if slot.first not in done), None)
        if waiting is not None:
            lacks = [n for a in waiting.actions for n in needs(a, table.stages, present) if n not in done]
            yield f"rank {rank} waits at {waiting} for {', '.join(map(str, lacks))}"


def channel_problems(programs: tuple[Program, ...]) -> Iterator[str]:
    """What is wrong with lowered programs if channels keep their order and sends wait for receives."""
    yield from _disordered(programs)
    at = [0] * len(programs)
    while _advance(programs, at):
        pass
    for rank, program in enumerate(programs):
        if at[rank] < len(program):
            yield f"rank {rank} waits for ever at {program[at[rank]]}"


def _disordered(programs: tuple[Program, ...]) -> Iterator[str]:
    sent: dict[tuple[int, int], list[Action]] = defaultdict(list)
    received: dict[tuple[int, int], list[Action]] = defaultdict(list)
    for rank, program in enumerate(programs):
        for op in program:
            if isinstance(op, Send):
                sent[rank, op.to].append(op.payload)
            elif isinstance(op, Recv):
                received[op.source, rank].append(op.payload)
    for source, target in sorted(sent.keys() | received.keys()):
        out, into = sent[source, target], received[source, target]
        if out != into:
            yield f"rank {source} sends rank {target} {_list(out)}, which receives {_list(into)}"


def _list(actions: list[Action]) -> str:
    shown = " ".join(map(str, actions[:6]))
    return f"{shown} ..." if len(actions) > 6 else shown or "nothing"


def _advance(programs: tuple[Program, ...], at: list[int]) -> bool:
    """Let every rank compute, and every send meet its receive, once; whether anything moved."""
    moved = False
    for rank, program in enumerate(programs):
        op = program[at[rank]] if at[rank] < len(program) else None
        if isinstance(op, Compute):
            at[rank] += 1
            moved = True
        elif isinstance(op, Send) and _meets(programs[op.to], at[op.to], Recv(op.payload, rank)):
            at[rank] += 1
            at[op.to] += 1
            moved = True
    return moved


def _meets(program: Program, position: int, receive: Recv) -> bool:
    return position < len(program) and program[position] == receive
