from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch

from benthic.errors import DataError
from benthic.model.initialise import initialise
from benthic.model.local import packed_sockets, plain_linear
from benthic.model.network import DeepSeek
from benthic.spec import presets
from benthic.train.data.shards import TokenShards, read_meta
from benthic.train.evaluate import Evaluation, ModelScore, evaluate
from benthic.train.sample import sample

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def model() -> DeepSeek:
    found = DeepSeek(presets.get("nano"))
    initialise(found, 5)
    return found


@pytest.fixture(scope="module")
def held_out(dataset: Path) -> TokenShards:
    return TokenShards(dataset, read_meta(dataset), "held_out")


def score(model: DeepSeek, shards: TokenShards, **changes: int) -> Evaluation:
    settings = {"seq_len": 24, "rows": 3, "max_tokens": 0} | changes
    depth = model.config.num_nextn_predict_layers
    return evaluate(ModelScore(model, plain_linear), shards, mask_documents=True, mtp_depth=depth, **settings)


def token_at(stream: list[tuple[int, int]], place: int, document: int) -> int | None:
    return stream[place][1] if place < len(stream) and stream[place][0] == document else None


@torch.no_grad()
def by_hand(
    model: DeepSeek, shards: TokenShards, seq_len: int, documents: int
) -> tuple[float, int, int, int]:
    """Row by row and document by document: nats, targets, drafts, accepted."""
    nats, targets, drafts, accepted = 0.0, 0, 0, 0
    lengths = shards.lengths[:documents]
    stream = [(d, int(t)) for d, n in enumerate(lengths) for t in shards.read(d, 0, int(n))]
    for start in range(0, len(stream), seq_len):
        row = stream[start : start + seq_len]
        for document in sorted({d for d, _ in row}):
            places = [start + i for i, (d, _) in enumerate(row) if d == document]
            ids = torch.tensor([stream[p][1] for p in places])
            after = [token_at(stream, p + 1, document) for p in places]
            second = [token_at(stream, p + 2, document) for p in places]
            borders = torch.tensor([0, len(ids)], dtype=torch.int32)
            sockets = packed_sockets(borders, len(ids), n_routed_experts=8)
            positions = torch.arange(len(ids))
            hidden = model(ids, positions, sockets)
            logits = model.logits(hidden.hidden_TD, plain_linear)
            nats -= sum(float(logits[i].log_softmax(-1)[t]) for i, t in enumerate(after) if t is not None)
            targets += sum(t is not None for t in after)
            shifted = torch.tensor([t if t is not None else 0 for t in after])
            ahead = model.predict_ahead(0, model.mtp_input(hidden), shifted, positions, sockets)
            draft = model.logits(ahead.hidden_TD, plain_linear).argmax(-1)
            for i in range(len(ids) - 1):
                if second[i] is not None:
                    drafts += 1
                    accepted += int(draft[i] == logits[i + 1].argmax())
    return nats, targets, drafts, accepted


def test_evaluation_is_what_a_loop_over_documents_finds(model: DeepSeek, held_out: TokenShards) -> None:
    documents = 3
    tokens, text_bytes = int(held_out.starts[documents]), int(held_out.text_bytes[:documents].sum())
    found = score(model, held_out, max_tokens=tokens)
    nats, targets, drafts, accepted = by_hand(model, held_out, 24, documents)
    assert targets == tokens - documents
    assert found.loss == pytest.approx(nats / targets, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)
    assert found.mtp_acceptance == pytest.approx(accepted / drafts, abs=2 / drafts)
    assert 0 < accepted < drafts


def test_rows_at_once_change_nothing(model: DeepSeek, held_out: TokenShards) -> None:
    assert score(model, held_out, rows=1, max_tokens=900).loss == pytest.approx(
        score(model, held_out, rows=50, max_tokens=900).loss, rel=1e-5
    )


def test_only_whole_documents_are_taken(model: DeepSeek, held_out: TokenShards) -> None:
    first = int(held_out.lengths[0])
    assert score(model, held_out, max_tokens=first).documents == 1
    assert score(model, held_out, max_tokens=1).documents == 1
    some = score(model, held_out, max_tokens=int(held_out.starts[2]))
    assert (some.documents, some.tokens) == (2, int(held_out.starts[2]))
    assert some.bytes == int(held_out.text_bytes[:2].sum())


def test_model_without_mtp_has_no_acceptance(held_out: TokenShards) -> None:
    import dataclasses

    plain = DeepSeek(dataclasses.replace(presets.get("nano"), num_nextn_predict_layers=0))
    initialise(plain, 5)
    assert score(plain, held_out, max_tokens=200).mtp_acceptance is None


def test_empty_split_is_refused(model: DeepSeek, held_out: TokenShards) -> None:
    import copy

    empty = copy.copy(held_out)
    empty.text_bytes = empty.text_bytes[:0]
    with pytest.raises(DataError, match="0 held-out documents"):
        score(model, empty)


def test_sample_is_repeatable_and_greedy_is_the_argmax(model: DeepSeek) -> None:
    def draw(temperature: float, seed: int) -> list[int]:
        return sample(
            model,
            [0, 5, 9],
            count=6,
            temperature=temperature,
            seed=seed,
            eos_token_id=-1,
            linear=plain_linear,
        )

    assert draw(1.0, 1) == draw(1.0, 1)
    assert draw(1.0, 1) != draw(1.0, 2)
    assert draw(0.0, 1) == draw(0.0, 2)
    first = draw(0.0, 1)[0]
    assert (
        sample(model, [0, 5, 9], count=6, temperature=0.0, seed=0, eos_token_id=first, linear=plain_linear)
        == []
    )
