"""How good a model is on held-out documents: loss, bits per byte, acceptance of its own drafts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from benthic.errors import DataError
from benthic.kernels import ops
from benthic.model.local import packed_sockets
from benthic.train.data.microbatch import IGNORE, Batches, Microbatch, assemble
from benthic.train.data.packing import WholePacking
from benthic.train.losses import ahead

if TYPE_CHECKING:
    from torch import Tensor

    from benthic.model.network import DeepSeek
    from benthic.model.sockets import Linear
    from benthic.train.data.shards import TokenShards


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One pass over held-out documents.

    loss: mean nats per target; every token but the first of each document is one, the end token included.
    bits_per_byte: all nats / ln 2 / bytes of UTF-8 text; comparable between tokenizers.
    mtp_acceptance: how often depth 1's most likely token is the main head's most likely next token, which is
        how often a greedy server would accept the draft; None without MTP modules.
    """

    loss: float
    bits_per_byte: float
    mtp_acceptance: float | None
    tokens: int
    documents: int
    bytes: int


@dataclass
class Scores:
    """What one or several microbatches come to; integers and nats that add up over ranks."""

    nats: float = 0.0
    targets: int = 0
    drafts: int = 0
    accepted: int = 0

    def add(self, other: Scores) -> None:
        """Count another's in."""
        self.nats += other.nats
        self.targets += other.targets
        self.drafts += other.drafts
        self.accepted += other.accepted


Score = Callable[[Iterator[Microbatch]], Scores]
"""Scores microbatches; over several ranks every rank calls it with the same ones."""


@torch.no_grad()
def evaluate(
    score: Score,
    shards: TokenShards,
    *,
    seq_len: int,
    rows: int,
    max_tokens: int,
    mask_documents: bool,
    mtp_depth: int,
) -> Evaluation:
    """Score whole documents, in the order of the split, until `max_tokens` tokens (0: all of them).

    Documents longer than `seq_len` are cut into rows, each of which starts without context; `rows` rows are
    computed at once. Where only some tokens are to be learned, only these count, and no document is cut.

    Raises:
        DataError: the split is empty.
    """
    documents = _documents(shards, max_tokens)
    if documents == 0:
        message = f"{shards.folder} has 0 held-out documents. Build the data with --held-out above 0."
        raise DataError(message)
    sums = score(_batches(shards, documents, seq_len, rows, mtp_depth, mask=mask_documents))
    text_bytes = int(shards.text_bytes[:documents].sum())
    return Evaluation(
        loss=sums.nats / max(1, sums.targets),
        bits_per_byte=sums.nats / math.log(2.0) / max(1, text_bytes),
        mtp_acceptance=sums.accepted / sums.drafts if sums.drafts else None,
        tokens=int(shards.starts[documents]),
        documents=documents,
        bytes=text_bytes,
    )


@dataclass(frozen=True)
class ModelScore:
    """Scores with a whole model on one device."""

    model: DeepSeek
    linear: Linear

    def __call__(self, batches: Iterator[Microbatch]) -> Scores:
        """One microbatch after another."""
        sums = Scores()
        for batch in batches:
            sums.add(self._of(batch.to(self.model.head_weight().device)))
        return sums

    def _of(self, batch: Microbatch) -> Scores:
        model, experts = self.model, self.model.config.n_routed_experts
        sockets = packed_sockets(
            batch.cu_seqlens, batch.max_seqlen, n_routed_experts=experts, linear=self.linear
        )
        hidden = model(batch.tokens_T, batch.positions_T, sockets)
        loss_T, main_T = chosen(model, hidden.hidden_TD, batch.target_KT[0])
        further = next(iter(ahead(model, hidden, batch, sockets)), None)  # acceptance is about depth 1
        draft_T = None if further is None else chosen(model, further.hidden_TD, batch.target_KT[1])[1]
        return scores_of(batch, loss_T, main_T, draft_T)


def chosen(model: DeepSeek, hidden_TD: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's loss and most likely token."""
    return ops.linear_cross_entropy(hidden_TD, model.head_weight(), target_T, return_argmax=True)


def scores_of(batch: Microbatch, loss_T: Tensor, main_T: Tensor, draft_T: Tensor | None) -> Scores:
    """Sum up one microbatch. Row i drafts token i + 2, which the main head predicts from row i + 1."""
    found = Scores(nats=float(loss_T.double().sum()), targets=batch.num_targets[0])
    if draft_T is not None:
        same_sequence = batch.positions_T[1:] == batch.positions_T[:-1] + 1
        valid = same_sequence & (batch.target_KT[1][:-1] != IGNORE)
        found.drafts = int(valid.sum())
        found.accepted = int((valid & (draft_T[:-1] == main_T[1:])).sum())
    return found


def _documents(shards: TokenShards, max_tokens: int) -> int:
    """How many leading documents stay within `max_tokens`, at least one where there is one."""
    total = len(shards.text_bytes)
    if max_tokens == 0 or total == 0:
        return total
    return max(1, int(np.searchsorted(shards.starts[1:], max_tokens, side="right")))


def _batches(
    shards: TokenShards, documents: int, seq_len: int, rows: int, depth: int, *, mask: bool
) -> Iterator[Microbatch]:
    lengths = shards.lengths[:documents]
    if shards.meta.masked:
        yield from _whole_batches(shards, WholePacking(lengths, seq_len, seed=0), rows, depth, mask=mask)
        return
    tokens = int(shards.starts[documents])
    stream = np.concatenate([shards.read(d, 0, int(lengths[d])) for d in range(documents)])
    owner = np.repeat(np.arange(documents), lengths) if mask else np.zeros(tokens, np.int64)
    count = -(-tokens // seq_len)
    padding = count * seq_len + 1 + depth - tokens
    stream = np.concatenate([stream, np.zeros(padding, np.int64)])
    owner = np.concatenate([owner, np.full(padding, -1, np.int64)])
    place_CW = np.arange(count)[:, None] * seq_len + np.arange(seq_len + 1 + depth)
    for start in range(0, count, rows):
        here = place_CW[start : start + rows]
        yield assemble(stream[here], owner[here], mtp_depth=depth)


def _whole_batches(
    shards: TokenShards, packing: WholePacking, rows: int, depth: int, *, mask: bool
) -> Iterator[Microbatch]:
    """Conversations, none of which is cut."""
    batches = Batches(shards, packing, mtp_depth=depth, mask_documents=mask)
    for start in range(0, packing.rows, rows):
        yield batches.microbatch(start, min(rows, packing.rows - start))
