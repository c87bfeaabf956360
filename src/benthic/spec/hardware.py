"""Accelerators by name: dense peak rates per GPU, in SI units and per direction, with their sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from benthic.errors import BackendError, UnknownFieldError

_TERA, _GIGA = 1e12, 1e9
_MI, _KI = 2**20, 2**10


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One GPU. Rates are dense (no 2:4 sparsity), bandwidths per direction, sizes in bytes, power in watts.

    `fp8_flops` is None where the tensor cores have no FP8. `nvlink_achieved` is what all-to-all reaches in
    practice where it was published, else None.
    """

    name: str
    bf16_flops: float
    fp8_flops: float | None
    hbm_bytes: float
    hbm_bandwidth: float
    nvlink_bandwidth: float
    nvlink_achieved: float | None = None
    network_bandwidth: float
    network_achieved: float | None = None
    pcie_bandwidth: float
    sms: int
    smem_bytes: int
    l2_bytes: int
    watts: float
    source: str

    def ridge(self, precision: Literal["bf16", "fp8"] = "bf16") -> float:
        """FLOPs per byte of HBM traffic beyond which compute is the bound; H100: 295 in BF16, 591 in FP8.

        Raises:
            BackendError: the GPU has no FP8.
        """
        peak = self.bf16_flops if precision == "bf16" else self.fp8_flops
        if peak is None:
            message = f"{self.name} has no FP8 tensor cores; ask for precision='bf16'"
            raise BackendError(message)
        return peak / self.hbm_bandwidth


_AICONFIGURATOR: Final = "aiconfigurator system tables; SM, smem and L2 counts from vendor data sheets"

A100: Final = Hardware(
    name="a100",
    bf16_flops=312 * _TERA,
    fp8_flops=None,
    hbm_bytes=80 * _GIGA,
    hbm_bandwidth=2.039 * _TERA,
    nvlink_bandwidth=300 * _GIGA,
    network_bandwidth=25 * _GIGA,
    pcie_bandwidth=32 * _GIGA,
    sms=108,
    smem_bytes=164 * _KI,
    l2_bytes=40 * _MI,
    watts=400,
    source=_AICONFIGURATOR,
)
H100: Final = Hardware(
    name="h100",
    bf16_flops=989 * _TERA,
    fp8_flops=1979 * _TERA,
    hbm_bytes=80 * _GIGA,
    hbm_bandwidth=3.35 * _TERA,
    nvlink_bandwidth=450 * _GIGA,
    network_bandwidth=50 * _GIGA,
    pcie_bandwidth=64 * _GIGA,
    sms=132,
    smem_bytes=228 * _KI,
    l2_bytes=50 * _MI,
    watts=700,
    source=_AICONFIGURATOR,
)
H800: Final = Hardware(
    name="h800",
    bf16_flops=989 * _TERA,
    fp8_flops=1979 * _TERA,
    hbm_bytes=80 * _GIGA,
    hbm_bandwidth=3.35 * _TERA,
    nvlink_bandwidth=200 * _GIGA,
    nvlink_achieved=160 * _GIGA,
    network_bandwidth=50 * _GIGA,
    network_achieved=40 * _GIGA,
    pcie_bandwidth=64 * _GIGA,
    sms=132,
    smem_bytes=228 * _KI,
    l2_bytes=50 * _MI,
    watts=700,
    source="DeepSeek-V3 report section 3.2.2; Insights into DeepSeek-V3 sections 4.1 and 4.3; else as h100",
)
H200: Final = Hardware(
    name="h200",
    bf16_flops=989 * _TERA,
    fp8_flops=1979 * _TERA,
    hbm_bytes=141 * _GIGA,
    hbm_bandwidth=4.8 * _TERA,
    nvlink_bandwidth=450 * _GIGA,
    network_bandwidth=50 * _GIGA,
    pcie_bandwidth=64 * _GIGA,
    sms=132,
    smem_bytes=228 * _KI,
    l2_bytes=50 * _MI,
    watts=700,
    source=_AICONFIGURATOR,
)
H20: Final = Hardware(
    name="h20",
    bf16_flops=148 * _TERA,
    fp8_flops=296 * _TERA,
    hbm_bytes=96 * _GIGA,
    hbm_bandwidth=4.0 * _TERA,
    nvlink_bandwidth=450 * _GIGA,
    network_bandwidth=50 * _GIGA,
    pcie_bandwidth=64 * _GIGA,
    sms=78,
    smem_bytes=228 * _KI,
    l2_bytes=60 * _MI,
    watts=500,
    source="public catalogue; SM count, L2 and power (400 to 500 W) unverified",
)
B200: Final = Hardware(
    name="b200",
    bf16_flops=2250 * _TERA,
    fp8_flops=4500 * _TERA,
    hbm_bytes=180 * _GIGA,
    hbm_bandwidth=7.7 * _TERA,
    nvlink_bandwidth=900 * _GIGA,
    network_bandwidth=50 * _GIGA,
    pcie_bandwidth=64 * _GIGA,
    sms=148,
    smem_bytes=228 * _KI,
    l2_bytes=126 * _MI,
    watts=1000,
    source="aiconfigurator system tables, the lower end where parts vary (192 GB, 8 TB/s, 100 GB/s exist)",
)

_ALL: Final = {gpu.name: gpu for gpu in (A100, H100, H800, H200, H20, B200)}


def names() -> tuple[str, ...]:
    """Every GPU that `get` knows."""
    return tuple(_ALL)


def get(name: str) -> Hardware:
    """The GPU called `name` (case is ignored).

    Raises:
        UnknownFieldError: no such GPU; the message names the nearest one.
    """
    if name.lower() not in _ALL:
        raise UnknownFieldError(kind="GPU", name=name, known=_ALL)
    return _ALL[name.lower()]
