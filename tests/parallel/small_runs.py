"""A dataset of random documents and runs of `nano` on it that take milliseconds a step."""

from __future__ import annotations

import dataclasses
import random
from typing import TYPE_CHECKING

from benthic.spec import presets
from benthic.train import recipes
from benthic.train.data.shards import write_made_up

if TYPE_CHECKING:
    from pathlib import Path

    from benthic.train.config import RunConfig

VOCAB = 320


def write_documents(folder: Path) -> Path:
    """Documents of 2 to 60 random tokens, so that rows hold several and some go on in the next row."""
    rng = random.Random(7)  # noqa: S311 (a corpus, not a secret)
    documents = {
        split: [[rng.randrange(2, VOCAB) for _ in range(rng.randint(0, 58))] for _ in range(200)]
        for split in ("train", "held_out")
    }
    return write_made_up(folder, documents, vocab_size=VOCAB, shard_tokens=4000)


def small_run(*, layers: int = 3, steps: int = 2, rows: int = 2, microbatches: int = 4) -> RunConfig:
    """`rows` rows of 32 tokens a microbatch, in float32."""
    config = recipes.nano_test()
    model = dataclasses.replace(presets.get("nano"), num_hidden_layers=layers, bos_token_id=0, eos_token_id=1)
    loop = dataclasses.replace(
        config.train,
        steps=steps,
        seq_len=32,
        local_batch_size=rows,
        global_batch_size=rows * microbatches,
        lr=1e-3,
        threads=1,
    )
    return dataclasses.replace(
        config,
        model=model,
        train=loop,
        precision=dataclasses.replace(config.precision, weights="float32", matmul="float32"),
        loss=dataclasses.replace(config.loss, balance_alpha=0.01),
    )
