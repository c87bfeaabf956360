"""Where copy engines move an exchange's rows: most rows go to every rank, and there are enough of them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from benthic.parallel.exchange_size import Size


def copied(ranks, *, tokens=4096, width=7168, top_k=8, **options):
    size = Size(
        n_routed_experts=64,
        top_k=top_k,
        hidden_size=width,
        dtype=torch.bfloat16,
        max_tokens=tokens,
        **options,
    )
    return size.copied(ranks)


@pytest.mark.parametrize(
    ("ranks", "top_k", "expected"), [(2, 6, True), (4, 6, True), (4, 4, False), (8, 8, False)]
)
def test_a_rank_must_need_four_fifths_of_all_rows(ranks, top_k, expected):
    assert copied(ranks, top_k=top_k) is expected


@pytest.mark.parametrize(("tokens", "width", "fp8", "expected"), [
    (4096, 2048, False, True), (4096, 2048, True, True), (2048, 2048, True, False), (128, 7168, False, False),
])  # fmt: skip
def test_one_rank_must_have_eight_mebibytes_of_them(tokens, width, fp8, expected):
    assert copied(2, tokens=tokens, width=width, fp8=fp8) is expected


def test_either_can_be_asked_for():
    assert copied(8, tokens=16, copies=True)
    assert not copied(2, copies=False)
