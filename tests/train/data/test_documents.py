from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pyarrow as pa
import pytest
from pyarrow import parquet

from benthic.errors import DataError
from benthic.train.data.documents import Corpus, Reading, read

if TYPE_CHECKING:
    from pathlib import Path


def texts(corpus: Corpus) -> list[str]:
    return [document.text for document in read(corpus)]


def test_folder_is_walked_in_order_and_filtered(tmp_path: Path) -> None:
    for name in ("b.py", "a.py", "test/c.py", "sub/d.py", "sub/e.txt", ".hidden/f.py", "empty.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("" if name == "empty.py" else name, encoding="utf-8")
    corpus = Corpus(sources=(tmp_path,), include=("*.py",), exclude=("test",))
    assert texts(corpus) == ["a.py", "b.py", "sub/d.py"]


def test_jsonl_parquet_and_saved_datasets_give_one_document_a_row(tmp_path: Path) -> None:
    import datasets

    rows = ["first", "second\nline", "   ", "fourth é"]
    lines = "".join(json.dumps({"body": row, "id": 1}) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines + "\n", encoding="utf-8")
    parquet.write_table(pa.table({"body": rows, "id": [1, 2, 3, 4]}), tmp_path / "b.parquet")
    datasets.Dataset.from_dict({"body": rows}).save_to_disk(str(tmp_path / "c"))
    for source in ("a.jsonl", "b.parquet", "c"):
        corpus = Corpus(sources=(tmp_path / source,), text_field="body")
        assert texts(corpus) == ["first", "second\nline", "fourth é"], source


def test_the_datasets_of_a_dict_are_named_for_a_choice(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["x"]})
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(DataError, match=r"Name those to read of .*both/test, .*both/train\."):
        texts(Corpus(sources=(tmp_path / "both",)))
    assert texts(Corpus(sources=(tmp_path / "both" / "train",))) == ["x"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl:2 is not JSON"),
        ("a.jsonl", b'["text"]\n', "a.jsonl:1 holds a list"),
        ("a.jsonl", b'{"txt": "x"}\n', "a.jsonl:1 has no field 'text'; it has txt. Pass --text-field"),
        ("a.jsonl", b'{"text": 5}\n', "'text' of .*a.jsonl:1 is int"),
        ("a.parquet", b"not parquet at all", "is no readable Parquet file"),
        ("a.txt", b"good \xff bad", "byte 0xff at offset 5 of 10 bytes"),
    ],
)
def test_unreadable_rows_are_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        texts(Corpus(sources=(tmp_path / name,)))


def test_parquet_without_the_text_field_lists_its_columns(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="it has body"):
        texts(Corpus(sources=(tmp_path / "a.parquet",)))


def test_invalid_utf8_can_be_skipped_or_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"bad \xff")
    (tmp_path / "b.txt").write_bytes(b"good")
    reading = Reading()
    skip = Corpus(sources=(tmp_path,), invalid_utf8="skip")
    assert [d.text for d in read(skip, reading)] == ["good"]
    assert reading.skipped == [str(tmp_path / "a.txt")]
    assert (reading.files, reading.documents, reading.bytes) == (2, 1, 4)
    assert texts(Corpus(sources=(tmp_path,), invalid_utf8="replace")) == ["bad �", "good"]


def test_missing_source_and_unmatched_patterns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        texts(Corpus(sources=(tmp_path / "nowhere",)))
    with pytest.raises(DataError, match=r"0 files in .* match include=\['\*.rs'\]"):
        texts(Corpus(sources=(tmp_path,), include=("*.rs",)))
