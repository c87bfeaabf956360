"""Answers as they arrive: the deltas of requests that belong together, for whoever waits for them."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Protocol, Self

from benthic.serve.messages import Delta

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Aborter(Protocol):
    """Whoever runs the requests of a stream."""

    def abort(self, request_id: str) -> None:
        """Stop a request; an id that is not in flight is ignored."""
        ...


class Streams(dict[str, "EngineStream"]):
    """Requests in flight, and where their deltas go."""

    def deliver(self, delta: Delta) -> None:
        """Pass a delta on; that of a request which was aborted while it was on its way is dropped."""
        stream = self.get(delta.request_id)
        if stream is None:
            return
        if delta.finish_reason is not None:
            del self[delta.request_id]
        stream.put(delta)

    def fail(self, error: Exception) -> None:
        """End all of them."""
        for stream in set(self.values()):
            stream.fail(error)
        self.clear()


class EngineStream:
    """Deltas of one request or of several that belong together, in order of arrival.

    Deltas of a request that wait to be read become one: whoever reads too slowly for every token gets several
    at a time, and falls no further behind.
    Ends when the last of them has finished. Close it (or use `async with`): what has not finished is aborted.
    """

    def __init__(self, client: Aborter, request_ids: Sequence[str]) -> None:
        self._client = client
        self._open = set(request_ids)
        self._items: deque[Delta | Exception] = deque()
        self._arrived = asyncio.Event()
        self._take: Callable[[Delta], None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()

    def __aiter__(self) -> EngineStream:
        return self

    async def __anext__(self) -> Delta:
        """The next delta.

        Raises:
            AdmissionError: the engine could never serve one of the requests.
            OverloadedError: it cannot serve it now.
            EngineDeadError: the engine process ended.
        """
        while not self._items:
            if not self._open:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        item = self._items.popleft()
        if isinstance(item, Exception):
            raise item
        return item

    async def relay(self, take: Callable[[Delta], None]) -> None:
        """Call `take` with every delta when it arrives, each as it came; returns after the last.

        Nobody is woken for a delta, which is most of what reading it here costs. `take` must not raise.
        Raises: what reading raises.
        """
        while self._items:
            take(await anext(self))
        self._take = take
        try:
            while self._open and not self._items:
                self._arrived.clear()
                await self._arrived.wait()
        finally:
            self._take = None
        async for delta in self:
            take(delta)

    def abort(self, request_id: str) -> None:
        """End one request early: no more of its deltas follow, and its blocks are freed at the next step."""
        self._items = deque(i for i in self._items if isinstance(i, Exception) or i.request_id != request_id)
        if request_id in self._open:
            self._open.discard(request_id)
            self._client.abort(request_id)
            self._arrived.set()

    def limit(self, seconds: float, error: Exception) -> None:
        """Fail with `error` when the stream has not been closed `seconds` from now."""
        self._timer = asyncio.get_running_loop().call_later(max(0.0, seconds), self.fail, error)

    def close(self) -> None:
        """Abort whatever has not finished."""
        if self._timer is not None:
            self._timer.cancel()
        for request_id in tuple(self._open):
            self.abort(request_id)

    def put(self, delta: Delta) -> None:
        """Called by the client: one more delta."""
        if delta.finish_reason is not None:
            self._open.discard(delta.request_id)
        if self._take is not None:
            self._take(delta)
            if not self._open:
                self._arrived.set()
            return
        before = None if delta.finish_reason in ("error", "abort") else self._waiting(delta.request_id)
        if before is None:
            self._items.append(delta)
        else:
            place, earlier = before
            self._items[place] = earlier.then(delta)
        self._arrived.set()

    def _waiting(self, request_id: str) -> tuple[int, Delta] | None:
        """The delta of this request that waits to be read, and its place in line."""
        for place, item in enumerate(self._items):
            if isinstance(item, Delta) and item.request_id == request_id:
                return place, item
        return None

    def fail(self, error: Exception) -> None:
        """Called by the client: nothing more will come."""
        self._items.append(error)
        self._arrived.set()
