"""How a weight is stored in a checkpoint: its type, and for FP8 its scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from benthic.errors import CheckpointError
from benthic.kernels import ops
from benthic.model.shard_writer import Planned
from benthic.model.tensor_check import FP8_BLOCK, SCALE_SUFFIX
from benthic.spec.totals import scale_shape

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from benthic.spec.parameters import HFTensor, Param

_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


@dataclass(frozen=True)
class Progress:
    """How far a checkpoint has been read or written."""

    name: str
    done_bytes: int
    total_bytes: int


Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Format:
    """The types of a checkpoint's weights.

    With `fp8`, matrices that released FP8 checkpoints quantise become float8_e4m3fn with a float32 scale per
    128 x 128 block, and `dtype` is that of all others. Router biases are float32 in every format.
    """

    dtype: torch.dtype
    fp8: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in _NAMES:
            message = f"checkpoints are written in {', '.join(_NAMES.values())} or FP8, not {self.dtype}."
            raise CheckpointError(message)

    @property
    def dtype_name(self) -> str:
        """The `torch_dtype` of `config.json`."""
        return _NAMES[self.dtype]

    def quantises(self, tensor: HFTensor) -> bool:
        """Whether the tensor is stored as FP8."""
        return self.fp8 and tensor.precision == "fp8"

    def plan(self, tensor: HFTensor) -> Iterator[Planned]:
        """What the tensor becomes in the file."""
        if self.quantises(tensor):
            scales = scale_shape(tensor.shape, (FP8_BLOCK, FP8_BLOCK))
            yield Planned(tensor.name, torch.float8_e4m3fn, tensor.shape)
            yield Planned(tensor.name + SCALE_SUFFIX, torch.float32, scales)
        else:
            dtype = torch.float32 if tensor.precision == "fp32" else self.dtype
            yield Planned(tensor.name, dtype, tensor.shape)

    def encode(self, tensor: HFTensor, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The named tensors that stand for `value`, matching `plan`."""
        if self.quantises(tensor):
            weight, scale = ops.quantise_fp8_blocks(value, block=FP8_BLOCK)
            yield tensor.name, weight
            yield tensor.name + SCALE_SUFFIX, scale
        else:
            yield tensor.name, value.to(torch.float32 if tensor.precision == "fp32" else self.dtype)


def in_file_order(params: Iterable[Param]) -> list[tuple[Param, HFTensor]]:
    """Every tensor to be written, in the order of the network, copies of shared ones last."""
    pairs = [(p, t) for p in params for t in p.hf]
    return sorted(pairs, key=lambda pair: pair[1].duplicate)
