"""The DeepSeek-V2/V3 network on packed tokens: the one definition that is trained, served and planned.

There is no batch axis. `tokens_T` holds the tokens of all sequences one after another, `positions_T` the
position of each within its own sequence; which tokens see which is the `attend` socket's knowledge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from torch import nn

from benthic.errors import ShapeError
from benthic.model.block import block_for
from benthic.model.linear import Embedding, Linear
from benthic.model.mtp import Mtp
from benthic.model.norm import Norm
from benthic.model.part import Part
from benthic.model.rope import Rotary
from benthic.model.sockets import LateSum

if TYPE_CHECKING:
    from torch import Tensor

    from benthic.model.block import Block
    from benthic.model.moe import Routing
    from benthic.model.sockets import Linear as LinearSocket
    from benthic.model.sockets import Sockets, Stream
    from benthic.spec.model import ModelConfig


@dataclass(frozen=True)
class Passed:
    """What a run of layers leaves: the residual stream, and each mixture layer's routing by layer index."""

    x_TD: Stream
    routing: tuple[tuple[int, Routing], ...]


@dataclass(frozen=True)
class Hidden:
    """The end of the network: the residual stream before and after the last norm, and every layer's routing.

    `hidden_TD` goes to `DeepSeek.logits`; `DeepSeek.mtp_input` says which of the two feeds the next MTP
    module.
    """

    pre_norm_TD: Tensor
    hidden_TD: Tensor
    routing: tuple[tuple[int, Routing], ...]


class DeepSeek(nn.Module):
    """The network, or the part of it that this instance holds.

    Parameters are those of `benthic.spec.parameters`, by name and shape.
    A new instance is not initialised: call `benthic.model.initialise.initialise`, or load a checkpoint.
    Build under `torch.device("meta")` to allocate nothing.
    """

    def __init__(self, config: ModelConfig, part: Part | None = None) -> None:
        super().__init__()
        part = Part.whole(config) if part is None else part
        part.check(config)
        self.config = config
        self.part = part
        self.rotary = Rotary(config)
        if part.embed:
            self.embed = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict({str(layer): block_for(config, layer) for layer in part.layers})
        if part.head:
            self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        if part.head and not config.tie_word_embeddings:
            self.head = Linear(config.vocab_size, config.hidden_size)
        self.mtp = nn.ModuleDict({str(depth): Mtp(config, depth) for depth in part.mtp})

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The layers of this part in order, without MTP blocks."""
        return tuple(cast("Block", block) for block in self.layers.values())

    def mtp_module(self, depth: int) -> Mtp:
        """The MTP module of a depth counted from 0."""
        return cast("Mtp", self.mtp[str(depth)])

    def forward(self, tokens_T: Tensor, positions_T: Tensor, sockets: Sockets) -> Hidden:
        """Run the whole network: embedding, layers, final norm.

        Shapes: tokens_T, positions_T integer [tokens].
        Raises: ShapeError if the two lengths disagree.
        """
        if tokens_T.shape != positions_T.shape:
            message = (
                f"{tuple(tokens_T.shape)} tokens but {tuple(positions_T.shape)} positions; give one each."
            )
            raise ShapeError(message)
        return self.finish(self.run_layers(self.embed(tokens_T), positions_T, sockets))

    def run_layers(self, x_TD: Stream, positions_T: Tensor, sockets: Sockets) -> Passed:
        """Pass the residual stream through the layers of this part."""
        angles = self.rotary(positions_T)
        routing: list[tuple[int, Routing]] = []
        for block in self.blocks:
            x_TD, routed = block(x_TD, angles, sockets)
            if routed is not None:
                routing.append((block.layer, routed))
        return Passed(x_TD, tuple(routing))

    def finish(self, passed: Passed) -> Hidden:
        """Apply the final norm."""
        return _ended(passed.x_TD, self.norm, passed.routing)

    def head_weight(self) -> Tensor:
        """The output head's matrix `[vocab_size, hidden_size]`: its own, or the embedding's when tied."""
        return self.embed.weight if self.config.tie_word_embeddings else self.head.weight

    def logits(self, hidden_TD: Tensor, linear: LinearSocket) -> Tensor:
        """Scores of the next token for each row of `hidden_TD`: `[rows, vocab_size]`."""
        return linear(hidden_TD, self.head_weight())

    def mtp_input(self, hidden: Hidden) -> Tensor:
        """What the next MTP module takes as `previous_TD`, before or after the norm as the config says."""
        return hidden.pre_norm_TD if self.config.mtp_hidden == "pre_norm" else hidden.hidden_TD

    def predict_ahead(
        self, depth: int, previous_TD: Tensor, tokens_T: Tensor, positions_T: Tensor, sockets: Sockets
    ) -> Hidden:
        """Predict one token further than the previous depth did, DeepSeek-V3 report eq. (21)-(23).

        Row i of `previous_TD` (see `mtp_input`) is the state that predicted token i + depth + 1;
        `tokens_T[i]` is that token, already shifted by the caller; row i of the result predicts token i +
        depth + 2. `depth` counts from 0. `positions_T` are those of the main model. The attend socket sees
        layer `num_hidden_layers + depth`.
        """
        module = self.mtp_module(depth)
        x_TD, routing = module(self.embed(tokens_T), previous_TD, self.rotary(positions_T), sockets)
        routed = () if routing is None else ((module.block.layer, routing),)
        return _ended(x_TD, module.norm, routed)


def _ended(x_TD: Stream, norm: Norm, routing: tuple[tuple[int, Routing], ...]) -> Hidden:
    """A residual stream before and after its last norm."""
    if isinstance(x_TD, LateSum):
        hidden_TD, x_TD = x_TD.normed(norm.weight, norm.eps)
        return Hidden(x_TD, hidden_TD, routing)
    return Hidden(x_TD, norm(x_TD), routing)
