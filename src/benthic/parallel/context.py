"""Context parallelism: every rank asks from its own tokens of each row and is told of all latents.

Latent attention leaves 576 elements a token behind (DeepSeek-V3), the same for all heads. They are gathered
over the context group, and each rank expands those that its queries see
(docs/adr/0008-tensor-and-context-parallelism.md).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from benthic.kernels import ops
from benthic.model.local import Lengths, attend_expanded
from benthic.parallel.collectives import gather_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from benthic.model.local import Core
    from benthic.model.sockets import LatentUp
    from benthic.parallel.mesh import Group
    from benthic.parallel.tokens import TokenShare


class Segment(NamedTuple):
    """Neighbouring tokens of one sequence, by their indices in the pack, and its tokens up to the last."""

    queries: range
    keys: range


def segments_of(share: TokenShare, cu_seqlens: Sequence[int]) -> tuple[Segment, ...]:
    """The sequences of the pack as this rank sees them, in the order of its tokens.

    A sequence that two of the rank's pieces meet gives two segments, whose keys overlap: its beginning is
    expanded twice, which is at most one chunk more than the longest key range of any rank.
    """
    sequences = list(itertools.pairwise(cu_seqlens))
    return tuple(itertools.chain.from_iterable(_cut(sequences, piece) for piece in _pieces(share)))


def _pieces(share: TokenShare) -> Iterator[range]:
    for row in range(share.rows):
        for piece in share.pieces:
            yield range(row * share.seq_len + piece.start, row * share.seq_len + piece.stop)


def _cut(sequences: Sequence[tuple[int, int]], piece: range) -> Iterator[Segment]:
    for start, stop in sequences:
        first, end = max(start, piece.start), min(stop, piece.stop)
        if first < end:
            yield Segment(range(first, end), range(start, end))


@dataclass(frozen=True)
class ContextAttend:
    """The `attend` socket of a rank that holds some tokens of every row.

    lengths: of the segments. key_K: int64, for every key of every segment, where its latent lies among those
    gathered from the ranks of `group` in order.
    """

    lengths: Lengths
    key_K: Tensor
    group: Group
    core: Core = ops.attention

    @classmethod
    def of(
        cls, share: TokenShare, cu_seqlens: Sequence[int], group: Group, device: torch.device
    ) -> ContextAttend:
        """For one microbatch, whose `cu_seqlens` are on the host: nothing waits for the device."""
        segments = segments_of(share, cu_seqlens)
        queries, keys = [len(s.queries) for s in segments], [len(s.keys) for s in segments]
        found_T = share.found()
        key_K = torch.cat([found_T[s.keys.start : s.keys.stop] for s in segments])
        lengths = Lengths(_running(queries, device), _running(keys, device), max(queries), max(keys))
        return cls(lengths, key_K.to(device, non_blocking=True), group)

    def slots(self, layer: int) -> None:
        """Nothing is cached."""

    def __call__(
        self,
        q_nope_THn: Tensor,
        q_rope_THr: Tensor,
        latent_TC: Tensor,
        k_rope_Tr: Tensor,
        up: LatentUp,
        *,
        layer: int,  # noqa: ARG002 (nothing is cached, so the layer does not matter)
        scale: float,
    ) -> Tensor:
        """DeepSeek-V3 report eq. (10); latents and rotated keys travel together.

        A latent is a key of at most two segments, and the sum of two gradients is the same in either order:
        the backward pass is deterministic.
        """
        own_TX = torch.cat((latent_TC, k_rope_Tr), dim=-1)
        all_TX = gather_tokens(own_TX, self.group)
        latent_AC, k_rope_Ar = all_TX.split((latent_TC.shape[-1], k_rope_Tr.shape[-1]), dim=-1)
        return attend_expanded(
            self.core,
            ops.join_head_dims(q_nope_THn, q_rope_THr),
            latent_AC.index_select(0, self.key_K),
            k_rope_Ar.index_select(0, self.key_K),
            up,
            self.lengths,
            scale=scale,
        )


def _running(counts: list[int], device: torch.device) -> Tensor:
    """Running starts, from 0 to the total, int32."""
    starts = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    return starts.to(device, non_blocking=True)
