"""One layer as four named phases: attention, dispatch, experts, combine.

Plain forward calls them in order. A pipeline executor may interleave the phases of two microbatches, a
server those of two half-batches, and a trainer may replace a phase of one block (`block.experts =
checkpointed(block.experts)`) without the block knowing. Phases keep no state, so running one twice changes
nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from torch import nn

from benthic.model.mla import attention_for
from benthic.model.mlp import Mlp
from benthic.model.moe import Moe
from benthic.model.norm import Norm
from benthic.model.sockets import InFlight

if TYPE_CHECKING:
    from torch import Tensor

    from benthic.model.moe import Routing
    from benthic.model.rope import Angles
    from benthic.model.sockets import Sockets, Stream
    from benthic.spec.model import ModelConfig

PHASES = ("attention", "dispatch", "experts", "combine")


@dataclass(frozen=True)
class Attended:
    """After attention: the residual stream with attention added, and its norm."""

    residual_TD: Tensor
    normed_TD: Tensor


@dataclass(frozen=True)
class Sent:
    """After dispatch: rows are on their way to their experts, `since` when shared ones may run beside."""

    attended: Attended
    routing: Routing
    flight: InFlight
    since: Any


@dataclass(frozen=True)
class Expanded:
    """After the dense network, which sends nothing anywhere: the finished residual stream."""

    out_TD: Tensor


@dataclass(frozen=True)
class Computed:
    """After experts: rows are on their way home, to residual plus shared experts."""

    flight: InFlight


SentT = TypeVar("SentT")
ComputedT = TypeVar("ComputedT")


class Block(nn.Module, ABC, Generic[SentT, ComputedT]):
    """One layer; subclasses differ in what happens after attention.

    Attributes:
        sends: `dispatch` and `experts` leave transfers on their way, which `experts` and `combine` finish.
    """

    sends: ClassVar[bool]

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.attn_norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.attn = attention_for(config, layer)
        self.ffn_norm = Norm(config.hidden_size, config.rms_norm_eps)

    def attention(self, x_TD: Stream, angles: Angles, sockets: Sockets) -> Attended:
        """Attend, add to the residual stream, and norm for what follows."""
        normed_TD, x_TD = self.attn_norm.with_input(x_TD)
        attended_TD = self.attn(normed_TD, angles, sockets)
        normed_TD, residual_TD = self.ffn_norm.after_adding(attended_TD, x_TD)
        return Attended(residual_TD, normed_TD)

    @abstractmethod
    def dispatch(self, attended: Attended, sockets: Sockets) -> SentT:
        """Choose experts and send each row to them."""

    @abstractmethod
    def experts(self, sent: SentT, sockets: Sockets) -> ComputedT:
        """Compute; no communication."""

    @abstractmethod
    def combine(self, computed: ComputedT, sockets: Sockets) -> Tensor:
        """Bring rows home and finish the residual stream: `[tokens, hidden_size]`."""

    @abstractmethod
    def routing(self, sent: SentT) -> Routing | None:
        """The routing that dispatch chose; None for a dense layer."""

    def leave(self, computed: ComputedT, sockets: Sockets) -> Stream:
        """As `combine`, but sums may be left to the norm that follows."""
        return self.combine(computed, sockets)

    def forward(self, x_TD: Stream, angles: Angles, sockets: Sockets) -> tuple[Stream, Routing | None]:
        """The four phases in order: the residual stream after this layer, and how tokens were routed."""
        attended = self.attention(x_TD, angles, sockets)
        sent = self.dispatch(attended, sockets)
        computed = self.experts(sent, sockets)
        return self.leave(computed, sockets), self.routing(sent)


class DenseBlock(Block[Attended, Expanded]):
    """A layer with one feed-forward network: dispatch and combine have nothing to do."""

    sends = False

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size)

    def dispatch(self, attended: Attended, sockets: Sockets) -> Attended:  # noqa: ARG002 (the phase's signature)
        """Send nothing."""
        return attended

    def experts(self, sent: Attended, sockets: Sockets) -> Expanded:
        """Add the feed-forward network to the residual stream."""
        return Expanded(sent.residual_TD + self.mlp(sent.normed_TD, sockets.linear))

    def combine(self, computed: Expanded, sockets: Sockets) -> Tensor:  # noqa: ARG002 (the phase's signature)
        """Nothing was sent, so nothing comes home."""
        return computed.out_TD

    def routing(self, sent: Attended) -> None:
        """A dense layer routes nothing."""


class MoeBlock(Block[Sent, Computed]):
    """A layer with routed and shared experts."""

    sends = True

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.moe = Moe(config)

    def dispatch(self, attended: Attended, sockets: Sockets) -> Sent:
        """Gate in float32, then send each row with its weights to the chosen experts."""
        normed_TD, config = attended.normed_TD, self.moe.gate.config
        copies = len(normed_TD) * config.num_experts_per_tok
        since = sockets.aside.moment(copies / config.n_routed_experts)
        routing = self.moe.gate(normed_TD)
        flight = sockets.exchange.start_dispatch(normed_TD, routing.expert_TK, routing.weight_TK)
        return Sent(attended, routing, flight, since)

    def experts(self, sent: Sent, sockets: Sockets) -> Computed:
        """Shared experts on this rank's own tokens while rows travel; routed experts on those that arrive."""
        linear, own = sockets.linear, sent.attended
        beside = sockets.aside(lambda: self.moe.beside(own.residual_TD, own.normed_TD, linear), sent.since)
        mixture = self.moe.experts.mixture(linear) if sent.flight.at_home else None
        if mixture is not None:
            (x_TD, weight_TK), expert_TK = sent.flight.tensors, sent.flight.handle
            return Computed(InFlight((mixture(x_TD, expert_TK, weight_TK, beside()),), None, at_home=True))
        arrived = sockets.exchange.finish_dispatch(sent.flight)
        rows_RD = self.moe.experts(arrived.rows_RD, arrived.ends_E, linear)
        return Computed(sockets.exchange.start_combine(rows_RD, arrived, beside()))

    def combine(self, computed: Computed, sockets: Sockets) -> Tensor:
        """Sum the weighed rows that come home, eq. (12)."""
        return sockets.exchange.finish_combine(computed.flight)

    def leave(self, computed: Computed, sockets: Sockets) -> Stream:
        """The rows as they are, where `sockets` say so."""
        if sockets.late is None or computed.flight.at_home:
            return self.combine(computed, sockets)
        return sockets.late(computed.flight)

    def routing(self, sent: Sent) -> Routing:
        """The gate's choice."""
        return sent.routing


def block_for(config: ModelConfig, layer: int) -> Block:
    """The block of `layer`; MTP layers count on from `num_hidden_layers`."""
    return MoeBlock(config, layer) if config.is_moe(layer) else DenseBlock(config, layer)
