"""Instances as fluids: prompts and outputs flow at given rates through steps of given length."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from benthic.sched.paces import Line
from benthic.sched.replan import Change, Replanner, Report, Split

MOST_TOKENS, MOST_SEQS = 2048, 64
PREFILL = Line(0.010, 0.0001)
"""9,526 tokens/s in steps of 2,048."""
DECODE = Line(0.010, 0.0002)
"""2,807 tokens/s in batches of 64."""


PATIENCE = 40_000
"""Tokens that wait on an instance before requests wait at the router."""


@dataclass
class Load:
    """Tokens per second that come in prompts and that would go out, and how long prompts are."""

    prompt: float
    output: float
    length: float = 500.0

    @classmethod
    def needing(cls, prefill: float, decode: float) -> Load:
        """What keeps so many instances of each kind busy at their fastest."""
        prompt = MOST_TOKENS / PREFILL.seconds(MOST_TOKENS)
        output = MOST_SEQS / DECODE.seconds(MOST_SEQS)
        return cls(prefill * prompt, decode * output)


@dataclass
class Totals:
    role: str
    steps: int = 0
    seconds: float = 0.0
    computed: int = 0
    rows: int = 0
    queued: float = 0.0
    done: float = 0.0
    draining_until: float = -1.0


@dataclass
class FluidFleet:
    """A fleet under a load; `noise` shakes the rates and the sizes of steps by so large a share."""

    replanner: Replanner
    prefill: int
    decode: int
    noise: float = 0.15
    drain_s: float = 2.0
    look_s: float = 1.0
    seed: int = 0
    now: float = 0.0
    changes: list[tuple[float, Change]] = field(default_factory=list)

    def __post_init__(self) -> None:
        roles = ["prefill"] * self.prefill + ["decode"] * self.decode
        self.instances = {f"{role}-{i}": Totals(role) for i, role in enumerate(roles)}
        self._random = random.Random(self.seed)  # noqa: S311 (not a secret)

    @property
    def split(self) -> Split:
        roles = [each.role for each in self.instances.values()]
        return Split(roles.count("prefill"), roles.count("decode"))

    def run(self, load: Load, seconds: float) -> list[Change]:
        """Play a load; returns the changes."""
        before = len(self.changes)
        until = self.now + seconds
        while self.now < until:
            self.now += self.look_s
            self._flow(load)
            change = self.replanner.observe(self.now, [self._report(name) for name in self.instances])
            if change is not None:
                self._turn(change)
        return [change for _, change in self.changes[before:]]

    def _turn(self, change: Change) -> None:
        instance = self.instances[change.name]
        assert self._steady(instance), "an instance that is changing is asked to change"
        assert change.before == self.split
        instance.role, instance.queued = change.role, 0.0
        instance.draining_until = self.now + self.drain_s
        assert change.after == self.split
        self.changes.append((self.now, change))

    def _steady(self, instance: Totals) -> bool:
        return instance.draining_until < self.now

    def _report(self, name: str) -> Report:
        each = self.instances[name]
        return Report(
            name=name,
            role=each.role,
            steady=self._steady(each),
            queued_tokens=round(each.queued) if each.role == "prefill" else 0,
            num_waiting=round(each.queued / self.answer) if each.role == "decode" else 0,
            steps=each.steps,
            step_seconds=each.seconds,
            computed_tokens=each.computed,
            rows=each.rows,
            tokens=each.rows,
        )

    def _flow(self, load: Load) -> None:
        """Prompts come in unless one side is full; those that are computed go on as outputs."""
        self.answer = load.output / load.prompt * load.length
        taking = {
            role: [each for each in self.instances.values() if each.role == role and self._steady(each)]
            for role in ("prefill", "decode")
        }
        full = any(each.queued > PATIENCE for each in self.instances.values())
        tokens = 0.0 if full else self._shaken(load.prompt) * self.look_s
        computed = 0.0
        for each in taking["prefill"]:
            before = each.computed
            self._prefill(each, tokens / len(taking["prefill"]), load)
            computed += each.computed - before
        for each in taking["decode"]:
            self._decode(each, computed * load.output / load.prompt / len(taking["decode"]))

    def _prefill(self, each: Totals, tokens: float, load: Load) -> None:
        """Steps are as large as what waits, up to the largest; what finds no time waits on."""
        each.queued += tokens
        size = min(MOST_TOKENS, self._shaken(max(64.0, each.queued / 8)))
        steps = min(round(each.queued / size), int(self.look_s / PREFILL.seconds(size)))
        each.steps += steps
        each.seconds += steps * PREFILL.seconds(size)
        each.computed += round(steps * size)
        each.done += steps * size
        each.rows += int(each.done / load.length)
        each.done %= load.length
        each.queued -= steps * size

    def _decode(self, each: Totals, tokens: float) -> None:
        """The batch is what makes steps put the rate out; beyond the largest, sequences wait."""
        each.queued += tokens
        rate = each.queued / self.look_s
        spare = 1.0 - rate * DECODE.slope
        batch = rate * DECODE.base / spare if spare > 0.0 else MOST_SEQS
        batch = min(MOST_SEQS, max(1.0, self._shaken(min(MOST_SEQS, batch))))
        steps = min(round(each.queued / batch), int(self.look_s / DECODE.seconds(batch)))
        each.queued = max(0.0, each.queued - steps * batch)
        each.steps += steps
        each.seconds += steps * DECODE.seconds(batch)
        each.computed += round(steps * batch)
        each.rows += round(steps * batch)

    def _shaken(self, value: float) -> float:
        return value * (1.0 + self.noise * self._random.uniform(-1.0, 1.0))
