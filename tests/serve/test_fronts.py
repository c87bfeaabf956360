"""Several processes that answer HTTP before one engine: together they are the server that one of them is."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import httpx
import pytest
from running import benthic_server, fake_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from running import Running

FRONTS = 3
STREAM = {"model": "fake", "prompt": [5], "stream": True, "ignore_eos": True}


@pytest.fixture(scope="module")
def several(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("fronts") / "log"
    with fake_server(tokenizer_folder, log, fronts=FRONTS) as started:
        yield started


def front_of(server: Running, request_id: str) -> int:
    """Which front answered a request, as its log says."""
    found = re.search(rf"benthic\.serve\.api\[(\d)\]: {request_id}", server.log.read_text())
    return int(found[1])


@contextmanager
def one_client_a_front(server: Running, fronts: int = FRONTS) -> Iterator[list[httpx.Client]]:
    """A kept-alive connection to each of them; which one a connection reaches is the kernel's choice."""
    with ExitStack() as stack:
        clients: dict[int, httpx.Client] = {}
        until = time.monotonic() + 30
        while len(clients) < fronts:
            assert time.monotonic() < until, f"reached {sorted(clients)} only"
            client = stack.enter_context(server.http())
            answer = client.post("/v1/completions", json={"model": "fake", "prompt": [5], "max_tokens": 1})
            if answer.status_code == 200:
                clients.setdefault(front_of(server, answer.json()["id"]), client)
        yield [clients[slot] for slot in range(fronts)]


def pids(server: Running) -> list[int]:
    """The process of each front, by its slot, of the latest life."""
    started = re.findall(r"uvicorn\.error\[(\d)\]: Started server process \[(\d+)\]", server.log.read_text())
    latest = {int(slot): int(pid) for slot, pid in started}
    return [latest[slot] for slot in sorted(latest)]


def children(server: Running) -> list[int]:
    listing = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(server.process.pid)], capture_output=True, text=True, check=False
    )
    return [int(pid) for pid in listing.stdout.split()]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def wait_for(condition, what: str, seconds: float = 15.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.05)


def events(lines: Iterator[str]) -> Iterator[dict]:
    for line in lines:
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


@contextmanager
def streaming(client: httpx.Client, max_tokens: int) -> Iterator[Iterator[str]]:
    """A stream whose first event has come."""
    with client.stream("POST", "/v1/completions", json=STREAM | {"max_tokens": max_tokens}) as answer:
        assert answer.status_code == 200, answer.read()
        lines = answer.iter_lines()
        assert next(lines).startswith("data: {")
        yield lines


BODIES = [
    ("/v1/completions", {"prompt": [5, 6], "max_tokens": 4, "logprobs": 2, "n": 2}),
    ("/v1/completions", {"prompt": [[7], [40, 41]], "max_tokens": 3, "echo": True}),
    ("/v1/completions", {"prompt": "abc", "max_tokens": 30, "stop": ["k"]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}),
    ("/v1/completions", {"prompt": [316], "max_tokens": 4}),
    ("/v1/completions", {"prompt": [317], "max_tokens": 4}),
    ("/v1/completions", {"prompt": [5], "max_tokens": -1}),
]


def test_each_of_three_fronts_answers_as_one_process_does(several: Running, server: Running) -> None:
    def said(client: httpx.Client) -> list[tuple[int, str]]:
        answers = [client.post(path, json={"model": "fake"} | body) for path, body in BODIES]
        return [(a.status_code, re.sub(r'"id":"[^"]*"', "", a.text)) for a in answers]

    with server.http() as alone, one_client_a_front(several) as clients:
        expected = said(alone)
        assert [status for status, _ in expected] == [200, 200, 200, 200, 400, 500, 400]
        for client in clients:
            assert said(client) == expected
            assert client.get("/v1/models").json() == alone.get("/v1/models").json()
            assert client.get("/instances").status_code == 404
        assert clients[0].get("/openapi.json").json() == alone.get("/openapi.json").json()


def test_connections_spread_over_the_fronts_and_streams_are_whole(several: Running) -> None:
    def ask(start: int) -> tuple[str, str]:
        with several.http() as http:
            body = STREAM | {"prompt": [40 + start], "max_tokens": 20}
            with http.stream("POST", "/v1/completions", json=body) as answer:
                found = list(events(answer.iter_lines()))
            return found[0]["id"], "".join(each["choices"][0]["text"] for each in found)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(64)))
    assert [text for _, text in answers[:2]] == [
        "".join(chr(token + 29) for token in range(41 + start, 61 + start)) for start in (0, 1)
    ]
    counted = [front_of(several, name) for name, _ in answers]
    assert all(counted.count(slot) >= 3 for slot in range(FRONTS)), counted


def test_metrics_are_those_of_all_fronts_whichever_answers(several: Running) -> None:
    ended, ttft = "benthic:request_success_total{length}", "benthic:time_to_first_token_seconds_count"
    refused, below = "benthic:request_refused_total{404}", "benthic:request_prompt_tokens_bucket{2.0}"
    names = (ended, ttft, below)
    with one_client_a_front(several) as clients:
        before = several.metrics()
        for count, client in enumerate(clients, start=1):
            for _ in range(count):
                body = {"model": "fake", "prompt": [5, 6], "max_tokens": 2}
                assert client.post("/v1/completions", json=body).status_code == 200
            client.post("/v1/completions", json={"model": "other", "prompt": [5]})
        after = several.metrics()
        assert [after[name] - before[name] for name in names] == [6, 6, 6]
        assert after[refused] - before.get(refused, 0) == 3
        texts = [client.get("/metrics").text for client in clients]
    for text in texts:
        kinds = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
        assert len(kinds) == len(set(kinds))
        sample = 'benthic:request_success_total{finished_reason="length",model_name="fake"}'
        assert f"{sample} {after[ended]}" in text


def test_the_page_of_every_front_shows_the_requests_of_all(several: Running) -> None:
    with one_client_a_front(several) as clients, clients[1].stream("GET", "/dash/events") as page:
        shown = events(page.iter_lines())
        assert next(shown)["kind"] == "opening"
        name = clients[0].post("/v1/completions", json={"model": "fake", "prompt": [5]}).json()["id"]
        found = (card for tick in shown for card in cards_of(tick, name))
        ended = next(card for card in found if card["reason"])
        assert (ended["reason"], ended["tokens"]) == ("length", 16)
        assert [phase[0] for phase in ended["phases"]] == ["queue", "prefill", "decode"]
        with clients[2].stream("GET", "/dash/events") as late:
            past = next(events(late.iter_lines()))
            numbers = [card["number"] for card in past["requests"]]
            assert cards_of(past, name)
            assert len(set(numbers)) == len(numbers)


def cards_of(message: dict, name: str) -> list[dict]:
    return [card for card in message["requests"] if card["id"].startswith(name)]


@pytest.fixture(scope="module")
def slow(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("slow_fronts") / "log"
    settings = {"step_seconds": 0.02, "max_num_seqs": 2, "max_waiting": 1, "fronts": FRONTS}
    with fake_server(tokenizer_folder, log, **settings) as started:
        yield started


def test_room_is_that_of_the_whole_server_and_is_free_again_when_clients_leave(slow: Running) -> None:
    with one_client_a_front(slow) as clients:
        with ExitStack() as stack:
            for client in clients[:2]:
                stack.enter_context(streaming(client, 250))
            waiting = clients[2].build_request("POST", "/v1/completions", json=STREAM | {"max_tokens": 200})
            with ThreadPoolExecutor(1) as pool:
                third = pool.submit(clients[2].send, waiting, stream=True)
                slow.wait_until(lambda found: found["benthic:num_requests_waiting"] == 1)
                for client in (slow.http() for _ in range(6)):
                    with client:
                        answer = client.post("/v1/completions", json={"model": "fake", "prompt": [5]})
                        assert answer.status_code == 503, answer.text
                        assert "exceed max_num_seqs + max_waiting = 2 + 1" in answer.text
                stack.close()
                third.result().close()
        slow.wait_idle()
        assert clients[1].get("/health").status_code == 200


def test_a_killed_front_loses_its_own_requests_and_another_takes_its_place(slow: Running) -> None:
    with (
        one_client_a_front(slow) as clients,
        streaming(clients[0], 250) as lost,
        streaming(clients[1], 60) as kept,
    ):
        before = pids(slow)
        os.kill(before[0], signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            list(lost)
        assert "[DONE]" in list(kept)[-2]
    slow.wait_idle()
    wait_for(lambda: pids(slow)[0] != before[0], "the front is started again")
    assert pids(slow)[1:] == before[1:]
    with one_client_a_front(slow) as clients:
        assert all(client.get("/health").status_code == 200 for client in clients)
        counted = slow.metrics()
        assert counted["benthic:request_success_total{length}"] >= 2 * FRONTS
    assert "front 0 (pid" in slow.log.read_text()


def test_a_front_that_hangs_is_killed_and_another_takes_its_place(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    settings = {"fronts": 2, "stall_s": 4.0, "step_seconds": 0.02}
    with fake_server(tokenizer_folder, tmp_path / "log", **settings) as server:
        with one_client_a_front(server, 2) as clients, streaming(clients[0], 250) as lost:
            before = pids(server)
            os.kill(before[0], signal.SIGSTOP)
            with pytest.raises(httpx.TransportError):
                list(lost)
            assert clients[1].get("/health").status_code == 200
        wait_for(lambda: pids(server)[0] != before[0], "the front is started again")
        assert pids(server)[1] == before[1]
        assert "front 0 said nothing for" in server.log.read_text()
        server.wait_idle()


def test_a_key_has_one_limit_over_all_fronts(tokenizer_folder: Path, tmp_path: Path) -> None:
    with fake_server(tokenizer_folder, tmp_path / "log", fronts=2, requests_per_minute=4) as server:
        statuses = []
        for _ in range(8):
            with server.http(headers={"Authorization": "Bearer one"}) as http:
                statuses.append(
                    http.post("/v1/completions", json={"model": "fake", "prompt": [5]}).status_code
                )
        assert statuses == [200] * 4 + [429] * 4


def test_the_first_signal_drains_every_front_and_leaves_no_process(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    with fake_server(tokenizer_folder, tmp_path / "log", fronts=2, step_seconds=0.02) as server:
        family = children(server)
        assert len(family) == 3
        with one_client_a_front(server, 2) as clients, server.http() as other:
            other.get("/health")
            with streaming(clients[0], 60) as one, streaming(clients[1], 60) as two:
                for pid in (*pids(server), server.process.pid):  # as service managers do
                    os.kill(pid, signal.SIGTERM)
                wait_for(lambda: server.log.read_text().count("draining 1 requests") == 2, "both drain")
                assert other.post("/v1/completions", json={"model": "fake", "prompt": [5]}).status_code == 503
                for lines in (one, two):
                    found = list(lines)
                    assert found[-2] == "data: [DONE]"
                    assert "error" not in "".join(found)
        assert server.process.wait(20) == 0
        assert all(gone(pid) for pid in family)


def test_the_second_signal_ends_streams_with_an_error_at_once(tokenizer_folder: Path, tmp_path: Path) -> None:
    with fake_server(tokenizer_folder, tmp_path / "log", fronts=2, step_seconds=0.2) as server:
        with server.http() as client, streaming(client, 250) as lines:
            server.process.send_signal(signal.SIGTERM)
            draining = re.compile(r"\]: draining \d")
            wait_for(lambda: len(draining.findall(server.log.read_text())) == 2, "every front has heard it")
            server.process.send_signal(signal.SIGTERM)
            assert "shutting down" in "".join(lines)
        assert server.process.wait(20) == 0
        assert "stopping with 1 requests in flight" in server.log.read_text()


def test_without_the_main_process_nobody_is_left(tokenizer_folder: Path, tmp_path: Path) -> None:
    with fake_server(tokenizer_folder, tmp_path / "log", fronts=2, step_seconds=0.02) as server:
        family = children(server)
        with server.http() as client, streaming(client, 250) as lines:
            server.process.kill()
            assert "main process is gone" in "".join(lines)
        wait_for(lambda: all(gone(pid) for pid in family), "fronts and engine leave")


def test_a_dead_engine_is_named_by_every_front(tokenizer_folder: Path, tmp_path: Path) -> None:
    with fake_server(tokenizer_folder, tmp_path / "log", fronts=2, step_seconds=0.02) as server:
        with one_client_a_front(server, 2) as clients:
            with streaming(clients[0], 250) as lines:
                crash = {"model": "fake", "prompt": [319], "max_tokens": 4}
                answer = clients[1].post("/v1/completions", json=crash)
                assert answer.status_code == 500
                assert "killed by signal 9" in answer.json()["error"]["message"]
                assert "killed by signal 9" in "".join(lines)
            for client in clients:
                assert client.get("/health").status_code == 503
                refused = client.post("/v1/completions", json=crash)
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 1


def test_a_fleet_is_seen_and_changed_from_any_front(nano_checkpoint: Path, tmp_path: Path) -> None:
    names = ("--served-model-name", "fake", "--num-blocks", "64", "--block-size", "4")
    flags = ("--decode", "2", "--api-server-count", "2", *names)
    body = {"model": "fake", "prompt": [40, 41], "max_tokens": 6, "seed": 5, "ignore_eos": True}
    anew = httpx.Limits(max_keepalive_connections=0)  # so that each request reaches a front by chance
    with (
        benthic_server(nano_checkpoint, tmp_path / "log", *flags) as server,
        server.http(limits=anew) as http,
        one_client_a_front(server, 2) as clients,
    ):

        def statuses(client: httpx.Client) -> dict[str, str]:
            return {each["name"]: each["status"] for each in client.get("/instances").json()["data"]}

        both = dict.fromkeys(("decode-0", "decode-1"), "serving")
        assert [statuses(client) for client in clients] == [both, both]
        texts = {client.post("/v1/completions", json=body).json()["choices"][0]["text"] for client in clients}
        assert len(texts) == 1
        assert clients[0].delete("/instances/decode-0").status_code == 202
        wait_for(lambda: statuses(clients[1]) == {"decode-1": "serving"}, "it has drained")
        assert "no instance 'decode-0'" in http.delete("/instances/decode-0").json()["error"]["message"]
        joined = clients[1].post("/instances", json={"role": "decode"})
        assert (joined.status_code, joined.json()["status"]) == (202, "starting")
        wait_for(lambda: statuses(http).get("decode-2") == "serving", "it has joined", 60)
        assert http.post("/v1/completions", json=body).json()["choices"][0]["text"] in texts
        with clients[0].stream("GET", "/dash/events") as page:
            ticks = events(page.iter_lines())
            assert ["decode-1", "decode-2"] in (
                [each["name"] for each in tick["instances"]] for tick in ticks
            )
            name = clients[1].post("/v1/completions", json=body).json()["id"]
            shown = next(c for tick in ticks if (c := cards_of(tick, name)))
            assert {phase[3] for phase in shown[0]["phases"]} <= {"", "decode-1", "decode-2"}
            assert shown[0]["phases"][-1][3]
        assert "benthic:instance_up" in http.get("/metrics").text
