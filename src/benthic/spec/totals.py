"""Sums over the parameter table: total, activated, stored; each with the rule by which it counts."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Final, Literal

from benthic.spec.parameters import HFTensor, Part, parameters

if TYPE_CHECKING:
    from benthic.spec.model import ModelConfig

ActiveRule = Literal["body", "head", "embedding and head"]

_LEFT_OUT: Final[dict[ActiveRule, frozenset[Part]]] = {
    "body": frozenset({"embedding", "head"}),
    "head": frozenset({"embedding"}),
    "embedding and head": frozenset(),
}
_BYTES: Final = {"fp8": 1, "bf16": 2, "fp32": 4}


def total(config: ModelConfig) -> int:
    """Parameters of the main model: matrices, norms, router biases, embedding, head; no MTP."""
    return sum(p.numel for p in parameters(config, include_mtp=False))


def active(config: ModelConfig, rule: ActiveRule = "head") -> int:
    """Parameters that one token uses: all of them, but only `num_experts_per_tok` of the routed experts.

    `rule` says what of the vocabulary counts: "body" neither table; "head" the output head only (the rule of
    the DeepSeek-V3 weight notes, and the one FLOPs need, as a lookup multiplies nothing); "embedding and
    head" both.
    A tied table counts once under "embedding and head", and as the head under "head".
    """
    left_out = _LEFT_OUT[rule]
    if config.tie_word_embeddings and rule == "head":
        left_out = frozenset()
    used = sum(
        (p.numel * p.active for p in parameters(config, include_mtp=False) if p.part not in left_out),
        Fraction(0),
    )
    return int(used)


def mtp_unique(config: ModelConfig) -> int:
    """Parameters that only the MTP modules have: their blocks, projections and norms."""
    return sum(p.numel for p in parameters(config) if p.mtp)


def mtp_stored(config: ModelConfig) -> int:
    """Elements that a checkpoint stores for the MTP layers, with copies of embedding and head."""
    copies = sum(t.numel for t in checkpoint_tensors(config) if t.duplicate)
    return mtp_unique(config) + copies


def stored(config: ModelConfig) -> int:
    """Elements that a checkpoint stores: main model, and MTP layers with their copies; no scales."""
    return total(config) + mtp_stored(config)


def checkpoint_tensors(config: ModelConfig, *, include_mtp: bool = True) -> tuple[HFTensor, ...]:
    """Every weight tensor of a checkpoint, in the order of the network (scales are not listed)."""
    return tuple(t for p in parameters(config, include_mtp=include_mtp) for t in p.hf)


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] = (128, 128)) -> tuple[int, int]:
    """Shape of the float32 scales of an FP8 matrix `[out, in]`: one per block, the last ones padded."""
    rows, columns = shape
    return math.ceil(rows / block[0]), math.ceil(columns / block[1])


def checkpoint_bytes(config: ModelConfig, *, fp8: bool, include_mtp: bool = True) -> int:
    """Bytes of the tensors of a checkpoint: weights, float32 scales of FP8 ones; no file headers."""
    return sum(_tensor_bytes(t, fp8=fp8) for t in checkpoint_tensors(config, include_mtp=include_mtp))


def _tensor_bytes(tensor: HFTensor, *, fp8: bool) -> int:
    if tensor.precision != "fp8":
        return tensor.numel * _BYTES[tensor.precision]
    if not fp8:
        return tensor.numel * _BYTES["bf16"]
    return tensor.numel + _BYTES["fp32"] * math.prod(scale_shape(tensor.shape))
