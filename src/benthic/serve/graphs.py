"""Decode steps on a GPU as CUDA graphs: one for each padded batch size, replayed with a single launch.

Launching the kernels of a step one by one takes the host several times as long as a GPU takes to run them
for few rows. A graph keeps the launches and the addresses they read; so its inputs are buffers that every
step overwrites, and a batch that is smaller than a graph's is padded with rows that store nothing (slot -1)
and attend to nothing (context 0). Nothing in a step asks the host how many rows an expert got.

The plain loop stays beside it; whatever a graph cannot hold (prefill rows, a batch above the largest size)
runs plainly. Verification of k drafts is the same step with k + 1 queries a sequence, and a prediction module
is a step of one layer that is also given the states before it.

Shape suffixes: S sequences of a graph, T = S * queries rows, P block-table columns.
"""

from __future__ import annotations

import contextlib
import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch

from benthic.model.sockets import Sockets
from benthic.serve.attend import DecodeRows, PagedAttend, StepLayout
from benthic.serve.steps import Replayed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor

    from benthic.model.network import DeepSeek
    from benthic.model.sockets import Exchange, Linear
    from benthic.serve.attend import MakeAttend
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
    """What every graph reads and writes, made for the largest batch; a graph of S uses the first rows.

    `given_TD` is what a prediction module takes besides tokens. Modules leave no logits: few of their rows
    need any. Graphs that never run between another's replay and the use of its outputs share one instance.
    """

    tokens_T: Tensor
    positions_T: Tensor
    slot_T: Tensor
    block_table_SP: Tensor
    context_S: Tensor
    given_TD: Tensor
    pre_norm_TD: Tensor
    hidden_TD: Tensor
    logits_TV: Tensor

    @classmethod
    def blank(
        cls, model: DeepSeek, sequences: int, queries: int, columns: int, *, module: bool = False
    ) -> Buffers:
        """Inputs of a step that does nothing, and room for its outputs; `module`: of a prediction module."""
        weight, rows = model.head_weight(), sequences * queries
        zeros = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        stream_TD = model.embed.weight.new_zeros(rows, model.config.hidden_size)
        table_SP = torch.zeros((sequences, columns), dtype=torch.int32, device=weight.device)
        return cls(
            tokens_T=zeros,
            positions_T=zeros.clone(),
            slot_T=torch.full_like(zeros, -1),
            block_table_SP=table_SP,
            context_S=table_SP.new_zeros(sequences),
            given_TD=stream_TD.new_zeros((rows if module else 0, stream_TD.shape[1])),
            pre_norm_TD=stream_TD,
            hidden_TD=torch.zeros_like(stream_TD),
            logits_TV=weight.new_zeros(0 if module else rows, model.config.vocab_size),
        )

    def outputs(self, rows: int) -> Replayed:
        """The first rows of what a graph wrote."""
        return Replayed(self.pre_norm_TD[:rows], self.hidden_TD[:rows], self.logits_TV[:rows])

    def fill(
        self, step: StepTensors, decode: DecodeRows, sequences: int, given_TD: Tensor | None = None
    ) -> None:
        """Take over a step's rows and blank those that pad it to `sequences`."""
        used, rows = decode.block_table_SP.shape[0], decode.rows
        columns = decode.block_table_SP.shape[1]
        self.tokens_T[:rows].copy_(step.tokens_T)
        self.positions_T[:rows].copy_(step.positions_T)
        self.slot_T[:rows].copy_(step.layout.slot_T)
        self.block_table_SP[:used, :columns].copy_(decode.block_table_SP)
        self.context_S[:used].copy_(decode.context_S)
        if given_TD is not None:
            self.given_TD[:rows].copy_(given_TD)
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


class Pass(NamedTuple):
    """What a graph runs: `queries` rows of each sequence (k + 1 to verify k drafts) through the model.

    With `module`: through the prediction module of that depth, counted from 0.
    """

    queries: int = 1
    module: int | None = None


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
        buffers: rows and block-table columns enough for the largest size and the longest sequence.
        sizes: padded batch sizes, in rising order.
        what: the pass.
        pool: device memory of captures, which graphs that copy their outputs away may share.
        attend: makes the socket of a pass.
    """

    def __init__(  # noqa: PLR0913 (what a pass depends on)
        self,
        model: DeepSeek,
        cache: LatentCache,
        *,
        linear: Linear,
        exchange: Exchange,
        buffers: Buffers,
        sizes: Sequence[int],
        what: Pass,
        pool: Any = None,
        attend: MakeAttend = PagedAttend,
    ) -> None:
        self._attend = attend
        self._model = model
        self._cache = cache
        self._linear = linear
        self._exchange = exchange
        self._queries, self._module = what
        self._sizes = tuple(sizes)
        self._buffers = buffers
        self._graphs: dict[int, Captured] = {}
        self._pool = torch.cuda.graph_pool_handle() if pool is None else pool

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

    def run(self, step: StepTensors, given_TD: Tensor | None = None) -> Replayed | None:
        """A step of decode rows alone, of a module with the states `given_TD`; None: the plain loop has to.

        The next call overwrites what this one returned, in the order of the stream.
        """
        decode = step.layout.decode
        if decode is None or step.layout.prefill is not None or decode.queries != self._queries:
            return None
        size = self.size_for(decode.block_table_SP.shape[0])
        if size is None:
            return None
        self._buffers.fill(step, decode, size, given_TD)
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
        attend = self._attend(self._cache, StepLayout(buffers.slot_T[:rows], decode, None))
        sockets = Sockets(attend, self._exchange, self._linear)
        tokens_T, positions_T = buffers.tokens_T[:rows], buffers.positions_T[:rows]
        if self._module is None:
            hidden = self._model(tokens_T, positions_T, sockets)
            buffers.logits_TV[:rows].copy_(self._model.logits(hidden.hidden_TD, self._linear))
        else:
            given_TD = buffers.given_TD[:rows]
            hidden = self._model.predict_ahead(self._module, given_TD, tokens_T, positions_T, sockets)
        buffers.pre_norm_TD[:rows].copy_(hidden.pre_norm_TD)
        buffers.hidden_TD[:rows].copy_(hidden.hidden_TD)
