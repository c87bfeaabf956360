"""Answers that notice when the client goes away: one value, or a stream of server-sent events."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.responses import Response

from benthic.errors import BenthicError
from benthic.serve import api_errors

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Coroutine

    from starlette.types import Receive, Scope, Send

    from benthic.serve.metrics import Metrics

logger = logging.getLogger("benthic.serve.api")
Result = TypeVar("Result")

DONE = b"data: [DONE]\n\n"


class ClientGoneError(Exception):
    """The client closed the connection; nobody is left to answer."""


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Run `work` to its end, or cancel it as soon as the client disconnects.

    The request body must have been read: from then on the only message left is the disconnect.
    Raises: ClientGoneError in the latter case.
    """
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise ClientGoneError
        return worker.result()
    finally:
        for task in (worker, watcher):
            task.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events, `data: …` each, `data: [DONE]` at the end.

    The status goes out with the first event, so whatever fails before it still gets an error status. What
    fails later ends the stream with an event that holds the error. When the client goes away the generator is
    closed at once. With `framed`, events come as whole frames, errors and the end among them.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], metrics: Metrics, *, framed: bool = False) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._framed = framed
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, or stop when the client is gone."""
        try:
            await until_disconnect(receive, self._run(scope, receive, send))
        except ClientGoneError:
            logger.debug("the client left in the middle of a stream")

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        async with aclosing(self._events) as events:
            try:
                async for event in events:
                    if not started:
                        started = True
                        await self._start(send)
                    await _send_body(send, event if self._framed else _frame(event), more=True)
            except BenthicError as error:
                failure = api_errors.of(error)
                self._metrics.refused(failure.status)
                if not started:
                    await failure.response()(scope, receive, send)
                    return
                await _send_body(send, _frame(failure.body()), more=True)
            await _send_body(send, b"" if self._framed else DONE, more=False)

    async def _start(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})


def _frame(event: bytes) -> bytes:
    return b"data: " + event + b"\n\n"


async def _send_body(send: Send, body: bytes, *, more: bool) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
