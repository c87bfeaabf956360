"""Runs with interpreted kernels only: `test_exchange_interpreter.py` starts it. See `peer_checks.py`."""

from __future__ import annotations

import functools
import itertools
import time
from unittest import mock

import pytest
import spawn as launcher
import torch
from peer_checks import check_overlap_and_recomputation, check_same_bits, shared_file_memory, size_for
from routings import PER_RANK, ROUTINGS, TOP_K, batches
from spawn import spawn

from benthic.errors import BackendError, ConfigError, ShapeError
from benthic.kernels import ops, triton_exchange
from benthic.parallel import exchange_nvlink
from benthic.parallel.exchange_memory import Mailbox, PeerMemory
from benthic.parallel.exchange_nvlink import NvlinkExchange


def memory(folder, rank, ranks):
    numbers = itertools.count()
    return lambda words: shared_file_memory(folder, rank, ranks, words, f"memory-{next(numbers)}")


def every_routing(rank, ranks, folder):
    shared = memory(folder, rank, ranks)
    same = functools.partial(check_same_bits, shared, rank, ranks, dtype=torch.float32, most=5, device="cpu")
    same(names=ROUTINGS[:1], width=1100, exact_rows=True)  # in two pieces
    same(names=ROUTINGS[:1], width=20, copies=True)
    with mock.patch.object(triton_exchange, "FEW_TOKENS", 2):  # as with hundreds of tokens
        same(names=ROUTINGS[:2], width=1100)
    many_tokens(shared, rank, ranks, same)
    if ranks == 2:
        names = ("half the experts empty", "one expert takes every token", "a rank without tokens")
        overlap = functools.partial(
            check_overlap_and_recomputation,
            shared, rank, ranks, dtype=torch.float32, width=24, device="cpu", most=4,
        )  # fmt: skip
        for copies in (False, True):
            same(names=names, width=20, copies=copies)
            same(names=ROUTINGS[:1], width=260, fp8=True, copies=copies)
            overlap(copies=copies)
            overlap(copies=copies, stream=Late)
            overlap(copies=copies, stream=Late, exact_rows=True)
            same(names=names[:1], width=20, copies=copies, exact_rows=True)


def as_many(tokens=2, programs=2):
    """As with hundreds of tokens: home in parts of 8 columns, by few programs that take few tokens."""
    tiny = {"FEW_TOKENS": 2, "PART": 8, "HOME_TOKENS": tokens, "multiprocessors": lambda _: 2 * programs}
    return mock.patch.multiple(triton_exchange, **tiny)


def many_tokens(shared, rank, ranks, same):
    with as_many():
        same(names=ROUTINGS[5:6], width=20)
        if ranks == 2:
            same(names=(ROUTINGS[0], *ROUTINGS[-2:]), width=20)
            same(names=ROUTINGS[:1], width=132, fp8=True)
            check_overlap_and_recomputation(
                shared, rank, ranks, dtype=torch.float32, width=24, device="cpu", most=4, exact_rows=True
            )
            for way in ((True, False), (False, True)):  # nothing but the way differs
                with mock.patch.multiple(exchange_nvlink, **dict(zip(WAYS, way, strict=True))):
                    same(names=ROUTINGS[:1], width=12)
    if ranks == 1:
        with as_many(tokens=8, programs=64):  # more than there are
            same(names=ROUTINGS[:1], width=20)


WAYS = ("SUMS_IN_PARTS", "FLAGS_WITH_ROWS")


def parts_that_come_late(rank, ranks, folder):
    """Rank 1 writes its sums by hand, NaN at first, then part by part in any order; rank 0 sums meanwhile."""
    with as_many():
        size = size_for(ranks, dtype=torch.float32, width=20, max_tokens=9)
        peers = memory(folder, rank, ranks)(size.words(ranks))
        box = NvlinkExchange(peers, size).home.take()
    generator = torch.Generator().manual_seed(3)
    expert = torch.rand(9, ranks * PER_RANK, generator=generator).topk(TOP_K, dim=1).indices.int()
    full, flags = box.signals.full, box.signals.full + torch.arange(3) * ranks + rank
    for order in itertools.permutations(range(3)):
        sums = torch.randn(2, 9, 20, generator=generator)
        box.await_free()
        if rank == 0:
            box.put(0, sums[0].view(torch.int32), None)
            peers.words[flags] = 1
            goes = torch.stack([(expert // PER_RANK == peer).any(1) for peer in range(2)])
            with as_many():
                out, _ = triton_exchange.sum_home(
                    box.rows_in(torch.float32), None, expert, box.signals,
                    rank=0, ranks=2, per_rank=PER_RANK, max_tokens=9,
                )  # fmt: skip
            assert torch.equal(out, torch.where(goes.unsqueeze(2), sums, 0).sum(0)), order
            assert not peers.words[full : full + 3 * ranks].any()
            assert not torch.cat((box.signals.pushed, box.signals.read)).any()
        else:
            written = torch.full_like(sums[1], torch.nan)
            box.put(0, written.view(torch.int32), None)
            for part in order:
                time.sleep(0.02)
                written[:, 8 * part : 8 * part + 8] = sums[1, :, 8 * part : 8 * part + 8]
                box.put(0, written.view(torch.int32), None)
                peers.peers[0][flags[part]] = 1
            box.raise_free()


class Late:
    """A push that runs as late as it may: what it reads must still be there, and unchanged."""

    def __init__(self, push, inputs):
        assert inputs
        self.waiting = [push]

    def join(self):
        if self.waiting:
            self.waiting.pop()()

    wait = join


@pytest.fixture
def _ranks_that_interpret(monkeypatch):
    """They need few of the modules that other tests' ranks do, and the interpreter's quicker way."""
    needed = ["torch.distributed", "benthic.parallel.exchange_nvlink", "members_once", "pytest"]
    monkeypatch.setattr(launcher, "IMPORTED_ONCE", needed)


@pytest.mark.usefixtures("_ranks_that_interpret")
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_both_exchanges_give_the_same_bits(ranks, tmp_path):
    spawn(every_routing, ranks, ranks, str(tmp_path), seconds=200)


@pytest.mark.usefixtures("_ranks_that_interpret")
def test_sums_wait_for_parts_that_come_late_and_in_any_order(tmp_path):
    spawn(parts_that_come_late, 2, 2, str(tmp_path), seconds=100)


@pytest.mark.parametrize("few", [False, True])
def test_many_tokens_are_summed_beside_their_own_push(few, monkeypatch):
    log = []

    class Noted(Late):
        def __init__(self, push, inputs):
            super().__init__(push, inputs)
            super().join()

        def join(self):
            log.append("end of the push")

    def noted(where, name):
        real = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *args, **options: log.append(name) or real(*args, **options))

    for where, name in ((Mailbox, "await_full"), (triton_exchange, "sum_home"), (ops, "sum_copies")):
        noted(where, name)
    if not few:
        monkeypatch.setattr(triton_exchange, "FEW_TOKENS", 2)
    exchange, batch = alone(), one_batch()
    exchange.stream = Noted
    arrived = exchange.finish_dispatch(exchange.start_dispatch(batch.x, batch.expert, batch.weight))
    exchange.finish_combine(exchange.start_combine(arrived.rows_RD, arrived))
    in_turn = ["end of the push", "await_full", "end of the push", "await_full", "sum_copies"]
    assert log == (in_turn if few else ["await_full", "end of the push", "sum_home", "end of the push"])


def alone(**options):
    size = size_for(1, dtype=torch.float32, width=8, max_tokens=9, **options)
    words = torch.zeros(size.words(1), dtype=torch.int32)
    return NvlinkExchange(PeerMemory((words,), 0), size)


def one_batch(**options):
    return batches("random", 1, dtype=torch.float32, width=8, most=9)[0]._replace(**options)


def test_more_transfers_than_mailboxes_are_refused():
    exchange, batch = alone(), one_batch()
    exchange.start_dispatch(batch.x, batch.expert, batch.weight)
    with pytest.raises(BackendError, match="1 transfers of this exchange are on their way out"):
        exchange.start_dispatch(batch.x, batch.expert, batch.weight)


def test_a_dispatch_that_was_finished_is_not_read_again_from_a_mailbox_in_use():
    exchange, batch = alone(), one_batch()
    flight = exchange.start_dispatch(batch.x, batch.expert, batch.weight)
    exchange.finish_dispatch(flight)
    with pytest.raises(BackendError, match="keep_arrivals=True"):
        exchange.finish_dispatch(flight)


def test_tokens_beyond_the_room_are_refused():
    exchange = alone()
    batch = one_batch()
    many = [tensor.repeat(2, 1) for tensor in (batch.x, batch.expert, batch.weight)]
    with pytest.raises(ShapeError, match=r"18 tokens, but max_tokens=9"):
        exchange.start_dispatch(*many)
    with pytest.raises(ShapeError, match=r"rows of 8 x torch.float64"):
        exchange.start_dispatch(batch.x.double(), batch.expert, batch.weight)


def test_rows_that_are_not_whole_words_are_refused():
    with pytest.raises(ConfigError, match="not whole words of 4"):
        size_for(2, dtype=torch.bfloat16, width=7).words(2)


def test_room_is_reserved_for_every_copy_that_could_arrive():
    exchange, batch = alone(), one_batch()
    arrived = exchange.finish_dispatch(exchange.start_dispatch(batch.x, batch.expert, batch.weight))
    assert arrived.rows_RD.shape[0] == 9 * min(3, PER_RANK)
    assert arrived.ends_E[-1] == 9 * 3
