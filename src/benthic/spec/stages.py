"""Cutting the layers of a model into pipeline stages of about equal work."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING

from benthic.errors import ConfigError
from benthic.spec.parameters import parameters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benthic.spec.model import ModelConfig


def layers_of_stages(
    config: ModelConfig, stages: int, layers_per_stage: Sequence[int] = ()
) -> tuple[range, ...]:
    """The layers of every stage, in order; the last stage also runs the head and the MTP modules.

    Without `layers_per_stage` the busiest stage is made as light as possible, work being the parameters that
    a token's product touches (FLOPs without the attention core, which is the same in every layer).

    Raises:
        ConfigError: there are fewer layers than stages, or `layers_per_stage` does not add up.
    """
    layers = config.num_hidden_layers
    if layers_per_stage:
        return _given(layers, stages, layers_per_stage)
    if stages > layers:
        message = (
            f"{stages} pipeline stages, but num_hidden_layers = {layers}. "
            "Every stage needs a layer: lower pp_degree or virtual_stages."
        )
        raise ConfigError(message)
    return _cut(config, stages)


@functools.lru_cache(maxsize=256)
def _cut(config: ModelConfig, stages: int) -> tuple[range, ...]:
    return _balanced(*work(config), stages)


def work(config: ModelConfig) -> tuple[tuple[int, ...], int]:
    """Parameters that one token's product touches: of each layer, and of head and MTP modules together."""
    layers = [0] * config.num_hidden_layers
    tail = 0
    for param in parameters(config):
        top, _, rest = param.name.partition(".")
        used = int(param.numel * param.active)
        if top == "layers":
            layers[int(rest.partition(".")[0])] += used
        elif top != "embed":
            tail += used * (1 + config.num_nextn_predict_layers) if param.part == "head" else used
    return tuple(layers), tail


def _given(layers: int, stages: int, counts: Sequence[int]) -> tuple[range, ...]:
    if len(counts) != stages or sum(counts) != layers or min(counts) < 1:
        message = (
            f"layout.layers_per_stage={list(counts)} names {len(counts)} stages of {sum(counts)} layers, but "
            f"there are {stages} stages and {layers} layers. Give every stage at least one layer."
        )
        raise ConfigError(message)
    ends = [sum(counts[: k + 1]) for k in range(stages)]
    return tuple(range(end - count, end) for end, count in zip(ends, counts, strict=True))


def _balanced(costs: tuple[int, ...], tail: int, stages: int) -> tuple[range, ...]:
    """Minimise the greatest stage, then the sum of squares, over (first layer, stages left)."""
    sums = [0]
    for cost in costs:
        sums.append(sums[-1] + cost)

    @functools.cache
    def best(start: int, left: int) -> tuple[int, int, int]:
        """Greatest work and sum of squares of the stages from layer `start` on, and where the first ends."""
        if left == 1:
            rest = sums[-1] - sums[start] + tail
            return rest, rest**2, len(costs)
        return min(joined(start, end, left) for end in range(start + 1, len(costs) - left + 2))

    def joined(start: int, end: int, left: int) -> tuple[int, int, int]:
        here, (most, squares, _) = sums[end] - sums[start], best(end, left - 1)
        return max(here, most), here**2 + squares, end

    cuts = [0]
    for left in range(stages, 0, -1):
        cuts.append(best(cuts[-1], left)[2])
    return tuple(range(a, b) for a, b in itertools.pairwise(cuts))
