"""Where a run starts when it does not start from random weights: a Hugging Face checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benthic.errors import ConfigError
from benthic.model.checkpoint import open_checkpoint
from benthic.model.shards import read_config
from benthic.parallel.pretrained import load_stages
from benthic.spec.hf import from_hf
from benthic.train.data import tokenizer as tokenizers

if TYPE_CHECKING:
    from benthic.model.checkpoint import Opened
    from benthic.parallel.mesh import Group
    from benthic.parallel.stages import Stages
    from benthic.spec.model import ModelConfig
    from benthic.train.config import RunConfig

# What a continued run may set anew: none of it is a weight's shape, and a longer context wants another YaRN.
_FREE: Final = frozenset(
    {
        "name",
        "rope_theta",
        "rope_scaling",
        "max_position_embeddings",
        "initializer_range",
        "bos_token_id",
        "eos_token_id",
        "num_nextn_predict_layers",
    }
)
_TOKENIZER: Final = "tokenizer.json"


@dataclass(frozen=True)
class Initial:
    """A checkpoint that fits a run; `load` brings it into the run's stages.

    notes: what the run sets otherwise than the checkpoint, a line each.
    """

    opened: Opened
    notes: tuple[str, ...]

    def load(self, stages: Stages, world: Group) -> None:
        """Set weights, masters and router biases; every rank must call it.

        Raises:
            TensorMismatchError: the tensors are not those of `config.json`.
        """
        load_stages(self.opened, stages, world)


def model_of(folder: Path) -> ModelConfig:
    """The model that a checkpoint's `config.json` describes.

    Raises:
        NotACheckpointError: there is no such file.
        ConfigError: it is of another architecture.
    """
    return from_hf(read_config(folder), name=folder.resolve().name).config


def open_initial(config: RunConfig, data: Path) -> Initial:
    """Compare the checkpoint `config.init_from` with the run's model and with the tokenizer of its data.

    Raises:
        ConfigError: they do not fit each other; every field or token that differs is named.
        CheckpointError: the folder cannot be read.
    """
    folder = Path(config.init_from)
    theirs = model_of(folder)
    problems = [*_model_problems(config, theirs), *_tokenizer_problems(folder, data / "tokenizer")]
    if problems:
        raise ConfigError("\n".join([f"the run cannot start from {folder}:", *problems]))
    mtp = theirs.num_nextn_predict_layers > 0 and not _without_mtp(config)
    return Initial(open_checkpoint(folder, mtp=mtp), tuple(_notes(config, theirs)))


def _without_mtp(config: RunConfig) -> bool:
    """Whether the checkpoint's MTP layers, if it has any, are left unread."""
    return config.model.num_nextn_predict_layers == 0 or config.init_mtp == "fresh"


def _model_problems(config: RunConfig, theirs: ModelConfig) -> list[str]:
    ours = config.model
    differing = [f.name for f in fields(ours) if getattr(ours, f.name) != getattr(theirs, f.name)]
    lines = [
        f"  model.{name}={getattr(ours, name)!r}, but its config.json says {getattr(theirs, name)!r}."
        for name in differing
        if name not in _FREE
    ]
    if lines:
        lines.append("  Pass --init-from, which takes the model from the checkpoint, or set these fields.")
    return [*lines, *_mtp_problems(config, theirs.num_nextn_predict_layers)]


def _mtp_problems(config: RunConfig, stored: int) -> list[str]:
    depth = config.model.num_nextn_predict_layers
    if stored == depth or _without_mtp(config):
        return []
    line = (
        f"  model.num_nextn_predict_layers={depth}, but it has {stored} MTP layers. Set "
        "model.num_nextn_predict_layers=0 to train without, or init_mtp=fresh to begin with random ones."
    )
    return [line]


def _tokenizer_problems(folder: Path, data: Path) -> list[str]:
    """Ids must mean the same text; a folder without `tokenizer.json` cannot be compared."""
    if not (folder / _TOKENIZER).is_file():
        return []
    theirs, ours = tokenizers.load_rules(folder), tokenizers.load_rules(data)
    known, used = theirs.get_vocab(), ours.get_vocab()
    strangers = sorted((t for t, i in used.items() if known.get(t) != i), key=lambda t: used[t])
    if not strangers:
        return []
    first = strangers[0]
    line = (
        f"  {len(strangers)} of the {len(used)} tokens of the data mean something else to it; the first is "
        f"{first!r}: id {used[first]} in the data, {known.get(first, 'none')} in the checkpoint. "
        f"Build the data with --tokenizer {folder}."
    )
    return [line]


def _notes(config: RunConfig, theirs: ModelConfig) -> list[str]:
    ours = replace(config.model, name=theirs.name, initializer_range=theirs.initializer_range)
    names = [f.name for f in fields(ours) if getattr(ours, f.name) != getattr(theirs, f.name)]
    return [
        f"model.{name} = {getattr(ours, name)}: the checkpoint has {getattr(theirs, name)}" for name in names
    ]
