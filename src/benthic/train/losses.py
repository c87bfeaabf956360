"""What is minimised: next token, tokens further ahead, and balance; summed, so that microbatches add up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from benthic.kernels import ops
from benthic.model.products import WeightGradients

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

    from benthic.model.moe import Routing
    from benthic.model.network import DeepSeek, Hidden
    from benthic.model.sockets import Sockets
    from benthic.train.data.microbatch import Microbatch

    Mean = Callable[[Tensor], Tensor]
    """Averages a tensor, without gradient, over the ranks that share the tokens of the same sequences."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How the sums of one microbatch enter the loss of the whole global batch.

    main: 1 / main targets of the global batch. mtp: the same for each depth, times λ / depths.
    balance: α / rows of the global batch.

    A step that is recorded has the first two as float32 scalars on its device, for targets differ in number.
    """

    main: float | Tensor
    mtp: tuple[float | Tensor, ...]
    balance: float


@dataclass
class Tally:
    """The sums of a step's microbatches as they are found, without gradients.

    Scalars: `main` over targets, `mtp[k]` over targets of depth k, `balance` over rows and layers. `counts`
    holds the tokens of each expert by layer index, int64 [experts].
    """

    main: list[Tensor] = field(default_factory=list)
    mtp: dict[int, list[Tensor]] = field(default_factory=dict)
    balance: list[Tensor] = field(default_factory=list)
    counts: dict[int, Tensor] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget the step before."""
        for found in (self.main, self.mtp, self.balance, self.counts):
            found.clear()


@dataclass(frozen=True)
class Objective:
    """The weighted losses of one microbatch, each noted in `tally` as it is computed.

    rows: sequences of the microbatch. shards: ranks that share their tokens; `mean` averages over these.
    sink: where the head's float32 sum is, if it has one: its gradient goes there in the forward pass.
    """

    weights: Weights
    tally: Tally
    rows: int
    shards: int = 1
    mean: Mean | None = None
    sink: WeightGradients = field(default_factory=WeightGradients)

    def main(self, model: DeepSeek, hidden: Hidden, target_T: Tensor) -> Tensor:
        """DeepSeek-V3 report eq. (25), the part of the main head."""
        loss, found = self._cross_entropy(model, hidden, target_T, self.weights.main)
        self.tally.main.append(found)
        return loss

    def ahead(self, model: DeepSeek, hidden: Hidden, target_T: Tensor, depth: int) -> Tensor:
        """Eq. (24), one depth."""
        loss, found = self._cross_entropy(model, hidden, target_T, self.weights.mtp[depth])
        self.tally.mtp.setdefault(depth, []).append(found)
        return loss

    def routed(self, layer: int, routing: Routing, *, top_k: int, experts: int) -> Tensor:
        """Eq. (17), one layer; also counts the tokens of each expert."""
        counts, scores_TE = self.tally.counts, routing.scores_TE
        if layer not in counts:
            counts[layer] = torch.zeros(experts, dtype=torch.int64, device=scores_TE.device)
        ops.count_experts(counts[layer], routing.expert_TK)
        factor = self.weights.balance / self.shards
        loss, found = ops.balance_loss(scores_TE, top_k=top_k, rows=self.rows, factor=factor, mean=self.mean)
        self.tally.balance.append(found if self.shards == 1 else found / self.shards)
        return loss

    def _cross_entropy(
        self, model: DeepSeek, hidden: Hidden, target_T: Tensor, weight: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """`weight` times the sum of `-log p(target)` over the targets, and that sum alone; float32."""
        head_VD = model.head_weight()
        into_VD, fresh, _ = self.sink.room_for(head_VD) or (None, False, None)
        return ops.linear_cross_entropy_sum(
            hidden.hidden_TD, head_VD, target_T, factor=weight, into_VD=into_VD, fresh=fresh
        )


def weights_of(
    num_targets: Sequence[int], *, rows: int, mtp_weight: float, normaliser: str, balance_alpha: float
) -> Weights:
    """The factors that turn sums over microbatches into means over the global batch.

    `num_targets` are those of the main head and of every MTP depth over the global batch of `rows` rows.
    Depth k of the MTP loss is divided by the number of main targets, as eq. (24) divides T - k terms by T
    (normaliser "tokens"), or by the number of its own targets ("targets").
    """
    main, *ahead = (max(1, count) for count in num_targets)
    divisors = ahead if normaliser == "targets" else [main] * len(ahead)
    return Weights(
        main=1.0 / main,
        mtp=tuple(mtp_weight / len(ahead) / divisor for divisor in divisors),
        balance=balance_alpha / rows,
    )


def targets_of(batch: Iterable[Microbatch]) -> tuple[int, ...]:
    """Targets of the main head and of every MTP depth over some microbatches."""
    return tuple(sum(counts) for counts in zip(*(m.num_targets for m in batch), strict=True))


def ahead(model: DeepSeek, hidden: Hidden, batch: Microbatch, sockets: Sockets) -> Iterable[Hidden]:
    """The hidden states of every MTP depth, each fed by the one before (DeepSeek-V3 report eq. (21)-(22))."""
    for depth in range(model.config.num_nextn_predict_layers):
        previous_TD = model.mtp_input(hidden)
        hidden = model.predict_ahead(depth, previous_TD, batch.ahead_KT[depth], batch.positions_T, sockets)
        yield hidden


def total(terms: Sequence[Tensor], like: Tensor) -> Tensor:
    """The sum of some scalars, zero when there are none."""
    return torch.stack(list(terms)).sum() if terms else like.new_zeros((), dtype=torch.float32)
