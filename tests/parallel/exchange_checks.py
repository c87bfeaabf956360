"""Runs with interpreted kernels only: `test_exchange_interpreter.py` starts it. See `peer_checks.py`."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from unittest import mock

import pytest
import spawn as launcher
import torch
import torch.distributed as dist  # noqa: TID251 (ranks meet)
from layouts import trainer_of, with_layout
from peer_checks import check_overlap_and_recomputation, check_same_bits, shared_file_memory, size_for
from replayed import Again
from routings import PER_RANK, ROUTINGS, batches
from small_runs import small_run, write_documents
from spawn import spawn

from benthic.errors import BackendError, ConfigError, ShapeError
from benthic.kernels import triton_exchange
from benthic.parallel.exchange_memory import PeerMemory
from benthic.parallel.exchange_nvlink import NvlinkExchange
from benthic.parallel.exchange_size import Size
from benthic.parallel.mesh import Mesh
from benthic.spec.layout import Layout
from benthic.train import recording
from benthic.train.recording import Direct, Recorded


def memory(folder, rank, ranks):
    numbers = itertools.count()
    return lambda words: shared_file_memory(folder, rank, ranks, words, f"memory-{next(numbers)}")


def every_routing(rank, ranks, folder):
    shared = memory(folder, rank, ranks)
    same = functools.partial(check_same_bits, shared, rank, ranks, dtype=torch.float32, most=5, device="cpu")
    same(names=ROUTINGS[:1], width=1100, exact_rows=True)  # in two pieces
    same(names=ROUTINGS[:1], width=20, exact_rows=True, fixed=True)
    same(names=ROUTINGS[:1], width=20, copies=True)
    with mock.patch.object(triton_exchange, "FEW_TOKENS", 2):  # as with hundreds of tokens
        same(names=ROUTINGS[:2], width=1100)
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


def recorded_steps(rank, ranks, folder):
    """A trainer's steps through mailboxes, recorded with hardly any spare rows, beside all-to-all's."""
    layout, data = Layout(dp_degree=ranks, ep_degree=ranks), Path(folder) / "data"
    config = with_layout(small_run(layers=2, steps=5, rows=1, microbatches=ranks), layout)
    if rank == 0:
        write_documents(data)
    dist.barrier()

    def steps(trainer):
        return [(each.loss, each.grad_norm) for each in (trainer.step() for _ in range(5))]

    wanted = steps(trainer_of(config, data, Mesh.of(layout, rank)))
    own = trainer_of(config, data, Mesh.of(layout, rank))
    model = config.model
    size = Size(
        n_routed_experts=model.n_routed_experts,
        top_k=model.num_experts_per_tok,
        hidden_size=model.hidden_size,
        dtype=torch.float32,
        max_tokens=32,
        exact_rows=True,
    )
    exchange = NvlinkExchange(memory(folder, rank, ranks)(size.words(ranks)), size)
    own.executor.exchange = exchange
    graphs = []

    def record(compute):
        graphs.append(Again(compute))
        return graphs[-1]

    own._computation = Recorded(Direct(own.executor, own.buckets, own.mesh), record=record)
    with mock.patch.object(recording, "SPARE_ROWS", 1 << 30):
        found = steps(own)
    assert exchange.room is None
    assert len(graphs) > 1  # some dispatch brought more rows than there was room for
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


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
def test_recorded_steps_lay_rows_out_without_asking(tmp_path):
    spawn(recorded_steps, 2, 2, str(tmp_path), seconds=200)


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
