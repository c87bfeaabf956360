"""Real text that every machine has: the source files of Python's standard library, as a dataset."""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path

from benthic.cli.data import STDLIB_LEFT_OUT
from benthic.train.data import build, documents, tokenizer


def make_data(
    folder: Path, vocab_size: int, *, parts: tuple[str, ...] = (".",), packages: tuple[str, ...] = ()
) -> Path:
    """Tokenizer and shards of the standard library, as `benthic data --python-stdlib` makes them.

    `parts` are the folders of it to read; "." is all of it. `packages` are installed packages whose sources
    are read too.
    """
    library = Path(sysconfig.get_path("stdlib"))
    installed = (importlib.util.find_spec(name) for name in packages)
    found = tuple(Path(spec.origin).parent for spec in installed if spec is not None and spec.origin)
    corpus = documents.Corpus(
        sources=(*(library / part for part in parts), *found), include=("*.py",), exclude=STDLIB_LEFT_OUT
    )
    rules = tokenizer.train((d.text for d in documents.read(corpus)), vocab_size)
    saved = tokenizer.save(rules, folder / "tokenizer", model_max_length=1024)
    build.build(corpus, saved, folder / "data", build.BuildOptions(held_out=0.04))
    return folder / "data"
