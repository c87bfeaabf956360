"""What an engine puts into a model's three sockets, chosen once; `attend` still lacks the step it is for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from benthic.model.local import LocalExchange
from benthic.model.sockets import Sockets, at_once
from benthic.serve.attend import PagedAttend
from benthic.serve.columns import fastest_linear

if TYPE_CHECKING:
    from benthic.model.network import DeepSeek
    from benthic.model.sockets import Aside, Exchange, Linear
    from benthic.serve.attend import MakeAttend, StepLayout
    from benthic.serve.cache import LatentCache


@dataclass(frozen=True)
class Plugs:
    """How matrices are multiplied, how rows reach experts, and what makes a step's attention.

    `aside` is for steps without prompts: the rows of others fill a GPU.
    """

    linear: Linear
    exchange: Exchange
    attend: MakeAttend = PagedAttend
    aside: Aside = at_once

    @classmethod
    def fastest(cls, model: DeepSeek) -> Plugs:
        """The fastest exact products here, and all experts."""
        return cls(fastest_linear(model), LocalExchange(model.config.n_routed_experts))

    def sockets(self, cache: LatentCache, layout: StepLayout) -> Sockets:
        """For one step against a cache. Where all rows decode, those that pad them follow the first."""
        exchange = self.exchange
        if layout.prefill is not None:
            return Sockets(self.attend(cache, layout), exchange, self.linear)
        if isinstance(exchange, LocalExchange):
            exchange = exchange.padded(layout.slot_T)
        return Sockets(self.attend(cache, layout), exchange, self.linear, self.aside)
