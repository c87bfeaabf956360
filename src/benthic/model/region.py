"""Reading a stretch of a parameter's part from a checkpoint: only the rows and columns that are asked for.

A rank that holds some experts, heads or columns, and of these one ZeRO shard, reads that and no more.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from benthic.kernels import ops
from benthic.model.rope_layout import half_split_order
from benthic.model.tensor_check import FP8_BLOCK, SCALE_SUFFIX

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from benthic.model.shards import Source
    from benthic.spec.parameters import HFTensor, Param

Box = tuple[slice, ...]


class Stretch(NamedTuple):
    """Elements `[start, stop)` of a tensor's flattened `region`, which lie at `at` of what was asked for."""

    tensor: HFTensor
    region: Box
    start: int
    stop: int
    at: int

    @property
    def rows(self) -> tuple[int, int, int]:
        """First row, row after the last, and elements of a row, counted inside the region."""
        width = math.prod(s.stop - s.start for s in self.region[1:])
        return self.start // width, -(-self.stop // width), width


def stretches(param: Param, box: Box, start: int, stop: int) -> Iterator[Stretch]:
    """What elements `[start, stop)` of the flattened `parameter[box]` are in the checkpoint's tensors.

    Copies of shared parameters are left out.
    """
    for tensor in param.hf:
        leading = box[: len(tensor.index)]
        if tensor.duplicate or not all(
            s.start <= i < s.stop for i, s in zip(tensor.index, leading, strict=True)
        ):
            continue
        region = box[len(tensor.index) :]
        size, number = math.prod(s.stop - s.start for s in region), 0
        for i, s in zip(tensor.index, leading, strict=True):
            number = number * (s.stop - s.start) + i - s.start
        first, last = max(start, number * size), min(stop, (number + 1) * size)
        if first < last:
            yield Stretch(tensor, region, first - number * size, last - number * size, first - start)


def read_stretch(
    source: Source, name: str, param: Param, found: Stretch, *, interleaved: bool, device: torch.device
) -> Tensor:
    """The elements of `found` out of the tensor called `name`, flat, float32, rotary rows as in the module.

    FP8 is dequantised on `device`, in whole blocks. `name` is the tensor's own or a copy's.
    """
    first, last, width = found.rows
    rows, columns = found.region[0], found.region[1:]
    wanted = torch.arange(rows.start + first, rows.start + last)
    if param.rope_rows and interleaved:
        wanted = half_split_order(param)[wanted]
    low, high = int(wanted.min()), int(wanted.max()) + 1
    values = read_region(source, name, (slice(low, high), *columns), device)
    if not torch.equal(wanted, torch.arange(low, high)):
        values = values[(wanted - low).to(device)]
    return values.reshape(-1)[found.start - first * width : found.stop - first * width]


def read_region(source: Source, name: str, region: Box, device: torch.device) -> Tensor:
    """`tensor[region]` in float32 on `device`."""
    stored = source.read(name)
    if stored.dtype != torch.float8_e4m3fn:
        return stored[region].to(device, torch.float32)
    blocks = tuple(slice(s.start // FP8_BLOCK, -(-s.stop // FP8_BLOCK)) for s in region)
    outer = tuple(slice(b.start * FP8_BLOCK, b.stop * FP8_BLOCK) for b in blocks)
    scale = source.read(name + SCALE_SUFFIX)[blocks].to(device, torch.float32).contiguous()
    weight = stored[outer].to(device).contiguous()
    wide = ops.dequantise_fp8(weight, scale, block=FP8_BLOCK, dtype=torch.float32)
    return wide[tuple(slice(s.start - o.start, s.stop - o.start) for s, o in zip(region, outer, strict=True))]
