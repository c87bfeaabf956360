"""From a checkpoint and options to the parts of an engine: weights, cache, scheduler and a description."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benthic.errors import CheckpointError, ConfigError
from benthic.kernels import native_build
from benthic.model.checkpoint import load_pretrained
from benthic.sched.batching import BatchingConfig, Scheduler
from benthic.sched.replay import RecordingScheduler
from benthic.serve.cache import CacheLayout, CacheSize, LatentCache, size_by_bytes, size_by_utilization
from benthic.serve.messages import Ready
from benthic.serve.runner import Runner
from benthic.serve.transfer.memory import MappedPages

if TYPE_CHECKING:
    from benthic.model.network import DeepSeek
    from benthic.serve.options import EngineOptions
    from benthic.spec.model import ModelConfig

logger = logging.getLogger("benthic.serve.engine")

CPU_CACHE_BYTES = 1 << 30
"""Most that the cache takes on a CPU when nothing says otherwise."""

ACTIVATION_BYTES = 2 << 30
"""Kept free on a GPU for the activations of a step and for library workspaces."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Parts:
    """What an engine is made of; `cache_size` says why the cache is as large as it is."""

    runner: Runner
    scheduler: Scheduler
    ready: Ready
    cache_size: CacheSize


def from_checkpoint(path: Path, options: EngineOptions) -> Parts:
    """Load the weights in `path` and assemble an engine's parts.

    Raises:
        CheckpointError: the folder cannot be read.
        ConfigError: the options contradict the model or the machine.
    """
    device = torch.device(options.device)
    if options.native_folder is not None:
        native_build.configure(Path(options.native_folder))
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    elif device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) - 1))
    dtype = DTYPES.get(options.dtype, torch.float32 if device.type == "cpu" else None)
    model = load_pretrained(path, device=device, dtype=dtype, mtp=False)
    eos = eos_token_ids(path, model.config)
    return assemble(model, options, model_name=path.name, eos=eos)


def assemble(model: DeepSeek, options: EngineOptions, *, model_name: str, eos: tuple[int, ...]) -> Parts:
    """Size the cache and make runner and scheduler for a loaded model.

    Raises:
        ConfigError: `max_model_len` is longer than the model's context, or the cache does not fit.
    """
    config = model.config
    weight = model.head_weight()
    max_model_len = longest(config, options)
    layout = CacheLayout.of(config, block_size=options.block_size, dtype=weight.dtype)
    size = cache_size(layout, options, max_model_len, weight.device)
    shared = options.share_pages and weight.device.type == "cpu"
    memory = MappedPages(size.num_blocks * layout.block_bytes) if shared else None
    cache = LatentCache(layout, size.num_blocks, weight.device, memory)
    logger.info("latent cache: %s", size.reason)
    batching = BatchingConfig(
        num_blocks=size.num_blocks,
        block_size=options.block_size,
        max_model_len=max_model_len,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        enable_prefix_caching=options.enable_prefix_caching,
        eos_token_ids=eos,
        lease_seconds=options.lease_seconds,
    )
    scheduler = make_scheduler(batching, options.record)
    ready = Ready(
        model_name=model_name,
        max_model_len=max_model_len,
        vocab_size=config.vocab_size,
        eos_token_ids=eos,
        num_blocks=size.num_blocks,
        block_size=options.block_size,
    )
    runner = Runner(
        model,
        cache,
        max_num_seqs=options.max_num_seqs,
        max_model_len=max_model_len,
        enforce_eager=options.enforce_eager,
    )
    return Parts(runner, scheduler, ready, size)


def make_scheduler(config: BatchingConfig, record: str | None) -> Scheduler:
    """The scheduler, recording its calls to a file when one is named (each line is flushed as it ends)."""
    if record is None:
        return Scheduler(config)
    file = Path(record).open("w", buffering=1, encoding="utf-8")  # noqa: SIM115 (open as long as the engine)
    return RecordingScheduler(config, lambda line: file.write(line + "\n"))


def longest(config: ModelConfig, options: EngineOptions) -> int:
    """The longest sequence to serve: the option's, bounded by the model's context.

    Raises:
        ConfigError: the option is above the model's `max_position_embeddings`.
    """
    asked, trained = options.max_model_len, config.max_position_embeddings
    if asked is not None and asked > trained:
        msg = (
            f"max_model_len = {asked}, but {config.name} has max_position_embeddings = {trained}. "
            "Lower max_model_len."
        )
        raise ConfigError(msg)
    return asked or trained


def cache_size(
    layout: CacheLayout, options: EngineOptions, max_model_len: int, device: torch.device
) -> CacheSize:
    """How many blocks the cache gets: given, by bytes, or (on a GPU) by what the weights leave free.

    Raises:
        ConfigError: not one block fits.
    """
    if options.num_blocks is not None:
        return CacheSize(num_blocks=options.num_blocks, reason=f"{options.num_blocks:,} blocks (num_blocks)")
    if options.kv_cache_memory is not None:
        return size_by_bytes(layout, options.kv_cache_memory, source="kv_cache_memory")
    if device.type == "cuda":
        return size_by_utilization(
            layout, device, utilization=options.gpu_memory_utilization, reserve=ACTIVATION_BYTES
        )
    blocks = options.max_num_seqs * -(-max_model_len // layout.block_size)
    budget = min(blocks * layout.block_bytes, CPU_CACHE_BYTES)
    source = f"max_num_seqs = {options.max_num_seqs} of {max_model_len} tokens, at most 1 GiB on a CPU"
    return size_by_bytes(layout, budget, source=source)


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
