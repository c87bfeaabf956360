"""From a checkpoint and options to weights in memory, and what else its folder says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benthic.errors import CheckpointError
from benthic.kernels import native_build
from benthic.model.block_scaled import load_block_scaled, stored_in_fp8
from benthic.model.checkpoint import load_pretrained
from benthic.model.dummy import random_weights
from benthic.model.sharded import load_shard
from benthic.spec import hf

if TYPE_CHECKING:
    from benthic.model.block_scaled import Scales
    from benthic.model.network import DeepSeek
    from benthic.serve.options import EngineOptions
    from benthic.spec.model import ModelConfig
    from benthic.spec.shard import Shard

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def prepare(options: EngineOptions) -> tuple[torch.device, torch.dtype | None]:
    """Set this process up for the device; returns it and what weights become (None: as stored)."""
    device = torch.device(options.device)
    if device.index is not None:
        torch.cuda.set_device(device)  # Triton launches on the current GPU, wherever its operands are
    if options.native_folder is not None:
        native_build.configure(Path(options.native_folder))
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    elif device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) - 1))
    return device, DTYPES.get(options.dtype, torch.float32 if device.type == "cpu" else None)


def load_weights(
    path: Path,
    options: EngineOptions,
    device: torch.device,
    dtype: torch.dtype | None,
    shard: Shard | None = None,
) -> tuple[DeepSeek, Scales]:
    """The model, or a shard of it, and the scales of weights that stay in FP8.

    A checkpoint's FP8 weights stay as they are on a GPU and are widened on a CPU, unless `quantization` says
    otherwise.

    Raises: as `load_pretrained`.
    """
    mtp = drafts_with_mtp(options)
    if options.load_format == "dummy":
        config = hf.read(path).config
        return random_weights(config, device, dtype, seed=options.seed, mtp=mtp, shard=shard), {}
    kept = options.quantization == "fp8" or (options.quantization == "auto" and device.type == "cuda")
    narrow_ones = kept and stored_in_fp8(path)
    if shard is not None:
        return load_shard(path, shard, device=device, dtype=dtype, mtp=mtp, narrow=narrow_ones)
    if narrow_ones:
        return load_block_scaled(path, device=device, dtype=dtype, mtp=mtp)
    return load_pretrained(path, device=device, dtype=dtype, mtp=mtp), {}


def drafts_with_mtp(options: EngineOptions) -> bool:
    """Whether the model's prediction modules are needed."""
    return options.speculative is not None and options.speculative.method == "mtp"


def eos_token_ids(path: Path, config: ModelConfig) -> tuple[int, ...]:
    """The tokens that end a sequence: `generation_config.json`'s if it names any, else the model config's.

    Chat checkpoints name several (end of text, end of turn) in the former and one in the latter.

    Raises:
        CheckpointError: the file is not JSON, or its `eos_token_id` is neither a number nor a list of them.
    """
    file = path / "generation_config.json"
    if not file.exists():
        return (config.eos_token_id,)
    try:
        named = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (json.JSONDecodeError, AttributeError, UnicodeDecodeError) as error:
        msg = f"{file} is not a JSON object: {error}. Repair or remove it."
        raise CheckpointError(msg) from error
    ids = [named] if isinstance(named, int) else named
    if ids is None:
        return (config.eos_token_id,)
    if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
        msg = f"{file} has eos_token_id = {named!r}; expected a number or a list of numbers."
        raise CheckpointError(msg)
    return tuple(ids)
