from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benthic.errors import DataError
from benthic.train.data import tokenizer

if TYPE_CHECKING:
    from pathlib import Path


def test_special_tokens_come_first_and_documents_carry_them(words: tokenizer.Tokenizer) -> None:
    assert (words.bos_token_id, words.eos_token_id, words.vocab_size) == (0, 1, 320)
    ids = words.encode_documents(["The sea."])[0]
    assert (ids[0], ids[-1]) == (0, 1)
    assert words.encode("The sea.") == ids[:-1]


@given(text=st.text(max_size=60))
def test_any_text_survives_encoding(words: tokenizer.Tokenizer, text: str) -> None:
    assert words.decode(words.encode(text)) == text


def test_line_break_and_indentation_become_one_token(tmp_path: Path) -> None:
    text = "def f(x):\n    if x:\n        return x\n    return 0\n" * 50
    saved = tokenizer.save(tokenizer.train([text], 274), tmp_path, model_max_length=64)
    pieces = [saved.decode([i]) for i in saved.encode("f(x):\n        return x")]
    assert "\n        " in pieces


@pytest.mark.hf
def test_transformers_loads_the_folder_and_agrees(words: tokenizer.Tokenizer) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(words.path))
    text = "Slow snow falls on ships.\n  Über 12 whales"
    assert theirs(text)["input_ids"] == words.encode(text)
    assert theirs.decode(words.encode(text), skip_special_tokens=True) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (0, 1)
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    prompt = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == f"{tokenizer.BOS}S\n\nUser: Q\n\nAssistant:"


def test_training_twice_gives_the_same_tokenizer(words: tokenizer.Tokenizer, corpus: object) -> None:
    from benthic.train.data.documents import read

    again = tokenizer.train((d.text for d in read(corpus)), 320)  # type: ignore[arg-type]
    assert again.to_str() == words.rules.to_str()


def test_impossible_vocabularies_are_refused_with_both_numbers() -> None:
    with pytest.raises(DataError, match="vocab_size=100 is below 258"):
        tokenizer.train(["text"], 100)
    with pytest.raises(DataError, match=r"1 documents gave \d+ tokens, but vocab_size=5000"):
        tokenizer.train(["a b c"], 5000)
    with pytest.raises(DataError, match="0 documents"):
        tokenizer.train([], 300)


def test_folder_without_tokenizer_or_end_token_is_refused(words: tokenizer.Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no tokenizer\.json"):
        tokenizer.load(tmp_path)
    words.rules.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="names no eos_token"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": tokenizer.EOS}}))
    assert tokenizer.load(tmp_path).bos_token_id is None
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="no readable tokenizer"):
        tokenizer.load(tmp_path)
