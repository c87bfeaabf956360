"""So many requests a minute for each key: a token bucket a key, as a plain ASGI layer."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.datastructures import Headers

from benthic.serve.api_errors import ApiError
from benthic.serve.middleware import is_open

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.types import ASGIApp, Receive, Scope, Send

MOST_BUCKETS = 10_000
"""Full buckets are forgotten beyond this many: they say nothing."""


@dataclass
class Bucket:
    """What a key has left, and when that was counted."""

    tokens: float
    at_s: float


class Buckets:
    """What every key has left of `per_minute` requests.

    A key that was idle may send `per_minute` at once; what it used comes back evenly over the minute.

    Args:
        per_minute: at least 1.
        clock: seconds, monotonic.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._buckets: dict[str, Bucket] = {}

    def take(self, who: str) -> float:
        """Use one of a key's requests; returns 0, or the seconds until it has one."""
        now = self._clock()
        if len(self._buckets) >= MOST_BUCKETS:
            self._forget_full(now)
        bucket = self._buckets.setdefault(who, Bucket(self._per_minute, now))
        bucket.tokens, bucket.at_s = self._refilled(bucket, now), now
        if bucket.tokens < 1.0:
            return (1.0 - bucket.tokens) * 60.0 / self._per_minute
        bucket.tokens -= 1.0
        return 0.0

    def _refilled(self, bucket: Bucket, now: float) -> float:
        return min(self._per_minute, bucket.tokens + (now - bucket.at_s) * self._per_minute / 60.0)

    def _forget_full(self, now: float) -> None:
        kept = {
            who: each for who, each in self._buckets.items() if self._refilled(each, now) < self._per_minute
        }
        self._buckets = kept


class RateLimit:
    """429 with `Retry-After` beyond `per_minute` requests of one key, or of one address without keys.

    Args:
        app: the next layer.
        per_minute: at least 1.
        take: uses one of a key's requests, wherever they are counted: 0, or the seconds until it has one.
        keyed: an outer layer lets through nobody without a key that it knows; else anything can be sent as
            one, and the address counts.
    """

    def __init__(
        self, app: ASGIApp, per_minute: int, take: Callable[[str], Awaitable[float]], *, keyed: bool
    ) -> None:
        self._app = app
        self._keyed = keyed
        self._per_minute = per_minute
        self._take = take

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 429."""
        if scope["type"] == "http" and not is_open(scope["path"]):
            wait_s = await self._take(_key(scope) if self._keyed else _address(scope))
            if wait_s > 0.0:
                await self._refusal(wait_s).response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, wait_s: float) -> ApiError:
        whose = "with this key" if self._keyed else "from this address"
        return ApiError(
            429,
            f"more than {self._per_minute} requests a minute {whose}. Wait {wait_s:.1f} s.",
            code="rate_limit_exceeded",
            retry_after_s=math.ceil(wait_s),
        )


def _key(scope: Scope) -> str:
    """Hashed, so that it is not kept."""
    given = Headers(scope=scope).get("authorization", "")
    return hashlib.sha256(given.encode("latin-1", errors="replace")).hexdigest()


def _address(scope: Scope) -> str:
    client = scope.get("client")
    return f"address {client[0] if client else 'unknown'}"
