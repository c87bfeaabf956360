"""How long sequences may be, and how many blocks the device and the host get to hold them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from benthic.errors import ConfigError
from benthic.serve.cache import CacheLayout, CacheSize, size_by_bytes, size_by_utilization

if TYPE_CHECKING:
    from benthic.serve.options import EngineOptions
    from benthic.spec.model import ModelConfig

CPU_CACHE_BYTES = 1 << 30
"""Most that the cache takes on a CPU when nothing says otherwise."""

ACTIVATION_BYTES = 2 << 30
"""Kept free on a GPU for the activations of a step and for library workspaces where nothing was measured."""


def cache_dtype(options: EngineOptions, weights: torch.dtype) -> torch.dtype:
    """What the latent cache stores: as the activations are, or E4M3 without scales."""
    return torch.float8_e4m3fn if options.kv_cache_dtype.startswith("fp8") else weights


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
    layout: CacheLayout,
    options: EngineOptions,
    max_model_len: int,
    device: torch.device,
    *,
    reserve: int = ACTIVATION_BYTES,
) -> CacheSize:
    """How many blocks the cache gets: given, by bytes, or (on a GPU) by what weights and `reserve` leave.

    Raises:
        ConfigError: not one block fits.
    """
    if options.num_blocks is not None:
        return CacheSize(num_blocks=options.num_blocks, reason=f"{options.num_blocks:,} blocks (num_blocks)")
    if options.kv_cache_memory is not None:
        return size_by_bytes(layout, options.kv_cache_memory, source="kv_cache_memory")
    if device.type == "cuda":
        return size_by_utilization(
            layout, device, utilization=options.gpu_memory_utilization, reserve=reserve
        )
    blocks = options.max_num_seqs * -(-max_model_len // layout.block_size)
    budget = min(blocks * layout.block_bytes, CPU_CACHE_BYTES)
    source = f"max_num_seqs = {options.max_num_seqs} of {max_model_len} tokens, at most 1 GiB on a CPU"
    return size_by_bytes(layout, budget, source=source)


def host_size(layout: CacheLayout, options: EngineOptions) -> CacheSize:
    """How many blocks of host memory each rank gets for what is evicted from its cache; 0 without any.

    Raises:
        ConfigError: not one block fits, or the machine has less memory than is asked for.
    """
    if not options.host_cache_gib:
        return CacheSize(num_blocks=0, reason="host_cache_gib = 0")
    asked, ranks = int(options.host_cache_gib * (1 << 30)), options.tensor_parallel_size
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if asked > there:
        msg = (
            f"host_cache_gib = {options.host_cache_gib} asks for {asked:,} bytes, but this machine has "
            f"{there:,} in all. Lower it."
        )
        raise ConfigError(msg)
    source = f"host_cache_gib = {options.host_cache_gib}" + (f" over {ranks} ranks" if ranks > 1 else "")
    return size_by_bytes(layout, asked // ranks, source=source)
