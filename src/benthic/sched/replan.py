"""Which instance should change its role, prefill or decode, when the load is no longer what it was.

DistServe (OSDI'24) section 4.3 re-plans when lengths or rates shift, and its algorithms give each phase as
many instances as its rate needs: n = R / g_p and m = R / g_d. Here the number of instances is given, so their
roles are divided in that proportion:

    needed prefill instances = prompt tokens/s that arrive / (tokens/s of one)
    needed decode instances  = output tokens/s that these lead to / (tokens/s of one at the wanted pace),
                               or blocks in use / (blocks of one), where that is more
    utilisation of a split   = the larger of needed / there are, over both roles

What arrives is what was done, and by how much queues grew. How long a queue is tells what was, not what
comes: it stands on whichever side is full, and a rule that follows it goes to and fro in an overloaded fleet.
A queue that shrinks takes nothing away: the door may be closed until it has shrunk.

An instance changes when that makes the larger utilisation smaller by `gain`, and did so at every look of a
whole window. The same needs never ask for the way back, since it would have to gain too; what remains is
bounded by `dwell_s`. Speeds are those of `benthic.sched.paces`, from steps that ran; a target for the time to
first token takes away what waiting may cost (M/D/1, DistServe eq. (1)).

Nothing here reads a clock or knows processes: reports and `now` come in, at most one change comes out.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Final, NamedTuple

from benthic.errors import ConfigError
from benthic.sched.paces import LEAST_SHARE, Pace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benthic.sched.routing import Role

LOOKS: Final = 20
"""Looks in a window, where that makes them no rarer than one a second."""


@dataclass(frozen=True, kw_only=True)
class ReplanConfig:
    """When roles change.

    Attributes:
        max_num_batched_tokens: most tokens in one step of an instance.
        max_num_seqs: most sequences in one.
        window_s: rates are means over so long, and a gain must hold for as long again.
        dwell_s: roles stay at least so long after instances came, went or changed.
        gain: share of the larger utilisation that a change must take away.
        busy: a fleet whose larger utilisation is below is left alone.
        decode_share: share of a decode instance's blocks that requests may fill.
        ttft_s: wanted time to first token; None wants none in particular.
        tpot_s: wanted time per output token; likewise.

    Raises:
        ConfigError: a number is out of its range.
    """

    max_num_batched_tokens: int
    max_num_seqs: int
    window_s: float = 30.0
    dwell_s: float = 120.0
    gain: float = 0.2
    busy: float = 0.5
    decode_share: float = 0.9
    ttft_s: float | None = None
    tpot_s: float | None = None

    def __post_init__(self) -> None:
        if not self.window_s > 0.0 or self.dwell_s < self.window_s:
            msg = (
                f"window_s = {self.window_s} and dwell_s = {self.dwell_s}, but a window lasts more than 0 s "
                "and roles stay for at least one."
            )
            raise ConfigError(msg)
        if not 0.0 < self.gain < 1.0:
            msg = f"gain = {self.gain} is not in (0, 1): without a gain roles would change for nothing."
            raise ConfigError(msg)

    @property
    def look_s(self) -> float:
        """Seconds between two reports that tell enough."""
        return min(1.0, self.window_s / LOOKS)


class Report(NamedTuple):
    """One instance at one moment; `steps` to `tokens` count since it started.

    Attributes:
        name: unique.
        role: what it is kept for now.
        steady: it takes requests: it does not start, drain or change.
        num_requests: requests assigned to it.
        queued_tokens: prompt tokens assigned to it that are not computed.
        num_waiting: sequences that wait in it.
        used_share: share of its blocks that are held.
        steps: batches computed.
        step_seconds: spent on them.
        computed_tokens: tokens in them, of prompts and of outputs.
        rows: sequences in them that got tokens.
        tokens: those tokens; more than `rows` where drafts were accepted.
    """

    name: str
    role: Role
    steady: bool
    num_requests: int = 0
    queued_tokens: int = 0
    num_waiting: int = 0
    used_share: float = 0.0
    steps: int = 0
    step_seconds: float = 0.0
    computed_tokens: int = 0
    rows: int = 0
    tokens: int = 0


class Sample(NamedTuple):
    """What happened between two looks.

    Attributes:
        at: when the second was.
        prompt_tokens: computed by prefill instances.
        queued_tokens: by which their queues grew.
        prompts: whose first tokens they gave.
        waiting: sequences by which the queues of decode instances grew.
        rows: of sequences there.
        tokens: that these got.
        room: decode instances whose blocks they fill.
    """

    at: float
    prompt_tokens: int
    queued_tokens: int
    prompts: int
    waiting: int
    rows: int
    tokens: int
    room: float


class Needs(NamedTuple):
    """How many instances the load would keep busy, in each role, and why.

    Attributes:
        prefill: instances.
        decode: instances.
        prompt_rate: prompt tokens that arrive each second.
        prompt_speed: of them, what one instance computes a second.
        output_rate: tokens each second that they lead to.
        output_speed: of them, what one instance puts out at the wanted pace.
        room: decode instances whose blocks are full.
    """

    prefill: float
    decode: float
    prompt_rate: float
    prompt_speed: float
    output_rate: float
    output_speed: float
    room: float

    def utilisation(self, split: Split) -> float:
        """The larger one of a split; 1 is as much as its instances can do."""
        return max(self.prefill / split.prefill, self.decode / split.decode)


class Split(NamedTuple):
    """How many instances have which role."""

    prefill: int
    decode: int

    def after(self, role: Role) -> Split | None:
        """The split when one more has `role`; None where none would be left of the other."""
        step = 1 if role == "prefill" else -1
        split = Split(self.prefill + step, self.decode - step)
        return split if min(split) > 0 else None


class Change(NamedTuple):
    """Instance `name` is to have `role` from now on; the numbers that led to it print as a sentence."""

    name: str
    role: Role
    needs: Needs
    before: Split
    after: Split

    def __str__(self) -> str:
        needs, before, after = self.needs, self.before, self.after
        return (
            f"{self.name} is to {self.role}: prefill needs {needs.prefill:.2f} instances "
            f"({needs.prompt_rate:.0f} prompt tokens/s, {needs.prompt_speed:.0f} each), decode needs "
            f"{needs.decode:.2f} ({needs.output_rate:.0f} tokens/s, {needs.output_speed:.0f} each; blocks "
            f"fill {needs.room:.2f}); with "
            f"{after.prefill}P{after.decode}D instead of {before.prefill}P{before.decode}D the busier role "
            f"is {needs.utilisation(after):.0%} busy instead of {needs.utilisation(before):.0%}"
        )


class Replanner:
    """Looks at reports and says when one instance should change its role."""

    def __init__(self, config: ReplanConfig) -> None:
        self.needs: Needs | None = None
        self._config = config
        self._prefill = Pace(config.max_num_batched_tokens)
        self._decode = Pace(config.max_num_seqs)
        self._last: tuple[Report, ...] = ()
        self._samples: deque[Sample] = deque()
        self._quiet_since = self._wanted_since = self._began = 0.0
        self._wanted: Role | None = None

    def observe(self, now: float, reports: Sequence[Report]) -> Change | None:
        """Take reports of all instances, in the order of before; returns what to change, or None.

        While an instance is not steady nothing is decided, and rates begin anew when all are.
        """
        known = [(report.name, report.role) for report in self._last]
        here = [(report.name, report.role) for report in reports]
        if known != here or not all(report.steady for report in reports):
            self._begin(now, reports)
            return None
        self._note(now, reports)
        self.needs = self._measure(now)
        return self._decide(now, reports)

    def _begin(self, now: float, reports: Sequence[Report]) -> None:
        self._last = tuple(reports)
        self._samples.clear()
        self._began = self._quiet_since = now
        self._wanted = self.needs = None

    def _note(self, now: float, reports: Sequence[Report]) -> None:
        """Learn the pace of every instance, and keep what all of them did for a window."""
        sums = {"prefill": _Sum(), "decode": _Sum()}
        for before, report in zip(self._last, reports, strict=True):
            done = _Sum.between(before, report)
            sums[report.role].add(done)
            if done.steps:
                pace, size = (
                    (self._prefill, done.computed) if report.role == "prefill" else (self._decode, done.rows)
                )
                pace.add(size / done.steps, done.seconds / done.steps)
        prefill, decode = sums["prefill"], sums["decode"]
        full = self._config.decode_share
        self._samples.append(
            Sample(
                at=now,
                prompt_tokens=prefill.computed,
                queued_tokens=prefill.queued,
                prompts=prefill.rows,
                waiting=decode.waiting,
                rows=decode.rows,
                tokens=decode.tokens,
                room=sum([min(1.0, each.used_share / full) for each in reports if each.role == "decode"]),
            )
        )
        self._last = tuple(reports)
        while self._samples[0].at <= now - self._config.window_s:
            self._began = self._samples.popleft().at

    def _measure(self, now: float) -> Needs | None:
        """What the window's load needs; None while a window is not full or a speed not known."""
        passed = now - self._began
        if passed < self._config.window_s * (1.0 - 0.5 / LOOKS):
            return None
        load = Sample(*[sum(column) for column in zip(*self._samples, strict=True)])
        arrived = load.prompt_tokens + max(0, load.queued_tokens)
        growth = arrived / load.prompt_tokens if load.prompt_tokens else 1.0
        if load.prompts:
            growth *= load.prompts / max(1, load.prompts - max(0, load.waiting))
        output_rate = growth * load.tokens / passed
        prompt_speed = self._prompt_speed(load.prompt_tokens / max(1, load.prompts)) if arrived else inf
        output_speed = self._output_speed(load.tokens / load.rows) if load.rows else inf
        if prompt_speed is None or output_speed is None:
            return None
        room = load.room / len(self._samples)
        return Needs(
            prefill=arrived / passed / prompt_speed,
            decode=max(output_rate / output_speed, room),
            prompt_rate=arrived / passed,
            prompt_speed=prompt_speed,
            output_rate=output_rate,
            output_speed=output_speed,
            room=room,
        )

    def _prompt_speed(self, length: float) -> float | None:
        """Tokens/s of a prefill instance, whose prompts have a mean `length`, at the wanted TTFT."""
        step = self._prefill.within()
        if step is None:
            return None
        target_s = self._config.ttft_s
        return step.speed * (1.0 if target_s is None else load_within(length / step.speed, target_s))

    def _output_speed(self, accepted: float) -> float | None:
        """Tokens/s of a decode instance at the wanted TPOT; a step gives a sequence `accepted` tokens."""
        bound = self._config.tpot_s
        step = self._decode.within(inf if bound is None else bound * accepted)
        return None if step is None else step.speed * accepted

    def _decide(self, now: float, reports: Sequence[Report]) -> Change | None:
        config = self._config
        wanted = self._want(reports)
        if wanted is None or self._wanted is None or wanted.role != self._wanted:
            self._wanted = None if wanted is None else wanted.role
            self._wanted_since = now
        if wanted is None or now - self._wanted_since < config.window_s:
            return None
        if now - self._quiet_since < config.dwell_s:
            return None
        self._quiet_since = self._wanted_since = now
        return wanted

    def _want(self, reports: Sequence[Report]) -> Change | None:
        """The change that gains most now, if one gains enough."""
        needs = self.needs
        if needs is None:
            return None
        prefills = sum([report.role == "prefill" for report in reports])
        split = Split(prefills, len(reports) - prefills)
        if not min(split):
            return None
        utilisation = needs.utilisation(split)
        role: Role = "prefill" if needs.prefill / split.prefill > needs.decode / split.decode else "decode"
        after = split.after(role)
        if after is None or utilisation < self._config.busy:
            return None
        if needs.utilisation(after) > (1.0 - self._config.gain) * utilisation:
            return None
        candidates = [report for report in reports if report.role != role]
        idlest = min(candidates, key=lambda report: (report.num_requests, report.queued_tokens, report.name))
        return Change(idlest.name, role, needs, split, after)


@dataclass(kw_only=True)
class _Sum:
    """What one or more instances did between two looks; `queued` and `waiting` grew by so much."""

    steps: int = 0
    seconds: float = 0.0
    computed: int = 0
    rows: int = 0
    tokens: int = 0
    queued: int = 0
    waiting: int = 0

    @classmethod
    def between(cls, before: Report, after: Report) -> _Sum:
        return cls(
            steps=after.steps - before.steps,
            seconds=after.step_seconds - before.step_seconds,
            computed=after.computed_tokens - before.computed_tokens,
            rows=after.rows - before.rows,
            tokens=after.tokens - before.tokens,
            queued=after.queued_tokens - before.queued_tokens,
            waiting=after.num_waiting - before.num_waiting,
        )

    def add(self, other: _Sum) -> None:
        self.computed += other.computed
        self.rows += other.rows
        self.tokens += other.tokens
        self.queued += other.queued
        self.waiting += other.waiting


def load_within(service_s: float, target_s: float) -> float:
    """The share of its time that a server may be busy for the mean wait and service to stay in `target_s`.

    M/D/1, DistServe eq. (1): `D + rho D / (2 (1 - rho)) = target`, solved for rho. At least `LEAST_SHARE`.
    """
    spare = 2.0 * max(0.0, target_s - service_s)
    return max(LEAST_SHARE, spare / (spare + service_s)) if service_s else 1.0
