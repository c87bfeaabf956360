"""Blocks that move as between hosts, by NIXL over TCP: the tokens of one engine, and an owner that dies."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from typing import TYPE_CHECKING

import pytest
import torch
from small_fleet import colocated
from test_router import all_of, fleet, nothing_left, run, seeded, until

from benthic.errors import TransferError
from benthic.serve.transfer.handshake import Region
from benthic.serve.transfer.memory import pull

pytest.importorskip("nixl", reason="NIXL is not installed")

from benthic.serve.transfer.nixl import NixlPages, NixlSource

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

SHAPE = (3, 20, 4, 6)


@pytest.fixture(autouse=True)
def _over_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")


def contents() -> torch.Tensor:
    return torch.arange(3 * 20 * 4 * 6, dtype=torch.float32).view(SHAPE).to(torch.bfloat16)


def own(pipe: Connection) -> None:
    pages = NixlPages(contents())
    region = pages.region()
    pipe.send((region.num_blocks, region.handle))
    pipe.recv()


def test_blocks_are_read_from_another_process_until_it_dies() -> None:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    owner = context.Process(target=own, args=(theirs,))
    owner.start()
    try:
        num_blocks, handle = mine.recv()
        local = torch.full((3, 24, 4, 6), torch.nan, dtype=torch.bfloat16)
        source = NixlSource(Region(kind="nixl", num_blocks=num_blocks, handle=handle), NixlPages(local))
        pull(source, [4, 0], [6, 1])
        assert torch.equal(local[:, [6, 1]], contents()[:, [4, 0]])
        assert local[:, [0, *range(2, 6), *range(7, 24)]].isnan().all()
        copies = [source.start([3], [8]), source.start([5, 7], [0, 23])]
        for copy in copies:
            copy.wait()
            assert copy.ended()
        assert torch.equal(local[:, [8, 0, 23]], contents()[:, [3, 5, 7]])
        owner.kill()
        owner.join()
        with pytest.raises(TransferError, match="NIXL"):
            pull(source, [2], [8])
    finally:
        owner.kill()
        owner.join()


def test_instances_that_move_blocks_by_nixl_answer_like_one_engine() -> None:
    asked = seeded(100)
    expected = colocated(asked)

    async def scenario() -> None:
        async with fleet(1, 1, engine={"mover": "nixl"}) as router:
            assert await all_of(router, asked) == expected
            await nothing_left(router)
            assert router.stats.pulled_blocks > 200
            assert router.retried == 0

    run(scenario())


def test_a_killed_owner_costs_no_request_its_answer() -> None:
    asked = seeded(60, seed=3)
    expected = colocated(asked)

    async def scenario() -> None:
        async with fleet(2, 1, engine={"mover": "nixl"}) as router:
            answers = asyncio.create_task(all_of(router, asked))
            await until(lambda: router.stats.pulled_blocks > 20, 90.0)
            victim = next(member for member in router.members if member.role == "prefill")
            os.kill(victim.client.pid, signal.SIGKILL)
            assert await answers == expected
            await until(lambda: len(router.members) == 3, 90.0)
            await nothing_left(router)

    run(scenario())
