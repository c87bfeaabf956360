"""Rows that leave a norm or a SwiGLU in FP8, where nothing but products in FP8 reads them.

So nothing wide is written to be read and quantised again, and rows that two products read (queries and
latent) are quantised once. The bits are those of quantising afterwards.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from benthic.kernels import ops
from benthic.model.block import Block, DenseBlock
from benthic.model.block_scaled import NarrowRows, block_scaled_linear
from benthic.model.mla import LowRankAttention
from benthic.model.sockets import summed

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from benthic.model.block_scaled import BlockScaledLinear, Scales
    from benthic.model.network import DeepSeek
    from benthic.model.norm import Norm
    from benthic.model.sockets import Stream


def quantise_as_computed(model: DeepSeek, scales: Scales) -> BlockScaledLinear:
    """Let norms and SwiGLUs hand on `NarrowRows` to products whose weights are named in `scales`.

    Returns the `linear` socket, with no other of which a model that was changed so is run.
    """
    for name, module in model.named_modules():
        if isinstance(module, Block):
            _norms(module, name, scales)
    return replace(block_scaled_linear(model, scales), narrow_hidden=True)


def _norms(block: Block, name: str, scales: Scales) -> None:
    """The norm before attention, that of queries, and in a dense block that before the network.

    A mixture's gate and exchange read what the network's norm gives, so there it stays wide.
    """
    attention = block.attn
    low_rank = isinstance(attention, LowRankAttention)
    if _narrow(scales, name, "attn.kv_a", "attn.q_a" if low_rank else "attn.q"):
        _put(block.attn_norm, "with_input", _normed_with_input(block.attn_norm))
    if isinstance(attention, LowRankAttention) and _narrow(scales, name, "attn.q_b"):
        _put(attention.q_a_norm, "forward", _normed(attention.q_a_norm))
    if isinstance(block, DenseBlock) and _narrow(scales, name, "mlp.gate_up"):
        _put(block.ffn_norm, "after_adding", _normed_sum(block.ffn_norm))


def _narrow(scales: Scales, name: str, *readers: str) -> bool:
    """Whether the weights of all readers are in FP8; those of experts are parameters of their own."""
    return all(f"{name}.{each}.weight" in scales or f"{name}.{each}" in scales for each in readers)


def _put(module: nn.Module, name: str, function: Callable[..., object]) -> None:
    setattr(module, name, function)  # a method of this instance alone


def _normed(norm: Norm) -> Callable[[Tensor], NarrowRows]:
    return lambda x_TD: NarrowRows(ops.rms_norm_fp8(x_TD, norm.weight, norm.eps), x_TD.dtype)


def _normed_with_input(norm: Norm) -> Callable[[Stream], tuple[NarrowRows, Tensor]]:
    normed = _normed(norm)

    def with_input(x_TD: Stream) -> tuple[NarrowRows, Tensor]:
        stream_TD = summed(x_TD)
        return normed(stream_TD), stream_TD

    return with_input


def _normed_sum(norm: Norm) -> Callable[[Tensor, Tensor], tuple[NarrowRows, Tensor]]:
    def after_adding(x_TD: Tensor, residual_TD: Tensor) -> tuple[NarrowRows, Tensor]:
        tiles, total_TD = ops.add_rms_norm_fp8(x_TD, residual_TD, norm.weight, norm.eps)
        return NarrowRows(tiles, x_TD.dtype), total_TD

    return after_adding
