"""Activation checkpointing by phase: chosen phases of each block are computed again in the backward pass."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from torch.utils.checkpoint import checkpoint

from benthic.model.block import PHASES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benthic.model.network import DeepSeek


def recompute_phases(model: DeepSeek, phases: Sequence[str]) -> None:
    """Wrap the named phases of every block, MTP blocks included; the blocks do not know.

    Phases keep no state, so running one twice counts nothing twice; only the tensors that enter a phase are
    kept. Cost: the forward FLOPs of the phase once more.
    """
    depths = range(len(model.mtp))
    blocks = [*model.blocks, *(model.mtp_module(depth).block for depth in depths)]
    for block in blocks:
        for phase in PHASES:
            if phase in phases:
                setattr(block, phase, _checkpointed(getattr(block, phase)))


def _checkpointed(phase: Callable[..., Any]) -> Callable[..., Any]:
    # no phase draws random numbers, so their state need not be kept
    return functools.partial(checkpoint, phase, use_reentrant=False, preserve_rng_state=False)
