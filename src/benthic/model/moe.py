"""DeepSeekMoE (DeepSeek-V3 report eq. (12)-(16)): gate, routed experts, shared experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from benthic.kernels import ops
from benthic.kernels.ops import Routing
from benthic.model.mlp import Mlp

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from benthic.model.sockets import Linear as LinearSocket
    from benthic.model.sockets import Mixture
    from benthic.spec.model import ModelConfig


__all__ = ["Experts", "Gate", "Moe", "Routing"]


class Gate(nn.Module):
    """Chooses experts in float32; `bias` (only with `noaux_tc`) steers the choice and not the weights."""

    bias: Tensor | None
    logits: Callable[[Tensor, Tensor], Tensor]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        biased = config.topk_method == "noaux_tc"
        bias = torch.empty(config.n_routed_experts, dtype=torch.float32) if biased else None
        self.register_buffer("bias", bias)
        self.logits = gate_logits

    def forward(self, x_TD: Tensor) -> Routing:
        """Route every row of the normed `x_TD`; logits, scores and weights are float32."""
        config = self.config
        return ops.route(
            self.logits(x_TD, self.weight),
            self.bias,
            scoring_func=config.scoring_func,
            topk_method=config.topk_method,
            top_k=config.num_experts_per_tok,
            n_group=config.n_group,
            topk_group=config.topk_group,
            norm_topk_prob=config.norm_topk_prob,
            routed_scaling_factor=config.routed_scaling_factor,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gate:  # noqa: FBT001, FBT002
        # The bias moves in steps of 0.001: bfloat16 has no room for them near 1, so a cast leaves it alone.
        before = self.bias
        super()._apply(fn, recurse)
        if before is not None and self.bias is not None and self.bias.dtype != torch.float32:
            self.bias = before.to(self.bias.device)
        return self


def gate_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """The gate's product in float32, for whose gradient x is kept as it came and not in float32."""
    if x_TD.dtype.itemsize >= 4:
        return F.linear(x_TD.float(), weight_ED.float())
    if not torch.is_grad_enabled():
        return ops.gate_logits(x_TD, weight_ED)
    logits_TE: Tensor = _WideLinear.apply(x_TD, weight_ED)
    return logits_TE


class _WideLinear(torch.autograd.Function):
    """`x W^T` of narrow operands, product and gradients in float32."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        """Save the narrow operands."""
        ctx.save_for_backward(x_TD, weight_ED)
        return ops.gate_logits(x_TD, weight_ED)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Both gradients, rounded once."""
        return ops.gate_gradients(grads[0], *ctx.saved_tensors)


class Experts(nn.Module):
    """The routed experts of this rank: every matrix of all experts in one tensor."""

    def __init__(self, experts: int, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(experts, 2, width, hidden_size))
        self.down = nn.Parameter(torch.empty(experts, hidden_size, width))

    def forward(self, rows_RD: Tensor, ends_E: Tensor, linear: LinearSocket) -> Tensor:
        """Each expert's SwiGLU network on its own rows."""
        return linear.network(rows_RD, self.gate_up.flatten(1, 2), self.down, ends_E)

    def mixture(self, linear: LinearSocket) -> Mixture | None:
        """The same with copying before it and summing behind it, where `linear` has that as one step."""
        return linear.mixture(self.gate_up.flatten(1, 2), self.down)


class Moe(nn.Module):
    """The parts of one mixture-of-experts layer; `block.MoeBlock` calls them phase by phase."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.moe_intermediate_size
        self.gate = Gate(config)
        self.experts = Experts(config.n_routed_experts, config.hidden_size, width)
        shared = config.n_shared_experts
        self.shared = Mlp(config.hidden_size, shared * width) if shared else None

    def beside(self, residual_TD: Tensor, normed_TD: Tensor, linear: LinearSocket) -> tuple[Tensor, ...]:
        """What never leaves the token's own rank, to be added up: residual stream and shared experts."""
        if self.shared is None:
            return (residual_TD,)
        return residual_TD, self.shared(normed_TD, linear)
