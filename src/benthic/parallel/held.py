"""What one rank holds of a tensor of the whole model, in coordinates that do not depend on the layout."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from benthic.parallel.boxes import Box, boxes_of_range

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from benthic.parallel.buckets import Piece


@dataclass(frozen=True)
class Held:
    """Some boxes of one tensor.

    shape: of the whole tensor. boxes: of it, laid end to end in `flat`. flat: one-dimensional and contiguous.
    owned: this rank writes them; False where another rank writes its copy.
    """

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    flat: Tensor
    owned: bool = True

    @classmethod
    def whole(cls, tensor: Tensor) -> Held:
        """All of a contiguous tensor, which shares its memory."""
        shape = tuple(tensor.shape)
        return cls(shape, (Box((0,) * len(shape), shape),), tensor.detach().view(-1))

    @classmethod
    def piece(
        cls, shape: Sequence[int], local: Sequence[slice], piece: Piece, flat: Tensor, *, owned: bool
    ) -> Held:
        """A flat range of the part `local` of a parameter of `shape`, as ZeRO cuts it."""
        origin = [part.start for part in local]
        ranges = boxes_of_range(piece.shape, piece.start, piece.stop)
        return cls(tuple(shape), tuple(box.moved(origin) for box in ranges), flat.detach(), owned)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.flat.numel() * self.flat.element_size()

    def chunks(self) -> Iterator[tuple[Box, Tensor]]:
        """Every box with its elements, which share memory with `flat`."""
        at = 0
        for box in self.boxes:
            yield box, self.flat[at : at + box.numel].view(box.sizes)
            at += box.numel

    def chunk(self, offsets: Sequence[int] | None) -> Tensor:
        """The elements of the box that begins at `offsets`."""
        return next(tensor for box, tensor in self.chunks() if box.offsets == tuple(offsets or ()))


def copy_to_host(held: Mapping[str, Held], buffers: dict[str, Tensor]) -> dict[str, Held]:
    """Copy what this rank writes into host memory, reusing `buffers`; done when it returns.

    Buffers of what lies on a GPU are pinned, so that the copies run at the speed of the bus.
    """
    copies = {}
    for name, one in held.items():
        if one.owned:
            buffer = buffers.get(name)
            if buffer is None or (buffer.shape, buffer.dtype) != (one.flat.shape, one.flat.dtype):
                buffers[name] = torch.empty_like(one.flat, device="cpu", pin_memory=one.flat.is_cuda)
            copy = buffers[name].copy_(one.flat, non_blocking=True)
            copies[name] = dataclasses.replace(one, flat=copy)
    for device in {one.flat.device for one in held.values() if one.flat.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return copies
