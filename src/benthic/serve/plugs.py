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

    `aside` is for steps without prompts: the rows of others fill a GPU. With `late` a mixture's last sum is
    made by the norm behind it, where all experts are here.
    """

    linear: Linear
    exchange: Exchange
    attend: MakeAttend = PagedAttend
    aside: Aside = at_once
    late: bool = False

    @classmethod
    def fastest(cls, model: DeepSeek) -> Plugs:
        """The fastest exact products here, and all experts."""
        return cls(fastest_linear(model), LocalExchange(model.config.n_routed_experts))

    def sockets(self, cache: LatentCache, layout: StepLayout) -> Sockets:
        """For one step against a cache. Where all rows decode, those that pad them follow the first."""
        exchange, attend = self.exchange, self.attend(cache, layout)
        late = exchange.late if self.late and isinstance(exchange, LocalExchange) else None
        if layout.prefill is not None:
            return Sockets(attend, exchange, self.linear, late=late)
        if isinstance(exchange, LocalExchange):
            exchange = exchange.padded(layout.slot_T)
        return Sockets(attend, exchange, self.linear, self.aside, late)
