"""A folder that `benthic serve --load-format dummy` can serve: a config and a word for every token."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benthic.spec import hf, presets

if TYPE_CHECKING:
    from pathlib import Path

    from benthic.spec.model import ModelConfig

NAME = "m"
DUMMY = ("--load-format", "dummy", "--served-model-name", NAME)
QUIET = ("--disable-log-requests", "--disable-uvicorn-access-log")


def shape(*, small: bool) -> ModelConfig:
    """Moonlight-16B, or `nano`, with 8,192 positions."""
    return replace(presets.get("nano" if small else "moonlight-16b-a3b"), max_position_embeddings=8192)


def make_folder(folder: Path, config: ModelConfig) -> Path:
    """Write config and tokenizer; token i is the word `ti`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(hf.dumps(config))
    words = {f"t{i}": i for i in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))  # noqa: S106 (a word, not a secret)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
