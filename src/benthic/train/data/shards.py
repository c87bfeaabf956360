"""Token shards on disk: `.bin` files of token ids, `.idx` files of document borders, and one `meta.json`.

A dataset folder:

    meta.json            what follows, with counts and checksums
    tokenizer/           the tokenizer the ids belong to
    train-00000.bin      token ids, uint16 (vocabularies up to 65,536) or uint32, documents back to back
    train-00000.idx      uint64 [documents, 2]: where each document ends in the shard, and its bytes of UTF-8
    train-00000.msk      only with masks: uint8 per token, 1 where the token is one to learn
    held_out-00000.bin   the held-out documents, same form

Files are memory-mapped: opening costs nothing, reading touches only what is read.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Literal

import numpy as np

from benthic.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

Split = Literal["train", "held_out"]
FORMAT: Final = "benthic-tokens-1"
FORMAT_MASKED: Final = "benthic-tokens-2"
_BORDER: Final = np.dtype([("end", "<u8"), ("bytes", "<u8")])


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One `.bin` and its `.idx`, by name without suffix; checksums are SHA-256 of the files.

    `mask_sha256` is None where there is no `.msk`: every token is one to learn.
    """

    name: str
    tokens: int
    documents: int
    sha256: str
    index_sha256: str
    mask_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """Totals of one split; `bytes` are of UTF-8 text, of what is to learn where there are masks."""

    tokens: int
    documents: int
    bytes: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What a dataset folder holds and which tokenizer made it."""

    vocab_size: int
    dtype: str
    bos_token_id: int | None
    eos_token_id: int
    tokenizer_sha256: str
    splits: dict[str, SplitInfo]
    source: dict[str, Any]

    @property
    def masked(self) -> bool:
        """Whether some tokens are not to be learned."""
        return any(shard.mask_sha256 for info in self.splits.values() for shard in info.shards)


@dataclass
class ShardWriter:
    """Writes the documents of one split, starting a new shard after `shard_tokens` tokens.

    With `masked`, every document comes with a mask.
    """

    folder: Path
    split: Split
    dtype: np.dtype[Any]
    shard_tokens: int
    masked: bool = False
    shards: list[Shard] = field(default_factory=list)
    bytes: int = 0
    _file: BinaryIO | None = None
    _mask: bytearray = field(default_factory=bytearray)
    _borders: list[tuple[int, int]] = field(default_factory=list)
    _tokens: int = 0

    def add(self, ids: list[int], text_bytes: int, learned: list[bool] | None = None) -> None:
        """Append one document; `learned` says for each token whether it is one to learn."""
        if self._file is None:
            self._file = self._path("bin").open("wb")
        self._file.write(np.asarray(ids, dtype=self.dtype).tobytes())
        if self.masked:
            self._mask += bytes(learned or [True] * len(ids))
        self._tokens += len(ids)
        self._borders.append((self._tokens, text_bytes))
        self.bytes += text_bytes
        if self._tokens >= self.shard_tokens:
            self._seal()

    def close(self) -> SplitInfo:
        """Finish the last shard and return the totals."""
        self._seal()
        return SplitInfo(
            tokens=sum(s.tokens for s in self.shards),
            documents=sum(s.documents for s in self.shards),
            bytes=self.bytes,
            shards=tuple(self.shards),
        )

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self.split}-{len(self.shards):05d}.{suffix}"

    def _seal(self) -> None:
        """End the shard that is open, if any, with its borders and checksums."""
        if self._file is None:
            return
        self._file.close()
        tokens, borders = self._path("bin"), self._path("idx")
        borders.write_bytes(np.array(self._borders, dtype=_BORDER).tobytes())
        if self.masked:
            self._path("msk").write_bytes(self._mask)
        self.shards.append(
            Shard(
                name=tokens.stem,
                tokens=self._tokens,
                documents=len(self._borders),
                sha256=_sha256(tokens),
                index_sha256=_sha256(borders),
                mask_sha256=_sha256(self._path("msk")) if self.masked else None,
            )
        )
        self._file, self._borders, self._tokens, self._mask = None, [], 0, bytearray()


class TokenShards:
    """The documents of one split, read through memory maps.

    Attributes:
        starts: int64 [documents + 1], where each document begins in the split taken as one long stream.
        text_bytes: int64 [documents], bytes of UTF-8 of each document.
    """

    def __init__(self, folder: Path, meta: Meta, split: Split) -> None:
        info = meta.splits[split]
        self.folder, self.meta, self.info = folder, meta, info
        borders = [_map(folder / f"{s.name}.idx", _BORDER, s.documents) for s in info.shards]
        self._bins = [_map(folder / f"{s.name}.bin", np.dtype(meta.dtype), s.tokens) for s in info.shards]
        self._masks = [
            _map(folder / f"{s.name}.msk", np.dtype(np.uint8), s.tokens) if s.mask_sha256 else None
            for s in info.shards
        ]
        shard_tokens = np.array([s.tokens for s in info.shards], dtype=np.int64)
        self._shard_starts = np.concatenate([[0], np.cumsum(shard_tokens)]).astype(np.int64)
        offsets = self._shard_starts[:-1]
        ends = [b["end"].astype(np.int64) + o for b, o in zip(borders, offsets, strict=True)]
        self.starts = np.concatenate([np.zeros(1, np.int64), *ends])
        self.text_bytes = np.concatenate(
            [np.zeros(0, np.int64), *(b["bytes"].astype(np.int64) for b in borders)]
        )

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document."""
        return np.diff(self.starts)

    @property
    def tokens(self) -> int:
        """Tokens of the split."""
        return int(self.starts[-1])

    def read(self, document: int, start: int, count: int) -> NDArray[np.int64]:
        """`count` token ids of one document from its token `start` on."""
        shard, local = self._find(document, start)
        return self._bins[shard][local : local + count].astype(np.int64)

    def read_mask(self, document: int, start: int, count: int) -> NDArray[np.bool_]:
        """For each of these tokens whether it is one to learn."""
        shard, local = self._find(document, start)
        mask = self._masks[shard]
        return np.ones(count, np.bool_) if mask is None else mask[local : local + count].astype(np.bool_)

    def _find(self, document: int, start: int) -> tuple[int, int]:
        """The shard that holds a token of a document, and where in it."""
        at = int(self.starts[document]) + start
        shard = int(np.searchsorted(self._shard_starts, at, side="right")) - 1
        return shard, at - int(self._shard_starts[shard])


def vocabulary_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest of uint16 and uint32 that holds every id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def write_meta(folder: Path, meta: Meta) -> None:
    """Write `meta.json`."""
    splits = {
        name: {
            "tokens": s.tokens,
            "documents": s.documents,
            "bytes": s.bytes,
            "shards": [{k: v for k, v in vars(shard).items() if v is not None} for shard in s.shards],
        }
        for name, s in meta.splits.items()
    }
    content = {"format": FORMAT_MASKED if meta.masked else FORMAT, **vars(meta), "splits": splits}
    (folder / "meta.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_made_up(
    folder: Path, documents: dict[Split, list[list[int]]], *, vocab_size: int, shard_tokens: int
) -> Path:
    """A dataset of ids that no tokenizer made, in a new folder; 0 begins documents and 1 ends them."""
    folder.mkdir(parents=True)
    splits: dict[str, SplitInfo] = {}
    for split, each in documents.items():
        writer = ShardWriter(folder, split, np.dtype("<u2"), shard_tokens)
        for ids in each:
            writer.add([0, *ids, 1], len(ids))
        splits[split] = writer.close()
    meta = Meta(
        vocab_size=vocab_size,
        dtype="<u2",
        bos_token_id=0,
        eos_token_id=1,
        tokenizer_sha256="",
        splits=splits,
        source={},
    )
    write_meta(folder, meta)
    return folder


def read_meta(folder: Path) -> Meta:
    """Read `meta.json`.

    Raises:
        DataError: the folder is no dataset, or of another format.
    """
    file = folder / "meta.json"
    if not file.is_file():
        msg = f"{folder} is no dataset: it has no meta.json. Make one with `benthic data build`."
        raise DataError(msg)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"{file} is not JSON: {error}. Build the dataset again."
        raise DataError(msg) from error
    found = content.pop("format", None)
    if found not in {FORMAT, FORMAT_MASKED}:
        msg = (
            f"{file} says format {found!r}, this version reads {FORMAT!r} and {FORMAT_MASKED!r}. "
            "Build the dataset again."
        )
        raise DataError(msg)
    content["splits"] = {name: _split_info(info) for name, info in content["splits"].items()}
    return Meta(**content)


def verify(folder: Path, meta: Meta) -> None:
    """Compare every file with its checksum.

    Raises:
        DataError: the first file that is missing, truncated or changed.
    """
    for info in meta.splits.values():
        for shard in info.shards:
            _check(folder / f"{shard.name}.bin", shard.sha256)
            _check(folder / f"{shard.name}.idx", shard.index_sha256)
            if shard.mask_sha256 is not None:
                _check(folder / f"{shard.name}.msk", shard.mask_sha256)


def _split_info(content: dict[str, Any]) -> SplitInfo:
    shards = tuple(Shard(**shard) for shard in content["shards"])
    return SplitInfo(
        tokens=content["tokens"], documents=content["documents"], bytes=content["bytes"], shards=shards
    )


def _map(path: Path, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    if not path.is_file():
        msg = f"{path} is missing. Build the dataset again."
        raise DataError(msg)
    size, expected = path.stat().st_size, count * dtype.itemsize
    if size != expected:
        msg = f"{path} has {size} bytes, but meta.json counts {expected}. Build the dataset again."
        raise DataError(msg)
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,))


def _check(path: Path, expected: str) -> None:
    if not path.is_file():
        msg = f"{path} is missing. Build the dataset again."
        raise DataError(msg)
    found = _sha256(path)
    if found != expected:
        msg = (
            f"{path} has SHA-256 {found[:12]}…, but meta.json says {expected[:12]}…: the file has changed "
            "since it was built. Build the dataset again."
        )
        raise DataError(msg)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
