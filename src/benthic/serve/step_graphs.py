"""Whole decode steps as CUDA graphs, with the greedy draw: mostly one copy and one launch.

The host writes where every row's token lies, its position and its cache slot into one array of pinned memory,
and a single copy brings them over; the block table follows only when it has changed. The graph gathers the
tokens, runs the model, takes the best token of each row, judges drafts where every sequence has as many as
the graph holds, and notes each sequence's newest token for the next step. A batch that is not greedy, or
whose drafts are uneven, takes the logits alone and draws from them (`benthic.serve.sampler`).

Shape suffixes: S sequences of a graph, Q queries, T = S * Q rows, K = Q - 1 drafts, N slots of the scheduler,
F tokens fed by a slot, P block-table columns.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from benthic.kernels import ops
from benthic.serve.attend import DecodeRows, StepLayout
from benthic.serve.drafts import Verdict
from benthic.serve.graphs import Graphs
from benthic.serve.steps import Replayed, StepTensors
from benthic.serve.transit import Homeward, to_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from benthic.model.network import DeepSeek
    from benthic.serve.graphs import Served
    from benthic.serve.steps import StepBuilder, StepRows

KEPT_VIEWS: Final = 64
"""Slices of the buffers that are kept: to make those of a step takes longer than to send its rows."""

RING: Final = 4
"""Pinned arrays in turn: a step is launched before the one before it has landed, and never two."""


class Drawn(NamedTuple):
    """What a step's graph drew, as if every row were greedy, and judged, as if all drafts were there.

    `size` is the graph's. `home_R` holds the tokens of all its rows, then how many drafts of each sequence
    held; `pinned_R` is where they go on the host.
    """

    size: int
    token_R: Tensor
    newest_S: Tensor
    verdict: Verdict | None
    home_R: Tensor
    pinned_R: Tensor

    def bring(self) -> Homeward:
        """Queue the copy to the host."""
        return Homeward.into((self.pinned_R,), (self.home_R,))

    def read(self, home_R: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tokens that came home and, where drafts were judged, how many held."""
        token_R = home_R[: len(self.token_R)]
        held = None if self.verdict is None else home_R[len(home_R) - len(self.newest_S) :]
        return token_R, held


class Stepped(NamedTuple):
    """What a replay leaves, the step as the graph's inputs hold it, and what was drawn of all its rows."""

    outputs: Replayed
    step: StepTensors
    drawn: Drawn | None


class StepInputs(NamedTuple):
    """A step's rows in the packed array: index of the token fed, position, cache slot; context and slot."""

    index_T: Tensor
    position_T: Tensor
    slot_T: Tensor
    context_S: Tensor
    owner_S: Tensor

    @classmethod
    def of(cls, packed: Tensor, size: int, queries: int) -> StepInputs:
        """The parts of the array for a graph of `size` sequences."""
        rows = size * queries
        return cls(*packed[: 3 * rows + 2 * size].split([rows, rows, rows, size, size]))


@dataclass(eq=False)
class StepBuffers:
    """What the graphs of steps read and write; a graph uses the first rows.

    They share one instance: none runs between another's replay and the use of its outputs.
    """

    packed: Tensor
    ring: list[Tensor]
    homes: list[Tensor]
    block_table_SP: Tensor
    context_S: Tensor
    pre_norm_TD: Tensor
    hidden_TD: Tensor
    logits_TV: Tensor
    home_R: Tensor
    newest_S: Tensor
    row_S: Tensor
    tokens_T: Tensor
    turn: int = 0
    table_of: tuple[bytes, int, int] | None = None

    @classmethod
    def blank(cls, model: DeepSeek, sequences: int, queries: int, columns: int) -> StepBuffers:
        """Room for a step of so many sequences with so many rows each."""
        weight, rows = model.head_weight(), sequences * queries
        device, on_gpu = weight.device, weight.is_cuda
        width = 3 * rows + 2 * sequences
        stream_TD = model.embed.weight.new_zeros(rows, model.config.hidden_size)
        ints = torch.zeros(rows + sequences, dtype=torch.int64, device=device)
        return cls(
            packed=torch.zeros(width, dtype=torch.int64, device=device),
            ring=[torch.zeros(width, dtype=torch.int64, pin_memory=on_gpu) for _ in range(RING)],
            homes=[torch.zeros(rows + sequences, dtype=torch.int64, pin_memory=on_gpu) for _ in range(RING)],
            block_table_SP=torch.zeros((sequences, columns), dtype=torch.int32, device=device),
            context_S=torch.zeros(sequences, dtype=torch.int32, device=device),
            pre_norm_TD=stream_TD,
            hidden_TD=torch.zeros_like(stream_TD),
            logits_TV=weight.new_zeros(rows, model.config.vocab_size),
            home_R=ints,
            newest_S=ints.new_zeros(sequences),
            row_S=ints.new_zeros(sequences),
            tokens_T=ints.new_zeros(rows),
        )

    def load(self, rows: StepRows, size: int, steps: StepBuilder) -> None:
        """Send a step's rows, padded to `size` sequences, and the block table if it is another one."""
        decode = rows.decode
        assert decode is not None  # noqa: S101 (the caller has looked)
        self.turn = (self.turn + 1) % RING
        width = (3 * decode.queries + 2) * size
        staged = self.ring[self.turn][:width]
        _pack(staged.numpy(), rows, size, steps.fed_NF.shape[0] - 1, steps.fed_NF.shape[1])
        self.packed[:width].copy_(staged, non_blocking=True)
        wanted = decode.slot_S.tobytes(), steps.version
        if self.table_of is None or self.table_of[:2] != wanted or self.table_of[2] < decode.columns:
            table_SP = to_device(steps.table(decode), self.packed.device)
            self.block_table_SP[: len(decode.slot_S), : decode.columns].copy_(table_SP)
            self.table_of = *wanted, decode.columns


def _pack(array: NDArray[np.int64], rows: StepRows, size: int, nobody: int, fed: int) -> None:
    """Write the parts of `StepInputs`; rows that pad belong to `nobody`'s slot and store nothing."""
    decode = rows.decode
    assert decode is not None  # noqa: S101 (the caller has looked)
    real, padded, used = len(rows.index_R), size * decode.queries, len(decode.slot_S)
    parts = ((rows.index_R, nobody * fed), (rows.position_T, 0), (rows.slot_T, -1))
    for number, (part, blank) in enumerate(parts):
        first = number * padded
        array[first : first + real] = part
        array[first + real : first + padded] = blank
    for number, (part, blank) in enumerate(((decode.context_S, 0), (decode.slot_S, nobody))):
        first = 3 * padded + number * size
        array[first : first + used] = part
        array[first + used : first + size] = blank


class StepGraphs(Graphs):
    """Decode steps with `queries` rows a sequence.

    Args:
        served: as for `Graphs`, and so `sizes` and `queries`.
        sizes: see there.
        queries: see there.
        steps: what every slot feeds, and the block table.
        buffers: rows and block-table columns enough for the largest size and the longest sequence.
    """

    def __init__(
        self,
        served: Served,
        sizes: Sequence[int],
        queries: int,
        *,
        steps: StepBuilder,
        buffers: StepBuffers,
    ) -> None:
        super().__init__(served, sizes, queries)
        self.steps = steps
        self.buffers = buffers
        self._found = functools.lru_cache(KEPT_VIEWS)(self._view)

    def size_of(self, rows: StepRows) -> int | None:
        """The smallest captured batch that holds a step; None when none does."""
        decode = rows.decode
        if decode is None or rows.chunks or decode.queries != self._queries:
            return None
        return self.size_for(len(decode.slot_S))

    def run(self, rows: StepRows, size: int) -> Stepped:
        """A step of decode rows alone in a batch of `size`, at least that of `size_of`.

        The next call overwrites what this one returned, in the order of the stream.
        """
        decode = rows.decode
        assert decode is not None  # noqa: S101 (there is a size)
        self.buffers.load(rows, size, self.steps)
        self.replay(size)
        found = self._found(size, len(decode.slot_S), decode.columns, self.buffers.turn)
        if rows.sampled_S is None:
            if not rows.chunk_rows:
                return found
            return found._replace(step=replace(found.step, chunk_rows=rows.chunk_rows))
        sampled_S = to_device(rows.sampled_S, self.buffers.packed.device)
        logits_SV = found.outputs.logits_TV.index_select(0, sampled_S)
        return Stepped(
            found.outputs._replace(logits_TV=logits_SV),
            replace(found.step, sampled_S=sampled_S, chunk_rows=rows.chunk_rows),
            None,
        )

    def _view(self, size: int, used: int, columns: int, turn: int) -> Stepped:
        """Where a replay leaves its outputs, and the step as its inputs hold it."""
        buffers, inputs, count = self.buffers, self.inputs(size), used * self._queries
        decode = DecodeRows(self._queries, buffers.block_table_SP[:used, :columns], buffers.context_S[:used])
        return Stepped(
            Replayed(buffers.pre_norm_TD[:count], buffers.hidden_TD[:count], buffers.logits_TV[:count]),
            StepTensors(
                tokens_T=buffers.tokens_T[:count],
                positions_T=inputs.position_T[:count],
                layout=StepLayout(inputs.slot_T[:count], decode, None),
                sampled_S=None,
                chunk_rows=(),
            ),
            self._drawn(size, used, turn),
        )

    def _drawn(self, size: int, used: int, turn: int) -> Drawn:
        buffers, rows, verdict = self.buffers, size * self._queries, None
        length = used
        if self._queries > 1:
            length = rows + used
            verdict = Verdict(buffers.home_R[rows:length], buffers.newest_S[:used], buffers.row_S[:used])
        return Drawn(
            size=size,
            token_R=buffers.home_R[: used * self._queries],
            newest_S=buffers.newest_S[:used],
            verdict=verdict,
            home_R=buffers.home_R[:length],
            pinned_R=buffers.homes[turn][:length],
        )

    def blank(self, size: int) -> None:
        """Let the buffers hold a step that does nothing, and what it draws."""
        inputs = self.inputs(size)
        outputs = self.buffers.home_R, self.buffers.newest_S, self.buffers.row_S, self.buffers.context_S
        for each in (self.buffers.packed, *outputs):
            each.zero_()
        inputs.slot_T.fill_(-1)
        inputs.owner_S.fill_(self.steps.fed_NF.shape[0] - 1)

    def inputs(self, size: int) -> StepInputs:
        """Where the graph of a size finds its rows."""
        return StepInputs.of(self.buffers.packed, size, self._queries)

    def decode_rows(self, size: int) -> DecodeRows:
        """The sequences of a graph."""
        return DecodeRows(self._queries, self.buffers.block_table_SP[:size], self.buffers.context_S[:size])

    def _forward(self, size: int) -> None:
        buffers, inputs, rows = self.buffers, self.inputs(size), size * self._queries
        buffers.context_S[:size].copy_(inputs.context_S)
        token_T = buffers.tokens_T[:rows]
        torch.index_select(self.steps.fed_NF.view(-1), 0, inputs.index_T, out=token_T)
        sockets = self.served.sockets(inputs.slot_T, self.decode_rows(size))
        hidden = self.served.model(token_T, inputs.position_T, sockets)
        logits_TV = buffers.logits_TV[:rows]
        self.served.logits_into(hidden.hidden_TD, logits_TV)
        buffers.pre_norm_TD[:rows].copy_(hidden.pre_norm_TD)
        buffers.hidden_TD[:rows].copy_(hidden.hidden_TD)
        notes = ops.Notes(
            buffers.home_R[: rows + size],
            buffers.newest_S[:size],
            buffers.row_S[:size],
            inputs.owner_S,
            self.steps.fed_NF,
        )
        ops.judge_greedy(logits_TV, token_T.view(size, self._queries), notes)
