"""Conversations: what is rendered, what of it is learned, and what the trainer makes of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from benthic.cli.settings import apply
from benthic.errors import DataError
from benthic.model.local import packed_sockets
from benthic.train import recipes
from benthic.train.data.build import BuildOptions
from benthic.train.data.build_chat import build_chat
from benthic.train.data.chat import ChatRenderer, Conversation, read_conversations
from benthic.train.data.microbatch import IGNORE, assemble
from benthic.train.data.packing import WholePacking
from benthic.train.data.shards import FORMAT_MASKED, TokenShards, read_meta, verify
from benthic.train.evaluate import evaluate
from benthic.train.resolve import resolve
from benthic.train.trainer import Trainer

if TYPE_CHECKING:
    from pathlib import Path

    from benthic.train.data.tokenizer import Tokenizer
    from benthic.train.hardware import HardwareFacts


def talk(*texts: str, **reply: object) -> Conversation:
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
    messages[-1] |= reply
    return Conversation("here:1", tuple(messages))


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pieces(words: Tokenizer, ids: list[int], learned: list[bool]) -> tuple[str, str]:
    """The text to be learned and the text that is not."""
    sides = ([i for i, kept in zip(ids, learned, strict=True) if kept is side] for side in (True, False))
    one, other = (words.rules.decode(side, skip_special_tokens=False) for side in sides)
    return one, other


@pytest.fixture(scope="session")
def renderer(words: Tokenizer) -> ChatRenderer:
    return ChatRenderer(words)


@pytest.fixture
def chats(words: Tokenizer, tmp_path: Path) -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": "sea " * n},
                {"role": "assistant", "content": "salt " * (n + 1)},
            ]
        }
        for n in range(1, 13)
    ]
    file = write(tmp_path / "chat.jsonl", *rows)
    build_chat([file], words, tmp_path / "set", BuildOptions(held_out=0.3), max_tokens=64)
    return tmp_path / "set"


def test_only_replies_and_their_end_are_learned_in_every_turn(renderer, words) -> None:
    example = renderer.example(talk("the sea", "is deep", "and cold", "yes"))
    learned, rest = pieces(words, example.ids, example.learned)
    assert learned == " is deep<|end_of_text|> yes<|end_of_text|>"
    assert rest == "<|begin_of_text|>User: the sea\n\nAssistant:User: and cold\n\nAssistant:"
    assert example.learned_bytes == len(learned)


def test_rendering_and_tokens_are_those_of_transformers(renderer, words) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(words.path)
    chat = talk("the sea", "is deep", "and cold", "yes")
    expected = theirs.apply_chat_template(list(chat.messages), tokenize=False)
    assert "".join(s.text for s in renderer.segments(chat)) == expected
    assert renderer.example(chat).ids == theirs.encode(expected, add_special_tokens=False)


def test_what_follows_the_last_reply_and_replies_of_weight_0_are_not_learned(renderer, words) -> None:
    example = renderer.example(talk("the sea", "is deep", "and cold"))
    assert words.decode(example.ids).endswith("is deep")
    messages = [*talk("the sea", "is deep", weight=0).messages, *talk("and cold", "yes").messages]
    example = renderer.example(Conversation("here:1", tuple(messages)))
    assert pieces(words, example.ids, example.learned)[0] == " yes<|end_of_text|>"


def test_long_conversations_end_with_the_last_reply_that_fits(renderer, words) -> None:
    chat = talk("the sea", "is deep", "and cold", "yes")
    whole = renderer.example(chat)
    assert renderer.example(chat, len(whole.ids)) == whole
    cut = renderer.example(chat, len(whole.ids) - 1)
    assert cut.ids == renderer.example(talk("the sea", "is deep")).ids
    assert cut.ids[-1] == words.eos_token_id
    assert renderer.example(chat, len(cut.ids) - 1) is None


def test_template_that_rewrites_earlier_turns_is_refused_with_the_remedy(words, tmp_path) -> None:
    from benthic.train.data import tokenizer as tokenizers

    tokenizers.copy(words.path, tmp_path)
    template = (
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %};{% endfor %}"
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    renderer = ChatRenderer(tokenizers.load(tmp_path))
    assert [s.text for s in renderer.segments(talk("a", "b"))] == ["a;", "b;"]
    with pytest.raises(DataError, match=r"here:1: .* message 4 of 4 .*one line for each reply"):
        renderer.segments(talk("a", "b", "c", "d"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds list, not an object with a list of messages"),
        ('{"text": "a"}', "holds an object with text"),
        ('{"messages": []}', "not an object with a list of messages"),
        ('{"messages": ["a"]}', "message 1 of 1 is str"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', "has role 'bot'; known are system"),
        ('{"messages": [{"role": "user", "content": [1]}]}', "has content of list, not text"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "none of 1 messages is a reply"),
        ('{"messages": [{"role": "assistant", "content": "a", "weight": 2}]}', "has weight 2"),
    ],
)
def test_malformed_line_is_named_with_its_number(tmp_path: Path, line: str, words: str) -> None:
    file = write(tmp_path / "chat.jsonl", {"messages": [{"role": "assistant", "content": "fine"}]})
    file.write_text(file.read_text() + "\n" + line + "\n")
    with pytest.raises(DataError) as caught:
        list(read_conversations([file]))
    assert str(caught.value).startswith(f"{file}:3")
    assert words in str(caught.value)


def test_dataset_keeps_the_mask_of_every_token_under_its_checksum(chats: Path) -> None:
    meta = read_meta(chats)
    assert json.loads((chats / "meta.json").read_text())["format"] == FORMAT_MASKED
    assert meta.masked
    assert meta.source["too_long"] == 12 - sum(split.documents for split in meta.splits.values()) == 2
    shards = TokenShards(chats, meta, "train")
    for document, length in enumerate(shards.lengths):
        tokens, learned = shards.read(document, 0, int(length)), shards.read_mask(document, 0, int(length))
        assert tokens[-1] == meta.eos_token_id
        assert learned[-1]
        assert not learned[0]
        assert np.array_equal(shards.read_mask(document, 2, 3), learned[2:5])
    mask = chats / f"{meta.splits['train'].shards[0].name}.msk"
    mask.write_bytes(b"\1" * mask.stat().st_size)
    with pytest.raises(DataError, match="msk has SHA-256"):
        verify(chats, meta)


def test_labels_of_main_and_mtp_heads_line_up_with_a_row_made_by_hand() -> None:
    tokens = np.array([[10, 11, 12, 13, 20, 21, 22]])
    owner = np.array([[0, 0, 0, 0, 1, 1, 1]])
    learned = np.array([[0, 0, 1, 1, 0, 1, 1]], dtype=bool)
    batch = assemble(tokens, owner, learned, mtp_depth=1)
    none = IGNORE
    assert batch.tokens_T.tolist() == [10, 11, 12, 13, 20]
    assert batch.target_KT.tolist() == [[none, 12, 13, none, 21], [12, 13, none, none, 22]]
    assert batch.ahead_KT.tolist() == [[11, 12, 13, 20, 21]]
    assert batch.num_targets == (3, 3)
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 0]


def test_whole_packing_cuts_nothing_and_uses_every_document_once_an_epoch() -> None:
    lengths = np.array([5, 9, 1, 3, 7, 2, 6, 10])
    packing = WholePacking(lengths, 10, seed=0)
    for epoch in range(2):
        rows = [packing.spans(epoch * packing.rows + n, 12) for n in range(packing.rows)]
        assert sorted(s.document for row in rows for s in row) == list(range(8))
        assert all(sum(s.count for s in row) <= 10 for row in rows)
        assert all((s.start, s.count) == (0, lengths[s.document]) for row in rows for s in row)
    assert packing.rows == 5
    orders = [[tuple(s.document for s in packing.spans(e * 5 + n, 12)) for n in range(5)] for e in range(2)]
    assert orders[0] != orders[1]
    with pytest.raises(
        DataError, match=r"1 of 2 documents are longer than train.seq_len=10.*--max-tokens 10"
    ):
        WholePacking(np.array([4, 11]), 10, seed=0)


def trainer_on(chats: Path, facts: HardwareFacts) -> Trainer:
    settings = [
        "train.seq_len=64",
        "train.local_batch_size=2",
        "train.global_batch_size=4",
        "train.threads=1",
    ]
    meta = read_meta(chats)
    resolved = resolve(apply(recipes.nano_test(), [*settings, "loss.balance_alpha=0"]), facts, meta)
    assert resolved.config.data.packing == "whole"
    assert any(choice.field == "data.packing" for choice in resolved.choices)
    return Trainer(resolved.config, TokenShards(chats, meta, "train"))


def test_gradient_is_that_of_the_replies_alone(chats: Path, facts: HardwareFacts) -> None:
    """Against cross entropies summed by hand over reply tokens; prompts and padding have no part in it."""
    trainer = trainer_on(chats, facts)
    model, config = trainer.model, trainer.config
    before = {n: t.clone() for n, t in model.state_dict().items()}
    weights = {n: before[n] for n, _ in model.named_parameters()}
    batch = [trainer.batches.microbatch(at, 2) for at in (0, 2)]
    result = trainer.step()
    found = {n: g.clone() for n, g in trainer.gradients().items()}
    model.load_state_dict(before)  # the router's biases moved too
    total = sum(m.num_targets[0] for m in batch)
    loss = torch.zeros(())
    for m in batch:
        sockets = packed_sockets(m.cu_seqlens, m.max_seqlen, n_routed_experts=config.model.n_routed_experts)
        hidden = model(m.tokens_T, m.positions_T, sockets)
        further = model.predict_ahead(0, model.mtp_input(hidden), m.ahead_KT[0], m.positions_T, sockets)
        for state, target_T, factor in ((hidden, m.target_KT[0], 1.0), (further, m.target_KT[1], 0.3)):
            logits_TV = state.hidden_TD @ model.head_weight().T
            kept = target_T != IGNORE
            loss = loss + factor * F.cross_entropy(logits_TV[kept], target_T[kept], reduction="sum") / total
    grads = dict(
        zip(weights, torch.autograd.grad(loss, list(model.parameters()), allow_unused=True), strict=True)
    )
    assert result.step_tokens == 4 * 64
    for name, gradient in grads.items():
        want = torch.zeros_like(weights[name]) if gradient is None else gradient
        assert torch.allclose(found[name].view(want.shape), want, atol=1e-6), name


def test_targets_are_exactly_the_learned_tokens_of_the_epoch(chats: Path, facts: HardwareFacts) -> None:
    trainer = trainer_on(chats, facts)
    shards = TokenShards(chats, read_meta(chats), "train")
    lengths = [int(n) for n in shards.lengths]
    learned = sum(int(shards.read_mask(d, 0, n).sum()) for d, n in enumerate(lengths))
    rows = WholePacking(shards.lengths, 64, trainer.config.data.seed).rows
    batch = trainer.batches.microbatch(0, rows)
    assert batch.num_targets == (learned, learned)
    assert learned < sum(lengths)
    targets = batch.target_KT[0][batch.target_KT[0] != IGNORE]
    salt = {int(t) for d, n in enumerate(lengths) for t in shards.read(d, 0, n)[shards.read_mask(d, 0, n)]}
    assert set(targets.tolist()) <= salt


def test_held_out_conversations_are_scored_on_their_replies(chats: Path, facts: HardwareFacts) -> None:
    trainer, meta = trainer_on(chats, facts), read_meta(chats)
    held_out = TokenShards(chats, meta, "held_out")
    learned = [held_out.read_mask(d, 0, int(n)).sum() for d, n in enumerate(held_out.lengths)]
    found = evaluate(
        trainer.executor.score,
        held_out,
        seq_len=64,
        rows=2,
        max_tokens=0,
        mask_documents=True,
        mtp_depth=trainer.config.model.num_nextn_predict_layers,
    )
    assert found.documents == len(learned)
    assert found.bytes < held_out.tokens * 5
    nats_per_byte = found.loss * sum(learned) / found.bytes
    assert found.bits_per_byte == pytest.approx(nats_per_byte / np.log(2.0))


def test_dataset_without_masks_is_read_as_before(dataset: Path) -> None:
    meta = read_meta(dataset)
    assert not meta.masked
    assert json.loads((dataset / "meta.json").read_text())["format"] == "benthic-tokens-1"
    assert "mask_sha256" not in (dataset / "meta.json").read_text()
    assert TokenShards(dataset, meta, "train").read_mask(0, 0, 4).all()
