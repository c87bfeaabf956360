"""Processes that answer HTTP, each on one core: what they make requests wait for on the way in and out.

A front reads requests and writes tokens in the order in which they came. While it is behind, tokens of a
request that has some waiting already go out with those, which costs less than a write of their own
(`serve/streams`): so it falls behind by at most one write a stream, and is late instead of overrun.

Kept by instance and not by request, for the sake of speed: of the tokens that a step brings, as many find
others waiting as the instance has writes waiting there.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benthic.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Hashable


@dataclass(frozen=True, kw_only=True)
class FrontCost:
    """Seconds of a front's core, and seconds on the way that keep none of its cores busy.

    Attributes:
        request_s: to take a request in.
        prompt_token_s: for each token of its prompt.
        write_s: to write to one client.
        token_s: for each token written.
        way_s: from the client to an engine and back to the client, besides all that: connecting, pipes,
            processes that wake up.
        hub_s: the same of the main process where it stands between fronts and engines, both ways together.

    Raises:
        ConfigError: one is negative or not finite.
    """

    request_s: float = 0.0
    prompt_token_s: float = 0.0
    write_s: float = 0.0
    token_s: float = 0.0
    way_s: float = 0.0
    hub_s: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0.0 <= value < math.inf:
                msg = f"a front's {name} is {value}, but seconds are finite and not below 0"
                raise ConfigError(msg)

    def seconds(self, prompt_tokens: float, output_tokens: float) -> float:
        """For one request whose tokens are all written one by one."""
        taken = self.request_s + prompt_tokens * self.prompt_token_s
        return taken + output_tokens * (self.write_s + self.token_s)

    def slower(self, times: float) -> FrontCost:
        """Everything that keeps a core busy takes so many times as long."""
        ways = {"way_s": self.way_s, "hub_s": self.hub_s}
        return FrontCost(**{name: value * times for name, value in vars(self).items()} | ways)

    def way_of(self, fronts: int) -> float:
        """Seconds on the way of a request and its first token with so many fronts."""
        return self.way_s + (self.hub_s if fronts > 1 else 0.0)


FREE = FrontCost()
"""As if requests and tokens took no time outside of steps."""


@dataclass(slots=True)
class Work:
    """Writes that wait on a front: of an instance, how many, seconds in all. A request taken in has none."""

    owner: Hashable
    writes: float
    seconds: float


class Front:
    """One process; times must not go back."""

    def __init__(self, cost: FrontCost) -> None:
        self.busy_s = 0.0
        self._cost = cost
        self._free_s = 0.0
        self._queue: deque[Work] = deque()
        self._waiting: dict[Hashable, float] = {}

    def take(self, now: float, prompt_tokens: int) -> float:
        """A request comes in; returns when the engine has it."""
        self._advance(now)
        self._add(Work(None, 0.0, self._cost.request_s + prompt_tokens * self._cost.prompt_token_s))
        return self._free_s

    def write(self, now: float, owner: Hashable, tokens: float, first: float = 0.0) -> None:
        """A step of an instance brings tokens, `first` of them for new streams."""
        self._advance(now)
        waiting = self._waiting.get(owner, 0.0)
        writes = tokens - min(tokens - first, waiting)
        self._waiting[owner] = waiting + writes
        self._add(Work(owner, writes, writes * self._cost.write_s + tokens * self._cost.token_s))

    def free_at(self, now: float) -> float:
        """When all that came until now is done."""
        return max(now, self._free_s)

    def _add(self, work: Work) -> None:
        self._queue.append(work)
        self._free_s += work.seconds
        self.busy_s += work.seconds

    def _advance(self, now: float) -> None:
        """Do what can be done until now."""
        left = self._free_s - now
        if left <= 0.0:
            self._free_s = now
            self._queue.clear()
            self._waiting.clear()
            return
        behind = sum([work.seconds for work in self._queue])
        while self._queue and behind > left:
            work = self._queue[0]
            done = min(1.0, (behind - left) / work.seconds) if work.seconds else 1.0
            behind -= done * work.seconds
            if work.writes:
                self._waiting[work.owner] -= done * work.writes
            if done < 1.0:
                work.writes *= 1.0 - done
                work.seconds *= 1.0 - done
                return
            self._queue.popleft()
