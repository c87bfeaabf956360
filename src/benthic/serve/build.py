"""From a checkpoint and options to the parts of an engine: weights, cache, scheduler and a description."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benthic.errors import CheckpointError, ConfigError
from benthic.kernels import native_build
from benthic.model.block_scaled import (
    block_scaled_linear,
    load_block_scaled,
    narrow,
    stored_in_fp8,
)
from benthic.model.checkpoint import load_pretrained
from benthic.model.dummy import random_weights
from benthic.model.local import LocalExchange
from benthic.model.sharded import load_shard
from benthic.parallel.divided import exchange_for
from benthic.sched.batching import BatchingConfig, Scheduler
from benthic.sched.replay import RecordingScheduler
from benthic.serve.attend import PagedAttend
from benthic.serve.cache import CacheLayout, CacheSize, LatentCache
from benthic.serve.capture import capture, capture_progress, graph_sizes
from benthic.serve.columns import fastest_linear
from benthic.serve.grammar import Grammars
from benthic.serve.invariant import InvariantAttend, invariant_linear
from benthic.serve.memory import MemoryUse, measure_use
from benthic.serve.messages import Ready
from benthic.serve.plugs import Plugs
from benthic.serve.runner import Runner
from benthic.serve.sizing import ACTIVATION_BYTES, cache_dtype, cache_size, host_size, longest
from benthic.serve.transfer.memory import MappedPages
from benthic.spec import hf

if TYPE_CHECKING:
    from benthic.model.block_scaled import Scales
    from benthic.model.network import DeepSeek
    from benthic.model.sockets import Exchange, Linear
    from benthic.parallel.team import Team
    from benthic.serve.options import EngineOptions
    from benthic.serve.runner import Lead, Turns
    from benthic.spec.model import ModelConfig
    from benthic.spec.shard import Shard

logger = logging.getLogger("benthic.serve.engine")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Parts:
    """What an engine is made of; `cache_size` and, on a GPU, `memory` say why the cache is as it is.

    `grammars` is None where no tokenizer is at hand: requests with structured output are then refused.
    """

    runner: Runner
    scheduler: Scheduler
    ready: Ready
    cache_size: CacheSize
    memory: MemoryUse | None = None
    grammars: Grammars | None = None


@dataclass(frozen=True)
class Rank:
    """One of several ranks that share weights.

    Either they compute one engine's steps, which rank 0 leads by `lead`; or each is an engine, and they take
    `turns`.
    """

    shard: Shard
    team: Team
    lead: Lead | None = None
    turns: Turns | None = None

    def exchange(self, config: ModelConfig) -> Exchange:
        """How rows reach experts."""
        return exchange_for(config, self.shard) if self.turns is None else self.turns.exchange

    @property
    def reports(self) -> bool:
        """Whether it says where memory goes; the others are like it."""
        return self.shard.index == 0


def from_checkpoint(path: Path, options: EngineOptions) -> Parts:
    """Load the weights in `path` and assemble an engine's parts.

    Raises:
        CheckpointError: the folder cannot be read.
        ConfigError: the options contradict the model or the machine.
    """
    device, dtype = prepare(options)
    model, scales = load_weights(path, options, device, dtype)
    eos = eos_token_ids(path, model.config)
    return with_grammars(assemble(model, options, model_name=path.name, eos=eos, scales=scales), path)


def with_grammars(parts: Parts, path: Path) -> Parts:
    """The parts, able to follow grammars where there is a tokenizer in `path`."""
    ready = parts.ready
    grammars = Grammars.from_folder(path, vocab_size=ready.vocab_size, eos=ready.eos_token_ids)
    return replace(parts, grammars=grammars)


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


def mtp_layers(config: ModelConfig, options: EngineOptions) -> int:
    """Layers that the cache holds for drafting, one for each prediction module.

    Raises:
        ConfigError: the modules are to draft, and there are none.
    """
    if not drafts_with_mtp(options):
        return 0
    if not config.num_nextn_predict_layers:
        msg = (
            f'speculative method "mtp" needs prediction modules, but {config.name} has '
            'num_nextn_predict_layers = 0. Use "ngram", or a checkpoint that has some.'
        )
        raise ConfigError(msg)
    return config.num_nextn_predict_layers


def assemble(
    model: DeepSeek,
    options: EngineOptions,
    *,
    model_name: str,
    eos: tuple[int, ...],
    scales: Scales | None = None,
    rank: Rank | None = None,
) -> Parts:
    """Size the cache and make runner and scheduler for a loaded model.

    `rank` says which shard of it is here, if not all of it; every rank must call it, and all get the cache
    that fits on each.

    `scales` belong to weights that are in FP8 already; with `quantization = "fp8"` and none, they are
    quantised here, in place.

    Raises:
        ConfigError: `max_model_len` is longer than the model's context, or the cache does not fit.
    """
    check_ranks(options, rank)
    if not scales and options.quantization == "fp8":
        scales = narrow(model)
    weight, max_model_len = model.head_weight(), longest(model.config, options)
    ahead = mtp_layers(model.config, options)
    layout = CacheLayout.of(
        model.config,
        block_size=options.block_size,
        dtype=cache_dtype(options, weight.dtype),
        mtp_layers=ahead,
    )
    plugs = plugs_for(model, options, scales, rank)
    sizes = graph_sizes(options, weight.device)
    use = None
    if weight.device.type == "cuda":
        use = measure_use(model, layout, options, plugs, sizes=sizes, max_model_len=max_model_len)
    reserve = ACTIVATION_BYTES if use is None else use.reserve
    size = cache_size(layout, options, max_model_len, weight.device, reserve=reserve)
    if rank is not None and rank.turns is None:
        size = replace(size, num_blocks=rank.team.least(size.num_blocks))
    shared = options.share_pages and weight.device.type == "cpu"
    memory = MappedPages(size.num_blocks * layout.block_bytes) if shared else None
    host = host_size(layout, options)
    cache = LatentCache(layout, size.num_blocks, weight.device, memory, host.num_blocks)
    reports = rank is None or rank.reports
    if reports:
        report(size, host, use, options, cache, ahead)
    batching = batching_config(options, size, host, max_model_len, eos=eos, ahead=ahead)
    ready = Ready(
        model_name=model_name,
        max_model_len=max_model_len,
        vocab_size=model.config.vocab_size,
        eos_token_ids=eos,
        num_blocks=size.num_blocks,
        block_size=options.block_size,
    )
    runner = Runner(
        model,
        cache,
        max_num_seqs=options.max_num_seqs,
        max_model_len=max_model_len,
        plugs=plugs,
        enforce_eager=options.enforce_eager
        or (rank is not None and not sizes.decodes),  # tapes hold no collectives
        graph_sizes=sizes,
        drafts=options.most_drafts,
        alone=rank is None or rank.turns is not None,
        lead=None if rank is None else rank.lead,
        turns=None if rank is None else rank.turns,
    )
    capture(runner, capture_progress if reports else iter)
    return Parts(runner, make_scheduler(batching, options.record), ready, size, use)


def batching_config(
    options: EngineOptions,
    size: CacheSize,
    host: CacheSize,
    max_model_len: int,
    *,
    eos: tuple[int, ...],
    ahead: int,
) -> BatchingConfig:
    """What the scheduler may do; `ahead` prediction modules follow the sequences."""
    return BatchingConfig(
        num_blocks=size.num_blocks,
        block_size=options.block_size,
        max_model_len=max_model_len,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        enable_prefix_caching=options.enable_prefix_caching,
        eos_token_ids=eos,
        lease_seconds=options.lease_seconds,
        num_speculative_tokens=options.most_drafts,
        adaptive_drafts=options.speculative is not None and options.speculative.adaptive,
        mtp_depth=ahead,
        host_blocks=host.num_blocks,
    )


def plugs_for(model: DeepSeek, options: EngineOptions, scales: Scales | None, rank: Rank | None) -> Plugs:
    """What goes into the model's sockets.

    Raises: ConfigError as `invariant_linear`.
    """
    config = model.config
    return Plugs(
        linear=linear_socket(model, options, scales),
        exchange=LocalExchange(config.n_routed_experts) if rank is None else rank.exchange(config),
        attend=InvariantAttend if options.batch_invariant else PagedAttend,
    )


def linear_socket(model: DeepSeek, options: EngineOptions, scales: Scales | None) -> Linear:
    """How matrices are multiplied: by row if the options ask for it, by blocks in FP8, or the fastest way.

    Raises: ConfigError as `invariant_linear`.
    """
    if options.batch_invariant:
        return invariant_linear(model, scales)
    return block_scaled_linear(model, scales) if scales else fastest_linear(model)


def check_ranks(options: EngineOptions, rank: Rank | None) -> None:
    """Raises: ConfigError when this process is not one of as many ranks as the options ask for."""
    asked, there = options.ranks, 1 if rank is None else rank.shard.size
    if asked != there:
        degree = "data_parallel_size" if options.data_parallel_size > 1 else "tensor_parallel_size"
        msg = (
            f"{degree} = {asked}, but this engine runs on {there}. Only `benthic serve "
            f"--{degree.replace('_', '-')}` starts several."
        )
        raise ConfigError(msg)


def report(
    size: CacheSize,
    host: CacheSize,
    use: MemoryUse | None,
    options: EngineOptions,
    cache: LatentCache,
    mtp: int,
) -> None:
    """Log where memory goes and why the cache is as large as it is."""
    logger.info("latent cache: %s", size.reason)
    if host.num_blocks:
        logger.info("host cache: %s", host.reason)
    if mtp:
        share = mtp * cache.layout.token_bytes // cache.layout.layers
        logger.info("latent cache: %s B/token of it for %d prediction layers", f"{share:,}", mtp)
    for line in [] if use is None else use.lines(options.gpu_memory_utilization, cache.num_bytes):
        logger.info("memory: %s", line)


def make_scheduler(config: BatchingConfig, record: str | None) -> Scheduler:
    """The scheduler, recording its calls to a file when one is named (each line is flushed as it ends)."""
    if record is None:
        return Scheduler(config)
    file = Path(record).open("w", buffering=1, encoding="utf-8")  # noqa: SIM115 (open as long as the engine)
    return RecordingScheduler(config, lambda line: file.write(line + "\n"))


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
