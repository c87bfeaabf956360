"""From a plan to tensors: which tokens, at which positions, in which slots, seen by whom.

Everything is computed with numpy on preallocated tables (a handful of array operations a step, no loop over
decoding sequences) and crosses to the device without the host waiting. The newest token and the drafts of
each slot alone live on the device: a step that is prepared while the one before still runs gathers its tokens
there.

Shape suffixes: T rows of the step, R of them decode rows, S sequences, N scheduler slots, F tokens that one
feeds, P block-table columns, M context tokens of all prefill chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from benthic.serve.attend import DecodeRows, PrefillRows, StepLayout, rows_behind
from benthic.serve.transit import to_device

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray
    from torch import Tensor

    from benthic.sched.plans import Prefill, StepPlan, TableWrite
    from benthic.serve.drafts import Drafts


@dataclass(frozen=True)
class StepTensors:
    """One step on the device.

    `sampled_S` are the rows from which a token is drawn, in the order of `StepPlan.sampled_ids`; None when
    they are all rows in order. `chunk_rows` gives the rows of every prefill chunk, in plan order.
    """

    tokens_T: Tensor
    positions_T: Tensor
    layout: StepLayout
    sampled_S: Tensor | None
    chunk_rows: tuple[range, ...]


@dataclass(frozen=True)
class DecodeSeqs:
    """The sequences of a step's decode rows, `queries` rows each: their slots, and how long they are then."""

    queries: int
    slot_S: NDArray[np.int64]
    context_S: NDArray[np.int64]
    columns: int


@dataclass(frozen=True)
class StepRows:
    """One step as the host has it: what `StepTensors` are made of, or what a graph's inputs take.

    Decode rows take their tokens from `StepBuilder.fed_NF`, read as one list, at `index_R`; `given` are those
    of the chunks behind them. `sampled_S` and `chunk_rows` are as in `StepTensors`.
    """

    index_R: NDArray[np.int64]
    given: list[NDArray[np.int64]]
    position_T: NDArray[np.int64]
    slot_T: NDArray[np.int64]
    decode: DecodeSeqs | None
    chunks: list[Prefill]
    sampled_S: NDArray[np.int64] | None
    chunk_rows: tuple[range, ...]


class Replayed(NamedTuple):
    """What a recorded step leaves in its buffers; the next replay overwrites it."""

    pre_norm_TD: Tensor
    hidden_TD: Tensor
    logits_TV: Tensor


class StepBuilder:
    """Keeps the block table and what every slot feeds next, and turns plans into tensors.

    Attributes:
        fed_NF: each slot's newest token, then its drafts, int64 on the device; a line more than there are
            slots, for rows that pad a batch.
        version: counts what was written to the block table.

    Args:
        max_num_seqs: scheduler slots.
        max_model_len: longest sequence.
        block_size: tokens in a block.
        device: where the tensors go.
        drafts: most drafts of a sequence.
        reads_pages: prefill rows read pages in place, so they get a block table and not the slots of their
            contexts.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        device: torch.device,
        drafts: int = 0,
        reads_pages: bool = False,
    ) -> None:
        self._reads_pages = reads_pages
        self.block_size = block_size
        self._device = device
        self._table_NP = np.zeros((max_num_seqs, -(-max_model_len // block_size)), dtype=np.int32)
        self.version = 0
        self.fed_NF = torch.zeros((max_num_seqs + 1, 1 + drafts), dtype=torch.int64, device=device)
        self._fed_here = self.fed_NF.numpy() if device.type == "cpu" else None
        self._decoding = Slots.of((), device)

    def write(self, tables: Iterable[TableWrite]) -> None:
        """Apply a plan's block-table writes; a second time changes nothing."""
        for slot, first, blocks in tables:
            self._table_NP[slot, first : first + len(blocks)] = blocks
            self.version += 1

    def remember(self, slots: tuple[int, ...], token_S: Tensor) -> None:
        """Note each slot's newest token: what its next decode row feeds (0 for `NO_TOKEN`)."""
        self.fed_NF[:, 0].index_copy_(0, self._slots_of(slots).on_device, token_S.clamp(min=0))

    def offer(self, slots: Tensor, token_SK: Tensor) -> None:
        """Note drafts behind the newest tokens of some slots."""
        self.fed_NF[:, 1 : 1 + token_SK.shape[1]].index_copy_(0, slots, token_SK)

    def build(self, plan: StepPlan, drafts: Drafts | None = None) -> StepTensors:
        """The tensors of a plan whose table writes were applied."""
        return self.tensors(self.rows(plan, drafts))

    def rows(self, plan: StepPlan, drafts: Drafts | None = None) -> StepRows:
        """A plan's step, on the host.

        Chunks of one token join the decode rows: absorbed attention reads their context without expanding it.
        Not so beside drafts, where every decode has as many rows as the one with the most.
        """
        if drafts is not None:
            return self._drafted_rows(plan, drafts)
        singles = [chunk for chunk in plan.prefills if chunk.length == 1]
        chunks = [chunk for chunk in plan.prefills if chunk.length > 1]
        slot_S = self._slots_of(plan.decode_slots).here
        position_S = np.array(plan.decode_positions, dtype=np.int64)
        if singles:
            single_S = np.array([chunk.slot for chunk in singles])
            self._feed(single_S, [_tokens(chunk)[0] for chunk in singles])
            slot_S = np.append(slot_S, single_S)
            position_S = np.append(position_S, [chunk.start for chunk in singles])
        positions, slots = self._chunk_places(chunks)
        return StepRows(
            index_R=slot_S * self.fed_NF.shape[1],
            given=[np.array(_tokens(chunk), dtype=np.int64) for chunk in chunks],
            position_T=np.concatenate([position_S, *positions]),
            slot_T=np.concatenate([self._slots(slot_S, position_S), *slots]),
            decode=self._decode_seqs(slot_S, position_S, 1) if slot_S.size else None,
            chunks=chunks,
            sampled_S=self._sampled(plan, singles, chunks),
            chunk_rows=_chunk_rows(plan),
        )

    def _drafted_rows(self, plan: StepPlan, drafts: Drafts) -> StepRows:
        """Decodes with their drafts, all padded to as many rows as the one with the most, then chunks."""
        decoding = self._slots_of(plan.decode_slots)
        if drafts.slots is None:
            self.offer(decoding.on_device, drafts.token_DK)
        slot_D1 = decoding.here[:, None]
        position_D = np.array(plan.decode_positions, dtype=np.int64)
        if drafts.even and not plan.prefills:
            position_DQ = position_D[:, None] + np.arange(drafts.queries)
            return StepRows(
                index_R=(slot_D1 * self.fed_NF.shape[1] + np.arange(drafts.queries)).ravel(),
                given=[],
                position_T=position_DQ.ravel(),
                slot_T=self._slots(slot_D1, position_DQ).ravel(),
                decode=self._decode_seqs(decoding.here, position_DQ[:, -1], drafts.queries),
                chunks=[],
                sampled_S=None,
                chunk_rows=(),
            )
        return self._uneven_rows(plan, drafts, decoding.here, position_D)

    def _uneven_rows(
        self, plan: StepPlan, drafts: Drafts, slot_D: NDArray[np.int64], position_D: NDArray[np.int64]
    ) -> StepRows:
        """The rows of decodes of which some have fewer drafts, or of decodes beside chunks."""
        chunks, place_DQ = list(plan.prefills), drafts.places()
        position_DQ = np.maximum(position_D[:, None] + place_DQ, 0)
        slot_DQ = np.where(place_DQ < 0, -1, self._slots(slot_D[:, None], position_DQ))
        positions, slots = self._chunk_places(chunks)
        rows = range_rows(place_DQ.size, [chunk.length for chunk in chunks])
        last = [row[-1] for chunk, row in zip(chunks, rows, strict=True) if chunk.samples]
        index_DQ = slot_D[:, None] * self.fed_NF.shape[1] + np.maximum(place_DQ, 0)
        return StepRows(
            index_R=index_DQ.ravel(),
            given=[np.array(_tokens(chunk), dtype=np.int64) for chunk in chunks],
            position_T=np.concatenate([position_DQ.ravel(), *positions]),
            slot_T=np.concatenate([slot_DQ.ravel(), *slots]),
            decode=self._decode_seqs(slot_D, position_D + np.array(drafts.counts), drafts.queries),
            chunks=chunks,
            sampled_S=np.concatenate([np.flatnonzero(place_DQ >= 0), np.array(last, np.int64)]),
            chunk_rows=rows,
        )

    def tensors(self, rows: StepRows) -> StepTensors:
        """A step's rows on the device."""
        position_T, slot_T = self._to_device(np.stack([rows.position_T, rows.slot_T]))
        decode, prefill = rows.decode, self._prefill(rows.chunks) if rows.chunks else None
        seqs = None
        if decode is not None:
            context_S = self._to_device(decode.context_S.astype(np.int32))
            seqs = DecodeRows(decode.queries, self._to_device(self.table(decode)), context_S)
        return StepTensors(
            tokens_T=self._fed(rows),
            positions_T=position_T,
            layout=StepLayout(slot_T, seqs, prefill),
            sampled_S=None if rows.sampled_S is None else self._to_device(rows.sampled_S),
            chunk_rows=rows.chunk_rows,
        )

    def table(self, decode: DecodeSeqs) -> NDArray[np.int32]:
        """The block table of a step's decode rows, as many columns as they need."""
        return self._table_NP[decode.slot_S, : decode.columns]

    def _feed(self, slot_S: NDArray[np.int64], tokens: list[int]) -> None:
        """Note tokens that the plan gives as the newest ones of their slots."""
        if self._fed_here is not None:
            self._fed_here[slot_S, 0] = tokens
        else:
            given_S = self._to_device(np.array(tokens, dtype=np.int64))
            self.fed_NF[:, 0].index_copy_(0, self._to_device(slot_S), given_S)

    def _fed(self, rows: StepRows) -> Tensor:
        """The tokens of decode rows, then those `given` by the plan."""
        if self._fed_here is not None:
            return torch.from_numpy(np.concatenate([self._fed_here.ravel()[rows.index_R], *rows.given]))
        fed_R = self.fed_NF.view(-1).index_select(0, self._to_device(rows.index_R))
        return torch.cat((fed_R, self._to_device(np.concatenate(rows.given)))) if rows.given else fed_R

    def _chunk_places(self, chunks: list[Prefill]) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
        """Positions and cache slots of every chunk's rows."""
        positions = [np.arange(chunk.start, chunk.start + chunk.length) for chunk in chunks]
        return positions, [self._slots(c.slot, row) for c, row in zip(chunks, positions, strict=True)]

    def on_device(self, slots: tuple[int, ...]) -> Tensor:
        """Some slots as indices on the device."""
        return self._slots_of(slots).on_device

    def _slots_of(self, slots: tuple[int, ...]) -> Slots:
        """The slots of the decoding sequences, which are mostly those of the step before."""
        if slots != self._decoding.slots:
            self._decoding = Slots.of(slots, self._device)
        return self._decoding

    def _slots(self, row: NDArray[np.int64] | int, position: NDArray[np.int64]) -> NDArray[np.int64]:
        """Cache slots of positions of the sequences in table rows `row`."""
        column = position // self.block_size
        first = self._table_NP[row, column].astype(np.int64) - column
        return first * self.block_size + position

    def passes(self, plan: StepPlan, counts: tuple[int, ...]) -> list[tuple[Tensor, StepLayout]]:
        """Positions and layouts of the passes that draft one token after another for the decodes of a plan.

        Pass i writes position `decode_positions + i` of a prediction module, for sequences that get more
        than i + 1 drafts; for the others it writes nothing, and what it computes means nothing.
        """
        decoding, count_D = self._slots_of(plan.decode_slots), np.array(counts, dtype=np.int64)
        step_K1 = np.arange(max(counts) - 1)[:, None]
        position_KD = np.array(plan.decode_positions) + np.minimum(step_K1, np.maximum(count_D - 2, 0))
        slot_KD = np.where(step_K1 < count_D - 1, self._slots(decoding.here, position_KD), -1)
        columns = int(position_KD.max(initial=0)) // self.block_size + 1
        table_DP = self._to_device(self._table_NP[decoding.here, :columns])
        position_KD, slot_KD = self._to_device(np.stack([position_KD, slot_KD]))
        context_KD = (position_KD + 1).to(torch.int32)
        rows = zip(position_KD, slot_KD, context_KD, strict=True)
        return [
            (position_D, StepLayout(slot_D, DecodeRows(1, table_DP, context_D), None))
            for position_D, slot_D, context_D in rows
        ]

    def passes_behind(
        self, plan: StepPlan, held_S: Tensor | None, passes: int
    ) -> list[tuple[Tensor, StepLayout]]:
        """Positions and layouts of passes behind what a plan draws, `held_S` drafts of each sequence kept.

        Pass i stands i behind each sequence's newest token. Where the plan's own blocks end, it writes
        nothing and sees what they hold.
        """
        ends = [position + 1 for position in plan.decode_positions]
        covered = [end + drafts for end, drafts in zip(ends, plan.decode_drafts, strict=True)]
        chunks = [chunk.start + chunk.length for chunk in plan.prefills if chunk.samples]
        block, slots = self.block_size, list(plan.sampled_slots)
        limit_S = -(-np.array(covered + chunks, dtype=np.int64) // block) * block
        table_SP = self._to_device(self._table_NP[slots, : int(limit_S.max()) // block])
        first_S, limit_S = self._to_device(np.stack([np.array(ends + chunks, dtype=np.int64), limit_S]))
        first_S = first_S if held_S is None else first_S + held_S
        positions = [first_S + ahead for ahead in range(passes)]
        rows = [(each, rows_behind(each, limit_S, table_SP, block)) for each in positions]
        return [(position_S, StepLayout(slot_S, decode, None)) for position_S, (slot_S, decode) in rows]

    def _decode_seqs(
        self, slot_S: NDArray[np.int64], position_S: NDArray[np.int64], queries: int
    ) -> DecodeSeqs:
        """Sequences whose last query stands at `position_S`."""
        columns = int(position_S.max()) // self.block_size + 1
        return DecodeSeqs(queries, slot_S, position_S + 1, columns)

    def _prefill(self, chunks: list[Prefill]) -> PrefillRows:
        lengths = [chunk.length for chunk in chunks]
        contexts = [chunk.start + chunk.length for chunk in chunks]
        context_slot_M = block_table_SP = None
        if self._reads_pages:
            columns = -(-max(contexts) // self.block_size)
            block_table_SP = self._to_device(self._table_NP[[chunk.slot for chunk in chunks], :columns])
        elif lengths != contexts:
            slots = [self._slots(chunk.slot, np.arange(n)) for chunk, n in zip(chunks, contexts, strict=True)]
            context_slot_M = self._to_device(np.concatenate(slots))
        return PrefillRows(
            cu_seqlens_q=self._to_device(_bounds(lengths)),
            cu_seqlens_k=self._to_device(_bounds(contexts)),
            max_seqlen_q=max(lengths),
            max_seqlen_k=max(contexts),
            context_slot_M=context_slot_M,
            block_table_SP=block_table_SP,
        )

    def _sampled(
        self, plan: StepPlan, singles: list[Prefill], chunks: list[Prefill]
    ) -> NDArray[np.int64] | None:
        num_decodes = len(plan.decode_slots)
        if not chunks and all(chunk.samples for chunk in singles):
            return None
        rows = zip(plan.prefills, _chunk_rows(plan), strict=True)
        last = [row[-1] for chunk, row in rows if chunk.samples]
        return np.array([*range(num_decodes), *last], dtype=np.int64)

    def _to_device(self, array: NDArray[np.int32] | NDArray[np.int64]) -> Tensor:
        return to_device(array, self._device)


class Slots(NamedTuple):
    """Rows of the block table as the scheduler gave them, as numpy has them, and on the device."""

    slots: tuple[int, ...]
    here: NDArray[np.int64]
    on_device: Tensor

    @classmethod
    def of(cls, slots: tuple[int, ...], device: torch.device) -> Slots:
        """Send them to the device."""
        here = np.array(slots, dtype=np.int64)
        return cls(slots, here, to_device(here, device))


def _tokens(chunk: Prefill) -> tuple[int, ...]:
    if chunk.tokens is None:
        msg = f"the chunk of {chunk.request_id!r} has no token ids; a live engine cannot run counted requests"
        raise ValueError(msg)
    return chunk.tokens


def _chunk_rows(plan: StepPlan) -> tuple[range, ...]:
    """Rows of each prefill chunk: chunks of one token follow the decodes, longer ones follow those."""
    single = len(plan.decode_slots)
    long = single + sum(chunk.length == 1 for chunk in plan.prefills)
    rows = []
    for chunk in plan.prefills:
        start = single if chunk.length == 1 else long
        rows.append(range(start, start + chunk.length))
        if chunk.length == 1:
            single += 1
        else:
            long += chunk.length
    return tuple(rows)


def range_rows(first: int, lengths: list[int]) -> tuple[range, ...]:
    """Rows of chunks that lie one after another from row `first` on."""
    ends = (first + np.cumsum(lengths)).tolist()
    return tuple(range(end - length, end) for end, length in zip(ends, lengths, strict=True))


def _bounds(lengths: list[int]) -> NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
