"""CUDA graphs: which batches get one, and what pads them."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch
from small_engine import random_model

from benthic.sched.plans import StepPlan, TableWrite
from benthic.serve.attend import DecodeRows, StepLayout
from benthic.serve.drafts import Drafts
from benthic.serve.graphs import ModuleBuffers, ModuleRows, collection_paused, padded_sizes
from benthic.serve.step_graphs import StepBuffers, StepInputs
from benthic.serve.steps import StepBuilder


def test_batch_sizes_are_those_of_vllm_and_end_with_the_largest_batch() -> None:
    assert padded_sizes(64) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    assert padded_sizes(3) == (1, 2, 3)
    assert padded_sizes(50)[-3:] == (40, 48, 50)
    assert padded_sizes(300)[-4:] == (256, 272, 288, 300)
    assert padded_sizes(4096)[-2:] == (496, 512)
    assert padded_sizes(256, limit=20) == (1, 2, 4, 8, 16, 20)
    assert padded_sizes(40, sizes=(32, 1, 64)) == (1, 32, 40)


def module_rows(tokens: list[int], columns: int, queries: int = 1) -> ModuleRows:
    sequences = len(tokens) // queries
    table = torch.full((sequences, columns), 5, dtype=torch.int32)
    decode = DecodeRows(queries, table, torch.full((sequences,), 9, dtype=torch.int32))
    rows = torch.tensor(tokens)
    return ModuleRows(torch.full((len(rows), 32), 4.0), rows, rows + 1, StepLayout(rows + 2, decode, None))


def test_rows_that_pad_a_module_store_nothing_and_attend_to_nothing() -> None:
    buffers = ModuleBuffers.blank(random_model(), 4, 1, 6)
    for each in (module_rows([10, 11, 12, 13], 6), module_rows([20, 21], 3)):
        assert each.layout.decode is not None
        buffers.fill(each, each.layout.decode, 4)
    assert buffers.tokens_T.tolist()[:2] == [20, 21]
    assert buffers.positions_T.tolist()[:2] == [21, 22]
    assert buffers.slot_T.tolist() == [22, 23, -1, -1]
    assert buffers.context_S.tolist() == [9, 9, 0, 0]
    assert buffers.given_TD.unique().tolist() == [4.0]


def test_padding_counts_the_queries_of_every_sequence() -> None:
    buffers = ModuleBuffers.blank(random_model(), 3, 2, 6)
    one = module_rows([20, 21], 3, queries=2)
    assert one.layout.decode is not None
    buffers.fill(one, one.layout.decode, 3)
    assert buffers.slot_T.tolist() == [22, 23, -1, -1, -1, -1]
    assert buffers.context_S.tolist() == [9, 0, 0]


def planned(positions: dict[int, int], drafts: int = 0) -> StepPlan:
    count = len(positions)
    return StepPlan(
        number=0,
        num_tokens=count * (1 + drafts),
        decode_ids=tuple(map(str, positions)),
        decode_slots=tuple(positions),
        decode_positions=tuple(positions.values()),
        decode_drafts=(drafts,) * count,
        prefills=(),
        tables=(),
        events=(),
    )


def test_a_step_crosses_in_one_array_whose_padding_belongs_to_nobody() -> None:
    steps = StepBuilder(max_num_seqs=6, max_model_len=16, block_size=4, device=torch.device("cpu"), drafts=1)
    steps.write([TableWrite(4, 0, (7, 8)), TableWrite(2, 0, (3,))])
    buffers = StepBuffers.blank(random_model(), 3, 2, 4)
    rows = steps.rows(planned({4: 5, 2: 1}, drafts=1), Drafts((1, 1), torch.tensor([[50], [51]])))
    buffers.load(rows, 3, steps)
    inputs = StepInputs.of(buffers.packed, 3, 2)
    assert inputs.index_T.tolist() == [8, 9, 4, 5, 12, 12]
    assert inputs.position_T.tolist() == [5, 6, 1, 2, 0, 0]
    assert inputs.slot_T.tolist() == [33, 34, 13, 14, -1, -1]
    assert inputs.context_S.tolist() == [7, 3, 0]
    assert inputs.owner_S.tolist() == [4, 2, 6]
    assert buffers.block_table_SP[:2, :2].tolist() == [[7, 8], [3, 0]]
    assert steps.fed_NF[[4, 2], 1].tolist() == [50, 51]


def test_the_block_table_crosses_again_when_it_or_the_batch_has_changed_and_not_else() -> None:
    steps = StepBuilder(max_num_seqs=3, max_model_len=16, block_size=4, device=torch.device("cpu"))
    steps.write([TableWrite(0, 0, (7, 8)), TableWrite(1, 0, (3, 4))])
    buffers = StepBuffers.blank(random_model(), 2, 1, 4)

    def table(positions: dict[int, int]) -> list[list[int]]:
        buffers.load(steps.rows(planned(positions)), 2, steps)
        return buffers.block_table_SP[: len(positions)].tolist()

    assert table({0: 3})[0][0] == 7
    buffers.block_table_SP[0, 0] = 99
    assert table({0: 3})[0][0] == 99, "nothing has changed"
    assert table({0: 4})[0][:2] == [7, 8], "a column more"
    assert table({1: 4})[0][:2] == [3, 4], "another batch"
    steps.write([TableWrite(1, 1, (6,))])
    assert table({1: 4})[0][:2] == [3, 6], "another block"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_graph_is_asked_for_without_a_gpu_or_against_the_options(device: str) -> None:
    from benthic.serve.capture import graph_sizes
    from benthic.serve.options import EngineOptions

    where = SimpleNamespace(type=device)
    assert graph_sizes(EngineOptions(enforce_eager=True), where) == ((), ())
    assert graph_sizes(EngineOptions(max_cudagraph_capture_size=0), where) == ((), ())
    some = graph_sizes(EngineOptions(max_num_seqs=4, max_num_batched_tokens=8), where)
    assert some == (((), ()) if device == "cpu" else ((1, 2, 4), (8,)))
    few = graph_sizes(EngineOptions(max_num_seqs=4, max_prompt_graph_size=0), where)
    assert few == (((), ()) if device == "cpu" else ((1, 2, 4), ()))


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
