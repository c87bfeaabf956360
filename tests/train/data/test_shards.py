from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest

from benthic.errors import DataError
from benthic.train.data import build
from benthic.train.data.documents import Corpus, read
from benthic.train.data.shards import TokenShards, read_meta, verify, vocabulary_dtype

if TYPE_CHECKING:
    from pathlib import Path

    from benthic.train.data.tokenizer import Tokenizer


def test_every_document_is_read_back_from_its_side(dataset: Path, corpus: Corpus, words: Tokenizer) -> None:
    meta = read_meta(dataset)
    assert len(meta.splits["train"].shards) > 1
    for split, held_out in (("train", False), ("held_out", True)):
        shards = TokenShards(dataset, meta, split)
        expected = [d.text for d in read(corpus) if build.is_held_out(d.text, 0.2) == held_out]
        found = [shards.read(n, 0, int(length)).tolist() for n, length in enumerate(shards.lengths)]
        assert found == words.encode_documents(expected)
        assert shards.text_bytes.tolist() == [len(text.encode()) for text in expected]
        assert shards.tokens == sum(map(len, found)) == meta.splits[split].tokens


def test_part_of_a_document_is_read(dataset: Path) -> None:
    shards = TokenShards(dataset, read_meta(dataset), "train")
    last = len(shards.lengths) - 1
    whole = shards.read(last, 0, int(shards.lengths[last]))
    assert np.array_equal(shards.read(last, 5, 7), whole[5:12])


def test_copies_of_a_text_fall_on_one_side_and_the_fraction_is_kept() -> None:
    sides = [build.is_held_out(f"document {n}", 0.1) for n in range(4000)]
    assert 0.08 < sum(sides) / len(sides) < 0.12
    assert [build.is_held_out(f"document {n}", 0.1) for n in range(4000)] == sides


def test_narrow_ids_for_small_vocabularies() -> None:
    assert [vocabulary_dtype(n).itemsize for n in (320, 65536, 65537)] == [2, 2, 4]


def test_verify_names_the_file_that_changed(dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    verify(copy, read_meta(copy))
    path = copy / "train-00001.bin"
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train-00001.bin has SHA-256 .* but meta.json says"):
        verify(copy, read_meta(copy))


def test_truncated_or_missing_shard_is_refused_with_both_sizes(dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    path, size = copy / "train-00000.bin", (copy / "train-00000.bin").stat().st_size
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(DataError, match=f"has {size - 6} bytes, but meta.json counts {size}"):
        TokenShards(copy, read_meta(copy), "train")
    path.unlink()
    with pytest.raises(DataError, match=r"train-00000.bin is missing"):
        TokenShards(copy, read_meta(copy), "train")


def test_folder_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no meta\.json"):
        read_meta(tmp_path)
    (tmp_path / "meta.json").write_text('{"format": "other"}')
    with pytest.raises(DataError, match="'other', this version reads 'benthic-tokens-1'"):
        read_meta(tmp_path)


def test_empty_corpus_and_empty_sides_are_refused(words: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("  \n")
    corpus = Corpus(sources=(tmp_path / "in",))
    with pytest.raises(DataError, match="holds 0 documents with text in 1 files"):
        build.build(corpus, words, tmp_path / "out", build.BuildOptions())
    (tmp_path / "in" / "a.txt").write_text("one text")
    with pytest.raises(
        DataError, match=r"held_out=0\.02 of 1 documents left 1 to train on and 0 to evaluate on"
    ):
        build.build(corpus, words, tmp_path / "out", build.BuildOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    meta = build.build(corpus, words, tmp_path / "out", build.BuildOptions(held_out=0.0))
    assert meta.splits["held_out"].documents == 0
    assert TokenShards(tmp_path / "out", meta, "held_out").tokens == 0
    with pytest.raises(DataError, match="exists already"):
        build.build(corpus, words, tmp_path / "out", build.BuildOptions())
