"""Where a request goes: which instance prefills it, which one decodes it, or that it has to wait.

Everything here is a pure function of what the router has assigned so far. A policy is two rankings of
instances, the lowest first, and a length; another policy is another pair of functions.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from benthic.errors import ConfigError
from benthic.sched.blocks import ROOT, block_key

Role = Literal["prefill", "decode"]


@dataclass(frozen=True, kw_only=True, slots=True)
class InstanceState:
    """One instance as the router knows it.

    Attributes:
        name: unique.
        role: what it is kept for; any instance can do everything.
        open: it is up and takes new requests.
        num_requests: requests assigned to it that have not ended there.
        queued_tokens: prompt tokens assigned to it and not computed yet.
        used_blocks: blocks that its requests hold or will hold when they start.
        num_blocks: blocks of its cache.
        block_size: tokens in one of them.
    """

    name: str
    role: Role
    open: bool
    num_requests: int
    queued_tokens: int
    used_blocks: int
    num_blocks: int
    block_size: int


class Query(NamedTuple):
    """A request to place.

    `num_tokens` are known (prompt and what was put out before a retry); `decodes` is False when one more
    token ends it; `cached` names the instances that have the beginning of the prompt, with tokens.
    """

    num_tokens: int
    decodes: bool = True
    cached: Mapping[str, int] = {}

    def missing(self, name: str) -> int:
        """Tokens that instance `name` would have to compute; the last known one always."""
        return max(1, self.num_tokens - self.cached.get(name, 0))


class Route(NamedTuple):
    """`prefill` computes the prompt and `decode` the rest; without `prefill`, `decode` does both."""

    decode: str
    prefill: str | None = None


Ranking = Callable[[Query, InstanceState], tuple[float, ...]]


def shortest_queue(query: Query, state: InstanceState) -> tuple[float, ...]:  # noqa: ARG001 (a Ranking)
    """Fewest prompt tokens ahead (DistServe section 4.3)."""
    return (state.queued_tokens, state.num_requests)


def prefix_affinity(query: Query, state: InstanceState) -> tuple[float, ...]:
    """Fewest tokens until the first one comes out: those ahead, and those of this prompt not cached there."""
    return (state.queued_tokens + query.missing(state.name), state.num_requests)


def least_loaded(query: Query, state: InstanceState) -> tuple[float, ...]:  # noqa: ARG001 (a Ranking)
    """The smallest share of blocks in use, then the fewest requests (DeepSeek's decode balancer)."""
    return (state.used_blocks / state.num_blocks, state.num_requests)


def cache_aware(query: Query, state: InstanceState) -> tuple[float, ...]:
    """The smallest share of its cache held once the request is there, what is cached of it for nothing.

    So a conversation goes back to where it was, unless that instance holds more by as many tokens.
    """
    held = state.used_blocks * state.block_size + query.missing(state.name)
    return (held / (state.num_blocks * state.block_size), state.num_requests)


RANKINGS: Mapping[str, Ranking] = {
    "shortest_queue": shortest_queue,
    "prefix_affinity": prefix_affinity,
    "least_loaded": least_loaded,
    "cache_aware": cache_aware,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """How requests are placed.

    Attributes:
        prefill: ranks the instances that prefill.
        decode: ranks those that decode.
        local_tokens: a request with at most so many tokens to compute is prefilled where it decodes
            (conditional disaggregation): the transfer would cost more than it keeps away.
        prefill_share: most of a prefill instance's blocks that requests may hold there, leases included.
        decode_share: most of a decode instance's blocks at which it still takes a request; the rest is for
            growth (DistServe's back-pressure is 0.9).

    Raises:
        ConfigError: a share is outside (0, 1] or `local_tokens` is negative.
    """

    prefill: Ranking = prefix_affinity
    decode: Ranking = least_loaded
    local_tokens: int = 0
    prefill_share: float = 0.5
    decode_share: float = 0.9

    def __post_init__(self) -> None:
        for name in ("prefill_share", "decode_share"):
            if not 0.0 < getattr(self, name) <= 1.0:
                msg = f"{name} = {getattr(self, name)} is not a share in (0, 1]."
                raise ConfigError(msg)
        if self.local_tokens < 0:
            msg = f"local_tokens = {self.local_tokens}; use 0 to prefill nothing on decode instances."
            raise ConfigError(msg)


def choose(query: Query, states: Sequence[InstanceState], policy: Policy) -> Route | None:
    """Place a request, or None: it has to wait until a request ends or an instance joins.

    Without an open prefill instance the decode instances prefill for themselves, and without an open decode
    instance the others decode. An idle instance always has room: the engine says what can never fit.
    """
    there = [state for state in states if state.open]
    prefills = [state for state in there if state.role == "prefill"]
    decodes = [state for state in there if state.role == "decode"]
    if not query.decodes and prefills:
        decodes = prefills
    decode = _best(query, decodes or there, policy.decode, policy.decode_share)
    if decode is None:
        return None
    local = decode.role == "prefill" or query.missing(decode.name) <= policy.local_tokens
    if local or not prefills:
        return Route(decode.name)
    prefill = _best(query, prefills, policy.prefill, policy.prefill_share)
    return None if prefill is None else Route(decode.name, prefill.name)


def _best(
    query: Query, states: Sequence[InstanceState], ranking: Ranking, share: float
) -> InstanceState | None:
    roomy = [state for state in states if _has_room(query, state, share)]
    return min(roomy, key=lambda state: (*ranking(query, state), state.name), default=None)


def _has_room(query: Query, state: InstanceState, share: float) -> bool:
    need = -(-query.num_tokens // state.block_size)
    return not state.num_requests or state.used_blocks + need <= share * state.num_blocks


@dataclass(kw_only=True)
class PrefixMap:
    """Remembers which instance computed which beginnings of prompts; the least recently used go first.

    A guess, not a promise: instances evict by themselves. `block_size` is the grain, `most_keys` the bound.
    """

    block_size: int
    most_keys: int = 1 << 16
    _owners: OrderedDict[bytes, set[str]] = field(default_factory=OrderedDict)

    def keys(self, tokens: Sequence[int]) -> tuple[bytes, ...]:
        """One key for every full block, each naming all tokens up to its end."""
        keys, parent = [], ROOT
        packed = array("q", tokens)
        whole, size = packed.tobytes(), self.block_size * packed.itemsize
        for start in range(0, len(whole) - size + 1, size):
            parent = block_key(parent, whole[start : start + size])
            keys.append(parent)
        return tuple(keys)

    def cached(self, keys: Sequence[bytes]) -> dict[str, int]:
        """Tokens that every instance which has any of the beginning probably has."""
        found: dict[str, int] = {}
        for index, key in enumerate(keys):
            owners = self._owners.get(key, ())
            there = [name for name in owners if found.get(name, 0) == index * self.block_size]
            if not there:
                break
            self._owners.move_to_end(key)
            found.update(dict.fromkeys(there, (index + 1) * self.block_size))
        return found

    def note(self, name: str, keys: Sequence[bytes]) -> None:
        """Instance `name` has these blocks now."""
        for key in keys:
            self._owners.setdefault(key, set()).add(name)
            self._owners.move_to_end(key)
        while len(self._owners) > self.most_keys:
            self._owners.popitem(last=False)

    def forget(self, name: str) -> None:
        """Instance `name` is gone, and what it had with it."""
        for owners in self._owners.values():
            owners.discard(name)
