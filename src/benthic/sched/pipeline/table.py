"""A pipeline schedule as a value: for every rank, the ordered slots it works through.

An action is written as in zero-bubble papers: `3F7` is the forward of microbatch 7 on stage 3. A slot holds
one action, or a forward and a backward that overlap, `3F7|4B2`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, get_args

from benthic.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

Kind = Literal["F", "B", "I", "W"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

_ACTION: Final = re.compile(r"(\d+)([FBIW])(\d+)")


class Action(NamedTuple):
    """One stage's work on one microbatch.

    `kind` is F (forward), B (the whole backward), I (backward to the stage's input only) or W (the weight
    gradients that an I has put off). A microbatch has on every stage one F, and one B or one I and one W.
    """

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


class Slot(NamedTuple):
    """One action, or two that run overlapped: a forward and then a B or an I, of different microbatches."""

    first: Action
    second: Action | None = None

    @property
    def actions(self) -> tuple[Action, ...]:
        """The slot's actions, one or two."""
        return (self.first,) if self.second is None else (self.first, self.second)

    def __str__(self) -> str:
        return "|".join(map(str, self.actions))


@dataclass(frozen=True, kw_only=True)
class Table:
    """A whole schedule.

    `slots[r]` is what rank r does, in order. `routes` are the ways through the ranks, `routes[k][s]` being
    the rank of stage s: one way in most schedules, two where microbatches enter from both ends (Chimera,
    DualPipe), so that a stage may live on two ranks; several stages may share a rank. `route_of[m]` is the
    way of microbatch m.
    """

    name: str
    slots: tuple[tuple[Slot, ...], ...]
    routes: tuple[tuple[int, ...], ...]
    route_of: tuple[int, ...]

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.slots)

    @property
    def stages(self) -> int:
        """Number of stages that the model is cut into."""
        return len(self.routes[0])

    @property
    def microbatches(self) -> int:
        """Number of microbatches."""
        return len(self.route_of)

    def rank_of(self, stage: int, microbatch: int) -> int:
        """The rank where `microbatch` meets `stage`."""
        return self.routes[self.route_of[microbatch]][stage]

    def actions(self) -> Iterator[tuple[int, Action]]:
        """Every action with the rank whose list it is in, rank by rank in order."""
        for rank, slots in enumerate(self.slots):
            for slot in slots:
                for action in slot.actions:
                    yield rank, action

    def __str__(self) -> str:
        return "\n".join(" ".join(map(str, slots)) for slots in self.slots)


def linear(name: str, slots: list[list[Action]], *, stages: int, microbatches: int) -> Table:
    """A table without overlap: stage s lives on rank `s % ranks`, every microbatch goes one way."""
    ranks = len(slots)
    way = tuple(stage % ranks for stage in range(stages))
    return one_way(name, [list(map(Slot, actions)) for actions in slots], way, microbatches)


def one_way(name: str, slots: list[list[Slot]], way: tuple[int, ...], microbatches: int) -> Table:
    """A table in which every microbatch meets stage s on rank `way[s]`."""
    return Table(name=name, slots=tuple(map(tuple, slots)), routes=(way,), route_of=(0,) * microbatches)


def v_shaped(ranks: int) -> tuple[int, ...]:
    """The way up the ranks and back: stages r and 2 ranks - 1 - r on rank r."""
    return (*range(ranks), *reversed(range(ranks)))


def two_ways(name: str, slots: list[list[Slot]], microbatches: int) -> Table:
    """A table with one stage a rank and way, half of the microbatches on each.

    The first half enters at rank 0 and goes up, the second enters at the last rank and goes down.
    """
    up, half = tuple(range(len(slots))), microbatches // 2
    return Table(
        name=name,
        slots=tuple(map(tuple, slots)),
        routes=(up, up[::-1]),
        route_of=(0,) * half + (1,) * (microbatches - half),
    )


def parse_slot(text: str) -> Slot:
    """Read a slot as `str` writes it: `3F7` or `3F7|4B2`.

    Raises:
        ConfigError: the text is no slot.
    """
    actions = []
    for part in text.split("|"):
        match = _ACTION.fullmatch(part)
        if match is None:
            message = (
                f"{part!r} in slot {text!r} is no action; write stage, F, B, I or W, microbatch, as in 3F7"
            )
            raise ConfigError(message)
        stage, kind, microbatch = match.groups()
        actions.append(Action(_kind(kind), int(stage), int(microbatch)))
    if len(actions) > 2:
        message = f"slot {text!r} overlaps {len(actions)} actions, but at most 2 overlap"
        raise ConfigError(message)
    return Slot(*actions)


def _kind(letter: str) -> Kind:
    return next(kind for kind in KINDS if kind == letter)
