"""What travels between the ranks of a layout for one microbatch: tokens to experts, activations to stages."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from benthic.plan.cost.ops import AllToAll, PointToPoint

if TYPE_CHECKING:
    from benthic.plan.training.shape import Shape
    from benthic.spec.model import ModelConfig


def travel(shape: Shape, width: float) -> AllToAll:
    """One way of the exchange: rows of `width` bytes, once a node by network, once a rank by NVLink."""
    model, ep = shape.model, shape.ep
    per_node = min(ep, shape.gpus_per_node)
    nodes = math.ceil(ep / per_node)
    ranks = distinct(model, ep)
    network = shape.tokens * distinct(model, nodes) * width * (nodes - 1) / nodes if nodes > 1 else 0.0
    nvlink = shape.tokens * ranks * width * (per_node - 1) / per_node
    return AllToAll(nvlink=nvlink * shape.skew, network=network * shape.skew, ranks=ep)


def distinct(model: ModelConfig, bins: int) -> float:
    """How many of `bins` equal holders of all experts a token goes to, its experts drawn evenly.

    b (1 - C(E - E/b, k)/C(E, k)) over the b holders and E experts that its groups allow; DeepSeek-V3 and 8
    nodes: 3.63 of the 4 allowed.
    """
    if bins == 1:
        return 1.0
    share = model.topk_group / model.n_group if model.n_group > 1 else 1.0
    experts = round(model.n_routed_experts * share)
    reached = bins * share if bins >= model.n_group else float(bins)
    here = max(1, round(experts / reached))
    top_k = model.num_experts_per_tok
    return reached * (1 - math.comb(max(experts - here, 0), top_k) / math.comb(experts, top_k))


def hop(shape: Shape, *, network: bool) -> PointToPoint:
    """A microbatch's activations, or their gradient, from one stage to the next."""
    moved = 2.0 * shape.tokens * shape.model.hidden_size
    return PointToPoint(bytes=moved, tier="network" if network else "nvlink")
