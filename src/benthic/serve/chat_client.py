"""A conversation with a running server, streamed to a terminal."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
from rich.markup import escape

from benthic import units
from benthic.errors import ServeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from rich.console import Console

CONNECT_S = 5.0
STOP_S = 30.0


class RefusedError(ServeError):
    """The server answered with an error; `code` is the error's own."""

    def __init__(self, message: str, code: str | None) -> None:
        super().__init__(message)
        self.code = code


class ChatSession:
    """Keeps the messages, asks the server, prints what comes.

    Args:
        url: of the server, without `/v1`.
        console: where answers appear.
        api_key: sent as a bearer token.
        model: a served name; None takes the server's first.
        system: the first message.
        sampling: request fields such as `temperature`.
        raw: continue the text through /v1/completions instead of chatting.
    Raises: ServeError when nothing answers at `url`.
    """

    def __init__(
        self,
        url: str,
        console: Console,
        *,
        api_key: str | None = None,
        model: str | None = None,
        system: str | None = None,
        sampling: Mapping[str, Any] | None = None,
        raw: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        timeout = httpx.Timeout(None, connect=CONNECT_S)
        self._http = httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=timeout)
        self._console = console
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._sampling = dict(sampling or {})
        self._raw = raw
        self._clock = clock
        self._messages: list[dict[str, str]] = list(self._system)
        self.model = model or self._first_model()

    def clear(self) -> None:
        """Forget the conversation; the system message stays."""
        self._messages = list(self._system)

    def say(self, text: str) -> None:
        """Send one message and print the answer as it comes; errors are printed, and the message forgotten.

        A server whose model has no chat template says so; from then on text is continued as with `raw`.
        """
        try:
            answer = self._continue(text) if self._raw else self._chat(text)
        except RefusedError as error:
            if error.code == "no_chat_template":
                self._console.print(
                    "[yellow]This model has no chat template: it continues your text (--raw).[/]"
                )
                self._raw = True
                self.say(text)
                return
            self._console.print(f"[bold red]error:[/] {escape(str(error))}")
            return
        except httpx.HTTPError as error:
            self._console.print(f"[bold red]error:[/] the connection failed: {escape(str(error))}")
            return
        if not self._raw:
            self._messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    def _first_model(self) -> str:
        try:
            response = self._http.get("/v1/models")
        except httpx.HTTPError as error:
            msg = (
                f"no server answers at {self._http.base_url}: {error}. Start one with `benthic serve MODEL`."
            )
            raise ServeError(msg) from error
        if response.status_code != 200:
            raise _refusal(response)
        return str(response.json()["data"][0]["id"])

    def _chat(self, text: str) -> str:
        body = {"messages": [*self._messages, {"role": "user", "content": text}]}
        return self._print("/v1/chat/completions", body, lambda choice: choice["delta"].get("content") or "")

    def _continue(self, text: str) -> str:
        body: dict[str, Any] = {"prompt": text}
        if "max_tokens" not in self._sampling:
            body["max_tokens"] = 256
        return self._print("/v1/completions", body, lambda choice: choice["text"])

    def _print(self, path: str, body: dict[str, Any], text_of: Callable[[Any], str]) -> str:
        """Stream one answer to the console and report its speed; Ctrl-C ends it early."""
        pieces: list[str] = []
        usage: dict[str, Any] = {}
        asked_s = self._clock()
        first_s: float | None = None
        try:
            for event in self._events(path, body):
                for choice in event["choices"]:
                    pieces.append(text_of(choice))
                    first_s = first_s or (self._clock() if pieces[-1] else None)
                    self._console.out(pieces[-1], end="", highlight=False)
                    self._console.file.flush()
                usage = event.get("usage") or usage
        except KeyboardInterrupt:
            self._console.print(" [dim](stopped)[/]", end="")
        self._console.print()
        if first_s is not None and usage:
            self._report(usage["completion_tokens"], first_s - asked_s, self._clock() - first_s)
        return "".join(pieces)

    def _report(self, tokens: int, ttft_s: float, rest_s: float) -> None:
        speed = f", {(tokens - 1) / rest_s:.1f} tokens/s" if tokens > 1 and rest_s > 0 else ""
        self._console.print(f"[dim]{units.plural(tokens, 'token')}, first after {ttft_s:.2f} s{speed}[/]")

    def _events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Chunks of a streamed answer. Raises: RefusedError for an error before or in the stream."""
        whole = {
            "model": self.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._sampling,
            **body,
        }
        with self._http.stream("POST", path, json=whole) as response:
            if response.status_code != 200:
                response.read()
                raise _refusal(response)
            for line in response.iter_lines():
                data = line.removeprefix("data: ")
                if not line or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise RefusedError(event["error"]["message"], event["error"]["code"])
                yield event


def _refusal(response: httpx.Response) -> RefusedError:
    try:
        error = response.json()["error"]
        return RefusedError(error["message"], error.get("code"))
    except (ValueError, KeyError, TypeError):
        return RefusedError(f"HTTP {response.status_code}: {response.text[:200]}", None)


@contextmanager
def local_server(model: Path, console: Console) -> Iterator[str]:
    """Run `benthic serve MODEL` on a free port for the length of the block; gives its address.

    Raises:
        ServeError: the server ended before it was ready, with the end of its log.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    start = "from benthic.cli.main import main; main()"
    command = [sys.executable, "-c", start, "serve", str(model), "--port", str(port), "--disable-log-stats"]
    with tempfile.TemporaryFile("w+") as log:
        # a session of its own: Ctrl-C in the terminal stops an answer, not the server
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)  # noqa: S603 (our own)
        address = f"http://127.0.0.1:{port}"
        try:
            with console.status(f"loading {model}"):
                _wait_healthy(process, address)
            if process.poll() is not None:
                log.seek(0)
                msg = f"serving {model} ended with code {process.returncode}: {log.read()[-500:].strip()}"
                raise ServeError(msg)
            yield address
        finally:
            _stop(process)


def _wait_healthy(process: subprocess.Popen[bytes], address: str) -> None:
    """Until the server answers or has ended."""
    while process.poll() is None:
        try:
            if httpx.get(f"{address}/health", timeout=CONNECT_S).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
