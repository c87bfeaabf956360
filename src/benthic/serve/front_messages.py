"""What crosses the border between the main process and the fronts, which answer HTTP, and nothing else does.

A frame from a front is its number and messages; a frame to a front is how many sequences the others have in
flight, and messages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import msgspec

from benthic.errors import AdmissionError, EngineDeadError, OverloadedError, ServeError, ServerClosingError
from benthic.sched.routing import Role  # noqa: TC001 (msgspec reads annotations)
from benthic.serve.journal import Entry, PhaseName  # noqa: TC001 (msgspec reads annotations)
from benthic.serve.messages import Abort, Delta, Generate, Ready, Stats

FailureName = Literal["admission", "overloaded", "closing", "engine", "other"]
# A kind of error before what it is a kind of.
FAILURES: Final[dict[FailureName, type[ServeError]]] = {
    "admission": AdmissionError,
    "overloaded": OverloadedError,
    "closing": ServerClosingError,
    "engine": EngineDeadError,
    "other": ServeError,
}


@dataclass(frozen=True, kw_only=True)
class Seat:
    """A front's place at the server.

    Attributes:
        number: of this process; one that replaces another has a new number.
        slot: which of the `slots` fronts it is, from 0.
        to_hub: address of the pipe that leads to the main process.
        to_front: of the one back.
        log_level: of its process.
    """

    number: int
    slot: int
    slots: int
    to_hub: str
    to_front: str
    log_level: int


class Hello(msgspec.Struct, frozen=True, tag=True):
    """A front is there and reads; it is answered with `Welcome`."""


class Serving(msgspec.Struct, frozen=True, tag=True):
    """A front has everything and accepts connections."""


class Open(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Submit requests that belong together."""

    requests: tuple[Generate, ...]


class Ended(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What became of a request that a front answered."""

    entry: Entry


class Report(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What a front has counted (`Counts`), and its requests in flight (entries of its journal).

    It comes every half second, and when asked for by a `Census`, whose number it then has. Both are passed on
    as they are.
    """

    census: int
    counts: msgspec.Raw
    active: msgspec.Raw


class Take(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Use one of a key's requests; answered in seconds."""

    who: str


class Scrape(msgspec.Struct, frozen=True, tag=True):
    """What `/metrics` says; answered in its text format."""


class Cards(msgspec.Struct, frozen=True, tag=True):
    """The instances; answered as the JSON of an `InstanceList`."""


class Join(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Start an instance; answered as the JSON of its card."""

    role: Role


class Leave(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Drain an instance, or end it `now`; answered as the JSON of its card."""

    name: str
    now: bool


Question = Take | Scrape | Cards | Join | Leave


class Ask(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A question about the whole server; `number` is the front's own."""

    number: int
    question: Question


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Requests that belong together end with an error, all of them."""

    request_ids: tuple[str, ...]
    failure: FailureName
    message: str


class Mark(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A router says that a phase of a request began, on the monotonic clock that all processes share."""

    request_id: str
    name: PhaseName
    where: str
    at_s: float


class State(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """How the engines are; `instances` is the JSON of an `InstanceList`, empty without a fleet."""

    stats: Stats | None
    trouble: str | None
    instances: bytes


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What a front needs before it serves; `started_at` is in seconds since 1970."""

    ready: Ready
    started_at: int
    ended: list[Entry]
    state: State


class Active(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The requests in flight of another front, all of them; none when it is gone."""

    front: int
    entries: msgspec.Raw


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """A question was answered with an error."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None


class Answer(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To question `number` of a front: a number of seconds, bytes, or a refusal."""

    number: int
    value: float | bytes | Refusal


class Census(msgspec.Struct, frozen=True, tag=True):
    """Report now."""

    number: int


class Stopping(msgspec.Struct, frozen=True, tag=True):
    """Drain; at once when it comes a second time."""


ToHub = Hello | Serving | Open | Abort | Ended | Report | Ask
ToFront = Delta | Failed | Mark | State | Welcome | Active | Ended | Answer | Census | Stopping
FromFront = tuple[int, list[ToHub]]
FromHub = tuple[int, list[ToFront]]
