"""Multi-head latent attention (DeepSeek-V3 report eq. (1)-(11)).

What a token leaves behind for later tokens is its normed latent `latent_TC` and one rotated key `k_rope_Tr`
shared by all heads. How queries meet them, expanded or absorbed, packed or paged, is the `attend` socket's
business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from benthic.kernels import ops
from benthic.model.linear import Linear
from benthic.model.norm import LATENT_NORM_EPS, Norm
from benthic.model.rope import softmax_scale

if TYPE_CHECKING:
    from torch import Tensor

    from benthic.kernels.ops import Slots
    from benthic.model.rope import Angles
    from benthic.model.sockets import Linear as LinearSocket
    from benthic.model.sockets import Sockets
    from benthic.spec.model import ModelConfig


@dataclass(frozen=True)
class LatentUp:
    """W^UK and W^UV of one layer, either applied to the latent or moved to the other side of the attention.

    `weight` is `kv_b.weight` [heads * (n + v), C]: per head the n rows of W^UK, then the v rows of W^UV.
    How many heads there are follows from its shape, so that a rank may hold some of them.
    """

    weight: Tensor
    nope_dim: int
    v_dim: int
    linear: LinearSocket

    def expand(self, latent_TC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of every head, eq. (2) and (5): `(k_nope_THn, v_THv)`, views of one product."""
        kv_THnv = self.linear(latent_TC, self.weight).unflatten(-1, (-1, self.nope_dim + self.v_dim))
        return ops.split_head_dims(kv_THnv, self.nope_dim)

    def absorb_query(self, q_nope_THn: Tensor) -> Tensor:
        """`q . (W^UK c) = (W^UK^T q) . c`: queries moved into the latent space, `q_THC`."""
        w_uk_HnC = self.weight.unflatten(0, (-1, self.nope_dim + self.v_dim))[:, : self.nope_dim]
        return (q_nope_THn.transpose(0, 1) @ w_uk_HnC).transpose(0, 1)

    def absorb_value(self, out_THC: Tensor) -> Tensor:
        """`sum p (W^UV c) = W^UV (sum p c)`: outputs moved from the latent space, `out_THv`."""
        w_uv_HvC = self.weight.unflatten(0, (-1, self.nope_dim + self.v_dim))[:, self.nope_dim :]
        return ops.heads_linear(out_THC, w_uv_HvC)


class Attention(nn.Module, ABC):
    """One layer of latent attention; subclasses say where queries come from."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.latent_up: type[LatentUp] = LatentUp
        self.layer = layer
        self.scale = softmax_scale(config)
        self.query_split = (config.qk_nope_head_dim, config.qk_rope_head_dim)
        self.latent_split = (config.kv_lora_rank, config.qk_rope_head_dim)
        self.v_dim = config.v_head_dim
        heads = config.num_attention_heads
        self.kv_a = Linear(config.latent_dim, config.hidden_size)
        self.kv_a_norm = Norm(config.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b = Linear(heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank)
        self.o = Linear(config.hidden_size, heads * config.v_head_dim)

    @abstractmethod
    def compress_query(self, x_TD: Tensor, linear: LinearSocket) -> Tensor:
        """What queries are made of."""

    @abstractmethod
    def query(self, compressed_TX: Tensor, linear: LinearSocket) -> Tensor:
        """All heads' queries before rotation: `[tokens, heads * (n + r)]`."""

    @property
    @abstractmethod
    def first(self) -> Linear:
        """What the hidden state is multiplied by on its way to queries."""

    @abstractmethod
    def after_first(self, product_TX: Tensor, linear: LinearSocket) -> Tensor:
        """From that product to what `query` gives."""

    def forward(self, x_TD: Tensor, angles: Angles, sockets: Sockets) -> Tensor:
        """Attend from every row of the normed `x_TD`: `[tokens, hidden_size]`, residual not yet added."""
        linear = sockets.linear
        if torch.is_grad_enabled():
            latent = sockets.aside(lambda: self.kv_a(x_TD, linear))
            out_THv = self.meet(self.compress_query(x_TD, linear), latent(), angles, sockets)
        else:
            out_THv = self._attend(*self._query_and_latent(x_TD, sockets), angles, sockets)
        return self.o(out_THv.flatten(1), linear)

    def _query_and_latent(self, x_TD: Tensor, sockets: Sockets) -> tuple[Tensor, Tensor]:
        """Where nothing is computed again: products of the hidden state side by side, or as one."""
        linear = sockets.linear
        both = linear.together(x_TD, (self.first.weight, self.kv_a.weight))
        if both is not None:
            return self.after_first(both[0], linear), both[1]
        latent = sockets.aside(lambda: self.kv_a(x_TD, linear))
        return self.query(self.compress_query(x_TD, linear), linear), latent()

    def meet(self, compressed_TX: Tensor, kv_TCr: Tensor, angles: Angles, sockets: Sockets) -> Tensor:
        """From the compressed query and the unnormed latent with its key to the attention's output."""
        return self._attend(self.query(compressed_TX, sockets.linear), kv_TCr, angles, sockets)

    def _attend(self, query_TX: Tensor, kv_TCr: Tensor, angles: Angles, sockets: Sockets) -> Tensor:
        q_THnr = query_TX.unflatten(-1, (-1, sum(self.query_split)))
        q_nope_THn, q_rope_THr = ops.split_head_dims(q_THnr, self.query_split[0])
        latent_TC, k_rope_Tr = kv_TCr.split(self.latent_split, -1)
        slots = sockets.attend.slots(self.layer)
        q_rope_THr, k_rope_Tr, latent_TC = self._rotate_and_norm(
            q_rope_THr, k_rope_Tr, latent_TC, angles, slots
        )
        return sockets.attend(
            q_nope_THn,
            q_rope_THr,
            latent_TC,
            k_rope_Tr,
            self.latent_up(self.kv_b.weight, self.query_split[0], self.v_dim, sockets.linear),
            layer=self.layer,
            scale=self.scale,
        )

    def _rotate_and_norm(
        self,
        q_rope_THr: Tensor,
        k_rope_Tr: Tensor,
        latent_TC: Tensor,
        angles: Angles,
        slots: Slots | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and key, normed latent; a trainer may have replaced the norm's method."""
        norm, cos_Tr2, sin_Tr2 = self.kv_a_norm, angles.cos_Tr2, angles.sin_Tr2
        operands = q_rope_THr, k_rope_Tr, latent_TC, norm.weight, norm.eps, cos_Tr2, sin_Tr2
        if slots is not None:
            return ops.rope_norm_store(*operands, slots)
        if not torch.is_grad_enabled():
            return ops.rope_and_norm(*operands)
        return *ops.rope_both(q_rope_THr, k_rope_Tr, cos_Tr2, sin_Tr2), norm(latent_TC)


class DirectAttention(Attention):
    """Queries straight from the hidden state (DeepSeek-V2-Lite, Moonlight)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.q = Linear(config.num_attention_heads * config.qk_head_dim, config.hidden_size)

    def compress_query(self, x_TD: Tensor, linear: LinearSocket) -> Tensor:  # noqa: ARG002 (nothing to do)
        """The hidden state itself."""
        return x_TD

    def query(self, compressed_TX: Tensor, linear: LinearSocket) -> Tensor:
        """`W^Q h`."""
        return self.q(compressed_TX, linear)

    @property
    def first(self) -> Linear:
        """`W^Q`."""
        return self.q

    def after_first(self, product_TX: Tensor, linear: LinearSocket) -> Tensor:  # noqa: ARG002 (nothing to do)
        """The queries themselves."""
        return product_TX


class LowRankAttention(Attention):
    """Queries through a latent of their own, eq. (6)-(9) (DeepSeek-V2, V3, Kimi-K2)."""

    def __init__(self, config: ModelConfig, layer: int, rank: int) -> None:
        super().__init__(config, layer)
        self.q_a = Linear(rank, config.hidden_size)
        self.q_a_norm = Norm(rank, LATENT_NORM_EPS)
        self.q_b = Linear(config.num_attention_heads * config.qk_head_dim, rank)

    def compress_query(self, x_TD: Tensor, linear: LinearSocket) -> Tensor:
        """`W^DQ h`."""
        return self.q_a(x_TD, linear)

    def query(self, compressed_TX: Tensor, linear: LinearSocket) -> Tensor:
        """`W^UQ norm(c)`."""
        return self.q_b(self.q_a_norm(compressed_TX), linear)

    @property
    def first(self) -> Linear:
        """`W^DQ`."""
        return self.q_a

    def after_first(self, product_TX: Tensor, linear: LinearSocket) -> Tensor:
        """The same."""
        return self.query(product_TX, linear)


def attention_for(config: ModelConfig, layer: int) -> Attention:
    """The attention that the config asks for."""
    if config.q_lora_rank is None:
        return DirectAttention(config, layer)
    return LowRankAttention(config, layer, config.q_lora_rank)
