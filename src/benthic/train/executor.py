"""How one optimizer step's microbatches are computed. This one runs them in turn on one device.

A pipeline executor takes the same arguments and gives the same outcome; the trainer knows neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from benthic.model.local import packed_sockets
from benthic.train.losses import Terms, Weights, terms

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from benthic.model.network import DeepSeek
    from benthic.model.sockets import Linear, Sockets
    from benthic.train.data.microbatch import Microbatch


@dataclass(frozen=True)
class Outcome:
    """Sums over all microbatches of a step, as `losses.Terms`; gradients are in the model."""

    main: Tensor
    mtp: tuple[Tensor, ...]
    balance: Tensor
    counts: dict[int, Tensor]


class Executor(Protocol):
    """Forward and backward of one step."""

    def run(self, batch: Sequence[Microbatch], weights: Weights) -> Outcome:
        """Add the gradient of the weighted loss of every microbatch to the model."""
        ...


@dataclass(frozen=True)
class LocalExecutor:
    """One microbatch after another on `device`."""

    model: DeepSeek
    device: torch.device
    linear: Linear

    def sockets(self, batch: Microbatch) -> Sockets:
        """Packed attention, all experts here."""
        experts = self.model.config.n_routed_experts
        return packed_sockets(
            batch.cu_seqlens, batch.max_seqlen, n_routed_experts=experts, linear=self.linear
        )

    def run(self, batch: Sequence[Microbatch], weights: Weights) -> Outcome:
        """Add the gradient of the weighted loss of every microbatch to the model."""
        done: list[Terms] = []
        for microbatch in batch:
            here = microbatch.to(self.device)
            found = terms(self.model, here, self.sockets(here))
            found.total(weights).backward()  # type: ignore[no-untyped-call]
            done.append(_detached(found))
        return _summed(done)


def _detached(found: Terms) -> Terms:
    mtp = tuple(term.detach() for term in found.mtp)
    return Terms(found.main.detach(), mtp, found.balance.detach(), found.counts)


def _summed(done: Sequence[Terms]) -> Outcome:
    return Outcome(
        main=torch.stack([t.main for t in done]).sum(),
        mtp=tuple(torch.stack(depth).sum() for depth in zip(*(t.mtp for t in done), strict=True)),
        balance=torch.stack([t.balance for t in done]).sum(),
        counts={layer: torch.stack([t.counts[layer] for t in done]).sum(0) for layer in done[0].counts},
    )
