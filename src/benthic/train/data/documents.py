"""Documents from files: plain text, a tree of source files, JSONL, Parquet, a saved `datasets` folder."""

from __future__ import annotations

import fnmatch
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from benthic.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_ROWS_AT_ONCE: Final = 256


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    name: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Which files hold the documents, and how to read them.

    sources: files, or folders, walked in sorted order but for hidden names. `.jsonl` and `.parquet` files
        hold one document a row, a folder saved by `datasets.save_to_disk` too; any other file is one text.
    include, exclude: shell patterns on the path below a source folder, or on a single name in it.
    text_field: column or key of the text in JSONL, Parquet and datasets.
    invalid_utf8: "error" refuses the file, "skip" leaves it out and counts it, "replace" puts U+FFFD.
    """

    sources: tuple[Path, ...]
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    text_field: str = "text"
    invalid_utf8: Literal["error", "skip", "replace"] = "error"


@dataclass
class Reading:
    """What a pass over a corpus has met so far."""

    files: int = 0
    documents: int = 0
    bytes: int = 0
    skipped: list[str] = field(default_factory=list)


def files(corpus: Corpus) -> tuple[Path, ...]:
    """Every file of the corpus, in the order it is read.

    Raises:
        DataError: a source does not exist or is a saved `DatasetDict`, or no file matches.
    """
    found: list[Path] = []
    for source in corpus.sources:
        if not source.exists():
            msg = f"{source} does not exist. Give a file or a folder of text, JSONL or Parquet."
            raise DataError(msg)
        _refuse_splits(source)
        found += _walk(source, corpus) if source.is_dir() and not _is_saved_dataset(source) else [source]
    if not found:
        where = ", ".join(map(str, corpus.sources))
        msg = (
            f"0 files in {where} match include={list(corpus.include)} and exclude={list(corpus.exclude)}. "
            "Widen --include or name another source."
        )
        raise DataError(msg)
    return tuple(found)


def read(corpus: Corpus, reading: Reading | None = None) -> Iterator[Document]:
    """Every document that is not blank, in a fixed order; `reading` counts along.

    Raises:
        DataError: a source is missing, unreadable, no UTF-8 (naming file and byte), or has no text field.
    """
    reading = Reading() if reading is None else reading
    for path in files(corpus):
        reading.files += 1
        for document in _reader(path)(path, corpus, reading):
            if document.text.strip():
                reading.documents += 1
                reading.bytes += len(document.text.encode())
                yield document


def _walk(folder: Path, corpus: Corpus) -> list[Path]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in paths if _wanted(path.relative_to(folder), corpus))


def _wanted(relative: Path, corpus: Corpus) -> bool:
    if any(part.startswith(".") or part == "__pycache__" for part in relative.parts):
        return False
    return _matches(relative, corpus.include) and not _matches(relative, corpus.exclude)


def _matches(relative: Path, patterns: tuple[str, ...]) -> bool:
    """Whether the path as a whole, or any one folder or file name in it, fits a pattern."""
    names = (relative.as_posix(), *relative.parts)
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns for name in names)


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_info.json").is_file() and (path / "state.json").is_file()


def _refuse_splits(path: Path) -> None:
    """A `DatasetDict` as `save_to_disk` writes it: which of its datasets is meant, only people know."""
    if (path / "dataset_dict.json").is_file():
        splits = sorted(str(one) for one in path.iterdir() if _is_saved_dataset(one))
        msg = f"{path} is several datasets, a DatasetDict. Name those to read of {', '.join(splits)}."
        raise DataError(msg)


def _reader(path: Path) -> Callable[[Path, Corpus, Reading], Iterator[Document]]:
    if path.is_dir():
        return _read_dataset
    return {".jsonl": _read_jsonl, ".parquet": _read_parquet}.get(path.suffix.lower(), _read_text)


def _read_text(path: Path, corpus: Corpus, reading: Reading) -> Iterator[Document]:
    text = _decode(path.read_bytes(), f"{path}", corpus, reading)
    if text is not None:
        yield Document(str(path), text)


def _read_jsonl(path: Path, corpus: Corpus, reading: Reading) -> Iterator[Document]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            name = f"{path}:{number}"
            text = _decode(line, name, corpus, reading)
            if text is not None and text.strip():
                yield Document(name, _text_of(_parse(text, name), corpus.text_field, name))


def _read_parquet(path: Path, corpus: Corpus, _: Reading) -> Iterator[Document]:
    import pyarrow as pa  # noqa: PLC0415 (takes half a second; only Parquet needs it)
    from pyarrow import parquet  # noqa: PLC0415

    try:
        file = parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        msg = f"{path} is no readable Parquet file: {error}"
        raise DataError(msg) from error
    if corpus.text_field not in file.schema_arrow.names:
        raise _no_field(str(path), corpus.text_field, file.schema_arrow.names)
    row = 0
    for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=[corpus.text_field]):
        for value in batch.column(0).to_pylist():
            yield Document(f"{path}:{row}", _as_text(value, corpus.text_field, f"{path}:{row}"))
            row += 1


def _read_dataset(path: Path, corpus: Corpus, _: Reading) -> Iterator[Document]:
    import datasets  # noqa: PLC0415 (takes a second; only saved datasets need it)

    rows = datasets.load_from_disk(str(path))
    if corpus.text_field not in rows.column_names:
        raise _no_field(str(path), corpus.text_field, rows.column_names)
    for number, row in enumerate(rows.select_columns([corpus.text_field])):
        name = f"{path}:{number}"
        yield Document(name, _as_text(row[corpus.text_field], corpus.text_field, name))


def _decode(raw: bytes, name: str, corpus: Corpus, reading: Reading) -> str | None:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if corpus.invalid_utf8 == "replace":
            return raw.decode("utf-8", errors="replace")
        if corpus.invalid_utf8 == "skip":
            reading.skipped.append(name)
            return None
        msg = (
            f"{name} is not UTF-8: byte {raw[error.start]:#04x} at offset {error.start} of {len(raw)} bytes. "
            "Convert the file, exclude it, or pass --invalid-utf8 skip or replace."
        )
        raise DataError(msg) from error


def _parse(line: str, name: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        msg = f"{name} is not JSON: {error}. One object a line is expected."
        raise DataError(msg) from error


def _text_of(row: Any, field_name: str, name: str) -> str:
    if not isinstance(row, dict):
        msg = f"{name} holds a {type(row).__name__}, not an object with a field {field_name!r}."
        raise DataError(msg)
    if field_name not in row:
        raise _no_field(name, field_name, list(row))
    return _as_text(row[field_name], field_name, name)


def _as_text(value: Any, field_name: str, name: str) -> str:
    if not isinstance(value, str):
        msg = f"{field_name!r} of {name} is {type(value).__name__}, not text."
        raise DataError(msg)
    return value


def _no_field(name: str, field_name: str, known: list[str]) -> DataError:
    return DataError(f"{name} has no field {field_name!r}; it has {', '.join(known)}. Pass --text-field.")
