"""Plain ASGI layers round the routes: request ids, keys, body size, and a count of what is in flight.

Plain, because Starlette's `BaseHTTPMiddleware` would hide client disconnects from the routes.
"""

from __future__ import annotations

import asyncio
import secrets
import string
import uuid
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException

from benthic.serve.api_errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN_PATHS = frozenset({"/health", "/version", "/metrics", "/openapi.json", "/docs", "/dash"})
"""Answered without a key: probes, scrapers and browsers have none."""

OPEN_FOLDER = "/dash/assets/"
"""What the page is made of. What it shows is behind `/dash/events`, which wants a key."""


def is_open(path: str) -> bool:
    """Whether a path is answered without a key and without a limit."""
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)


ID_CHARS = frozenset(string.ascii_letters + string.digits + "-_.:/+=")
ID_LENGTH = 128


class RequestIds:
    """Every answer carries `X-Request-Id`: the client's own, or a new one.

    The client's own is 1 to 128 letters, digits and `-_.:/+=`; anything else is replaced.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Add the header to the answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        valid = 0 < len(given) <= ID_LENGTH and set(given) <= ID_CHARS
        request_id = given if valid else uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(raw=message["headers"]).append("x-request-id", request_id)
            await send(message)

        await self._app(scope, receive, send_with_id)


class ApiKeys:
    """401 unless the request brings `Authorization: Bearer KEY` with one of the keys."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if scope["type"] == "http" and not is_open(scope["path"]) and not self._known(scope):
            error = ApiError(
                401,
                "the API key is missing or wrong. Send Authorization: Bearer KEY.",
                code="invalid_api_key",
            )
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _known(self, scope: Scope) -> bool:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        given = key.strip().encode("latin-1", errors="replace")
        # every key is compared, in constant time, so that timing tells nothing
        matches = [secrets.compare_digest(given, known) for known in self._keys]
        return scheme.lower() == "bearer" and any(matches)


class BodyLimit:
    """413 for a body above `max_bytes`, declared or sent."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with a counting `receive`."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_bytes:
            error = too_large(int(declared), self._max_bytes)
            await error.response()(scope, receive, send)
            return
        received = 0

        async def receive_counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise HTTPException(413, str(too_large(received, self._max_bytes)))
            return message

        await self._app(scope, receive_counted, send)


def too_large(size: int, limit: int) -> ApiError:
    """413 with the two numbers."""
    return ApiError(
        413, f"the body has {size} bytes or more, but at most {limit} are taken", code="too_large"
    )


class InFlight:
    """Counts requests between arrival and the end of their answer, so that a drain can wait for them."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._count = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def count(self) -> int:
        """Requests being answered."""
        return self._count

    async def wait_idle(self) -> None:
        """Wait until nothing is being answered."""
        await self._idle.wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count the request while it is answered."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._count += 1
        self._idle.clear()
        try:
            await self._app(scope, receive, send)
        finally:
            self._count -= 1
            if not self._count:
                self._idle.set()
