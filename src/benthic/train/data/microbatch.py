"""Rows of tokens as the network takes them: packed, with positions, sequence borders and targets."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from benthic.errors import ShapeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from benthic.train.data.packing import Rows, Span
    from benthic.train.data.shards import TokenShards

IGNORE: Final = -100
_ALIGNED: Final = 16
"""Bytes: kernels read vectors of so many, and are compiled anew for tensors that begin in between."""


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on `device`; a GPU copies pinned memory when it gets there, and nobody waits."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def sent_together(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Tensors of the host on `device`, as `sent`, in one copy of which they are parts (16 bytes aligned)."""
    sizes = [-(-tensor.nbytes // _ALIGNED) * _ALIGNED for tensor in tensors]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    packed = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    memory = packed.numpy()  # what numpy does costs the host less than operators
    for start, tensor in zip(starts, tensors, strict=True):
        own = np.ascontiguousarray(tensor.numpy()).reshape(-1)
        memory[start : start + tensor.nbytes] = own.view(np.uint8)
    there = packed.to(device, non_blocking=True)
    in_dtype = {dtype: there.view(dtype) for dtype in {tensor.dtype for tensor in tensors}}
    return [
        in_dtype[tensor.dtype].as_strided(tensor.shape, _strides(tensor.shape), start // tensor.itemsize)
        for start, tensor in zip(starts, tensors, strict=True)
    ]


def _strides(shape: Sequence[int]) -> list[int]:
    """Of a tensor that lies in order."""
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """Some rows, packed into one axis of `T = rows * seq_len` tokens.

    Shapes: tokens_T int64; positions_T int64, from 0 in every sequence; cu_seqlens int32 [sequences + 1];
    ahead_KT int64 [depths, T], the token k + 1 places on, which MTP depth k reads; target_KT int64
    [1 + depths, T], the token that the main head (row 0) and depth k (row k + 1) predict, -100 where there is
    none. `num_targets[k]` counts the targets of row k.
    """

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    ahead_KT: torch.Tensor
    target_KT: torch.Tensor
    num_targets: tuple[int, ...]
    rows: int

    @property
    def seq_len(self) -> int:
        """Tokens of a row."""
        return self.tokens_T.numel() // self.rows

    def take(self, index_T: torch.Tensor) -> Microbatch:
        """Some of the tokens, equally many of each row and in the order of `index_T` (int64).

        Sequence borders and numbers of targets remain those of the whole rows.
        """
        return dataclasses.replace(
            self,
            tokens_T=self.tokens_T[index_T],
            positions_T=self.positions_T[index_T],
            ahead_KT=self.ahead_KT[:, index_T],
            target_KT=self.target_KT[:, index_T],
        )

    def padded(self, sequences: int) -> Microbatch:
        """As one of so many sequences, of which any may be a row long: the last ones are empty.

        Raises:
            ShapeError: it has more.
        """
        missing = sequences + 1 - self.cu_seqlens.numel()
        if missing < 0:
            msg = f"{self.cu_seqlens.numel() - 1} sequences cannot be padded to {sequences}"
            raise ShapeError(msg)
        end = self.cu_seqlens[-1:].expand(missing)
        starts = torch.cat([self.cu_seqlens, end])
        return dataclasses.replace(self, cu_seqlens=starts, max_seqlen=self.seq_len)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What a device is sent."""
        return self.tokens_T, self.positions_T, self.cu_seqlens, self.ahead_KT, self.target_KT

    def to(self, device: torch.device) -> Microbatch:
        """The same on `device`."""
        if self.tokens_T.device == device:
            return self
        tokens_T, positions_T, cu_seqlens, ahead_KT, target_KT = sent_together(self.tensors(), device)
        return dataclasses.replace(
            self,
            tokens_T=tokens_T,
            positions_T=positions_T,
            cu_seqlens=cu_seqlens,
            ahead_KT=ahead_KT,
            target_KT=target_KT,
        )


class Batches:
    """Reads the microbatches of a run; `position` counts rows and is the whole state."""

    def __init__(self, shards: TokenShards, packing: Rows, *, mtp_depth: int, mask_documents: bool) -> None:
        self._shards, self._packing = shards, packing
        self._mtp_depth, self._mask = mtp_depth, mask_documents

    def microbatch(self, position: int, rows: int) -> Microbatch:
        """The rows at `position … position + rows - 1`."""
        window = self._packing.seq_len + 1 + self._mtp_depth
        read = [self._row(position + row, window) for row in range(rows)]
        tokens_SW, owner_SW, learned_SW = (np.stack(parts) for parts in zip(*read, strict=True))
        return assemble(tokens_SW, owner_SW, learned_SW, mtp_depth=self._mtp_depth)

    def _row(self, position: int, window: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Tokens, owners and which tokens are to be learned; a row that is not full is padded with zeros."""
        spans = self._packing.spans(position, window)
        tokens = np.concatenate([self._shards.read(s.document, s.start, s.count) for s in spans])
        learned = np.concatenate([self._shards.read_mask(s.document, s.start, s.count) for s in spans])
        owner = _owners(spans) if self._mask else np.zeros(len(tokens), np.int64)
        padding = (0, window - len(tokens))
        return np.pad(tokens, padding), np.pad(owner, padding, constant_values=-1), np.pad(learned, padding)


class ReadAhead:
    """The microbatches of `rows` rows of one step after another, of which the next can be read early."""

    def __init__(self, batches: Batches, rows: int) -> None:
        self._batches, self._rows = batches, rows
        self._starts, self._ahead = range(0), list[Microbatch]()

    def take(self, starts: range) -> list[Microbatch]:
        """Those that begin at `starts`: read by now, or read now."""
        if starts != self._starts:
            self.read(starts)
        found, self._starts, self._ahead = self._ahead, range(0), []
        return found

    def read(self, starts: range) -> None:
        """Read those that begin at `starts`, which `take` will most likely ask for."""
        self._ahead = [self._batches.microbatch(start, self._rows) for start in starts]
        self._starts = starts


def assemble(
    tokens_SW: NDArray[np.int64],
    owner_SW: NDArray[np.int64],
    learned_SW: NDArray[np.bool_] | None = None,
    *,
    mtp_depth: int,
) -> Microbatch:
    """Pack windows of `seq_len + 1 + mtp_depth` tokens; `owner` tells tokens of different documents apart.

    A target that belongs to another document than the token it is predicted from is left out, for the main
    head and for every depth alike, and so is one that is not `learned` (None: all are). A negative owner
    marks padding, which has no target.
    """
    rows, window = tokens_SW.shape
    seq_len = window - 1 - mtp_depth
    own_SL = owner_SW[:, :seq_len]
    shifted = [slice(k + 1, k + 1 + seq_len) for k in range(mtp_depth + 1)]
    valid_KSL = np.stack([(owner_SW[:, s] == own_SL) & (own_SL >= 0) for s in shifted])
    if learned_SW is not None:
        valid_KSL &= np.stack([learned_SW[:, s] for s in shifted])
    target_KSL = np.where(valid_KSL, np.stack([tokens_SW[:, s] for s in shifted]), IGNORE)
    ahead_KSL = np.stack([tokens_SW[:, s] for s in shifted])[:mtp_depth]
    starts, positions_SL = _sequences(own_SL)
    cu_seqlens = np.concatenate([starts, [rows * seq_len]])
    return Microbatch(
        tokens_T=torch.from_numpy(tokens_SW[:, :seq_len].reshape(-1)),
        positions_T=torch.from_numpy(positions_SL.reshape(-1)),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        max_seqlen=int(np.diff(cu_seqlens).max()),
        ahead_KT=torch.from_numpy(ahead_KSL.reshape(mtp_depth, rows * seq_len)),
        target_KT=torch.from_numpy(target_KSL.reshape(mtp_depth + 1, -1)),
        num_targets=tuple(int(valid.sum()) for valid in valid_KSL),
        rows=rows,
    )


def _owners(spans: list[Span]) -> NDArray[np.int64]:
    """A number for each token that differs between neighbouring documents."""
    return np.repeat(np.arange(len(spans)), [span.count for span in spans])


def _sequences(owner_SL: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where sequences start in the packed axis, and each token's position in its sequence."""
    seq_len = owner_SL.shape[1]
    begins_SL = np.ones_like(owner_SL, dtype=bool)
    begins_SL[:, 1:] = owner_SL[:, 1:] != owner_SL[:, :-1]
    place_L = np.arange(seq_len)
    last_begin_SL = np.maximum.accumulate(np.where(begins_SL, place_L, 0), axis=1)
    return np.flatnonzero(begins_SL.reshape(-1)), place_L - last_begin_SL
