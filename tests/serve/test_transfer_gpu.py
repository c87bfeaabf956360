"""Blocks that move from one GPU's process to another's."""

from __future__ import annotations

import multiprocessing

import pytest
import torch

from benthic.errors import TransferError
from benthic.serve.transfer.cuda import CudaSource, region_of
from benthic.serve.transfer.handshake import Region
from benthic.serve.transfer.memory import pull

SHAPE = (3, 5, 4, 6)


def own(device: str, pipe) -> None:
    pages = torch.arange(360, dtype=torch.float32, device=device).view(SHAPE).to(torch.bfloat16)
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
        local = torch.full((3, 7, 4, 6), torch.nan, dtype=torch.bfloat16, device=reader)
        pull(CudaSource(Region(kind="cuda", num_blocks=num_blocks, handle=handle), local), [4, 0], [6, 1])
        expected = torch.arange(360, dtype=torch.float32).view(SHAPE).to(torch.bfloat16)
        assert torch.equal(local[:, 6].cpu(), expected[:, 4])
        assert torch.equal(local[:, 1].cpu(), expected[:, 0])
        assert local[:, [0, 2, 3, 4, 5]].isnan().all()
        wide = torch.zeros((3, 7, 4, 60), dtype=torch.bfloat16, device=reader)
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
