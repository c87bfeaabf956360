"""What one rank holds of a tensor of the whole model, in coordinates that do not depend on the layout."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from benthic.kernels import ops
from benthic.parallel.boxes import Box, boxes_of_range

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from benthic.parallel.buckets import Piece


@dataclass(frozen=True)
class Held:
    """Some boxes of one tensor.

    shape: of the whole tensor. boxes: of it, laid end to end in `flat`. flat: one-dimensional and contiguous.
    owned: this rank writes them; False where another rank writes its copy. weight: if given, elements are the
    float32 masters of these weights, of which `flat` has the remainders.
    """

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    flat: Tensor
    owned: bool = True
    weight: Tensor | None = None

    @classmethod
    def whole(cls, tensor: Tensor) -> Held:
        """All of a contiguous tensor, which shares its memory."""
        shape = tuple(tensor.shape)
        return cls(shape, (Box((0,) * len(shape), shape),), tensor.detach().view(-1))

    @classmethod
    def piece(
        cls, shape: Sequence[int], local: Sequence[slice], piece: Piece, flat: Tensor, *, owned: bool
    ) -> Held:
        """A flat range of the part `local` of a parameter of `shape`, as ZeRO cuts it.

        `flat` is what is kept of its master, or has other elements of the same places.
        """
        origin = [part.start for part in local]
        ranges = boxes_of_range(piece.shape, piece.start, piece.stop)
        weight = piece.weight if flat is piece.kept else None
        return cls(tuple(shape), tuple(box.moved(origin) for box in ranges), flat.detach(), owned, weight)

    @property
    def dtype(self) -> torch.dtype:
        """Of the elements."""
        return self.flat.dtype if self.weight is None else torch.float32

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return self.flat.numel() * self.dtype.itemsize

    def elements(self) -> Tensor:
        """All of them, flat: `flat`, or a copy where that has remainders."""
        return self.flat if self.weight is None else ops.join_master(self.weight, self.flat)

    def chunk(self, offsets: Sequence[int] | None) -> Tensor:
        """The elements of the box that begins at `offsets`, in its shape: part of `flat`, or a copy."""
        flat, weight = self._box(offsets)
        return flat if weight is None else ops.join_master(weight, flat)

    def write(self, offsets: Sequence[int] | None, inside: tuple[slice, ...], masters: Tensor) -> None:
        """Set the masters `inside` the box that begins at `offsets`: their weights and remainders."""
        flat, weight = self._box(offsets)
        assert weight is not None, "there are no remainders; `chunk` can be written"  # noqa: S101
        ops.split_master(masters, weight[inside], flat[inside])

    def _box(self, offsets: Sequence[int] | None) -> tuple[Tensor, Tensor | None]:
        """What `flat` and `weight` have of one box, in its shape."""
        number = [box.offsets for box in self.boxes].index(tuple(offsets or ()))
        box, at = self.boxes[number], sum(box.numel for box in self.boxes[:number])
        flat = self.flat[at : at + box.numel].view(box.sizes)
        return flat, None if self.weight is None else self.weight[at : at + box.numel].view(box.sizes)


def copy_to_host(held: Mapping[str, Held], buffers: dict[str, Tensor]) -> dict[str, Held]:
    """Copy what this rank writes into host memory, reusing `buffers`; done when it returns.

    Buffers of what lies on a GPU are pinned, so that the copies run at the speed of the bus.
    """
    copies = {}
    for name, one in held.items():
        if one.owned:
            buffer = buffers.get(name)
            if buffer is None or (buffer.shape, buffer.dtype) != (one.flat.shape, one.dtype):
                on_gpu = one.flat.is_cuda
                buffers[name] = torch.empty_like(one.flat, dtype=one.dtype, device="cpu", pin_memory=on_gpu)
            copy = buffers[name].copy_(one.elements(), non_blocking=True)
            copies[name] = dataclasses.replace(one, flat=copy, weight=None)
    for device in {one.flat.device for one in held.values() if one.flat.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return copies
