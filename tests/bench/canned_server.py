"""An OpenAI-compatible server of known behaviour, on a thread of its own."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Iterator

TTFT_S, TPOT_S = 0.05, 0.01


class Canned:
    """Streams `max_tokens` words; the prompts "refuse", "break" and "silent" make it misbehave."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.in_flight = 0
        self.most_in_flight = 0

    async def models(self, _: web.Request) -> web.Response:
        card = {"id": "canned", "object": "model", "max_model_len": 100}
        return web.json_response({"object": "list", "data": [card]})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._complete(request)
        finally:
            self.in_flight -= 1

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("Authorization"))
        if body["prompt"] == "refuse":
            return web.json_response({"error": {"message": "too many requests", "code": 429}}, status=429)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if body["prompt"] == "silent":
            await asyncio.sleep(1)
        await asyncio.sleep(TTFT_S)
        for number in range(body["max_tokens"]):
            if number:
                await asyncio.sleep(TPOT_S)
            await response.write(chunk(number + 1))
            if body["prompt"] == "break":
                request.transport.abort()
                return response
        await response.write(b"data: [DONE]\n\n")
        return response


def chunk(tokens: int) -> bytes:
    usage = {"prompt_tokens": 4, "completion_tokens": tokens}
    body = {"choices": [{"index": 0, "text": "word ", "finish_reason": None}], "usage": usage}
    return f"data: {json.dumps(body)}\n\n".encode()


@contextmanager
def running() -> Iterator[tuple[str, Canned]]:
    """The address of a server, and the server."""
    canned = Canned()
    app = web.Application()
    app.add_routes([web.get("/v1/models", canned.models), web.post("/v1/completions", canned.complete)])
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    runner = web.AppRunner(app)

    async def start() -> int:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return runner.addresses[0][1]

    try:
        port = asyncio.run_coroutine_threadsafe(start(), loop).result(20)
        yield f"http://127.0.0.1:{port}", canned
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
        loop.close()
