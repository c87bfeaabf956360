"""Steps with prompts in them as CUDA graphs: chunks beside decodes, padded to a number of rows.

Written kernel by kernel, a step of a mixture of 27 layers keeps the host for 40 to 70 ms however few rows it
has, while a GPU takes 10 ms for 512 of them. So such a step is recorded too, for a row count that holds it.
Where its decode rows end is not known when it is recorded: the border is a number on the device. Attention in
the latent space runs over the first rows as if all of them decoded, attention over expanded keys over all
rows, and each row takes what it should (`benthic.serve.attend`). To the latter the decode rows are one
sequence, each chunk is another, and the rows that pad the step are the last.

There are graphs for steps of whole prompts, which attend to their own rows, and others for steps whose chunks
continue something that is cached, with room for so many rows of context; and both again for decodes that
verify as many drafts as there may be.

Shape suffixes: T rows of a graph, S sequences that may decode, Q rows of each, P block-table columns, M rows
of context, C chunks, B = C + 3 bounds of the sequences of expanded attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from benthic.model.network import Hidden
from benthic.sched.graph_sizes import FEW_DECODES, sizes_beside
from benthic.serve.attend import DecodeRows, PrefillRows, StepLayout
from benthic.serve.graphs import Graphs
from benthic.serve.transit import to_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from benthic.model.network import DeepSeek
    from benthic.serve.graphs import Served
    from benthic.serve.steps import StepRows, StepTensors

CHUNKS: Final = 32
"""Most chunks of a recorded step; more of them are so many rows that the host is the faster one."""

CONTEXT_ROWS: Final = 8192
"""Most rows of context that a recorded step expands, its own among them."""


@dataclass(frozen=True)
class PromptBuffers:
    """What recorded steps read and write; a graph uses the first rows. They share one instance.

    `bounds_2B` int32: where the sequences of expanded attention start, in rows and in rows of context;
    `border_1` int64: how many rows decode.
    """

    tokens_T: Tensor
    positions_T: Tensor
    slot_T: Tensor
    block_table_SP: Tensor
    context_S: Tensor
    border_1: Tensor
    bounds_2B: Tensor
    context_slot_M: Tensor
    pre_norm_TD: Tensor
    hidden_TD: Tensor

    @classmethod
    def blank(cls, model: DeepSeek, rows: int, sequences: int, columns: int) -> PromptBuffers:
        """Inputs of a step that does nothing, and room for its outputs."""
        zeros_T = torch.zeros(rows, dtype=torch.int64, device=model.embed.weight.device)
        stream_TD = model.embed.weight.new_zeros(rows, model.config.hidden_size)
        ints = zeros_T.to(torch.int32)
        return cls(
            tokens_T=zeros_T,
            positions_T=zeros_T.clone(),
            slot_T=torch.full_like(zeros_T, -1),
            block_table_SP=ints.new_zeros(sequences, columns),
            context_S=ints.new_zeros(sequences),
            border_1=zeros_T.new_zeros(1),
            bounds_2B=ints.new_zeros(2, CHUNKS + 3),
            context_slot_M=zeros_T.new_zeros(CONTEXT_ROWS),
            pre_norm_TD=stream_TD,
            hidden_TD=torch.zeros_like(stream_TD),
        )

    def fill(self, rows: StepRows, step: StepTensors, size: int) -> None:
        """Take over a step's rows, and let those that pad it to `size` store nothing."""
        count, decode = len(rows.position_T), step.layout.decode
        self.tokens_T[:count].copy_(step.tokens_T)
        self.positions_T[:count].copy_(step.positions_T)
        self.slot_T[:count].copy_(step.layout.slot_T)
        self.slot_T[count:size].fill_(-1)
        self.context_S.zero_()
        border = 0 if decode is None else decode.rows
        if decode is not None:
            used, columns = decode.block_table_SP.shape
            self.context_S[:used].copy_(decode.context_S)
            self.block_table_SP[:used, :columns].copy_(decode.block_table_SP)
        self.border_1.fill_(border)
        self.bounds_2B.copy_(to_device(bounds(rows, border, size), self.bounds_2B.device))
        assert step.layout.prefill is not None  # noqa: S101 (there is a size)
        context_slot_M = step.layout.prefill.context_slot_M
        if context_slot_M is not None:
            self.context_slot_M[: len(context_slot_M)].copy_(context_slot_M)


def bounds(rows: StepRows, border: int, size: int) -> NDArray[np.int32]:
    """Where the sequences of expanded attention start: decode rows, chunks, what pads the step; int32 [2, B].

    Where chunks attend to the step's own rows, both lines are alike. Where contexts are read from the cache,
    neither decode rows nor those that pad see any of them.
    """
    lengths = [chunk.length for chunk in rows.chunks]
    bounds_2B = np.full((2, CHUNKS + 3), size, dtype=np.int32)
    bounds_2B[:, 0] = 0
    starts = slice(1, len(lengths) + 2)
    bounds_2B[0, starts] = border + np.cumsum([0, *lengths])
    if whole(rows):
        bounds_2B[1] = bounds_2B[0]
    else:
        bounds_2B[1, starts] = np.cumsum([0, *context_lengths(rows)])
        bounds_2B[1, starts.stop :] = bounds_2B[1, starts.stop - 1]
    return bounds_2B


def context_lengths(rows: StepRows) -> list[int]:
    """Tokens that each chunk sees, its own among them."""
    return [chunk.start + chunk.length for chunk in rows.chunks]


def whole(rows: StepRows) -> bool:
    """Whether every chunk starts at its prompt's beginning: all that it sees are rows of the step."""
    return not any(chunk.start for chunk in rows.chunks)


class PromptGraphs(Graphs):
    """Steps with chunks, whole prompts or others.

    Args:
        served: as for `Graphs`.
        sizes: row counts, in rising order; where few decode, their rows go on top.
        queries: rows of each sequence that decodes.
        sequences: most that may decode; of 0 nothing is attended to in the latent space.
        reads_cache: chunks continue something that is cached.
        buffers: room for the largest size, so many sequences and the longest of them.
    """

    def __init__(
        self,
        served: Served,
        sizes: Sequence[int],
        queries: int = 1,
        *,
        sequences: int,
        reads_cache: bool,
        buffers: PromptBuffers,
    ) -> None:
        super().__init__(served, sizes, queries)
        self._sequences = sequences
        self._reads_cache = reads_cache
        self._buffers = buffers

    @classmethod
    def kinds(
        cls, served: Served, sizes: Sequence[int], *, max_num_seqs: int, columns: int, drafts: int = 0
    ) -> tuple[PromptGraphs, ...]:
        """All that an engine may want, those for no and for few decodes first; none without sizes.

        Drafts are for few decodes, so that those with drafts are for no more.
        """
        if not sizes:
            return ()
        buffers = PromptBuffers.blank(served.model, sizes[-1], max_num_seqs, columns)
        few = min(FEW_DECODES, max_num_seqs)
        decodes = [
            *((1, each) for each in sorted({0, few, max_num_seqs})),
            *([(1 + drafts, few)] if drafts else []),
        ]
        return tuple(
            cls(
                served,
                sizes_beside(sizes, sequences * queries if sequences == few else 0),
                queries,
                sequences=sequences,
                reads_cache=reads_cache,
                buffers=buffers,
            )
            for queries, sequences in decodes
            for reads_cache in (False, True)
        )

    @property
    def what(self) -> str:
        """Words for the log."""
        chunks = "chunks of cached prompts" if self._reads_cache else "whole prompts"
        if not self._sequences:
            return f"{chunks} alone"
        return f"{chunks} beside up to {self._sequences} decodes of {self._queries} rows"

    def size_of(self, rows: StepRows) -> int | None:
        """The fewest captured rows that hold a step; None when none do."""
        decode = rows.decode
        decodes = 0 if decode is None else len(decode.slot_S)
        queries = 1 if decode is None else decode.queries
        fits = 0 < len(rows.chunks) <= CHUNKS and decodes <= self._sequences
        if not fits or queries != self._queries or whole(rows) == self._reads_cache:
            return None
        if self._reads_cache and sum(context_lengths(rows)) > CONTEXT_ROWS:
            return None
        return self.size_for(len(rows.position_T))

    def run(self, rows: StepRows, step: StepTensors, size: int) -> Hidden:
        """The states of a step's rows, in a graph of `size` rows, at least that of `size_of`.

        The next call overwrites what this one returned, in the order of the stream.
        """
        count = len(rows.position_T)
        self._buffers.fill(rows, step, size)
        self.replay(size)
        return Hidden(self._buffers.pre_norm_TD[:count], self._buffers.hidden_TD[:count], ())

    def blank(self, size: int) -> None:
        """Let the buffers hold a step of rows that pad."""
        buffers = self._buffers
        for each in (buffers.tokens_T, buffers.positions_T, buffers.context_S, buffers.border_1):
            each.zero_()
        buffers.slot_T.fill_(-1)
        buffers.bounds_2B.fill_(size)[:, 0].zero_()

    def layout(self, size: int) -> StepLayout:
        """The step of a graph as attention sees it."""
        buffers, most = self._buffers, min(self._sequences, size // self._queries)
        rows_B, context_B = buffers.bounds_2B
        decode = DecodeRows(self._queries, buffers.block_table_SP[:most], buffers.context_S[:most])
        return StepLayout(
            buffers.slot_T[:size],
            decode if most else None,
            PrefillRows(
                cu_seqlens_q=rows_B,
                cu_seqlens_k=context_B,
                max_seqlen_q=size,
                max_seqlen_k=CONTEXT_ROWS if self._reads_cache else size,
                context_slot_M=buffers.context_slot_M if self._reads_cache else None,
            ),
            border_1=buffers.border_1,
        )

    def _forward(self, size: int) -> None:
        buffers, served = self._buffers, self.served
        sockets = served.plugs.sockets(served.cache, self.layout(size))
        hidden = served.model(buffers.tokens_T[:size], buffers.positions_T[:size], sockets)
        buffers.pre_norm_TD[:size].copy_(hidden.pre_norm_TD)
        buffers.hidden_TD[:size].copy_(hidden.hidden_TD)
