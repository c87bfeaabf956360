"""Scores microbatches over all ranks of a run: the forward half of the pipeline table, without losses."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from benthic.train.data.microbatch import IGNORE
from benthic.train.evaluate import Scores, chosen, scores_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from benthic.model.moe import Routing
    from benthic.model.network import DeepSeek, Hidden
    from benthic.train.data.microbatch import Microbatch


@dataclass
class Scored:
    """What the head of one microbatch finds: each row's loss and likeliest token, and the drafts of depth 1.

    Stands where training has an `Objective`; the losses that it returns are zeros.
    """

    loss_T: Tensor | None = None
    main_T: Tensor | None = None
    draft_T: Tensor | None = None

    def main(self, model: DeepSeek, hidden: Hidden, target_T: Tensor) -> Tensor:
        """Keep loss and choice of the main head."""
        self.loss_T, self.main_T = chosen(model, hidden.hidden_TD, target_T)
        return self.loss_T.new_zeros(())

    def ahead(self, model: DeepSeek, hidden: Hidden, target_T: Tensor, depth: int) -> Tensor:
        """Keep the drafts of depth 1."""
        if depth == 0:
            self.draft_T = chosen(model, hidden.hidden_TD, target_T)[1]
        return hidden.hidden_TD.new_zeros((), dtype=torch.float32)

    def routed(self, layer: int, routing: Routing, *, top_k: int, experts: int) -> Tensor:  # noqa: ARG002
        """Routing is no part of a score."""
        return routing.scores_TE.new_zeros(())

    def scores(self, batch: Microbatch, *, whole_rows: bool) -> Scores:
        """The sums; drafts count only where a rank holds whole rows, for they are compared with the next."""
        if self.loss_T is None or self.main_T is None:
            return Scores()
        here = dataclasses.replace(batch, num_targets=(int((batch.target_KT[0] != IGNORE).sum()),))
        return scores_of(here, self.loss_T, self.main_T, self.draft_T if whole_rows else None)


def rounds(batches: Iterator[Microbatch], data: int, rank: int, each: int) -> Iterator[list[Microbatch]]:
    """Deal microbatches to `data` ranks, `each` to every rank a round; what is missing has no targets."""
    while found := list(itertools.islice(batches, data * each)):
        spare = dataclasses.replace(found[0], target_KT=torch.full_like(found[0].target_KT, IGNORE))
        found += [spare] * (data * each - len(found))
        yield found[rank::data]
