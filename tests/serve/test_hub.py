"""The main process's end of the fronts, with an engine that does what the test says."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import pickle
import re
import socket
import sys
import time
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from benthic.errors import AdmissionError, EngineDeadError, OverloadedError, ServeError
from benthic.serve import front, launch
from benthic.serve.api_errors import ApiError
from benthic.serve.chat_template import ChatTemplate
from benthic.serve.front_messages import Join, Serving, Take
from benthic.serve.fronts import Fronts, spread
from benthic.serve.hub import Hub, RoutedJournal
from benthic.serve.journal import Journal
from benthic.serve.messages import Delta, Generate, Ready, SamplingParams, Stats
from benthic.serve.metrics import Metrics
from benthic.serve.rate_limit import Buckets
from benthic.serve.remote import FrontJournal, RemoteClient, RemoteWhole
from benthic.serve.service import ServiceSettings
from benthic.serve.streams import EngineStream
from benthic.serve.tokenizer import Tokenizer
from benthic.serve.whole import Alone

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from benthic.serve.journal import Entry

READY = Ready(
    model_name="m", max_model_len=64, vocab_size=10, eos_token_ids=(1,), num_blocks=8, block_size=16
)


class Engine:
    """What stands behind a hub; the test puts deltas."""

    def __init__(self) -> None:
        self.streams: dict[str, EngineStream] = {}
        self.aborted: list[str] = []
        self.trouble: str | None = None
        self.stats: Stats | None = None

    @property
    def in_flight(self) -> int:
        return len(self.streams)

    def open(self, requests: list[Generate]) -> EngineStream:
        if self.trouble is not None:
            raise EngineDeadError(self.trouble)
        names = [request.request_id for request in requests]
        stream = EngineStream(self, names)
        self.streams.update(dict.fromkeys(names, stream))
        return stream

    def abort(self, request_id: str) -> None:
        del self.streams[request_id]
        self.aborted.append(request_id)

    def put(self, name: str, *tokens: int, end: bool = False) -> None:
        stream = self.streams.pop(name) if end else self.streams[name]
        stream.put(Delta(request_id=name, tokens=tokens, finish_reason="length" if end else None))


class Pair:
    """A hub and two fronts of it, all in this loop."""

    def __init__(self, max_waiting: int) -> None:
        self.engine, self.stops = Engine(), []
        self.parts = SimpleNamespace(options=SimpleNamespace(stall_s=60.0))
        self.journal = RoutedJournal(time.monotonic)
        metrics = Metrics("m", READY, lambda: self.engine.stats)
        self.hub = Hub(
            self.engine,
            ready=READY,
            whole=Alone(metrics, buckets=Buckets(2, time.monotonic)),
            settings=ServiceSettings(served_names=("m",), root="m", max_num_seqs=1, max_waiting=max_waiting),
            journal=self.journal,
            started_at=7,
            log_level=logging.ERROR,
        )
        self.links = [self.hub.join(slot, 2) for slot in range(2)]
        self.journals = [FrontJournal(time.monotonic, slot=slot, slots=2) for slot in range(2)]
        self.fronts = [
            RemoteClient(link.seat, journal, lambda slot=slot: self.stops.append(slot))
            for slot, (link, journal) in enumerate(zip(self.links, self.journals, strict=True))
        ]
        self.metrics = [Metrics("m", READY, lambda: None) for _ in self.fronts]
        self.wholes = [RemoteWhole(*both) for both in zip(self.fronts, self.metrics, strict=True)]


@asynccontextmanager
async def pair(max_waiting: int = 9) -> AsyncIterator[Pair]:
    made = Pair(max_waiting)
    try:
        async with asyncio.timeout(30):
            for front in made.fronts:
                assert (await front.wait_ready(), (await front.welcome()).started_at) == (READY, 7)
                front.post(Serving())
            for link in made.links:
                await link.serving.wait()
            yield made
    finally:
        for front in made.fronts:
            await front.leave()
        await made.hub.close()


def request(name: str) -> Generate:
    return Generate(request_id=name, prompt=(5,), params=SamplingParams())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def test_a_front_gets_the_deltas_of_its_own_requests_in_order() -> None:
    async def scenario() -> None:
        async with pair() as made:
            one, two = (front.open([request(name)]) for front, name in zip(made.fronts, "ab", strict=True))
            await until(lambda: len(made.engine.streams) == 2)
            for token in range(3):
                made.engine.put("a", token)
            made.engine.put("b", 9, end=True)
            made.engine.put("a", 3, end=True)
            assert [each.tokens async for each in two] == [(9,)]
            assert [token async for each in one for token in each.tokens] == [0, 1, 2, 3]
            assert made.fronts[0].in_flight == 0

    asyncio.run(scenario())


def test_what_waits_for_the_loop_leaves_as_one_message() -> None:
    async def scenario() -> list[int]:
        async with pair() as made:
            made.fronts[0].open([request("a"), request("b")])
            await until(lambda: len(made.engine.streams) == 2)
            await asyncio.sleep(0.05)
            frames, taken = [], made.fronts[0]._decode
            made.fronts[0]._decode = lambda frame: frames.append(taken(frame)) or frames[-1]
            for token in range(10):
                made.engine.put("a", token)
                made.engine.put("b", token)
            await until(lambda: bool(frames))
            return [sum(isinstance(each, Delta) for each in messages) for _, messages in frames]

    assert asyncio.run(scenario()) == [20]


def test_a_request_that_a_front_gives_up_is_aborted_and_its_late_deltas_ignored() -> None:
    async def scenario() -> None:
        async with pair() as made:
            stream = made.fronts[0].open([request("a"), request("b")])
            await until(lambda: len(made.engine.streams) == 2)
            stream.abort("a")
            made.engine.put("a", 1)
            await until(lambda: made.engine.aborted == ["a"])
            made.engine.put("b", 2, end=True)
            assert [each.request_id async for each in stream] == ["b"]
            assert made.engine.in_flight == made.fronts[0].in_flight == 0

    asyncio.run(scenario())


def test_when_a_front_is_gone_its_requests_are_aborted_and_what_it_counted_stays() -> None:
    async def scenario() -> None:
        async with pair() as made:
            made.fronts[0].open([request("a")])
            kept = made.fronts[1].open([request("b")])
            made.journals[0].begin("a", arrival_s=0.0, prompt_tokens=1)
            made.metrics[0].refused(404)
            made.fronts[0].report()
            await until(lambda: len(made.journals[1].active) == 1)
            await made.hub.leave(made.links[0])
            await until(lambda: made.engine.aborted == ["a"])
            assert b'status="404"} 1.0' in await made.wholes[1].exposition()
            assert made.journals[1].active == ()
            made.engine.put("b", 2, end=True)
            assert [each.tokens async for each in kept] == [(2,)]

    asyncio.run(scenario())


@pytest.mark.parametrize("error", [AdmissionError, OverloadedError, EngineDeadError, ServeError])
def test_an_error_of_the_engine_is_the_same_error_in_the_front(error: type[ServeError]) -> None:
    async def scenario() -> None:
        async with pair() as made:
            stream = made.fronts[0].open([request("a")])
            await until(lambda: made.engine.in_flight == 1)
            made.engine.streams["a"].fail(error("9 blocks, but there are 4"))
            with pytest.raises(error, match="9 blocks, but there are 4") as found:
                await anext(stream)
            assert type(found.value) is error

    asyncio.run(scenario())


def test_a_dead_engine_is_trouble_before_its_requests_end() -> None:
    async def scenario() -> None:
        async with pair() as made:
            made.engine.trouble = "killed by signal 9"
            with pytest.raises(EngineDeadError, match="signal 9"):
                await anext(made.fronts[0].open([request("a")]))
            assert made.fronts[0].trouble == "killed by signal 9"

    asyncio.run(scenario())


def test_sequences_in_flight_and_their_limit_are_those_of_all_fronts() -> None:
    async def scenario() -> None:
        async with pair(max_waiting=1) as made:
            one = made.fronts[0].open([request("a"), request("b")])
            await until(lambda: made.engine.in_flight == 2)
            with pytest.raises(OverloadedError, match=r"2 sequences in flight \+ 1 new ones exceed"):
                await anext(made.fronts[1].open([request("c")]))
            assert made.fronts[1].in_flight == 2
            one.close()
            await until(lambda: made.engine.in_flight == 0)
            made.fronts[1].open([request("d")])
            await until(lambda: made.engine.in_flight == 1)

    asyncio.run(scenario())


def test_a_key_uses_up_one_bucket_and_questions_are_answered_with_their_errors() -> None:
    async def scenario() -> None:
        async with pair() as made:
            waits = [await whole.take("key") for whole in (*made.wholes, made.wholes[0])]
            assert waits[:2] == [0.0, 0.0]
            assert waits[2] > 29
            assert await made.fronts[0].ask(Take(who="another")) == 0.0
            with pytest.raises(ApiError, match="no instances") as refused:
                await made.fronts[0].ask(Join(role="decode"))
            assert refused.value.status == 404

    asyncio.run(scenario())


def test_metrics_are_the_sum_over_fronts_and_say_since_when_the_first_one_counts() -> None:
    async def scenario() -> tuple[bytes, list[bytes]]:
        async with pair() as made:
            for metrics, seconds in zip(made.metrics, (0.003, 0.3), strict=True):
                metrics.first_token(seconds)
                metrics.refused(404)
            return await made.wholes[0].exposition(), [metrics.render() for metrics in made.metrics]

    text, alone = asyncio.run(scenario())
    name = b"benthic:time_to_first_token_seconds"
    for bound, expected in ((b"0.001", 0), (b"0.005", 1), (b"0.25", 1), (b"0.5", 2), (b"+Inf", 2)):
        assert name + b'_bucket{le="%s",model_name="m"} %.1f\n' % (bound, expected) in text
    assert name + b'_sum{model_name="m"} 0.303\n' in text
    assert b'benthic:request_refused_total{model_name="m",status="404"} 2.0\n' in text
    assert text.count(b"# TYPE " + name + b" histogram") == 1
    assert since(text) == [min(since(alone[0]) + since(alone[1]))]


def since(text: bytes) -> list[float]:
    return [float(found) for found in re.findall(rb"request_refused_created{.*} (.*)", text)]


def test_phases_that_a_router_notes_reach_the_front_of_the_request() -> None:
    async def scenario() -> None:
        async with pair() as made:
            traced: list[Entry] = []
            made.journal.on_end(traced.append)
            made.journals[0].begin("a", arrival_s=time.monotonic(), prompt_tokens=1)
            made.fronts[0].open([request("a")])
            await until(lambda: made.engine.in_flight == 1)
            made.journal.enter("a", "prefill", "prefill-0")
            made.engine.put("a", 1)
            await until(lambda: len(made.journals[0].own[0].phases) == 2)
            made.journals[0].end("a", "length", tokens=1, met=None)
            await until(lambda: len(made.journals[1].ended) == len(made.journal.ended) == 1)
            (seen,) = made.journals[1].ended
            assert [entry.request_id for entry in traced] == ["a"]
            assert [phase[::2] for phase in seen.phases] == [("queue", ""), ("prefill", "prefill-0")]

    asyncio.run(scenario())


def test_fronts_are_told_to_stop_as_often_as_the_server_is() -> None:
    async def scenario() -> list[int]:
        async with pair() as made:
            made.hub.stop_all()
            made.hub.stop_all()
            await until(lambda: len(made.stops) == 4)
            return sorted(made.stops)

    assert asyncio.run(scenario()) == [0, 0, 1, 1]


def test_a_front_that_ends_before_it_serves_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_words: object) -> multiprocessing.process.BaseProcess:
        process = multiprocessing.get_context("fork").Process(target=sys.exit, args=(3,))
        process.start()
        return process

    async def scenario() -> None:
        monkeypatch.setattr(front, "start_front", start)
        async with pair() as made:
            bound = launch.bind("127.0.0.1", 0)
            fronts = Fronts(made.hub, spread(bound, 2), made.parts)
            with pytest.raises(ServeError, match="a front ended before it served"):
                await fronts.wait_serving()
            await fronts.kill()
            assert bound.fileno() == -1

    asyncio.run(scenario())


def test_sockets_of_fronts_share_a_port_that_nobody_else_can_have() -> None:
    sockets = spread(launch.bind("127.0.0.1", 0), 3)
    try:
        host, port = sockets[0].getsockname()
        assert {each.getsockname() for each in sockets} == {(host, port)}
        with pytest.raises(ServeError, match=f"cannot listen on {host}:{port}"):
            launch.bind(host, port)
        for _ in range(60):
            socket.create_connection((host, port)).close()
        assert all(accepted(each) for each in sockets)
    finally:
        for each in sockets:
            each.close()


def accepted(listening: socket.socket) -> int:
    """Connections that wait at a socket."""
    count = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            listening.accept()[0].close()
            count += 1
    return count


def test_a_front_that_cannot_read_its_pipe_ends_instead_of_letting_requests_wait() -> None:
    async def scenario() -> None:
        async with pair() as made:
            stream = made.fronts[0].open([request("a")])
            made.links[0]._socket.send(b"junk")
            with pytest.raises(EngineDeadError, match="the front failed"):
                await anext(stream)
            assert made.stops == [0, 0]
            assert made.fronts[1].trouble is None

    asyncio.run(scenario())


def test_processes_that_number_requests_never_give_one_number_twice() -> None:
    journals = [Journal(lambda: 0.0, slot=slot, slots=3) for slot in range(3)]
    for count, journal in ((5, journals[2]), (2, journals[0]), (3, journals[1])):
        for i in range(count):
            journal.begin(f"{i}", arrival_s=0.0, prompt_tokens=1)
    numbers = [entry.number for journal in journals for entry in journal.active]
    assert len(set(numbers)) == 10
    journals[2].end("4", "length", tokens=1, met=None)
    journals[0].show(journals[2].ended[0])
    journals[0].begin("x", arrival_s=0.0, prompt_tokens=1)
    assert journals[0].active[-1].number > journals[2].ended[0].number


def test_what_fronts_serve_with_can_be_sent_to_their_processes(tokenizer_folder: Path) -> None:
    template = ChatTemplate("{{ bos_token }}{{ messages[0].content }}", {"bos_token": "<s>"})
    sent = pickle.dumps((template, Tokenizer.from_folder(tokenizer_folder)))
    again, tokenizer = pickle.loads(sent)  # noqa: S301 (our own)
    messages = [{"role": "user", "content": "hi"}]
    assert again.render(messages) == template.render(messages) == "<s>hi"
    assert tokenizer.encode("hello there") == Tokenizer.from_folder(tokenizer_folder).encode("hello there")
