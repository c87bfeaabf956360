"""What travels between the ranks of a layout for one microbatch: tokens to experts, activations to stages."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from benthic.parallel.activations import arrivals
from benthic.plan.cost.ops import AllToAll, PointToPoint

if TYPE_CHECKING:
    from benthic.plan.training.shape import Shape


def travel(shape: Shape, width: float) -> AllToAll:
    """One way of the exchange: rows of `width` bytes, once a node by network, once a rank by NVLink."""
    model, ep = shape.model, shape.ep
    per_node = min(ep, shape.gpus_per_node)
    nodes = math.ceil(ep / per_node)
    ranks = arrivals(model, ep)
    network = shape.tokens * arrivals(model, nodes) * width * (nodes - 1) / nodes if nodes > 1 else 0.0
    nvlink = shape.tokens * ranks * width * (per_node - 1) / per_node
    return AllToAll(nvlink=nvlink * shape.skew, network=network * shape.skew, ranks=ep)


def hop(shape: Shape, *, network: bool) -> PointToPoint:
    """A microbatch's activations, or their gradient, from one stage to the next."""
    moved = 2.0 * shape.tokens * shape.model.hidden_size
    return PointToPoint(bytes=moved, tier="network" if network else "nvlink")
