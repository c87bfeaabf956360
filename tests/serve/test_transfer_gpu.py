"""Blocks that move from one GPU's process to another's."""

from __future__ import annotations

import multiprocessing

import pytest
import torch

from benthic.errors import TransferError
from benthic.serve.transfer.cuda import CudaSource, region_of
from benthic.serve.transfer.handshake import Region
from benthic.serve.transfer.memory import pull

SHAPE = (3, 20, 4, 6)
NUMBERS = torch.arange(3 * 20 * 4 * 6, dtype=torch.float32).view(SHAPE).to(torch.bfloat16)


def own(device: str, pipe) -> None:
    pages = NUMBERS.to(device)
    torch.cuda.synchronize(device)
    region = region_of(pages)
    pipe.send((region.num_blocks, region.handle))
    pipe.recv()  # the tensor must outlive its readers


def pulled_from(owner: str, reader: str) -> None:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=own, args=(owner, theirs))
    process.start()
    try:
        num_blocks, handle = mine.recv()
        source = CudaSource(
            Region(kind="cuda", num_blocks=num_blocks, handle=handle),
            local := torch.full((3, 24, 4, 6), torch.nan, dtype=torch.bfloat16, device=reader),
        )
        pull(source, [4, 0], [6, 1])
        assert torch.equal(local[:, [6, 1]].cpu(), NUMBERS[:, [4, 0]])
        assert local[:, [0, *range(2, 6), *range(7, 24)]].isnan().all()
        many = list(range(19, 8, -1))  # more than the smallest recorded copy
        on_their_way = [source.start([3], [8]), source.start([5, 7], [0, 23]), source.start(many, many)]
        for copy in on_their_way:
            copy.wait()
            assert copy.ended()
        assert torch.equal(local[:, [8, 0, 23, *many]].cpu(), NUMBERS[:, [3, 5, 7, *many]])
        pull(source, [2], [8])  # by a recording that was used before
        assert torch.equal(local[:, [8, 0, 6]].cpu(), NUMBERS[:, [2, 5, 4]])
        wide = torch.zeros((3, 24, 4, 60), dtype=torch.bfloat16, device=reader)
        with pytest.raises(TransferError, match="but its terms make"):
            CudaSource(Region(kind="cuda", num_blocks=num_blocks, handle=handle), wide)
    finally:
        mine.send("done")
        process.join(60)


@pytest.mark.multigpu
def test_blocks_are_pulled_from_another_gpu() -> None:
    pulled_from("cuda:1", "cuda:0")


@pytest.mark.gpu
def test_blocks_are_pulled_from_another_process_on_the_same_gpu() -> None:
    pulled_from("cuda:0", "cuda:0")
