from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from benthic.parallel.context import segments_of
from benthic.parallel.tokens import TokenShare, by_rank, by_row
from benthic.spec.layout import Layout


@st.composite
def divisions(draw):
    """The shares of all context ranks and, of each, of all tensor ranks."""
    cp, tp = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    rows, chunk = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    layout = Layout(cp_degree=cp, tp_degree=tp)
    shares = [
        TokenShare.of(layout, layout.place(rank), rows=rows, seq_len=2 * cp * tp * chunk)
        for rank in range(layout.ranks)
    ]
    return [shares[at : at + tp] for at in range(0, layout.ranks, tp)]


@st.composite
def packs(draw):
    """A division of rows into shares, and rows cut into sequences."""
    division = draw(divisions())
    share = division[0][0]
    starts = {row * share.seq_len for row in range(share.rows)}
    total = share.rows * share.seq_len
    starts |= draw(st.sets(st.integers(0, total - 1), max_size=8))
    return division, [*sorted(starts), total]


@given(divisions())
def test_every_token_is_in_the_stream_of_exactly_one_rank(division):
    share = division[0][0]
    found = torch.cat([one.stream() for group in division for one in group])
    assert found.sort().values.tolist() == list(range(share.rows * share.seq_len))


@given(divisions())
def test_streams_gathered_over_the_tensor_group_are_the_tokens_of_its_attention(division):
    for group in division:
        gathered = torch.cat([one.stream() for one in group])
        restored = by_row(gathered, len(group), group[0].row_part)
        assert torch.equal(restored, group[0].attention())
        assert torch.equal(by_rank(restored, len(group), group[0].row_part), gathered)


@given(divisions())
def test_every_rank_holds_equally_many_tokens_of_every_row(division):
    share = division[0][0]
    for one in itertools.chain.from_iterable(division):
        rows = one.stream().div(share.seq_len, rounding_mode="floor").bincount(minlength=share.rows)
        assert rows.tolist() == [one.row_part] * share.rows


@given(divisions())
def test_tokens_gathered_over_the_context_group_are_found_in_their_order(division):
    gathered = torch.cat([group[0].attention() for group in division])
    assert gathered[division[0][0].found()].tolist() == list(range(gathered.numel()))


@given(divisions())
def test_every_context_rank_has_the_same_work_under_a_causal_mask(division):
    share = division[0][0]
    work = {int((group[0].attention() % share.seq_len + 1).sum()) for group in division}
    assert len(work) == 1


@given(packs())
def test_segments_ask_from_every_token_of_the_rank_and_see_its_sequence_up_to_the_last(pack):
    division, cu_seqlens = pack
    for group in division:
        segments = segments_of(group[0], cu_seqlens)
        asked = [token for segment in segments for token in segment.queries]
        assert asked == group[0].attention().tolist()
        for queries, keys in segments:
            start = max(s for s in cu_seqlens if s <= queries.start)
            assert queries.stop <= min(s for s in cu_seqlens if s > queries.start)
            assert keys == range(start, queries.stop)


@given(packs())
def test_no_latent_is_a_key_of_more_than_two_segments(pack):
    division, cu_seqlens = pack
    for group in division:
        keys = [token for segment in segments_of(group[0], cu_seqlens) for token in segment.keys]
        assert torch.tensor(keys).bincount().max() <= 2


def test_the_rank_in_the_middle_has_one_piece_and_others_an_early_and_a_late_one():
    pieces = [TokenShare(rows=1, seq_len=12, cp=cp, cp_degree=3).pieces for cp in range(3)]
    assert pieces[0] == (range(2), range(10, 12))
    assert pieces[1] == (range(2, 4), range(8, 10))
    assert pieces[2] == (range(4, 8),)
