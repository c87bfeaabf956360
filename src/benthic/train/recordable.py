"""Whether steps of a run can be CUDA graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benthic.train.config import RunConfig


def unrecordable(config: RunConfig) -> str:
    """Why the host must stay in a step; empty: it need not."""
    if config.device != "cuda":
        return f"device={config.device} has no CUDA graphs"
    if config.exchange.kind == "all_to_all":
        return "exchange.kind=all_to_all asks the device how many rows travel"
    if config.layout.cp_degree > 1:
        return f"layout.cp_degree={config.layout.cp_degree} cuts documents on the host"
    if config.offload:
        return f"offload={', '.join(config.offload)} brings activations to the host"
    return ""
