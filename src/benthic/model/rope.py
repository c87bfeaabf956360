"""Rotary positions and their YaRN extension (DeepSeek-V3 report section 4.3; Peng et al. 2023).

Inside the model the rotary dims lie half-split: dim j is paired with dim j + r/2. Checkpoints that hold
interleaved pairs are permuted once, when they are loaded (`benthic.model.rope_layout`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from benthic.spec.model import ModelConfig, Yarn


@dataclass(frozen=True)
class Angles:
    """The rotation of every token of one forward pass: float32 `[tokens, r / 2]` each."""

    cos_Tr2: Tensor
    sin_Tr2: Tensor


def yarn_mscale(factor: float, mscale: float) -> float:
    """`0.1 * mscale * ln(factor) + 1`: how much YaRN raises the logits of an extended context."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(config: ModelConfig) -> float:
    """What `q . k` is multiplied with: `(n + r) ** -0.5`, times `mscale ** 2` under YaRN.

    DeepSeek-V3: 0.1352338; DeepSeek-V2: 0.1147214; Kimi-K2: 0.1308608.
    """
    scale = config.qk_head_dim**-0.5
    yarn = config.rope_scaling
    return scale if yarn is None else scale * yarn_mscale(yarn.factor, yarn.mscale_all_dim) ** 2


def magnitude(config: ModelConfig) -> float:
    """What cos and sin are multiplied with: 1 unless YaRN's two mscales differ."""
    yarn = config.rope_scaling
    if yarn is None:
        return 1.0
    return yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)


def yarn_bounds(config: ModelConfig, yarn: Yarn) -> tuple[int, int]:
    """The dims `(low, high)` between which YaRN passes from keeping a frequency to dividing it by `factor`.

    The dim that turns n times in the original context is `r * ln(L / (2 pi n)) / (2 ln theta)`; `beta_fast`
    turns give `low`, `beta_slow` turns give `high`. DeepSeek-V3: (10, 23).
    """
    dim = config.qk_rope_head_dim

    def turning(turns: float) -> float:
        ratio = yarn.original_max_position_embeddings / (2 * math.pi * turns)
        return dim * math.log(ratio) / (2 * math.log(config.rope_theta))

    # The released code bounds the upper end by r - 1 although there are only r / 2 frequencies.
    return max(math.floor(turning(yarn.beta_fast)), 0), min(math.ceil(turning(yarn.beta_slow)), dim - 1)


def inverse_frequencies(config: ModelConfig) -> list[float]:
    """Radians per position of each of the r / 2 rotary pairs, computed in double precision."""
    dim = config.qk_rope_head_dim
    plain = [config.rope_theta ** (-2 * j / dim) for j in range(dim // 2)]
    yarn = config.rope_scaling
    if yarn is None:
        return plain
    low, high = yarn_bounds(config, yarn)
    width = (high - low) or 0.001
    ramp = [min(max((j - low) / width, 0.0), 1.0) for j in range(dim // 2)]
    return [theta / yarn.factor * r + theta * (1 - r) for theta, r in zip(plain, ramp, strict=True)]


class Rotary(nn.Module):
    """Turns positions into angles; holds the frequencies in float32 whatever the model is cast to."""

    frequency_r2: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._values = inverse_frequencies(config)
        self._magnitude = magnitude(config)
        # Real values even under `torch.device("meta")`, for they do not come from a checkpoint.
        here = torch.get_default_device()
        device = torch.device("cpu") if here.type == "meta" else here
        self.register_buffer("frequency_r2", self._on(device), persistent=False)

    def forward(self, positions_T: Tensor) -> Angles:
        """Cosines and sines of `positions_T` (any integer dtype), once for all layers."""
        angle_Tr2 = positions_T[:, None] * self.frequency_r2
        if self._magnitude == 1.0:
            return Angles(angle_Tr2.cos(), angle_Tr2.sin())
        return Angles(angle_Tr2.cos() * self._magnitude, angle_Tr2.sin() * self._magnitude)

    def _on(self, device: torch.device) -> Tensor:
        return torch.tensor(self._values, dtype=torch.float32, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:  # noqa: FBT001, FBT002
        # Moves with the model, but neither a cast nor `to_empty` may change the frequencies.
        super()._apply(fn, recurse)
        self.frequency_r2 = self._on(self.frequency_r2.device)
        return self
