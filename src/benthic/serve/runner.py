"""Runs a plan: block table, tensors, one forward pass, logits for the rows that need them and no others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from benthic.model.local import LocalExchange
from benthic.model.sockets import Sockets
from benthic.serve.attend import PagedAttend
from benthic.serve.columns import ColumnLinear, fastest_linear
from benthic.serve.steps import StepBuilder
from benthic.serve.tapes import DecodeTapes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from benthic.model.network import DeepSeek
    from benthic.model.sockets import Linear
    from benthic.sched.plans import StepPlan
    from benthic.serve.cache import LatentCache

LOGIT_ROWS = 256
"""Most rows of prompt logits that exist at one time: 256 rows of a 129,280-token vocabulary are 132 MB."""


@dataclass(frozen=True)
class StepResult:
    """What a forward pass leaves for the sampler.

    `logits_SV` has one row for each of `StepPlan.sampled_ids`; `hidden_TD` and `chunk_rows` serve prompt
    log-probabilities.
    """

    logits_SV: Tensor
    hidden_TD: Tensor
    chunk_rows: tuple[range, ...]


class Runner:
    """One model on one device with its cache.

    Args:
        model: loaded weights, all layers.
        cache: pages for at least the model's layers.
        max_num_seqs: scheduler slots.
        max_model_len: longest sequence.
        linear: how matrices are multiplied; None takes the fastest exact way here, see
        `benthic.serve.columns`.
        enforce_eager: run every step as it is written, without tapes.
    """

    def __init__(
        self,
        model: DeepSeek,
        cache: LatentCache,
        *,
        max_num_seqs: int,
        max_model_len: int,
        linear: Linear | None = None,
        enforce_eager: bool = False,
    ) -> None:
        self.cache = cache
        self.model = self._model = model.eval()
        self._linear = fastest_linear(model) if linear is None else linear
        self._exchange = LocalExchange(model.config.n_routed_experts)
        self.tapes: DecodeTapes | None = None  # None: every step runs as it is written
        if isinstance(self._linear, ColumnLinear) and not enforce_eager:
            self.tapes = DecodeTapes(
                model,
                cache,
                linear=self._linear,
                exchange=self._exchange,
                columns=-(-max_model_len // cache.layout.block_size),
            )
            self.tapes.warm_up()
        self._steps = StepBuilder(
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            block_size=cache.layout.block_size,
            device=cache.pages_LPBW.device,
        )

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Compute one step. Cost: one forward pass of `plan.num_tokens` rows."""
        self._steps.write(plan.tables)
        step = self._steps.build(plan)
        taped = None if self.tapes is None else self.tapes.run(step)
        if taped is not None:
            return StepResult(taped[1], taped[0], step.chunk_rows)
        sockets = Sockets(PagedAttend(self.cache, step.layout), self._exchange, self._linear)
        hidden_TD = self._model(step.tokens_T, step.positions_T, sockets).hidden_TD
        sampled_SD = hidden_TD if step.sampled_S is None else hidden_TD.index_select(0, step.sampled_S)
        return StepResult(self._model.logits(sampled_SD, self._linear), hidden_TD, step.chunk_rows)

    @torch.inference_mode()
    def row_logits(self, result: StepResult, rows: range) -> Iterator[Tensor]:
        """Logits of some rows of a step, `LOGIT_ROWS` at a time (for prompt log-probabilities)."""
        for start in range(rows.start, rows.stop, LOGIT_ROWS):
            some_TD = result.hidden_TD[start : min(start + LOGIT_ROWS, rows.stop)]
            yield self._model.logits(some_TD, self._linear)

    def remember(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        """Note the newest token of each slot, which its next decode row feeds."""
        self._steps.remember(slots, tokens)
