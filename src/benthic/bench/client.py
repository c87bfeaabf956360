"""The HTTP side of a load test: one streamed request to an OpenAI-compatible server, with times.

aiohttp, because a load generator must cost less than what it measures: its parser is compiled, and a chunk
costs half of what httpx takes for it (docs/adr/0011-bench-room.md). Nothing is retried: a second try is not
the request that was due.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import aiohttp
import msgspec

from benthic.bench.events import AnswerReader, error_text
from benthic.errors import ConfigError, ServeError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from benthic.bench.samples import Answer
    from benthic.bench.workload import Work

Api = Literal["openai", "openai-chat"]
PATHS: dict[Api, str] = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}
CONNECT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Target:
    """Which server, and what every request carries.

    Attributes:
        base_url: without the path.
        api: completions or chat completions.
        path: of the endpoint; empty means the API's own.
        model: as requests name it.
        api_key: sent as a bearer token.
        extra: fields added to every body.
        timeout_s: longest silence within one answer.
        continuous_usage: ask for token counts in every chunk; servers that do not know it ignore it.
    """

    base_url: str
    api: Api
    model: str
    path: str = ""
    api_key: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 600.0
    continuous_usage: bool = True

    @property
    def url(self) -> str:
        """Where requests go."""
        return self.base_url.rstrip("/") + (self.path or PATHS[self.api])

    def body(self, work: Work) -> dict[str, Any]:
        """The JSON of one request."""
        options = {"include_usage": True}
        if self.continuous_usage:
            options["continuous_usage_stats"] = True
        body = {
            "model": self.model,
            "max_tokens": work.output_tokens,
            "stream": True,
            "stream_options": options,
            **self.extra,
        }
        if self.api == "openai":
            return {**body, "prompt": work.prompt}
        if not isinstance(work.prompt, str):
            msg = "chat prompts are text, but this workload has token ids. Give --tokenizer, or use openai."
            raise ConfigError(msg)
        return {**body, "messages": [{"role": "user", "content": work.prompt}]}


class Client:
    """Sends requests over as many connections as are in flight."""

    def __init__(self, session: aiohttp.ClientSession, target: Target, clock: Callable[[], float]) -> None:
        self._session = session
        self._target = target
        self._clock = clock

    async def send(self, work: Work) -> Answer:
        """One request, to its end. Errors of server and connection become the answer's `error`."""
        body = msgspec.json.encode(self._target.body(work))
        reader = AnswerReader(self._clock())
        try:
            async with self._session.post(self._target.url, data=body) as response:
                if response.status != 200:
                    return _refused(reader, await response.read(), response.status, self._clock())
                async for data in response.content.iter_any():
                    reader.feed(self._clock(), data)
        except TimeoutError:
            return _failed(reader, f"no byte in {self._target.timeout_s:g} s", self._clock())
        except aiohttp.ClientError as error:
            return _failed(reader, f"the connection failed: {type(error).__name__}: {error}", self._clock())
        return reader.end(self._clock())

    async def get_json(self, path: str) -> Any:
        """GET a JSON document. Raises: ServeError when there is none."""
        url = self._target.base_url.rstrip("/") + path
        try:
            async with self._session.get(url, timeout=aiohttp.ClientTimeout(total=CONNECT_S)) as response:
                if response.status != 200:
                    msg = f"GET {url} was answered with {response.status}: {(await response.text())[:200]}"
                    raise ServeError(msg)
                return await response.json(content_type=None)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            msg = f"GET {url} failed: {type(error).__name__}: {error}. Is the server up?"
            raise ServeError(msg) from error


@asynccontextmanager
async def connect(target: Target, clock: Callable[[], float]) -> AsyncIterator[Client]:
    """A client for the length of the block."""
    headers = {"Content-Type": "application/json"}
    if target.api_key is not None:
        headers["Authorization"] = f"Bearer {target.api_key}"
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=target.timeout_s)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session:
        yield Client(session, target, clock)
    await asyncio.sleep(0)  # let the transports close


def _failed(reader: AnswerReader, why: str, now: float) -> Answer:
    return replace(reader.end(now), error=why)


def _refused(reader: AnswerReader, body: bytes, status: int, now: float) -> Answer:
    try:
        found = msgspec.json.decode(body)
        words = error_text(found.get("error", found) if isinstance(found, dict) else found)
    except msgspec.DecodeError:
        words = body[:200].decode(errors="replace")
    return _failed(reader, f"HTTP {status}: {words}", now)
