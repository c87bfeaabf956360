"""Documents to token shards: tokenize, hold some out, write, seal with checksums."""

from __future__ import annotations

import hashlib
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from benthic.errors import DataError
from benthic.train.data.documents import Corpus, Document, Reading, read
from benthic.train.data.shards import Meta, ShardWriter, Split, vocabulary_dtype, write_meta
from benthic.train.data.tokenizer import Tokenizer, copy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_DOCUMENTS_AT_ONCE: Final = 64
_HASH_BYTES: Final = 8


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How documents become shards.

    held_out: fraction of documents kept for evaluation, chosen by a hash of their text: the choice does not
        depend on order, and copies of one text fall on one side.
    shard_tokens: a new file is begun after so many tokens.
    """

    held_out: float = 0.02
    shard_tokens: int = 2**28


def build(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: Path,
    options: BuildOptions,
    progress: Callable[[Reading], None] | None = None,
) -> Meta:
    """Write a dataset folder; it appears under its name only when complete.

    Raises:
        DataError: the folder exists, the corpus is empty, or no document fell on one of the two sides.
    """
    with begun(folder, options) as unfinished:
        meta = _write(corpus, tokenizer, unfinished, options, progress)
        seal(unfinished, tokenizer, meta)
    return meta


@contextmanager
def begun(folder: Path, options: BuildOptions) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` at the end, or nothing if that is not reached.

    Raises:
        DataError: `folder` exists, or an option makes no sense.
    """
    if not 0.0 <= options.held_out < 1.0:
        msg = f"held_out={options.held_out} is no fraction in [0, 1)."
        raise DataError(msg)
    if folder.exists():
        msg = f"{folder} exists already. Choose another --out or delete it."
        raise DataError(msg)
    unfinished = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    unfinished.rename(folder)


def seal(unfinished: Path, tokenizer: Tokenizer, meta: Meta) -> None:
    """Add what belongs to a dataset beside its shards."""
    copy(tokenizer.path, unfinished / "tokenizer")
    write_meta(unfinished, meta)


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document is kept for evaluation: the first 64 bits of its BLAKE2b hash against `fraction`."""
    digest = hashlib.blake2b(text.encode(), digest_size=_HASH_BYTES).digest()
    return int.from_bytes(digest, "big") < fraction * 2 ** (8 * _HASH_BYTES)


def _write(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: Path,
    options: BuildOptions,
    progress: Callable[[Reading], None] | None,
) -> Meta:
    reading = Reading()
    writers = writers_of(folder, tokenizer, options)
    documents = read(corpus, reading)
    while some := list(islice(documents, _DOCUMENTS_AT_ONCE)):
        _write_some(some, tokenizer, writers, options.held_out)
        if progress is not None:
            progress(reading)
    source = {"files": reading.files, "skipped": len(reading.skipped)}
    meta = meta_of(tokenizer, writers, {"held_out": options.held_out, **source})
    check_sides(meta, ", ".join(map(str, corpus.sources)), options)
    return meta


def meta_of(tokenizer: Tokenizer, writers: dict[Split, ShardWriter], source: dict[str, Any]) -> Meta:
    """Close the writers and sum up what they wrote."""
    return Meta(
        vocab_size=tokenizer.vocab_size,
        dtype=vocabulary_dtype(tokenizer.vocab_size).str,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tokenizer_sha256=tokenizer.sha256,
        splits={str(name): writer.close() for name, writer in writers.items()},
        source=source,
    )


def writers_of(
    folder: Path, tokenizer: Tokenizer, options: BuildOptions, *, masked: bool = False
) -> dict[Split, ShardWriter]:
    """A writer for each split; `masked` ones also write which tokens are to be learned."""
    dtype = vocabulary_dtype(tokenizer.vocab_size)
    splits: tuple[Split, ...] = ("train", "held_out")
    return {split: ShardWriter(folder, split, dtype, options.shard_tokens, masked) for split in splits}


def _write_some(
    documents: list[Document], tokenizer: Tokenizer, writers: dict[Split, ShardWriter], held_out: float
) -> None:
    ids = tokenizer.encode_documents([document.text for document in documents])
    for document, tokens in zip(documents, ids, strict=True):
        split: Split = "held_out" if is_held_out(document.text, held_out) else "train"
        writers[split].add(tokens, len(document.text.encode()))


def check_sides(meta: Meta, where: str, options: BuildOptions) -> None:
    """Refuse a dataset without documents on a side that should have some.

    Raises:
        DataError: with the counts.
    """
    train, held_out = meta.splits["train"].documents, meta.splits["held_out"].documents
    if train + held_out == 0:
        msg = f"{where} holds 0 documents with text in {meta.source['files']} files."
        raise DataError(msg)
    if train == 0 or (held_out == 0 and options.held_out > 0):
        msg = (
            f"held_out={options.held_out} of {train + held_out} documents left {train} to train on and "
            f"{held_out} to evaluate on. Change --held-out (0 for none) or give more documents."
        )
        raise DataError(msg)
