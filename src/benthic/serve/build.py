"""From a checkpoint and options to the parts of an engine: weights, cache, scheduler and a description."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from benthic.errors import ConfigError
from benthic.model.block_scaled import (
    block_scaled_linear,
    narrow,
)
from benthic.model.local import LocalExchange
from benthic.model.narrow_rows import quantise_as_computed
from benthic.model.sockets import at_once
from benthic.parallel.divided import exchange_for
from benthic.sched.batching import BatchingConfig, Scheduler
from benthic.sched.replay import RecordingScheduler
from benthic.serve.aside import aside_for
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
from benthic.serve.weights import drafts_with_mtp, eos_token_ids, load_weights, prepare

if TYPE_CHECKING:
    from benthic.model.block_scaled import Scales
    from benthic.model.network import DeepSeek
    from benthic.model.sockets import Exchange, Linear
    from benthic.parallel.team import Team
    from benthic.serve.graphs import GraphSizes
    from benthic.serve.options import EngineOptions
    from benthic.serve.runner import Lead, Turns
    from benthic.spec.model import ModelConfig
    from benthic.spec.shard import Shard

logger = logging.getLogger("benthic.serve.engine")


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
    max_model_len, ahead = longest(model.config, options), mtp_layers(model.config, options)
    plugs = plugs_for(model, options, scales, rank)
    sizes = graph_sizes(options, model.head_weight().device)
    room = make_room(model, options, plugs, sizes, rank, ahead=ahead, max_model_len=max_model_len)
    reports = rank is None or rank.reports
    if reports:
        report(room.size, room.host, room.use, options, room.cache, ahead)
    batching = batching_config(options, room.size, room.host, max_model_len, eos=eos, ahead=ahead)
    ready = Ready(
        model_name=model_name,
        max_model_len=max_model_len,
        vocab_size=model.config.vocab_size,
        eos_token_ids=eos,
        num_blocks=room.size.num_blocks,
        block_size=options.block_size,
    )
    runner = make_runner(model, options, plugs, sizes, rank, cache=room.cache, max_model_len=max_model_len)
    capture(runner, capture_progress if reports else iter)
    return Parts(runner, make_scheduler(batching, options.record), ready, room.size, room.use)


@dataclass(frozen=True)
class Room:
    """The cache, how many blocks it has on the device and on the host, and what else takes a GPU's memory."""

    size: CacheSize
    host: CacheSize
    use: MemoryUse | None
    cache: LatentCache


def make_room(
    model: DeepSeek,
    options: EngineOptions,
    plugs: Plugs,
    sizes: GraphSizes,
    rank: Rank | None,
    *,
    ahead: int,
    max_model_len: int,
) -> Room:
    """Measure what steps and graphs take on a GPU, and lay out the cache in what is left.

    Raises:
        ConfigError: not one block fits.
    """
    weight = model.head_weight()
    device, dtype = weight.device, cache_dtype(options, weight.dtype)
    layout = CacheLayout.of(model.config, block_size=options.block_size, dtype=dtype, mtp_layers=ahead)
    use = None
    if device.type == "cuda":
        use = measure_use(model, layout, options, plugs, sizes=sizes, max_model_len=max_model_len)
    reserve = ACTIVATION_BYTES if use is None else use.reserve
    size = cache_size(layout, options, max_model_len, device, reserve=reserve)
    if rank is not None and rank.turns is None:
        size = replace(size, num_blocks=rank.team.least(size.num_blocks))
    shared = options.share_pages and device.type == "cpu"
    memory = MappedPages(size.num_blocks * layout.block_bytes) if shared else None
    host = host_size(layout, options)
    return Room(size, host, use, LatentCache(layout, size.num_blocks, device, memory, host.num_blocks))


def make_runner(
    model: DeepSeek,
    options: EngineOptions,
    plugs: Plugs,
    sizes: GraphSizes,
    rank: Rank | None,
    *,
    cache: LatentCache,
    max_model_len: int,
) -> Runner:
    """What runs steps; a rank among others has no tapes, which hold no collectives."""
    return Runner(
        model,
        cache,
        max_num_seqs=options.max_num_seqs,
        max_model_len=max_model_len,
        plugs=plugs,
        enforce_eager=options.enforce_eager or (rank is not None and not sizes.decodes),
        graph_sizes=sizes,
        drafts=options.most_drafts,
        alone=rank is None or rank.turns is not None,
        lead=None if rank is None else rank.lead,
        turns=None if rank is None else rank.turns,
        halve_from=options.dbo_prefill_token_threshold if options.enable_dbo else 0,
    )


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
    config, device = model.config, model.head_weight().device
    return Plugs(
        linear=linear_socket(model, options, scales),
        exchange=LocalExchange(config.n_routed_experts) if rank is None else rank.exchange(config),
        attend=InvariantAttend if options.batch_invariant else PagedAttend,
        aside=aside_for(device) if rank is None else at_once,
        late=rank is None and device.type == "cuda" and not options.batch_invariant,
    )


def linear_socket(model: DeepSeek, options: EngineOptions, scales: Scales | None) -> Linear:
    """How matrices are multiplied: by row if the options ask for it, by blocks in FP8, or the fastest way.

    On a GPU what comes before a product in FP8 then gives FP8; on a CPU its C is faster than what that saves.

    Raises: ConfigError as `invariant_linear`.
    """
    if options.batch_invariant:
        return invariant_linear(model, scales)
    if not scales:
        return fastest_linear(model)
    on_gpu = model.head_weight().is_cuda
    return quantise_as_computed(model, scales) if on_gpu else block_scaled_linear(model, scales)


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
    return RecordingScheduler(config, lambda line: file.write(line + "\n"), time.monotonic)
