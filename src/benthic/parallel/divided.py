"""Tensor and expert parallelism for serving, put round the parts of a network that does not know of it.

A rank holds a shard of every layer (`spec.shard`) and sees every token. What it computes of a sum is summed
over the ranks (Shoeybi et al. 2019): after the output projection of attention, after a dense network, and
once after a mixture of experts, shared and routed ones together. So the residual stream has the same bits on
all ranks, and with it every gate's choice. Training divides tokens between layers as well
(`parallel.tensor`); a decode step has too few for that.

Cost of a step: two all-reduces of [tokens, hidden_size] a layer, one for the embedding, and an all-gather of
the rows of logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from benthic.kernels import ops
from benthic.model.block import MoeBlock
from benthic.model.local import LocalExchange
from benthic.model.sockets import Arrived, InFlight

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from benthic.model.block import Computed
    from benthic.model.moe import Moe
    from benthic.model.network import DeepSeek
    from benthic.model.sockets import Linear as LinearSocket
    from benthic.model.sockets import Sockets
    from benthic.parallel.team import Team
    from benthic.spec.model import ModelConfig
    from benthic.spec.shard import Shard

    Product = Callable[[Tensor, LinearSocket], Tensor]

SUMMED: Final = (".attn.o", ".mlp")


def exchange_for(config: ModelConfig, shard: Shard) -> LocalExchange:
    """The `exchange` socket of a rank: all experts, or those that are whole here."""
    if not shard.whole_experts:
        return LocalExchange(config.n_routed_experts)
    held = shard.experts(config)
    return OwnExperts(config.n_routed_experts, held.start, len(held))


@dataclass(frozen=True)
class OwnExperts(LocalExchange):
    """Every token is here and `held` experts from `first` on: combine leaves their share of each sum.

    Experts are counted from the own ones on, so that other ranks' rows come last: products leave them zero.
    The number of rows does not depend on the routing, so nothing waits for it and a CUDA graph can hold it.
    """

    first: int
    held: int

    def start_dispatch(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> InFlight:
        """Count experts from the own ones on; the rows stay where they are."""
        return InFlight((x_TD, weight_TK), (expert_TK - self.first) % self.n_routed_experts)

    def finish_dispatch(self, flight: InFlight) -> Arrived:
        """Copy every token to each of its experts; the rows of those held elsewhere lie past the last end."""
        x_TD, weight_TK = flight.tensors
        rows_RD, ends_E, maps = ops.permute(x_TD, flight.handle, self.n_routed_experts, slot_T=self.slot_T)
        return Arrived(rows_RD, ends_E[: self.held], weight_TK, maps)


def divide(model: DeepSeek, team: Team) -> None:
    """Let a model that holds a rank's shard compute what the whole one would, together with the others."""
    for name, module in model.named_modules():
        if name.endswith(SUMMED):
            _put(module, "forward", _summed(module.forward, team))
        elif isinstance(module, MoeBlock):
            _put(module, "combine", _combined(module, team))
            if team.index:
                _put(module.moe, "beside", _beside(module.moe))
    _put(model.embed, "forward", _looked_up(model.embed.weight, team))
    _put(model, "logits", _gathered(model.logits, team))


def _put(module: nn.Module, name: str, function: Callable[..., object]) -> None:
    setattr(module, name, function)  # a method of this instance alone


def _summed(product: Product, team: Team) -> Product:
    return lambda x_TI, linear: team.sum(product(x_TI, linear))


def _gathered(product: Product, team: Team) -> Product:
    return lambda x_SD, linear: team.columns(product(x_SD, linear))


def _combined(block: MoeBlock, team: Team) -> Callable[[Computed, Sockets], Tensor]:
    combine = block.combine
    return lambda computed, sockets: team.sum(combine(computed, sockets))


def _beside(moe: Moe) -> Callable[[Tensor, Tensor, LinearSocket], tuple[Tensor, ...]]:
    """The shared experts' share without the residual stream, which only rank 0 adds to the sum."""
    shared = moe.shared
    if shared is None:
        return lambda residual_TD, normed_TD, linear: ()  # noqa: ARG005
    return lambda residual_TD, normed_TD, linear: (shared(normed_TD, linear),)  # noqa: ARG005


def _looked_up(weight_VD: Tensor, team: Team) -> Callable[[Tensor], Tensor]:
    """Rows of a table whose other rows are on other ranks."""
    held = weight_VD.shape[0]
    first = team.index * held

    def look_up(tokens_T: Tensor) -> Tensor:
        row_T = tokens_T - first
        elsewhere_T1 = ((row_T < 0) | (row_T >= held)).unsqueeze(1)
        found_TD = torch.embedding(weight_VD, row_T.clamp(0, held - 1))
        return team.sum(found_TD.masked_fill_(elsewhere_T1, 0))

    return look_up
