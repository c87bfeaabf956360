"""Record what happened to a scheduler, and replay it: the same calls must give the same plans.

A recording is JSON lines: the configuration, then one line for every call that changed something, with its
`now`, and for plans and commits a digest of what came out. Whoever changes a decision sees the first line
where an old run takes another turn; the simulator and the live engine are compared in the same way. A live
engine's lines also say when they were written (`at`), and when each plan's step was launched.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from benthic.errors import DataError, ServeError
from benthic.sched.batching import BatchingConfig, Finished, Request, Scheduler, StepPlan, Totals

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from benthic.sched.plans import TransferPlan

VERSION = 2


class RecordingScheduler(Scheduler):
    """A scheduler that also writes every call that changes it, one line of JSON each (without the newline).

    Calls that raise, and aborts of unknown requests, change nothing and are not written.

    Args:
        config: as for `Scheduler`.
        write: takes one line; it decides where and when lines are stored.
        clock: seconds, for the lines' `at`; None writes none, so that equal runs have equal recordings.
    """

    def __init__(
        self,
        config: BatchingConfig,
        write: Callable[[str], object],
        clock: Callable[[], float] | None = None,
    ) -> None:
        super().__init__(config)
        self._write = write
        self._clock = clock
        self.leases.journal = self.pulls.journal = self.pulls.early.journal = self._put
        self._put({"version": VERSION, "config": asdict(config)})

    def add(self, request: Request, now: float) -> None:
        """As `Scheduler.add`."""
        super().add(request, now)
        self._put({"add": request.changed(), "now": now})

    def abort(self, request_id: str, now: float) -> Finished | None:
        """As `Scheduler.abort`."""
        ended = super().abort(request_id, now)
        if ended is not None:
            self._put({"abort": request_id, "now": now})
        return ended

    def reset_prefix_cache(self) -> int:
        """As `Scheduler.reset_prefix_cache`."""
        cleared = super().reset_prefix_cache()
        self._put({"reset_prefix_cache": cleared})
        return cleared

    def plan(self, now: float) -> StepPlan:
        """As `Scheduler.plan`."""
        plan = super().plan(now)
        self._put({"plan": _summary(plan), "now": now})
        return plan

    def commit(
        self,
        plan: StepPlan,
        accepted: Sequence[Sequence[int]],
        now: float,
        given: Sequence[int] | None = None,
    ) -> tuple[Finished, ...]:
        """As `Scheduler.commit`."""
        ended = super().commit(plan, accepted, now, given)
        rows = [list(row) for row in accepted]
        fewer = {} if given is None else {"given": list(given)}
        self._put({"commit": plan.number, "rows": rows, **fewer, "now": now, "ended": _digest(ended)})
        return ended

    def commit_counts(
        self, plan: StepPlan, now: float, counts: Sequence[int] | None = None
    ) -> tuple[Finished, ...]:
        """As `Scheduler.commit_counts`."""
        ended = super().commit_counts(plan, now, counts)
        given = None if counts is None else list(counts)
        self._put({"commit_counts": plan.number, "counts": given, "now": now, "ended": _digest(ended)})
        return ended

    def fail(self, plan: StepPlan, now: float) -> tuple[Finished, ...]:
        """As `Scheduler.fail`."""
        ended = super().fail(plan, now)
        self._put({"fail": plan.number, "now": now, "ended": _digest(ended)})
        return ended

    def launched(self, plan: StepPlan, now: float) -> None:
        """Write that the step of `plan` is launched, which changes nothing."""
        self._put({"launched": plan.number, "now": now})

    def _put(self, event: dict[str, Any]) -> None:
        if self._clock is not None:
            event = {**event, "at": self._clock()}
        self._write(json.dumps(event, separators=(",", ":")))


@dataclass(frozen=True, kw_only=True, slots=True)
class Replayed:
    """What a replay went through; every plan and every end was equal to the recorded one."""

    plans: int
    requests: int
    config: BatchingConfig
    totals: Totals


def replay(lines: Iterable[str], see: Callable[[StepPlan], object] | None = None) -> Replayed:
    """Make the recorded calls on a fresh scheduler and insist on the recorded outcomes.

    `see` gets every plan, which the recording only sums up.

    Raises:
        ServeError: an outcome differs; the line, what was recorded and what came out are named.
        DataError: the recording is not one (malformed or truncated line, other version).
    """
    numbered = _parse(lines)
    config = _read_config(numbered)
    player = _Player(config, see)
    for number, event in numbered:
        player.play(number, event)
    totals = player.scheduler.totals
    return Replayed(plans=player.num_plans, requests=totals.requests, config=config, totals=totals)


class _Player:
    def __init__(self, config: BatchingConfig, see: Callable[[StepPlan], object] | None) -> None:
        self.scheduler = Scheduler(config)
        self.num_plans = 0
        self._see = see
        self._plans: dict[int, StepPlan] = {}
        self._transfers: dict[int, TransferPlan] = {}

    def play(self, line: int, event: dict[str, Any]) -> None:
        kind = next(iter(event), "nothing")
        actions = {
            "add": self._add,
            "abort": self._abort,
            "reset_prefix_cache": self._reset,
            "plan": self._plan,
            "commit": self._commit,
            "commit_counts": self._commit_counts,
            "fail": self._fail,
            "renew": self._renew,
            "release": self._release,
            "transfers": self._plan_transfers,
            "pulled": self._pulled,
            "pull_failed": self._pull_failed,
            "early": self._early,
            "grown": self._grown,
            "dropped": self._dropped,
            "launched": self._launched,
        }
        if kind not in actions:
            msg = f"line {line} of the recording is a {kind!r}, but only {sorted(actions)} are known."
            raise DataError(msg)
        try:
            actions[kind](line, event)
        except (KeyError, TypeError) as error:
            msg = f"line {line} of the recording is a {kind!r} that lacks or misspells a field: {error}."
            raise DataError(msg) from error

    def _add(self, line: int, event: dict[str, Any]) -> None:  # noqa: ARG002 (one signature for all)
        self.scheduler.add(Request(**_tuples(event["add"])), event["now"])

    def _abort(self, line: int, event: dict[str, Any]) -> None:
        ended = self.scheduler.abort(event["abort"], event["now"])
        _insist(line, "aborted request", event["abort"], ended and ended.request_id)

    def _reset(self, line: int, event: dict[str, Any]) -> None:
        _insist(line, "blocks cleared", event["reset_prefix_cache"], self.scheduler.reset_prefix_cache())

    def _plan(self, line: int, event: dict[str, Any]) -> None:
        plan = self.scheduler.plan(event["now"])
        self.num_plans += 1
        self._plans[plan.number] = plan
        summary = json.loads(json.dumps(_summary(plan)))
        for name, value in event["plan"].items():
            _insist(line, f"plan {name}", value, summary[name])
        if self._see is not None:
            self._see(plan)

    def _launched(self, line: int, event: dict[str, Any]) -> None:
        number = event["launched"]
        _insist(line, "launched plan", number, number if number in self._plans else "not in flight")

    def _commit(self, line: int, event: dict[str, Any]) -> None:
        plan = self._plans.pop(event["commit"])
        ended = self.scheduler.commit(plan, event["rows"], event["now"], event.get("given"))
        _insist(line, f"ends of plan {plan.number}", event["ended"], _digest(ended))

    def _commit_counts(self, line: int, event: dict[str, Any]) -> None:
        plan = self._plans.pop(event["commit_counts"])
        ended = self.scheduler.commit_counts(plan, event["now"], event["counts"])
        _insist(line, f"ends of plan {plan.number}", event["ended"], _digest(ended))

    def _fail(self, line: int, event: dict[str, Any]) -> None:
        plan = self._plans.pop(event["fail"])
        ended = self.scheduler.fail(plan, event["now"])
        _insist(line, f"ends of plan {plan.number}", event["ended"], _digest(ended))

    def _renew(self, line: int, event: dict[str, Any]) -> None:
        found = self.scheduler.leases.renew(event["renew"], event["now"])
        _insist(line, f"lease {event['renew']!r}", "there", "there" if found else "missing")

    def _release(self, line: int, event: dict[str, Any]) -> None:
        found = self.scheduler.leases.release(event["release"])
        _insist(line, f"lease {event['release']!r}", "there", "there" if found else "missing")

    def _plan_transfers(self, line: int, event: dict[str, Any]) -> None:
        plans = self.scheduler.pulls.plan()
        self._transfers.update({plan.number: plan for plan in plans})
        _insist(line, "transfers", event["transfers"], json.loads(json.dumps([list(plan) for plan in plans])))

    def _pulled(self, line: int, event: dict[str, Any]) -> None:  # noqa: ARG002 (one signature for all)
        self.scheduler.pulls.commit(self._transfers.pop(event["pulled"]))

    def _pull_failed(self, line: int, event: dict[str, Any]) -> None:  # noqa: ARG002 (one signature for all)
        self.scheduler.pulls.fail(self._transfers.pop(event["pull_failed"]))

    def _early(self, line: int, event: dict[str, Any]) -> None:  # noqa: ARG002 (one signature for all)
        request = Request(**_tuples(event["early"]))
        self.scheduler.pulls.early.begin(request, event["num_tokens"], event["now"])

    def _grown(self, line: int, event: dict[str, Any]) -> None:  # noqa: ARG002 (one signature for all)
        self.scheduler.pulls.early.grow(event["grown"], event["num_tokens"])

    def _dropped(self, line: int, event: dict[str, Any]) -> None:  # noqa: ARG002 (one signature for all)
        self.scheduler.pulls.early.drop(event["dropped"])


def _insist(line: int, what: str, recorded: object, replayed: object) -> None:
    if recorded != replayed:
        msg = (
            f"line {line} of the recording: {what} was {recorded!r}, but the replay gives {replayed!r}. "
            "The scheduler decides differently now, or the recording was altered."
        )
        raise ServeError(msg)


def _parse(lines: Iterable[str]) -> Iterable[tuple[int, dict[str, Any]]]:
    """Numbered events; an iterator, so that a long recording streams."""

    def parsed() -> Iterable[tuple[int, dict[str, Any]]]:
        for number, line in enumerate(lines, start=1):
            try:
                event = json.loads(line)
            except ValueError as error:
                msg = f"line {number} of the recording is not JSON ({error}). Drop it if the run was cut off."
                raise DataError(msg) from error
            if not isinstance(event, dict):
                msg = f"line {number} of the recording is a {type(event).__name__}, not an object."
                raise DataError(msg)
            yield number, event

    return iter(parsed())


def _read_config(numbered: Iterable[tuple[int, dict[str, Any]]]) -> BatchingConfig:
    _, header = next(iter(numbered), (0, {}))
    if header.get("version") != VERSION:
        msg = f"the recording has version {header.get('version')}, but this replay reads version {VERSION}."
        raise DataError(msg)
    try:
        return BatchingConfig(**_tuples(header["config"]))
    except (KeyError, TypeError) as error:
        msg = f"line 1 of the recording holds no scheduler configuration: {error}."
        raise DataError(msg) from error


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _summary(plan: StepPlan) -> dict[str, Any]:
    """What a reader wants to see of a plan, and a digest of all of it."""
    copies = (plan.to_host, plan.from_host)
    return {
        "number": plan.number,
        "num_tokens": plan.num_tokens,
        "decodes": len(plan.decode_ids),
        "prefills": [[chunk.request_id, chunk.start, chunk.length] for chunk in plan.prefills],
        "events": [[type(event).__name__, event.request_id] for event in plan.events],
        "digest": _digest((plan, *copies) if any(copies) else plan),
    }


def _digest(outcome: object) -> str:
    """Ints, floats, strings and tuples have one `repr`, so equal outcomes have equal digests."""
    return blake2b(repr(outcome).encode(), digest_size=12).hexdigest()
