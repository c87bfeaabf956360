"""One front as the main process sees it: what it has in flight, and what it is to be told."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import TYPE_CHECKING, Final

import msgspec
import zmq

from benthic.serve.front_messages import FAILURES

if TYPE_CHECKING:
    from collections.abc import Callable

    from benthic.errors import BenthicError
    from benthic.serve.front_messages import FailureName, Seat, ToFront
    from benthic.serve.messages import Delta
    from benthic.serve.streams import EngineStream

NOBODY: Final = msgspec.Raw(msgspec.msgpack.encode([]))
"""No entries, and no counts."""


class FrontLink:
    """One front: what it has in flight, and what it is to be told.

    Args:
        seat: its place.
        socket: the pipe that leads to it.
        in_flight: sequences of the whole server.
    """

    def __init__(self, seat: Seat, socket: zmq.Socket[bytes], in_flight: Callable[[], int]) -> None:
        self.seat = seat
        self.streams: dict[str, EngineStream] = {}
        self.serving = asyncio.Event()
        self.heard_s = 0.0
        self.counts: msgspec.Raw = NOBODY
        self.census = 0
        self._socket = socket
        self._in_flight = in_flight
        self._encode = msgspec.msgpack.Encoder().encode
        self._outbox: list[ToFront] = []
        self._unsent: deque[bytes] = deque()
        self._closed = False
        self._call_soon = asyncio.get_running_loop().call_soon

    def post(self, message: ToFront) -> None:
        """Tell it at the loop's next turn, with whatever else there is by then."""
        if not self._outbox:
            self._call_soon(self.flush)
        self._outbox.append(message)

    def deliver(self, delta: Delta) -> None:
        """Pass a token on."""
        if delta.finish_reason is not None:
            self.streams.pop(delta.request_id, None)
        if not self._outbox:
            self._call_soon(self.flush)
        self._outbox.append(delta)

    def flush(self) -> None:
        """Send what there is; the pipe takes nothing before the front has come."""
        if self._closed:
            return
        if self._outbox:
            others = max(0, self._in_flight() - len(self.streams))
            self._unsent.append(self._encode((others, self._outbox)))
            self._outbox.clear()
        with contextlib.suppress(zmq.Again):
            while self._unsent:
                self._socket.send(self._unsent[0], zmq.NOBLOCK)
                self._unsent.popleft()

    def close(self) -> None:
        """Abort what it has in flight, and end the pipe."""
        for stream in set(self.streams.values()):
            stream.close()
        self.streams.clear()
        self._closed = True
        self._socket.close(linger=0)


def failure_of(error: BenthicError) -> FailureName:
    """What kind of error a front raises in its place."""
    return next((name for name, kind in FAILURES.items() if isinstance(error, kind)), "other")
