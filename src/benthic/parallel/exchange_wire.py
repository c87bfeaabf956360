"""What a token's row looks like between ranks: its own dtype, or FP8 with one scale a 1 x 128 tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from benthic.kernels import ops

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Wire:
    """Packs rows for the way to the experts.

    FP8 follows DeepSeek-V3 report section 3.3.3: E4M3 values with power-of-two scales, `D + 4 ceil(D / 128)`
    bytes a row instead of `2 D`. It travels as bytes, since not every backend moves float8.
    """

    fp8: bool

    def pack(self, x_TD: Tensor) -> Tensor:
        """Rows as they travel."""
        if not self.fp8:
            return x_TD.contiguous()
        values_TD, scale = ops.quantise_fp8_rows(x_TD, power_of_two=True)
        return torch.cat((values_TD.view(torch.uint8), scale.view(torch.uint8)), dim=1)

    def unpack(self, wire: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """Rows as they were, but for the rounding to FP8."""
        if not self.fp8:
            return wire
        values, scale = wire[:, :width], wire[:, width:]
        if width % 4:  # scales would begin between words
            scale = scale.clone()
        values, scale = values.view(torch.float8_e4m3fn), scale.view(torch.float32)
        return ops.dequantise_fp8_rows(values, scale, dtype=dtype)


def pack_choice(expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Chosen experts and the bits of their weights in one int32 matrix `[T, 2 K]`."""
    return torch.cat((expert_TK.to(torch.int32), weight_TK.view(torch.int32)), dim=1)


def unpack_choice(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The reverse: `(expert_AK int32, weight_AK float32)`."""
    expert_AK, weight_AK = packed.chunk(2, dim=1)
    return expert_AK, weight_AK.clone().view(torch.float32)
