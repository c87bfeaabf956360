"""From words of the command line to a workload: files are read here, and what a server says of itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tokenizers

from benthic.bench.workload import (
    RandomSource,
    Source,
    TextSource,
    TokenRange,
    TraceSource,
    Work,
    read_prompts,
    read_sharegpt,
)
from benthic.errors import ConfigError, DataError, ServeError
from benthic.spec import traces

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benthic.bench.client import Client

Dataset = Literal["random", "sharegpt", "custom", "azure", "mooncake"]
DEFAULT_COUNT = 200
FIRST_RANDOM_TOKEN = 3
"""Below it most vocabularies keep control symbols; a tokenizer says exactly."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What `/v1/models` says of the model under test; None is what the server does not say."""

    name: str
    root: str | None
    max_model_len: int | None


async def served_model(client: Client, wanted: str | None) -> ServedModel:
    """The served model called `wanted`, or the first.

    Raises:
        ServeError: the server does not list models, or not this one.
    """
    found = await client.get_json("/v1/models")
    cards = found.get("data") if isinstance(found, dict) else None
    if not cards:
        msg = f"/v1/models lists no model: {str(found)[:200]}"
        raise ServeError(msg)
    names = [str(card.get("id")) for card in cards]
    if wanted is not None and wanted not in names:
        msg = f"the server does not serve {wanted!r}, but {', '.join(names)}. Give one of them as --model."
        raise ServeError(msg)
    card = cards[0 if wanted is None else names.index(wanted)]
    return ServedModel(name=str(card["id"]), root=card.get("root"), max_model_len=card.get("max_model_len"))


async def server_version(client: Client) -> Any:
    """What `/version` says; None where there is no such path."""
    try:
        return await client.get_json("/version")
    except ServeError:
        return None


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """The `--random-*` and `--output-len` words."""

    input_len: int
    output_len: int | None
    range_ratio: float
    prefix_len: int


@dataclass(frozen=True, kw_only=True)
class AsText:
    """A source whose token prompts are written as text, for APIs that take no token ids.

    A text of random tokens may be tokenized into another number of tokens: the server's count is the truth.
    """

    source: Source
    tokenizer: tokenizers.Tokenizer

    def works(self, count: int, run: int) -> list[Work]:
        """The source's prompts, decoded."""
        return [
            Work(
                prompt=work.prompt if isinstance(work.prompt, str) else self.tokenizer.decode(work.prompt),
                output_tokens=work.output_tokens,
            )
            for work in self.source.works(count, run)
        ]


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Token ids for random prompts, and how to write them as text where the API takes none."""

    tokens: TokenRange
    tokenizer: tokenizers.Tokenizer | None

    @classmethod
    def of(cls, folder: Path | None, vocab_size: int | None, served: ServedModel) -> Vocabulary:
        """Of a tokenizer's folder, of a number, or of the folder that the server says it serves.

        Raises:
            ConfigError: none of the three is there.
            DataError: the tokenizer cannot be read.
        """
        if folder is None and served.root is not None and (Path(served.root) / "tokenizer.json").is_file():
            folder = Path(served.root)
        if folder is not None:
            return cls._of_tokenizer(folder, vocab_size)
        if vocab_size is None:
            msg = (
                "random prompts need to know which token ids exist. Give --tokenizer FOLDER (with a "
                "tokenizer.json) or --vocab-size."
            )
            raise ConfigError(msg)
        return cls(tokens=TokenRange(first=FIRST_RANDOM_TOKEN, last=vocab_size), tokenizer=None)

    @classmethod
    def _of_tokenizer(cls, folder: Path, vocab_size: int | None) -> Vocabulary:
        path = folder / "tokenizer.json"
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            msg = f"{path} cannot be read as a tokenizer: {error}"
            raise DataError(msg) from error
        special = frozenset(
            token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special
        )
        last = vocab_size or max(tokenizer.get_vocab().values()) + 1
        excluded = frozenset(token for token in special if token < last)
        return cls(tokens=TokenRange(first=0, last=last, excluded=excluded), tokenizer=tokenizer)

    def written(self, source: Source, *, as_text: bool) -> Source:
        """The source as the API takes it. Raises: ConfigError for text without a tokenizer."""
        if not as_text:
            return source
        if self.tokenizer is None:
            msg = "chat takes text, and random tokens become text only through --tokenizer FOLDER"
            raise ConfigError(msg)
        return AsText(source=source, tokenizer=self.tokenizer)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The words that make a workload.

    Attributes:
        dataset: where prompts come from.
        path: file of every dataset but random.
        count: requests of a run; None takes a trace's all, else 200.
        lengths: of random prompts; `output_len` also of a file's.
        tokenizer: folder with a tokenizer.json.
        vocab_size: instead of it.
        length_scale: times a trace's lengths.
        trace_speed: times a trace's speed.
        seed: of prompts and arrivals.
    """

    dataset: Dataset
    path: Path | None
    count: int | None
    lengths: Lengths
    tokenizer: Path | None
    vocab_size: int | None
    length_scale: float
    trace_speed: float
    seed: int

    def workload(self, served: ServedModel, *, as_text: bool) -> Workload:
        """Read what is to be read. `as_text` is for APIs that take no token ids.

        Raises:
            ConfigError: a flag is missing or contradicts another.
            DataError: a file is not of its format.
        """
        if self.dataset == "sharegpt" or self.dataset == "custom":  # noqa: PLR1714 (mypy narrows this)
            source = text_source(self.path, self.dataset, self.lengths.output_len, self.seed)
            return Workload(source=source, trace=None, count=self.count or DEFAULT_COUNT, dropped=0)
        vocabulary = Vocabulary.of(self.tokenizer, self.vocab_size, served)
        if self.dataset == "random":
            drawn = random_source(vocabulary, self.lengths, self.seed)
            return Workload(
                source=vocabulary.written(drawn, as_text=as_text),
                trace=None,
                count=self.count or DEFAULT_COUNT,
                dropped=0,
            )
        recorded = read_trace(self.path, self.dataset, speed=self.trace_speed, length_scale=self.length_scale)
        trace, dropped = fitting(recorded, served.max_model_len)
        replayed = TraceSource(trace=trace, tokens=vocabulary.tokens, seed=self.seed)
        return Workload(
            source=vocabulary.written(replayed, as_text=as_text),
            trace=trace,
            count=self.count or len(trace),
            dropped=dropped,
        )


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Prompts, a trace where there is one, requests of a run, and how many of the trace do not fit."""

    source: Source
    trace: traces.Trace | None
    count: int
    dropped: int


def read_text(path: Path | None, dataset: Dataset) -> str:
    """A dataset's file. Raises: ConfigError when none is named; DataError when it cannot be read."""
    if path is None:
        msg = f"--dataset-name {dataset} reads a file. Give --dataset-path."
        raise ConfigError(msg)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{path} cannot be read: {error}"
        raise DataError(msg) from error


def read_trace(
    path: Path | None, dataset: Literal["azure", "mooncake"], *, speed: float, length_scale: float
) -> traces.Trace:
    """A trace at another speed and with other lengths."""
    read = traces.read_azure if dataset == "azure" else traces.read_mooncake
    try:
        trace = read(read_text(path, dataset).splitlines())
    except DataError as error:
        msg = f"{path}: {error}"
        raise DataError(msg) from error
    return traces.with_lengths_scaled(traces.at_speed(trace, speed), length_scale)


def text_source(
    path: Path | None, dataset: Literal["sharegpt", "custom"], output_len: int | None, seed: int
) -> TextSource:
    """Prompts of a file; a `.txt` file of `custom` holds one plain prompt a line."""
    text = read_text(path, dataset)
    if dataset == "sharegpt":
        return TextSource(texts=read_sharegpt(text, output_len=output_len), seed=seed)
    json_lines = path is not None and path.suffix != ".txt"
    return TextSource(texts=read_prompts(text, json_lines=json_lines, output_len=output_len), seed=seed)


def random_source(vocabulary: Vocabulary, lengths: Lengths, seed: int) -> RandomSource:
    """Random prompts."""
    return RandomSource(
        tokens=vocabulary.tokens,
        input_len=lengths.input_len,
        output_len=lengths.output_len or 128,
        range_ratio=lengths.range_ratio,
        prefix_len=lengths.prefix_len,
        seed=seed,
    )


def read_extra(words: str | None) -> dict[str, Any]:
    """`--extra-body`. Raises: ConfigError when it is no JSON object."""
    if words is None:
        return {}
    try:
        found = json.loads(words)
    except ValueError as error:
        msg = f"--extra-body is not JSON: {error}"
        raise ConfigError(msg) from error
    if not isinstance(found, dict):
        msg = f"--extra-body is {words[:60]!r}, but it must be a JSON object"
        raise ConfigError(msg)
    return found


def write_result(path: Path, record: dict[str, Any]) -> None:
    """Write JSON, making the folder first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def fitting(trace: traces.Trace, max_model_len: int | None) -> tuple[traces.Trace, int]:
    """The requests that the server can hold, and how many it cannot. Raises: DataError when none fits."""
    if max_model_len is None:
        return trace, 0
    kept: Sequence[traces.TraceRequest] = traces.that_fit(trace, max_model_len)
    if not kept:
        msg = f"no request of the trace fits in the server's {max_model_len} tokens. Try --length-scale."
        raise DataError(msg)
    return tuple(kept), len(trace) - len(kept)
