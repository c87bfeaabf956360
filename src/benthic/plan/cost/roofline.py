"""The least time of an operation on given hardware, and what one reaches without better knowledge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from benthic.errors import ConfigError
from benthic.plan.cost.ops import AllToAll, Collective, MemoryBound, PointToPoint

if TYPE_CHECKING:
    from benthic.plan.cost.ops import Dtype, Op, Transfer
    from benthic.spec.hardware import Hardware

LAUNCH: Final = 3e-6  # seconds before a kernel's first byte (aiconfigurator's constant)
NVLINK_HOP: Final = 3.33e-6  # Insights into DeepSeek-V3, table 5
NETWORK_HOP: Final = 3.7e-6  # the same, InfiniBand across leaves

_PRODUCTS: Final = 0.7  # of the tensor cores' peak
_STREAMS: Final = 0.8  # of a memory's or a link's bandwidth (aiconfigurator's constant)


def floor(op: Op, hardware: Hardware) -> float:
    """Seconds that no implementation can beat: the largest of FLOPs and of bytes over each link.

    Raises:
        ConfigError: the GPU has no FP8.
    """
    if isinstance(op, AllToAll | PointToPoint | Collective):
        nvlink, network = op.traffic
        return max(nvlink / hardware.nvlink_bandwidth, network / hardware.network_bandwidth)
    return max(op.flops / peak(hardware, op.dtype), op.bytes / hardware.hbm_bandwidth)


def ideal(op: Op, hardware: Hardware) -> float:
    """The floor after the launch of a kernel, or behind the latency of every hop."""
    return floor(op, hardware) + _start(op)


def usual(op: Op, hardware: Hardware) -> float:
    """Seconds where nothing was measured: usual shares of peaks, and what links are known to reach."""
    if isinstance(op, AllToAll | PointToPoint | Collective):
        return _links(op, hardware) + _start(op)
    share = _STREAMS if isinstance(op, MemoryBound) else _PRODUCTS
    products = op.flops / (share * peak(hardware, op.dtype))
    return max(products, op.bytes / (_STREAMS * hardware.hbm_bandwidth)) + _start(op)


def peak(hardware: Hardware, dtype: Dtype) -> float:
    """Dense FLOP/s; FP32 products take the TF32 rate, half of BF16's.

    Raises:
        ConfigError: the GPU has no FP8.
    """
    if dtype == "bf16":
        return hardware.bf16_flops
    if dtype == "fp32":
        return hardware.bf16_flops / 2
    if hardware.fp8_flops is None:
        message = (
            f"{hardware.name} has no FP8 tensor cores, but a product in fp8 was asked for. Plan in bf16."
        )
        raise ConfigError(message)
    return hardware.fp8_flops


def _links(op: Transfer, hardware: Hardware) -> float:
    nvlink, network = op.traffic
    inside = hardware.nvlink_achieved or _STREAMS * hardware.nvlink_bandwidth
    outside = hardware.network_achieved or _STREAMS * hardware.network_bandwidth
    return max(nvlink / inside, network / outside)


def _start(op: Op) -> float:
    if isinstance(op, AllToAll | PointToPoint | Collective):
        return op.hops * (NETWORK_HOP if op.traffic[1] else NVLINK_HOP)
    return LAUNCH
