"""The 12-bit format: its values, its rounding, its scales, its bytes."""

from __future__ import annotations

import pytest
import torch

from benthic.errors import ShapeError
from benthic.kernels import ops
from benthic.kernels.reference.e5m6 import E5M6_MAX, round_e5m6


def every_value() -> torch.Tensor:
    """All finite non-negative values of the format, from their definition, in order."""
    subnormal = torch.arange(64) * 2.0**-20
    normal = [(1 + torch.arange(64) / 64) * 2.0 ** (e - 15) for e in range(1, 31)]
    return torch.cat((subnormal, *normal)).to(torch.float32)


def test_every_value_of_the_format_is_kept_with_its_sign() -> None:
    values = every_value()
    assert values[-1] == E5M6_MAX
    assert values.unique().numel() == 31 * 64
    both = torch.cat((values, -values))
    assert torch.equal(round_e5m6(both), both)


def test_rounding_is_to_nearest_and_ties_go_to_the_even_mantissa() -> None:
    values = every_value().double()
    middle = (values[1:] + values[:-1]) / 2
    even = torch.where(torch.arange(len(middle)) % 2 == 0, values[:-1], values[1:])
    assert torch.equal(round_e5m6(middle.float()).double(), even)
    for factor, nearest in ((1 - 1e-6, values[:-1]), (1 + 1e-6, values[1:])):
        assert torch.equal(round_e5m6((middle * factor).float()).double(), nearest)


def test_value_is_rounded_once_and_not_by_way_of_float16() -> None:
    """Just above a tie, by less than float16 can show: twice rounded, it would go down to even."""
    x = torch.tensor([1 + 2.0**-7 + 2.0**-20])
    assert round_e5m6(x).item() == 1 + 2.0**-6
    assert round_e5m6(x.half()).item() == 1.0


@pytest.mark.parametrize("width", [1, 2, 7, 127, 128, 129, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_take_12_bits_a_value_and_come_back_rounded(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    x = (torch.randn(9, width, generator=generator) * torch.logspace(-6, 6, 9)[:, None]).to(dtype)
    packed, scale = ops.quantise_e5m6(x)
    assert packed.shape == (9, 3 * -(-width // 2))
    assert scale.shape == (9, -(-width // 128))
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
    back = ops.dequantise_e5m6(packed, scale, width, dtype=torch.float32)
    spread = scale.repeat_interleave(128, dim=1)[:, :width]
    assert torch.equal(back, round_e5m6(x.float() / spread) * spread)
    assert ((back - x.float()).abs() <= (x.float().abs() * 2.0**-7).clamp(min=2.0**-21 * spread)).all()


def test_scale_is_the_smallest_power_of_two_that_holds_the_tile() -> None:
    x = torch.tensor([[E5M6_MAX], [E5M6_MAX * 1.01], [1.0], [0.0]])
    packed, scale = ops.quantise_e5m6(x)
    assert scale.flatten().tolist()[:3] == [1.0, 2.0, 2.0**-15]
    assert ops.dequantise_e5m6(packed, scale, 1, dtype=torch.float32)[3].item() == 0.0


def test_bytes_of_another_width_are_refused() -> None:
    packed, scale = ops.quantise_e5m6(torch.ones(2, 6))
    with pytest.raises(ShapeError, match="rows of 8 take 12 bytes and 1 scales, not 9 and 1"):
        ops.dequantise_e5m6(packed, scale, 8)
    with pytest.raises(ShapeError, match="3 dims"):
        ops.quantise_e5m6(torch.ones(2, 3, 4))
