"""One step of a run as a Hugging Face checkpoint, without its ranks and without its optimizer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from benthic.model.checkpoint import save_weights
from benthic.spec.model import ModelConfig
from benthic.train.checkpoint import STATE, weights_of
from benthic.train.data import tokenizer
from benthic.train.fields import from_json

if TYPE_CHECKING:
    from benthic.model.export import Format, Report


def is_step(folder: Path) -> bool:
    """Whether `folder` is a `checkpoint/step-N` of a run."""
    return (folder / STATE).is_file()


def export_step(
    folder: Path, target: Path, form: Format, *, mtp: bool, max_shard_bytes: int, progress: Report | None
) -> None:
    """Write the masters of a step, rounded to `form`, with the tokenizer of the run's data.

    The files are those that the run would have exported had it ended there. `mtp=False` leaves the MTP layers
    out. Memory holds one parameter in float32: at most a layer's gate and up projections of all experts.

    Raises:
        CheckpointError: a file of the step is missing, truncated or changed, or `target` is taken.
        DataError: the data of the run, whose tokenizer belongs to it, is no longer where it was.
    """
    read = weights_of(folder)
    config = json.loads((folder / STATE).read_text(encoding="utf-8"))["config"]
    model: ModelConfig = from_json(ModelConfig, config["model"])
    if not mtp:
        model = replace(model, num_nextn_predict_layers=0)
    words = Path(config["data"]["path"]) / "tokenizer"
    tokenizer.load_rules(words)
    save_weights(read, model, target, form, max_shard_bytes=max_shard_bytes, progress=progress)
    tokenizer.copy(words, target)
