"""A small corpus of made-up sentences, a tokenizer and a dataset of it, and `nano` runs on them."""

from __future__ import annotations

import dataclasses
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benthic.train import recipes
from benthic.train.data import build, tokenizer
from benthic.train.data.documents import Corpus, read
from benthic.train.data.shards import TokenShards, read_meta
from benthic.train.hardware import HardwareFacts
from benthic.train.resolve import resolve
from benthic.train.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable

    from benthic.train.config import RunConfig

# for `forked`, which starts runs that are killed
if (folder := str(Path(__file__).parents[1] / "parallel")) not in sys.path:
    sys.path.insert(0, folder)

WORDS = [
    "the",
    "sea",
    "floor",
    "keeps",
    "what",
    "light",
    "forgets",
    "and",
    "slow",
    "snow",
    "falls",
    "on",
    "ships",
    "whales",
    "silt",
    "vents",
    "crabs",
    "ropes",
    "while",
    "currents",
    "carry",
    "salt",
    "past",
    "cold",
    "stones",
    "into",
    "deep",
    "quiet",
    "water",
]
VOCAB = 320


def sentences(seed: int, count: int) -> str:
    rng = random.Random(seed)  # noqa: S311 (a corpus, not a secret)
    lines = (" ".join(rng.choices(WORDS, k=rng.randint(4, 12))).capitalize() + "." for _ in range(count))
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        (folder / f"{number:02d}.txt").write_text(sentences(number, 1 + number * 2), encoding="utf-8")
    return Corpus(sources=(folder,))


@pytest.fixture(scope="session")
def words(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tokenizer.Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    rules = tokenizer.train((document.text for document in read(corpus)), VOCAB)
    return tokenizer.save(rules, folder, model_max_length=256)


@pytest.fixture(scope="session")
def dataset(corpus: Corpus, words: tokenizer.Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "dataset"
    build.build(corpus, words, folder, build.BuildOptions(held_out=0.2, shard_tokens=4000))
    return folder


@pytest.fixture(scope="session")
def facts() -> HardwareFacts:
    return HardwareFacts(
        device="cpu",
        name="test",
        total_memory=2**34,
        threads=1,
        peak_flops={"float32": 1e11},
        peak_source="made up",
    )


@pytest.fixture
def nano() -> RunConfig:
    """The nano recipe with one layer of each kind, and rows short enough that a step takes milliseconds."""
    config = recipes.nano_test()
    model = dataclasses.replace(config.model, num_hidden_layers=2)
    loop = dataclasses.replace(config.train, steps=20, seq_len=32, local_batch_size=2, global_batch_size=4)
    return dataclasses.replace(config, model=model, train=loop)


@pytest.fixture
def trainer(dataset: Path, facts: HardwareFacts) -> Callable[[RunConfig], Trainer]:
    """Builds a trainer of a config on the dataset."""

    def make(config: RunConfig) -> Trainer:
        meta = read_meta(dataset)
        return Trainer(resolve(config, facts, meta).config, TokenShards(dataset, meta, "train"))

    return make
