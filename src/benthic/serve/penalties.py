"""Repetition, frequency and presence penalties: what each penalised request has seen, and their strengths.

Shape suffixes: L rows with penalties, P tokens of a prompt, V vocabulary, N slots of the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from benthic.serve.transit import tensor_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from benthic.serve.drafts import Trial
    from benthic.serve.messages import SamplingParams


@dataclass(frozen=True)
class Penalties:
    """Rows with penalties: `row_L` in the batch, `slot_L` in the table, and their three strengths."""

    row_L: Tensor
    slot_L: Tensor
    repetition_L1: Tensor
    frequency_L1: Tensor
    presence_L1: Tensor

    @classmethod
    def of(
        cls, slots: Sequence[int], settings: Sequence[SamplingParams], device: torch.device
    ) -> Penalties | None:
        """Stack the rows whose slot in the penalty table is not -1; None when there are none."""
        chosen = [i for i, slot in enumerate(slots) if slot >= 0]
        if not chosen:
            return None
        params = [settings[i] for i in chosen]

        def column(values: list[float]) -> Tensor:
            return tensor_of(values, np.float32, device).unsqueeze(-1)

        return cls(
            row_L=tensor_of(chosen, np.int64, device),
            slot_L=tensor_of([slots[i] for i in chosen], np.int64, device),
            repetition_L1=column([p.repetition_penalty for p in params]),
            frequency_L1=column([p.frequency_penalty for p in params]),
            presence_L1=column([p.presence_penalty for p in params]),
        )


class PenaltyTable:
    """Which tokens each penalised request has seen: counts of its output, and what was in its prompt.

    Rows are allocated for requests with penalties alone and doubled in number when they run out.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._counts_NV = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        self._in_prompt_NV = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)
        self._free: list[int] = []

    def admit(self, prompt: Sequence[int], output: Sequence[int] = ()) -> int:
        """Take a slot and note the prompt's tokens in it, and those put out before."""
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self._counts_NV[slot] = 0
        self._in_prompt_NV[slot] = False
        device = self._counts_NV.device
        self._in_prompt_NV[slot].index_fill_(0, tensor_of(prompt, np.int64, device), value=True)
        for token in output:
            self._counts_NV[slot, token] += 1
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back."""
        self._free.append(slot)

    def apply(self, logits_SV: Tensor, penalties: Penalties, trial: Trial | None = None) -> None:
        """Penalise in place: repetition divides (or multiplies negative) logits, the others subtract.

        A row that verifies a draft has put out, as far as it knows, the drafts before it.
        """
        logits_LV = logits_SV[penalties.row_L]
        counts_LV = self._counts_NV[penalties.slot_L]
        if trial is not None:
            token_LK, counted_LK = trial.seen(penalties.row_L)
            counts_LV.scatter_add_(1, token_LK, counted_LK.to(torch.int32))
        in_output_LV = counts_LV > 0
        seen_LV = in_output_LV | self._in_prompt_NV[penalties.slot_L]
        factor_LV = torch.where(seen_LV, penalties.repetition_L1, 1.0)
        logits_LV = torch.where(logits_LV > 0, logits_LV / factor_LV, logits_LV * factor_LV)
        logits_LV -= penalties.frequency_L1 * counts_LV
        logits_LV -= penalties.presence_L1 * in_output_LV
        logits_SV[penalties.row_L] = logits_LV

    def count(self, token_S: Tensor, penalties: Penalties, kept_S: Tensor | None = None) -> None:
        """Count the tokens just drawn; with several rows a request, those of the rows that are `kept_S`."""
        token_L = token_S[penalties.row_L]
        counted_L = (token_L >= 0).to(torch.int32)
        if kept_S is None:
            self._counts_NV[penalties.slot_L, token_L.clamp(min=0)] += counted_L
            return
        counted_L *= kept_S[penalties.row_L]
        place = (penalties.slot_L, token_L.clamp(min=0))
        self._counts_NV.index_put_(place, counted_L, accumulate=True)

    def _grow(self) -> None:
        old = self._counts_NV.shape[0]
        extra = max(8, old)
        self._counts_NV = torch.cat(
            [self._counts_NV, self._counts_NV.new_zeros((extra, self._counts_NV.shape[1]))]
        )
        self._in_prompt_NV = torch.cat(
            [self._in_prompt_NV, self._in_prompt_NV.new_zeros((extra, self._in_prompt_NV.shape[1]))]
        )
        self._free.extend(range(old, old + extra))
