"""`benthic data`: tokenizers and token shards from text."""

from __future__ import annotations

import sysconfig
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from benthic import units
from benthic.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benthic.train.data.documents import Corpus, Reading
    from benthic.train.data.shards import Meta

app = typer.Typer(help="Make tokenizers and token shards from text.", no_args_is_help=True)

# Generated tables, tests and old grammars would teach a small model little of how people write Python.
STDLIB_LEFT_OUT: Final = (
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "lib2to3",
    "encodings",
    "pydoc_data",
    "turtledemo",
    "entities.py",
    "stringprep.py",
    "locale.py",
    "_sysconfigdata*",
    "config-*",
)


class InvalidUtf8(StrEnum):
    """What to do with bytes that are not UTF-8."""

    error = "error"
    skip = "skip"
    replaced = "replace"


Sources = Annotated[
    list[Path] | None,
    typer.Argument(help="Text files, JSONL, Parquet, or folders of them.", show_default=False),
]
Stdlib = Annotated[
    bool, typer.Option("--python-stdlib", help="Add the source files of this Python's library.")
]
Include = Annotated[
    list[str] | None,
    typer.Option(help="Only files in folders that match this pattern, e.g. '*.py'; repeatable."),
]
Exclude = Annotated[list[str] | None, typer.Option(help="Not these files or folders; repeatable.")]
TextField = Annotated[str, typer.Option(help="Field of the text in JSONL and Parquet.")]
Utf8 = Annotated[
    InvalidUtf8, typer.Option("--invalid-utf8", help="What to do with bytes that are not UTF-8.")
]


@app.command()
def tokenizer(  # noqa: PLR0913 (one argument an option)
    sources: Sources = None,
    *,
    out: Annotated[
        Path, typer.Option(help="Folder to write, in Hugging Face format; must hold no tokenizer.")
    ],
    vocab_size: Annotated[
        int, typer.Option(help="Tokens to learn: 2 special, 256 bytes, the rest merges.")
    ] = 4096,
    model_max_length: Annotated[
        int, typer.Option(help="Context length noted in tokenizer_config.json.")
    ] = 1024,
    python_stdlib: Stdlib = False,
    include: Include = None,
    exclude: Exclude = None,
    text_field: TextField = "text",
    invalid_utf8: Utf8 = InvalidUtf8.error,
) -> None:
    """Learn a byte-level BPE tokenizer."""
    from benthic.train.data import tokenizer as tokenizers  # noqa: PLC0415 (keeps other commands quick)
    from benthic.train.data.documents import Reading, read  # noqa: PLC0415

    corpus = _corpus(sources, include, exclude, text_field, invalid_utf8, python_stdlib=python_stdlib)
    if (out / "tokenizer.json").exists():
        message = f"{out} holds a tokenizer already. Choose another --out or delete it."
        raise DataError(message)
    reading = Reading()
    with _progress("reading") as show:
        rules = tokenizers.train(_telling(corpus, reading, show, read), vocab_size)
    saved = tokenizers.save(rules, out, model_max_length=model_max_length)
    Console().print(
        f"{saved.vocab_size} tokens from {reading.documents} documents, {units.size(reading.bytes)} → {out}",
        highlight=False,
    )


@app.command()
def build(  # noqa: PLR0913 (one argument an option)
    sources: Sources = None,
    *,
    tokenizer: Annotated[Path, typer.Option(help="Hugging Face tokenizer folder.")],
    out: Annotated[Path, typer.Option(help="Dataset folder to write; must not exist.")],
    held_out: Annotated[float, typer.Option(help="Fraction of documents kept for evaluation.")] = 0.02,
    shard_tokens: Annotated[int, typer.Option(help="Tokens of one shard file.", min=1)] = 2**28,
    python_stdlib: Stdlib = False,
    include: Include = None,
    exclude: Exclude = None,
    text_field: TextField = "text",
    invalid_utf8: Utf8 = InvalidUtf8.error,
) -> None:
    """Tokenize documents into memory-mapped shards."""
    from benthic.train.data import build as builds  # noqa: PLC0415 (keeps other commands quick)
    from benthic.train.data import tokenizer as tokenizers  # noqa: PLC0415

    corpus = _corpus(sources, include, exclude, text_field, invalid_utf8, python_stdlib=python_stdlib)
    options = builds.BuildOptions(held_out=held_out, shard_tokens=shard_tokens)
    with _progress("tokenizing") as show:
        meta = builds.build(corpus, tokenizers.load(tokenizer), out, options, show)
    _print(out, meta)


@app.command()
def chat(
    sources: Annotated[list[Path], typer.Argument(help="JSONL files, one conversation a line.")],
    *,
    tokenizer: Annotated[Path, typer.Option(help="Hugging Face tokenizer folder with a chat template.")],
    out: Annotated[Path, typer.Option(help="Dataset folder to write; must not exist.")],
    max_tokens: Annotated[
        int, typer.Option(help="Cut longer conversations after the last reply that fits; 0: no limit.", min=0)
    ] = 0,
    held_out: Annotated[float, typer.Option(help="Fraction of conversations kept for evaluation.")] = 0.02,
    shard_tokens: Annotated[int, typer.Option(help="Tokens of one shard file.", min=1)] = 2**28,
) -> None:
    """Tokenize conversations for fine-tuning: only the assistant's replies are learned."""
    from benthic.train.data import tokenizer as tokenizers  # noqa: PLC0415 (keeps other commands quick)
    from benthic.train.data.build import BuildOptions  # noqa: PLC0415
    from benthic.train.data.build_chat import build_chat  # noqa: PLC0415

    options, words = BuildOptions(held_out=held_out, shard_tokens=shard_tokens), tokenizers.load(tokenizer)
    with _progress("tokenizing") as show:
        meta = build_chat(sources, words, out, options, max_tokens=max_tokens, progress=show)
    _print(out, meta)
    if meta.source["too_long"]:
        left_out = (
            f"{meta.source['too_long']} conversations left out: no reply ends within {max_tokens} tokens"
        )
        Console().print(left_out, highlight=False)


@app.command()
def check(folder: Annotated[Path, typer.Argument(help="Dataset folder.")]) -> None:
    """Compare every file of a dataset with its checksum and show what it holds."""
    from benthic.train.data import shards  # noqa: PLC0415 (keeps other commands quick)

    meta = shards.read_meta(folder)
    shards.verify(folder, meta)
    _print(folder, meta)


def _corpus(
    sources: list[Path] | None,
    include: list[str] | None,
    exclude: list[str] | None,
    text_field: str,
    invalid_utf8: InvalidUtf8,
    *,
    python_stdlib: bool,
) -> Corpus:
    from benthic.train.data.documents import Corpus  # noqa: PLC0415 (keeps other commands quick)

    found, patterns, left_out = tuple(sources or ()), tuple(include or ()), tuple(exclude or ())
    if python_stdlib:
        found, patterns = (*found, Path(sysconfig.get_path("stdlib"))), patterns or ("*.py",)
        left_out = (*left_out, *STDLIB_LEFT_OUT)
    if not found:
        message = "0 sources were named. Give files or folders, or pass --python-stdlib."
        raise DataError(message)
    return Corpus(
        sources=found,
        include=patterns or ("*",),
        exclude=left_out,
        text_field=text_field,
        invalid_utf8=invalid_utf8.value,
    )


def _telling(
    corpus: Corpus,
    reading: Reading,
    show: Callable[[Reading], None],
    read: Callable[[Corpus, Reading], Iterator[object]],
) -> Iterator[str]:
    for document in read(corpus, reading):
        show(reading)
        yield document.text  # type: ignore[attr-defined]


class _progress:  # noqa: N801 (used as a function)
    """A spinner that counts documents; silent where there is no terminal."""

    def __init__(self, verb: str) -> None:
        console = Console(stderr=True)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._verb = verb
        self._task = self._bar.add_task(verb, total=None)

    def __enter__(self) -> Callable[[Reading], None]:
        self._bar.start()
        return self._show

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _show(self, reading: Reading) -> None:
        text = f"{self._verb}: {reading.documents:,} documents, {units.size(reading.bytes)}"
        self._bar.update(self._task, description=text)


def _print(folder: Path, meta: Meta) -> None:
    table = Table(title=f"{folder}", title_justify="left", caption_justify="left")
    for column in ("split", "documents", "tokens", "text", "bytes/token", "shards"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for name, info in meta.splits.items():
        ratio = info.bytes / info.tokens if info.tokens else 0.0
        table.add_row(
            name,
            f"{info.documents:,}",
            f"{info.tokens:,}",
            units.size(info.bytes),
            f"{ratio:.2f}",
            str(len(info.shards)),
        )
    skipped = meta.source["skipped"]
    width = f"{meta.vocab_size:,} token ids of {meta.dtype[-1]} bytes"
    table.caption = f"{width}; {skipped} files skipped as not UTF-8"
    Console().print(table)
