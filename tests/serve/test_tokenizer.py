from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, trainers

from benthic.errors import DataError
from benthic.serve.detokenize import Detokenizer, StopMatcher, StopRule
from benthic.serve.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(tokenizer_folder)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The Llama family's layout: spaces as U+2581, unknown characters as single bytes."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))  # noqa: S106
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    backend.train_from_iterator(["the quick brown fox", "jumps over the dog"] * 20, trainer)
    source = json.loads(backend.to_str())
    source["added_tokens"] = [t for t in source["added_tokens"] if not t["content"].startswith("<0x")]
    (folder / "tokenizer.json").write_text(json.dumps(source))
    return Tokenizer.from_folder(folder)


def streamed(tokenizer: Tokenizer, ids: list[int], *, skip: bool = True) -> str:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    return "".join(detokenizer.push([token]) for token in ids) + detokenizer.finish()


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_streaming_byte_level_text_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    assert streamed(tokenizer, tokenizer.encode(text), skip=False) == text


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 309)), skip=st.booleans())
def test_any_token_sequence_streams_to_what_the_library_decodes(
    tokenizer: Tokenizer, ids: list[int], *, skip: bool
) -> None:
    expected = tokenizer.backend.decode(ids, skip_special_tokens=skip)
    assert streamed(tokenizer, ids, skip=skip) == expected
    assert tokenizer.decode(ids, skip_special_tokens=skip) == expected


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="▁<")))
def test_streaming_sentencepiece_text_equals_the_library(sentencepiece: Tokenizer, text: str) -> None:
    ids = sentencepiece.encode(text)
    assert streamed(sentencepiece, ids) == sentencepiece.backend.decode(ids)
    assert sentencepiece.decode(ids) == sentencepiece.backend.decode(ids)


def test_a_character_split_over_tokens_appears_with_its_last_byte(tokenizer: Tokenizer) -> None:
    wave = [tokenizer.backend.token_to_id(char) for char in "ðŁĮĬ"]  # the four bytes of U+1F30A
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push([token]) for token in wave] == ["", "", "", "🌊"]
    cut = Detokenizer(tokenizer)
    assert cut.push(wave[:2]) == ""
    assert cut.finish() == "\ufffd"


def test_beginning_of_sequence_is_added_when_the_config_says_so(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    config = {"bos_token": "<bos>", "add_bos_token": True}
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_folder(tmp_path)
    plain = tokenizer.encode("the dog", add_special_tokens=False)
    assert tokenizer.encode("the dog") == [0, *plain]
    assert tokenizer.encode("<bos>the dog") == [0, *plain]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "has no tokenizer.json"),
        ("{", "cannot be read"),
        (
            json.dumps(
                json.loads(Backend(models.WordLevel({"a": 0}, unk_token="a")).to_str())  # noqa: S106
                | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}
            ),
            "WordPiece",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_refused_with_the_reason(
    tmp_path: Path, content: str | None, words: str
) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=words):
        Tokenizer.from_folder(tmp_path)


def cut_at_first_stop(text: str, stops: tuple[str, ...], *, include: bool) -> tuple[str, str | None]:
    """The definition: the first position where some stop string is complete; the longest of those."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(max_examples=500, deadline=None)
@given(
    chunks=st.lists(st.text(alphabet="abc", max_size=4), max_size=12),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
)
def test_stop_strings_cut_the_text_wherever_token_borders_fall(
    chunks: list[str], stops: list[str], *, include: bool
) -> None:
    matcher = StopMatcher(StopRule(strings=tuple(stops), include=include))
    shown = ""
    for chunk in chunks:
        shown += matcher.push(chunk)
        if matcher.matched is not None:
            break
    else:
        shown += matcher.finish()
    assert (shown, matcher.matched) == cut_at_first_stop("".join(chunks), tuple(stops), include=include)


def test_text_is_held_back_only_while_a_stop_string_could_still_complete() -> None:
    matcher = StopMatcher(StopRule(strings=("\n\n##",)))
    assert [matcher.push(text) for text in ("a\n", "\n", "#", "x", "y")] == ["a", "", "", "\n\n#x", "y"]


def test_detokenizing_costs_the_same_for_the_last_token_as_for_the_first(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the quick brown fox " * 50_000)
    assert streamed(tokenizer, ids) == "the quick brown fox " * 50_000  # seconds, if it were quadratic: hours
