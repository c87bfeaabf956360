from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benthic.errors import ConfigError, DataError
from benthic.train.data.microbatch import IGNORE, assemble, sent_together
from benthic.train.data.packing import Packing, Span, shuffled

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12).map(np.array)
SIZES = st.integers(1, 17)


def tokens_of(spans: list[Span]) -> list[tuple[int, int, int]]:
    return [(s.epoch, s.document, s.start + i) for s in spans for i in range(s.count)]


@given(LENGTHS, SIZES, st.integers(0, 5))
def test_every_token_comes_exactly_once_an_epoch(lengths: np.ndarray, seq_len: int, seed: int) -> None:
    packing = Packing(lengths, seq_len, seed)
    epochs = 3
    rows = range(packing.first_row(epochs))
    seen = Counter(token for row in rows for token in tokens_of(packing.spans(row, seq_len)))
    assert max(seen.values()) == 1
    for epoch in range(epochs):
        expected = {(epoch, d, i) for d, length in enumerate(lengths) for i in range(length)}
        assert expected <= set(seen)


@given(LENGTHS, SIZES, st.integers(0, 5), st.integers(0, 60))
def test_any_row_is_found_again_without_reading_those_before(
    lengths: np.ndarray, seq_len: int, seed: int, position: int
) -> None:
    running, fresh = Packing(lengths, seq_len, seed), Packing(lengths, seq_len, seed)
    for row in range(position):
        running.spans(row, seq_len + 2)
    assert running.spans(position, seq_len + 2) == fresh.spans(position, seq_len + 2)


@given(LENGTHS, SIZES, st.integers(0, 40))
def test_what_follows_a_row_is_the_stream_itself(lengths: np.ndarray, seq_len: int, position: int) -> None:
    packing = Packing(lengths, seq_len, 0)
    stream = tokens_of(packing.spans(position, seq_len + 3))
    assert len(stream) == seq_len + 3
    for (e0, d0, i0), (e1, d1, i1) in itertools.pairwise(stream):
        same = (e0, d0, i0 + 1) == (e1, d1, i1)
        assert same or (i0 == lengths[d0] - 1 and i1 == 0)


def test_seed_and_epoch_change_the_order() -> None:
    lengths = np.full(50, 4)
    orders = [tuple(s.document for s in Packing(lengths, 200, seed).spans(0, 200)) for seed in (0, 1)]
    later = tuple(s.document for s in Packing(lengths, 200, 0).spans(1, 200))
    assert len({*orders, later}) == 3
    assert sorted(orders[0]) == sorted(later) == list(range(50))


def test_shuffle_is_the_same_for_ever() -> None:
    assert shuffled(8, (0, 0, 1)).tolist() == shuffled(8, (0, 0, 1)).tolist()
    assert shuffled(8, (7, 3, 2)).tolist() == [0, 6, 2, 7, 3, 4, 1, 5]


def test_impossible_packings_are_refused() -> None:
    with pytest.raises(ConfigError, match="seq_len=0"):
        Packing(np.array([3]), 0, 0)
    with pytest.raises(DataError, match="0 documents"):
        Packing(np.array([], dtype=np.int64), 4, 0)
    with pytest.raises(DataError, match="the shortest of 0 tokens"):
        Packing(np.array([3, 0]), 4, 0)


def test_targets_positions_and_borders_of_two_rows_by_hand() -> None:
    tokens = np.array([[10, 11, 20, 21, 22, 23], [30, 31, 32, 33, 40, 41]])
    owner = np.array([[1, 1, 2, 2, 2, 2], [3, 3, 3, 3, 4, 4]])
    batch = assemble(tokens, owner, mtp_depth=1)
    assert batch.tokens_T.tolist() == [10, 11, 20, 21, 30, 31, 32, 33]
    assert batch.positions_T.tolist() == [0, 1, 0, 1, 0, 1, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 2, 4, 8]
    assert batch.max_seqlen == 4
    assert batch.target_KT[0].tolist() == [11, IGNORE, 21, 22, 31, 32, 33, IGNORE]
    assert batch.target_KT[1].tolist() == [IGNORE, IGNORE, 22, 23, 32, 33, IGNORE, IGNORE]
    assert batch.ahead_KT.tolist() == [[11, 20, 21, 22, 31, 32, 33, 40]]
    assert batch.num_targets == (6, 4)


def test_without_a_document_mask_a_row_is_one_sequence_and_every_token_has_a_target() -> None:
    tokens = np.arange(12).reshape(2, 6)
    batch = assemble(tokens, np.zeros((2, 6), np.int64), mtp_depth=1)
    assert batch.cu_seqlens.tolist() == [0, 4, 8]
    assert batch.num_targets == (8, 8)
    assert batch.target_KT[1].tolist() == [2, 3, 4, 5, 8, 9, 10, 11]


def test_padding_has_no_targets() -> None:
    owner = np.array([[0, 0, 0, -1, -1]])
    batch = assemble(np.array([[5, 6, 7, 0, 0]]), owner, mtp_depth=0)
    assert batch.target_KT[0].tolist() == [6, 7, IGNORE, IGNORE]


@given(st.integers(0, 2), st.integers(1, 3), st.integers(1, 9), st.randoms(use_true_random=False))
def test_targets_never_cross_documents(depth: int, rows: int, seq_len: int, rng: object) -> None:
    window = seq_len + 1 + depth
    steps = np.array([[rng.random() < 0.3 for _ in range(window)] for _ in range(rows)])  # type: ignore[attr-defined]
    owner = steps.cumsum(1)
    tokens = np.arange(rows * window).reshape(rows, window)
    batch = assemble(tokens, owner, mtp_depth=depth)
    owner_of = dict(zip(tokens.flat, owner.flat, strict=True))
    for k in range(depth + 1):
        for token, target in zip(batch.tokens_T.tolist(), batch.target_KT[k].tolist(), strict=True):
            inside = owner_of[token] == owner_of[token + k + 1]
            assert target == (token + k + 1 if inside else IGNORE)


def test_parts_of_one_copy_to_a_device_are_the_tensors_and_begin_at_aligned_bytes() -> None:
    owner = np.repeat([0, 1, 2], [3, 5, 1])[None]
    batch = assemble(np.arange(9)[None], owner, mtp_depth=0)
    fields = (batch.tokens_T, batch.cu_seqlens, batch.ahead_KT, batch.positions_T)
    for part, field in zip(sent_together(fields, torch.device("cpu")), fields, strict=True):
        assert part.dtype == field.dtype
        assert part.equal(field)
        assert part.storage_offset() * part.itemsize % 16 == 0
    there = batch.to(torch.device("meta"))
    assert (there.target_KT.shape, there.ahead_KT.shape) == (batch.target_KT.shape, (0, 8))
    assert (there.num_targets, there.rows) == (batch.num_targets, 1)
