"""What follows a greedy step whose drafts a graph has judged, as a graph of its own: learn, and draft anew.

It reads the buffers of the step's graph, so it needs no inputs: the one prediction module runs over the
step's rows, then as often as drafts are wanted over each sequence's newest row. It is `MtpDrafter.learn` for
the common case, in one launch.

Shape suffixes: as in `benthic.serve.step_graphs`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benthic.kernels import ops
from benthic.model.network import Hidden
from benthic.serve.attend import rows_behind
from benthic.serve.graphs import Graphs

if TYPE_CHECKING:
    from torch import Tensor

    from benthic.serve.step_graphs import StepGraphs


class TailGraphs(Graphs):
    """Learning and drafting behind the steps of `step`, for a model with one prediction module.

    Args:
        step: graphs of the steps.
        hidden_ND: the module's newest normed state of every slot; a line more than there are slots.
        previous_ND: what the module is fed of it.
    """

    def __init__(self, step: StepGraphs, hidden_ND: Tensor, previous_ND: Tensor) -> None:
        super().__init__(step.served, step.sizes, step.queries)
        self._step = step
        self._hidden_ND = hidden_ND
        self._previous_ND = previous_ND

    def blank(self, size: int) -> None:
        """As of the step's graphs."""
        self._step.blank(size)

    def _forward(self, size: int) -> None:
        served, buffers, inputs = self.served, self._step.buffers, self._step.inputs(size)
        rows, drafts, steps = size * self._queries, self._queries - 1, self._step.steps
        given_TD = served.model.mtp_input(self._last(rows))
        token_T = buffers.home_R[:rows].clamp(min=0)
        sockets = served.sockets(inputs.slot_T, self._step.decode_rows(size))
        ahead = served.model.predict_ahead(0, given_TD, token_T, inputs.position_T, sockets)
        row_S = buffers.row_S[:size]
        hidden_SD = ahead.hidden_TD.index_select(0, row_S)
        previous_SD = served.model.mtp_input(ahead).index_select(0, row_S)
        self._hidden_ND.index_copy_(0, inputs.owner_S, hidden_SD)
        self._previous_ND.index_copy_(0, inputs.owner_S, previous_SD)
        if not drafts:
            return
        first_S = inputs.position_T.view(size, self._queries)[:, 0]
        newest_S = first_S + 1 + buffers.home_R[rows : rows + size]
        covered_S = (first_S + drafts) // steps.block_size * steps.block_size + steps.block_size
        limit_S = torch.where(inputs.context_S > 0, covered_S, 0)
        table_SP = buffers.block_table_SP[:size]
        tokens: list[Tensor] = []
        for number in range(drafts):
            if number:
                position_S = newest_S + (number - 1)
                slot_S, decode = rows_behind(position_S, limit_S, table_SP, steps.block_size)
                fed = previous_SD, tokens[-1], position_S
                ahead = served.model.predict_ahead(0, *fed, served.sockets(slot_S, decode))
                hidden_SD, previous_SD = ahead.hidden_TD, served.model.mtp_input(ahead)
            tokens.append(ops.best_tokens(served.logits(hidden_SD)).clamp(min=0))
        steps.fed_NF[:, 1 : 1 + drafts].index_copy_(0, inputs.owner_S, torch.stack(tokens, dim=1))

    def _last(self, rows: int) -> Hidden:
        """The states that the step left."""
        return Hidden(self._step.buffers.pre_norm_TD[:rows], self._step.buffers.hidden_TD[:rows], ())
