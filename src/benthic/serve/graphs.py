"""Work on a GPU as CUDA graphs: one for each padded batch size, replayed with a single launch.

Launching the kernels of a step one by one takes the host several times as long as a GPU takes to run them
for few rows. A graph keeps the launches and the addresses they read; so its inputs are buffers that every
step overwrites, and a batch that is smaller than a graph's is padded with rows that store nothing (slot -1)
and attend to nothing (context 0). Nothing in a step asks the host how many rows an expert got.

The plain loop stays beside it; whatever a graph cannot hold (a batch above the largest size) runs plainly.
Here are what all graphs have in common, and those of a prediction module, which is a step of one layer that
is also given the states before it; `step_graphs` holds those of whole decode steps, `prompt_graphs` those of
steps with chunks of prompts.

On a CPU, where tests run, a "graph" is the function that a capture would record, called anew.

Shape suffixes: S sequences of a graph, T = S * queries rows, P block-table columns.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, TypeAlias

import torch

from benthic.model.network import Hidden
from benthic.serve.attend import DecodeRows, StepLayout
from benthic.serve.into import Into

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor

    from benthic.model.network import DeepSeek
    from benthic.model.sockets import Sockets
    from benthic.serve.cache import LatentCache
    from benthic.serve.plugs import Plugs

Progress: TypeAlias = "Callable[[Sequence[int]], Iterable[int]]"
"""Goes through batch sizes and shows how far it is."""


class GraphSizes(NamedTuple):
    """Sizes that get a CUDA graph: batches of decode steps, and rows of steps with prompts."""

    decodes: tuple[int, ...] = ()
    prompts: tuple[int, ...] = ()


NO_GRAPHS: Final = GraphSizes()


def padded_sizes(most: int, *, limit: int = 512, sizes: Sequence[int] | None = None) -> tuple[int, ...]:
    """Batch sizes to capture for at most `most` sequences: 1, 2, 4, then steps of 8 to 256, of 16 above.

    The sizes and the limit are vLLM's. `sizes` replaces the series; sizes above `most` or `limit` are left
    out, and the largest batch within both is always there.
    """
    top = min(most, limit)
    series = sizes or (1, 2, 4, *range(8, min(top, 256) + 1, 8), *range(272, top + 1, 16))
    return tuple(sorted({size for size in series if size <= top} | {top}))


class Recorded(Protocol):
    """What a capture leaves; a `torch.cuda.CUDAGraph` is one."""

    def replay(self) -> None:
        """Launch everything."""
        ...


@dataclass(frozen=True)
class Again:
    """Runs a function again, where there is nothing to capture with."""

    function: Callable[[], None]

    def replay(self) -> None:
        """Call it."""
        self.function()


class Captured(NamedTuple):
    """A graph and how much device memory its capture took."""

    graph: Recorded
    num_bytes: int


@dataclass(frozen=True)
class Served:
    """What all graphs of an engine run: a model over its cache.

    `pool` is the device memory of captures, which graphs that copy their outputs away may share.
    """

    model: DeepSeek
    cache: LatentCache
    plugs: Plugs
    pool: Any = None

    @classmethod
    def of(cls, model: DeepSeek, cache: LatentCache, plugs: Plugs) -> Served:
        """With a pool of their own."""
        pool = torch.cuda.graph_pool_handle() if cache.pages_LPBW.is_cuda else None
        return cls(model, cache, plugs, pool)

    def sockets(self, slot_T: Tensor, decode: DecodeRows) -> Sockets:
        """The sockets of decode rows."""
        return self.plugs.sockets(self.cache, StepLayout(slot_T, decode, None))

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """Scores of the next token for some rows."""
        return self.model.logits(hidden_SD, self.plugs.linear)

    def logits_into(self, hidden_SD: Tensor, out_SV: Tensor) -> None:
        """As `logits`, written there; by the product itself where that can."""
        logits_SV = self.model.logits(hidden_SD, Into(self.plugs.linear, out_SV))
        if logits_SV.data_ptr() != out_SV.data_ptr():
            out_SV.copy_(logits_SV)


class Graphs(abc.ABC):
    """Graphs of one pass, by padded batch size.

    Args:
        served: what runs.
        sizes: padded batch sizes, in rising order.
        queries: rows of each sequence.
    """

    def __init__(self, served: Served, sizes: Sequence[int], queries: int) -> None:
        self.served = served
        self._sizes = tuple(sizes)
        self._queries = queries
        self._graphs: dict[int, Captured] = {}

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
    def what(self) -> str:
        """Words for the log."""
        return f"{self._queries} rows a sequence"

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

    def size_for(self, sequences: int) -> int | None:
        """The smallest captured batch that holds so many; None when none does."""
        return next((size for size in self._sizes if size >= sequences and size in self._graphs), None)

    def idle(self, size: int) -> None:
        """Launch the graph of a size on rows that store nothing and see nothing."""
        self.blank(size)
        self.replay(size)

    def replay(self, size: int) -> None:
        """Launch the graph of a size on whatever the buffers hold."""
        self._graphs[size].graph.replay()

    def release(self) -> None:
        """Give up the graphs: NCCL waits for those that hold its kernels before it takes a group down."""
        self._graphs.clear()

    def _capture(self, size: int) -> Captured:
        self.blank(size)
        self._forward(size)  # compiles and loads kernels, which a capture must not do
        if not self.served.cache.pages_LPBW.is_cuda:
            return Captured(Again(functools.partial(self._forward, size)), 0)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before, _ = torch.cuda.mem_get_info()
        graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that watches NCCL asks for events while collectives are captured
        with torch.cuda.graph(graph, pool=self.served.pool, capture_error_mode="thread_local"):
            self._forward(size)
        after, _ = torch.cuda.mem_get_info()
        return Captured(graph, max(0, before - after))

    @abc.abstractmethod
    def blank(self, size: int) -> None:
        """Let the inputs of a size be those of a step that does nothing."""

    @abc.abstractmethod
    def _forward(self, size: int) -> None:
        """The pass over `size` sequences, from the buffers that it reads to those that it writes."""


@dataclass(frozen=True)
class ModuleBuffers:
    """What the graphs of prediction modules read and write; a graph of S sequences uses the first rows.

    `given_TD` are the states that a module takes besides tokens. Graphs that never run between another's
    replay and the use of its outputs share one instance.
    """

    tokens_T: Tensor
    positions_T: Tensor
    slot_T: Tensor
    block_table_SP: Tensor
    context_S: Tensor
    given_TD: Tensor
    pre_norm_TD: Tensor
    hidden_TD: Tensor

    @classmethod
    def blank(cls, model: DeepSeek, sequences: int, queries: int, columns: int) -> ModuleBuffers:
        """Inputs of a step that does nothing, and room for its outputs."""
        device, rows = model.embed.weight.device, sequences * queries
        zeros = torch.zeros(rows, dtype=torch.int64, device=device)
        stream_TD = model.embed.weight.new_zeros(rows, model.config.hidden_size)
        table_SP = torch.zeros((sequences, columns), dtype=torch.int32, device=device)
        return cls(
            tokens_T=zeros,
            positions_T=zeros.clone(),
            slot_T=torch.full_like(zeros, -1),
            block_table_SP=table_SP,
            context_S=table_SP.new_zeros(sequences),
            given_TD=stream_TD,
            pre_norm_TD=torch.zeros_like(stream_TD),
            hidden_TD=torch.zeros_like(stream_TD),
        )

    def fill(self, rows: ModuleRows, decode: DecodeRows, sequences: int) -> None:
        """Take over a pass's rows and blank those that pad it to `sequences`."""
        used, count = decode.block_table_SP.shape[0], decode.rows
        columns = decode.block_table_SP.shape[1]
        self.tokens_T[:count].copy_(rows.tokens_T)
        self.positions_T[:count].copy_(rows.positions_T)
        self.slot_T[:count].copy_(rows.layout.slot_T)
        self.block_table_SP[:used, :columns].copy_(decode.block_table_SP)
        self.context_S[:used].copy_(decode.context_S)
        self.given_TD[:count].copy_(rows.previous_TD)
        if used < sequences:
            self.clear(used, sequences, decode.queries)

    def clear(self, first: int, end: int, queries: int) -> None:
        """Let sequences `first` to `end` store nothing and see nothing."""
        self.slot_T[first * queries : end * queries].fill_(-1)
        self.context_S[first:end].zero_()


class ModuleRows(NamedTuple):
    """What a prediction module runs over."""

    previous_TD: Tensor
    tokens_T: Tensor
    positions_T: Tensor
    layout: StepLayout


class ModuleGraphs(Graphs):
    """Graphs of the prediction module of one depth.

    Args:
        served: as for `Graphs`, and so `sizes` and `queries`.
        sizes: see there.
        queries: see there.
        depth: of the module, counted from 0.
        buffers: rows and block-table columns enough for the largest size and the longest sequence.
    """

    def __init__(
        self, served: Served, sizes: Sequence[int], queries: int, *, depth: int, buffers: ModuleBuffers
    ) -> None:
        super().__init__(served, sizes, queries)
        self._depth = depth
        self._buffers = buffers

    def size_of(self, rows: ModuleRows) -> int | None:
        """The smallest captured batch that holds a pass; None when none does."""
        decode = rows.layout.decode
        if decode is None or rows.layout.prefill is not None or decode.queries != self._queries:
            return None
        return self.size_for(decode.block_table_SP.shape[0])

    def run(self, rows: ModuleRows, size: int) -> Hidden:
        """A pass over decode rows in a batch of `size`, at least that of `size_of`.

        The next call overwrites what this one returned, in the order of the stream.
        """
        decode = rows.layout.decode
        assert decode is not None  # noqa: S101 (there is a size)
        self._buffers.fill(rows, decode, size)
        self.replay(size)
        return Hidden(self._buffers.pre_norm_TD[: decode.rows], self._buffers.hidden_TD[: decode.rows], ())

    def blank(self, size: int) -> None:
        """Let the buffers hold a pass of rows that pad."""
        self._buffers.clear(0, size, self._queries)

    def _forward(self, size: int) -> None:
        buffers, rows = self._buffers, size * self._queries
        decode = DecodeRows(self._queries, buffers.block_table_SP[:size], buffers.context_S[:size])
        hidden = self.served.model.predict_ahead(
            self._depth,
            buffers.given_TD[:rows],
            buffers.tokens_T[:rows],
            buffers.positions_T[:rows],
            self.served.sockets(buffers.slot_T[:rows], decode),
        )
        buffers.pre_norm_TD[:rows].copy_(hidden.pre_norm_TD)
        buffers.hidden_TD[:rows].copy_(hidden.hidden_TD)


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
