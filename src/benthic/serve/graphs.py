"""Decode steps on a GPU as CUDA graphs: one for each padded batch size, replayed with a single launch.

Launching the kernels of a step one by one takes the host several times as long as a GPU takes to run them
for few rows. A graph keeps the launches and the addresses they read; so its inputs are buffers that every
step overwrites, and a batch that is smaller than a graph's is padded with rows that store nothing (slot -1)
and attend to nothing (context 0). Nothing in a step asks the host how many rows an expert got.

The plain loop stays beside it; whatever a graph cannot hold (prefill rows, a batch above the largest size)
runs plainly. Verification of k drafts is the same step with k + 1 queries a sequence.

Shape suffixes: S sequences of a graph, T = S * queries rows, P block-table columns.
"""

from __future__ import annotations

import contextlib
import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch

from benthic.model.sockets import Sockets
from benthic.serve.attend import DecodeRows, PagedAttend, StepLayout
from benthic.serve.steps import Replayed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor

    from benthic.model.network import DeepSeek
    from benthic.model.sockets import Exchange, Linear
    from benthic.serve.cache import LatentCache
    from benthic.serve.steps import StepTensors

Progress: TypeAlias = "Callable[[Sequence[int]], Iterable[int]]"
"""Goes through batch sizes and shows how far it is."""


def padded_sizes(most: int, *, limit: int = 512, sizes: Sequence[int] | None = None) -> tuple[int, ...]:
    """Batch sizes to capture for at most `most` sequences: 1, 2, 4, then steps of 8 to 256, of 16 above.

    The sizes and the limit are vLLM's. `sizes` replaces the series; sizes above `most` or `limit` are left
    out, and the largest batch within both is always there.
    """
    top = min(most, limit)
    series = sizes or (1, 2, 4, *range(8, min(top, 256) + 1, 8), *range(272, top + 1, 16))
    return tuple(sorted({size for size in series if size <= top} | {top}))


@dataclass(frozen=True)
class Buffers:
    """What every graph reads and writes, made for the largest batch; a graph of S uses the first rows."""

    tokens_T: Tensor
    positions_T: Tensor
    slot_T: Tensor
    block_table_SP: Tensor
    context_S: Tensor
    hidden_TD: Tensor
    logits_TV: Tensor
    previous_TD: Tensor

    @classmethod
    def blank(cls, model: DeepSeek, sequences: int, queries: int, columns: int) -> Buffers:
        """Inputs of a step that does nothing, and room for its outputs."""
        weight, rows = model.head_weight(), sequences * queries
        zeros = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        table_SP = torch.zeros((sequences, columns), dtype=torch.int32, device=weight.device)
        return cls(
            tokens_T=zeros,
            positions_T=zeros.clone(),
            slot_T=torch.full_like(zeros, -1),
            block_table_SP=table_SP,
            context_S=table_SP.new_zeros(sequences),
            hidden_TD=weight.new_zeros(rows, model.config.hidden_size),
            logits_TV=weight.new_zeros(rows, model.config.vocab_size),
            previous_TD=weight.new_zeros(rows, model.config.hidden_size),
        )

    def outputs(self, rows: int) -> Replayed:
        """The first rows of what a graph wrote."""
        return Replayed(self.hidden_TD[:rows], self.logits_TV[:rows], self.previous_TD[:rows])

    def fill(self, step: StepTensors, decode: DecodeRows, sequences: int) -> None:
        """Take over a step's rows and blank those that pad it to `sequences`."""
        used, rows = decode.block_table_SP.shape[0], decode.rows
        columns = decode.block_table_SP.shape[1]
        self.tokens_T[:rows].copy_(step.tokens_T)
        self.positions_T[:rows].copy_(step.positions_T)
        self.slot_T[:rows].copy_(step.layout.slot_T)
        self.block_table_SP[:used, :columns].copy_(decode.block_table_SP)
        self.context_S[:used].copy_(decode.context_S)
        if used < sequences:
            self.slot_T[rows : sequences * decode.queries].fill_(-1)
            self.context_S[used:sequences].zero_()


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """Collect garbage now and not again inside: freeing another graph would break off a capture."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Captured(NamedTuple):
    """A graph and how much device memory its capture took."""

    graph: torch.cuda.CUDAGraph
    num_bytes: int


class DecodeGraphs:
    """Graphs by padded batch size over one model and its cache.

    Args:
        model: on a GPU.
        cache: its pages.
        linear: the socket.
        exchange: the socket.
        columns: columns of the block table, enough for the longest sequence.
        sizes: padded batch sizes, in rising order.
        queries: tokens of each sequence in a step; k + 1 to verify k drafts.
    """

    def __init__(
        self,
        model: DeepSeek,
        cache: LatentCache,
        *,
        linear: Linear,
        exchange: Exchange,
        columns: int,
        sizes: Sequence[int],
        queries: int = 1,
    ) -> None:
        self._model = model
        self._cache = cache
        self._linear = linear
        self._exchange = exchange
        self._queries = queries
        self._sizes = tuple(sizes)
        self._buffers = Buffers.blank(model, self._sizes[-1], queries, columns)
        self._graphs: dict[int, Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __len__(self) -> int:
        """How many batch sizes are captured."""
        return len(self._graphs)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Padded batch sizes, in rising order."""
        return self._sizes

    @property
    def queries(self) -> int:
        """Tokens of each sequence in a step."""
        return self._queries

    @property
    def num_bytes(self) -> int:
        """Device memory that captures took; they share intermediate results, the largest comes first."""
        return sum(captured.num_bytes for captured in self._graphs.values())

    def bytes_of(self, size: int) -> int:
        """What the capture of one size took beyond what it found."""
        return self._graphs[size].num_bytes

    @torch.inference_mode()
    def capture(self, progress: Progress) -> None:
        """Capture every size, the largest first so that the smaller ones find its memory.

        Cost: two forward passes a size; the first compiles kernels that were not compiled before.
        """
        with collection_paused():
            for size in progress(self._sizes[::-1]):
                self._graphs[size] = self._capture(size)

    def run(self, step: StepTensors) -> Replayed | None:
        """A step of decode rows alone; None if the plain loop has to run it.

        The next call overwrites what this one returned, in the order of the stream.
        """
        decode = step.layout.decode
        if (
            decode is None
            or step.layout.prefill is not None
            or step.chunk_rows
            or decode.queries != self._queries
        ):
            return None
        size = self.size_for(decode.block_table_SP.shape[0])
        if size is None:
            return None
        self._buffers.fill(step, decode, size)
        self.replay(size)
        found = self._buffers.outputs(decode.rows)
        if step.sampled_S is None:
            return found
        return found._replace(logits_TV=found.logits_TV.index_select(0, step.sampled_S))

    def size_for(self, sequences: int) -> int | None:
        """The smallest captured batch that holds so many; None when none does."""
        return next((size for size in self._sizes if size >= sequences and size in self._graphs), None)

    def replay(self, size: int) -> None:
        """Launch the graph of a size on whatever the buffers hold."""
        self._graphs[size].graph.replay()

    def release(self) -> None:
        """Give up the graphs: NCCL waits for those that hold its kernels before it takes a group down."""
        self._graphs.clear()

    def _capture(self, size: int) -> Captured:
        self._forward(size)  # compiles and loads kernels, which a capture must not do
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before, _ = torch.cuda.mem_get_info()
        graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that watches NCCL asks for events while collectives are captured
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._forward(size)
        after, _ = torch.cuda.mem_get_info()
        return Captured(graph, max(0, before - after))

    def _forward(self, size: int) -> None:
        buffers, rows = self._buffers, size * self._queries
        decode = DecodeRows(self._queries, buffers.block_table_SP[:size], buffers.context_S[:size])
        attend = PagedAttend(self._cache, StepLayout(buffers.slot_T[:rows], decode, None))
        sockets = Sockets(attend, self._exchange, self._linear)
        hidden = self._model(buffers.tokens_T[:rows], buffers.positions_T[:rows], sockets)
        buffers.hidden_TD[:rows].copy_(hidden.hidden_TD)
        buffers.previous_TD[:rows].copy_(self._model.mtp_input(hidden))
        buffers.logits_TV[:rows].copy_(self._model.logits(hidden.hidden_TD, self._linear))
