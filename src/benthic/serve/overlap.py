"""Whether an engine's steps overlap, and whether the next plan waits for requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benthic.errors import ConfigError
from benthic.sched.tempo import Tempo

if TYPE_CHECKING:
    import torch

    from benthic.serve.options import EngineOptions


def overlaps(options: EngineOptions, device: torch.device) -> bool:
    """Whether a step is launched before the one before it has landed.

    Prompt lookup has to see a token before it can draft behind it.
    """
    if options.speculative is not None and options.speculative.method == "ngram":
        return False
    return device.type == "cuda" if options.async_scheduling is None else options.async_scheduling


def tempo_for(options: EngineOptions, device: torch.device) -> Tempo | None:
    """What says how long the next plan may wait; None plans at once.

    Raises:
        ConfigError: late planning is asked for, but no step is in flight while the next is planned.
    """
    late_ms = options.late_planning_ms
    if late_ms is None:
        return None
    if not overlaps(options, device):
        msg = (
            f"late_planning_ms = {late_ms} waits while a step is in flight, but on {device} with these "
            "options a step ends before the next is planned; leave it out, or give --async-scheduling "
            "without ngram"
        )
        raise ConfigError(msg)
    return Tempo(late_ms / 1000)
