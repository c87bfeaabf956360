"""An instance of two ranks pulls from one of one rank: what either rank cannot do, and what it still does."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec
import pytest
import torch
from small_engine import is_empty, random_model, request, serve
from small_fleet import Pair, fleet_folder, replace_params
from test_transfer import PROMPT, Slow

from benthic.errors import TransferError
from benthic.model.checkpoint import save_pretrained
from benthic.serve.commands import ClosePages, Fetch, Fetched, Leave, OpenPages, decode_answer, encode
from benthic.serve.fetching import Fetching
from benthic.serve.fleet import load_instance
from benthic.serve.options import EngineOptions
from benthic.serve.seats import Seat
from benthic.serve.transfer.handshake import Region, Welcome
from benthic.serve.transfer.memory import Handle

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from benthic.serve.instance import Instance

pytestmark = pytest.mark.dist

ENGINE = EngineOptions(
    max_num_seqs=8,
    max_num_batched_tokens=64,
    block_size=4,
    num_blocks=96,
    num_threads=1,
    enforce_eager=True,
)
GONE = msgspec.msgpack.encode(Handle(2**22 + 1, 3, 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages") / "nano"
    save_pretrained(random_model(), folder, dtype=torch.float32)
    return folder


@contextmanager
def alone(folder: Path, **options: object) -> Iterator[Instance]:
    """An instance of one rank, in this process."""
    with fleet_folder() as desks:
        instance = load_instance(folder, replace(ENGINE, **options), f"ipc://{desks}/a", Seat())
        yield instance
        instance.leave()


@pytest.fixture(scope="module")
def reader(folder: Path) -> Iterator[Instance]:
    """An instance of two ranks, of which rank 0 is in this process."""
    with fleet_folder() as desks:
        instance = load_instance(folder, replace(ENGINE, tensor_parallel_size=2), f"ipc://{desks}/b", Seat())
        yield instance
        instance.leave()


@pytest.fixture
def both(folder: Path, reader: Instance) -> Iterator[Pair]:
    with alone(folder) as owner:
        pair = Pair(owner, reader)
        yield pair
        pair.settle()
        assert is_empty(owner)
        assert is_empty(reader)


def expected(both: Pair, name: str, prompt: list[int]) -> list[int]:
    """What the owner answers by itself."""
    return serve(both.owner, [request(f"{name}-alone", prompt, max_tokens=8)])[f"{name}-alone"].tokens


def test_every_rank_pulls(both: Pair) -> None:
    pulled = both.reader.stats().pulled_blocks
    asked = request("a", PROMPT, max_tokens=8)
    assert both.decode(asked, both.prefill(asked)) == expected(both, "a", PROMPT)
    assert both.reader.stats().pulled_blocks == pulled + 8


def test_blocks_that_one_rank_cannot_read_are_computed(both: Pair, caplog: pytest.LogCaptureFixture) -> None:
    asked = request("b", PROMPT[1:], max_tokens=8)
    pulled, whole = both.reader.stats().pulled_blocks, both.owner._desk._welcome
    gone = Region(kind="memory", num_blocks=96, handle=GONE)
    both.owner._desk._welcome = Welcome(whole.instance_id, (whole.regions[0], gone))
    with caplog.at_level(logging.WARNING):
        assert both.decode(asked, both.prefill(asked)) == expected(both, "b", PROMPT[1:])
    assert "b: rank 1: the other instance shares 1 bytes" in caplog.text
    assert "the prompt is computed here" in caplog.text
    assert both.reader.stats().pulled_blocks == pulled
    assert both.owner._desk.address not in both.reader._reader._owners


def test_an_owner_of_other_terms_is_refused_in_words(
    folder: Path, reader: Instance, caplog: pytest.LogCaptureFixture
) -> None:
    asked = request("c", PROMPT[2:], max_tokens=8)
    with alone(folder, block_size=8) as owner, caplog.at_level(logging.WARNING):
        both = Pair(owner, reader)
        assert both.decode(asked, both.prefill(asked)) == expected(both, "c", PROMPT[2:])
        both.settle()
        assert is_empty(owner)
    assert "block_size is 4 here and 8 there; the prompt is computed here" in caplog.text


def test_blocks_of_an_aborted_pull_are_given_away_when_every_rank_has_let_go(
    both: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(both.reader._reader, "wait", time.sleep)
    asked, events = request("d", PROMPT[3:], max_tokens=8), []
    (late,) = both.reader.engine.followers.pids
    first = both.prefill(asked)
    os.kill(late, signal.SIGSTOP)
    both.reader.add(replace_params(asked, output=first.tokens, pull=first.remote))
    incoming = both.reader._reader._incoming["d"]
    deadline = time.monotonic() + 20
    while not incoming.copying:
        assert time.monotonic() < deadline, "no copy has begun"
        both.reader.step()
    free = both.reader.stats().num_free_blocks

    def go_on() -> None:
        events.append(both.reader.stats().num_free_blocks)
        os.kill(late, signal.SIGCONT)

    threading.Timer(0.2, go_on).start()
    both.reader.abort("d")
    assert events == [free], "the abort did not wait"
    assert is_empty(both.reader)


class FakePages:
    """Pages of a rank whose copies take two looks, then succeed or fail; `opened` are the regions."""

    def __init__(self) -> None:
        self.opened: list[int] = []
        self.fails = False

    def source(self, region: Region) -> FakePages:
        if region.kind == "none":
            msg = "no such pages"
            raise TransferError(msg)
        self.opened.append(region.num_blocks)
        return self

    def start(self, remote_blocks: tuple[int, ...], local_blocks: tuple[int, ...]) -> Slow:
        def copy() -> None:
            if self.fails:
                msg = f"the link broke at {remote_blocks} to {local_blocks}"
                raise TransferError(msg)

        return Slow(copy, looks=2)


def test_a_rank_answers_every_fetch_once_however_it_ends() -> None:
    here, there = multiprocessing.Pipe()
    pages = FakePages()
    rank = Fetching(5, pages, there)

    def look() -> list[Fetched]:
        """Rank 0 says something; what the rank has said by the time it hears it."""
        here.send_bytes(encode(Leave()))
        assert rank.receive() == encode(Leave())
        answers = []
        while here.poll(0):
            answers.append(decode_answer(here.recv_bytes()))
        return answers

    regions = tuple(Region(kind="memory", num_blocks=n, handle=b"") for n in range(3))
    rank.open(OpenPages("a", regions))
    assert pages.opened == [2], "rank 5 reads rank 5 mod 3"
    rank.start(Fetch(1, "a", (7,), (8,)))
    assert [look(), look(), look(), look()] == [[], [], [Fetched(1, None)], []]
    pages.fails = True
    rank.start(Fetch(2, "a", (7,), (8,)))
    rank.close(ClosePages("a"))
    rank.start(Fetch(3, "a", (1,), (2,)))
    assert look() == [Fetched(3, "instance a is not open here")]
    assert [look(), look(), look()] == [[], [Fetched(2, "the link broke at (7,) to (8,)")], []]
    rank.open(OpenPages("b", (Region(kind="none", num_blocks=0, handle=b""),)))
    rank.start(Fetch(4, "b", (1,), (2,)))
    assert look() == [Fetched(4, "no such pages")]
