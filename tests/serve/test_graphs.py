"""CUDA graphs: which batches get one, and what pads them."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch
from small_engine import random_model

from benthic.serve.attend import DecodeRows, StepLayout
from benthic.serve.graphs import Buffers, collection_paused, padded_sizes
from benthic.serve.steps import StepTensors


def test_batch_sizes_are_those_of_vllm_and_end_with_the_largest_batch() -> None:
    assert padded_sizes(64) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    assert padded_sizes(3) == (1, 2, 3)
    assert padded_sizes(50)[-3:] == (40, 48, 50)
    assert padded_sizes(300)[-4:] == (256, 272, 288, 300)
    assert padded_sizes(4096)[-2:] == (496, 512)
    assert padded_sizes(256, limit=20) == (1, 2, 4, 8, 16, 20)
    assert padded_sizes(40, sizes=(32, 1, 64)) == (1, 32, 40)


def step(tokens: list[int], columns: int, queries: int = 1) -> StepTensors:
    sequences = len(tokens) // queries
    table = torch.full((sequences, columns), 5, dtype=torch.int32)
    decode = DecodeRows(queries, table, torch.full((sequences,), 9, dtype=torch.int32))
    rows = torch.tensor(tokens)
    return StepTensors(rows, rows + 1, StepLayout(rows + 2, decode, None), None, ())


def test_rows_that_pad_a_batch_store_nothing_and_attend_to_nothing() -> None:
    buffers = Buffers.blank(random_model(), 4, 1, 6)
    full, two = step([10, 11, 12, 13], 6), step([20, 21], 3)
    for each, size in ((full, 4), (two, 4)):
        assert each.layout.decode is not None
        buffers.fill(each, each.layout.decode, size)
    assert buffers.tokens_T.tolist()[:2] == [20, 21]
    assert buffers.positions_T.tolist()[:2] == [21, 22]
    assert buffers.slot_T.tolist() == [22, 23, -1, -1]
    assert buffers.context_S.tolist() == [9, 9, 0, 0]
    assert (buffers.hidden_TD.shape, buffers.logits_TV.shape) == ((4, 32), (4, 320))


def test_padding_counts_the_queries_of_every_sequence() -> None:
    buffers = Buffers.blank(random_model(), 3, 2, 6)
    one = step([20, 21], 3, queries=2)
    assert one.layout.decode is not None
    buffers.fill(one, one.layout.decode, 3)
    assert buffers.slot_T.tolist() == [22, 23, -1, -1, -1, -1]
    assert buffers.context_S.tolist() == [9, 0, 0]


def test_buffers_of_a_prediction_module_take_states_and_leave_no_logits() -> None:
    buffers = Buffers.blank(random_model(), 3, 2, 6, module=True)
    one = step([20, 21], 3, queries=2)
    assert one.layout.decode is not None
    states = torch.full((2, 32), 4.0)
    buffers.fill(one, one.layout.decode, 3, states)
    assert torch.equal(buffers.given_TD[:2], states)
    assert not buffers.given_TD[2:].any()
    assert buffers.logits_TV.shape == (0, 320)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_graph_is_asked_for_without_a_gpu_or_against_the_options(device: str) -> None:
    from benthic.serve.build import graph_sizes
    from benthic.serve.options import EngineOptions

    where = SimpleNamespace(type=device)
    assert graph_sizes(EngineOptions(enforce_eager=True), where) == ()
    assert graph_sizes(EngineOptions(max_cudagraph_capture_size=0), where) == ()
    some = graph_sizes(EngineOptions(max_num_seqs=4, max_num_batched_tokens=8), where)
    assert some == (() if device == "cpu" else (1, 2, 4))


def test_garbage_is_collected_before_a_capture_and_not_within() -> None:
    class Ring:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            gone.append(gc.isenabled())

    gone: list[bool] = []
    Ring()
    with collection_paused():
        assert gone == [True]
        assert not gc.isenabled()
    assert gc.isenabled()
