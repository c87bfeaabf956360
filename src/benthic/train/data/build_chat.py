"""Conversations to token shards with masks: render, tokenize, truncate, hold some out, write."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benthic.train.data.build import begun, check_sides, is_held_out, meta_of, seal, writers_of
from benthic.train.data.chat import ChatRenderer, read_conversations
from benthic.train.data.documents import Reading

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from benthic.train.data.build import BuildOptions
    from benthic.train.data.shards import Meta, Split
    from benthic.train.data.tokenizer import Tokenizer


def build_chat(
    sources: Sequence[Path],
    tokenizer: Tokenizer,
    folder: Path,
    options: BuildOptions,
    *,
    max_tokens: int = 0,
    progress: Callable[[Reading], None] | None = None,
) -> Meta:
    """Write a dataset folder of conversations in which only the replies are to be learned.

    A conversation of more than `max_tokens` tokens (0: no limit) is cut after the last reply that fits, and
    left out if none does; `meta.source["too_long"]` counts these.

    Raises:
        DataError: a line is malformed (file and line are named), the template cannot be used, the folder
            exists, or no conversation fell on one of the two sides.
    """
    with begun(folder, options) as unfinished:
        renderer, reading, too_long = ChatRenderer(tokenizer), Reading(files=len(sources)), 0
        writers = writers_of(unfinished, tokenizer, options, masked=True)
        for conversation in read_conversations(sources):
            example = renderer.example(conversation, max_tokens)
            if example is None:
                too_long += 1
                continue
            split: Split = "held_out" if is_held_out(example.text, options.held_out) else "train"
            writers[split].add(example.ids, example.learned_bytes, example.learned)
            reading.documents += 1
            reading.bytes += len(example.text.encode())
            if progress is not None:
                progress(reading)
        counts = {"files": reading.files, "skipped": 0, "too_long": too_long, "max_tokens": max_tokens}
        meta = meta_of(tokenizer, writers, {"held_out": options.held_out, **counts})
        check_sides(meta, ", ".join(map(str, sources)), options)
        seal(unfinished, tokenizer, meta)
    return meta
