"""What is minimised: next token, tokens further ahead, and balance; summed, so that microbatches add up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from benthic.kernels import ops
from benthic.train.balance import expert_counts, sequence_balance_loss

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from benthic.model.moe import Routing
    from benthic.model.network import DeepSeek, Hidden
    from benthic.model.sockets import Sockets
    from benthic.train.data.microbatch import Microbatch


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How the sums of one microbatch enter the loss of the whole global batch.

    main: 1 / main targets of the global batch. mtp: the same for each depth, times λ / depths.
    balance: α / rows of the global batch.
    """

    main: float
    mtp: tuple[float, ...]
    balance: float


@dataclass(frozen=True)
class Terms:
    """The sums of one microbatch, scalars: over targets, over targets of each depth, over rows and layers.

    `counts` holds the tokens of each expert by layer index, int64 [experts].
    """

    main: Tensor
    mtp: tuple[Tensor, ...]
    balance: Tensor
    counts: dict[int, Tensor]

    def total(self, weights: Weights) -> Tensor:
        """The scalar to differentiate: DeepSeek-V3 report eq. (25) and (17), this microbatch's share."""
        loss = self.main * weights.main + self.balance * weights.balance
        for term, weight in zip(self.mtp, weights.mtp, strict=True):
            loss = loss + term * weight
        return loss


def weights_of(
    batch: Sequence[Microbatch], *, mtp_weight: float, normaliser: str, balance_alpha: float
) -> Weights:
    """The factors that turn sums over microbatches into means over the global batch.

    Depth k of the MTP loss is divided by the number of main targets, as eq. (24) divides T - k terms by T
    (normaliser "tokens"), or by the number of its own targets ("targets").
    """
    per_depth = [sum(counts) for counts in zip(*(m.num_targets for m in batch), strict=True)]
    main, *ahead = (max(1, count) for count in per_depth)
    divisors = ahead if normaliser == "targets" else [main] * len(ahead)
    return Weights(
        main=1.0 / main,
        mtp=tuple(mtp_weight / len(ahead) / divisor for divisor in divisors),
        balance=balance_alpha / sum(m.rows for m in batch),
    )


def terms(model: DeepSeek, batch: Microbatch, sockets: Sockets) -> Terms:
    """Run the network over one microbatch and take every loss."""
    hidden = model(batch.tokens_T, batch.positions_T, sockets)
    main = cross_entropy(model, hidden, batch.target_KT[0])
    routings = list(hidden.routing)
    mtp: list[Tensor] = []
    for depth, further in enumerate(ahead(model, hidden, batch, sockets)):
        mtp.append(cross_entropy(model, further, batch.target_KT[depth + 1]))
        routings += further.routing
    return Terms(main, tuple(mtp), _balance(model, routings, batch.rows), _counts(model, routings))


def ahead(model: DeepSeek, hidden: Hidden, batch: Microbatch, sockets: Sockets) -> Iterable[Hidden]:
    """The hidden states of every MTP depth, each fed by the one before (DeepSeek-V3 report eq. (21)-(22))."""
    for depth in range(model.config.num_nextn_predict_layers):
        previous_TD = model.mtp_input(hidden)
        hidden = model.predict_ahead(depth, previous_TD, batch.ahead_KT[depth], batch.positions_T, sockets)
        yield hidden


def cross_entropy(model: DeepSeek, hidden: Hidden, target_T: Tensor) -> Tensor:
    """Sum of `-log p(target)` over the targets, float32."""
    return ops.linear_cross_entropy(hidden.hidden_TD, model.head_weight(), target_T).sum()


def _balance(model: DeepSeek, routings: Sequence[tuple[int, Routing]], rows: int) -> Tensor:
    top_k = model.config.num_experts_per_tok
    losses = [sequence_balance_loss(r.scores_TE, top_k=top_k, rows=rows) for _, r in routings]
    return torch.stack(losses).sum() if losses else model.head_weight().new_zeros((), dtype=torch.float32)


def _counts(model: DeepSeek, routings: Sequence[tuple[int, Routing]]) -> dict[int, Tensor]:
    experts = model.config.n_routed_experts
    return {layer: expert_counts(routing.expert_TK, experts) for layer, routing in routings}
