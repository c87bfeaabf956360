"""The layer that `moe_layer.py` times, and its peer of `transformers` with the same weights."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from benthic.spec import hf, presets

if TYPE_CHECKING:
    from torch import nn

    from benthic.spec.model import ModelConfig


def model_of(*, small: bool) -> ModelConfig:
    """One mixture layer of Moonlight, or something small with as many parts; without a real vocabulary."""
    whole = presets.get("moonlight-16b-a3b")
    words = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 1}
    one = dataclasses.replace(whole, num_hidden_layers=1, first_k_dense_replace=0, **words)
    if not small:
        return one
    sizes = {
        "hidden_size": 256,
        "moe_intermediate_size": 128,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
    }
    return dataclasses.replace(one, name="small", num_attention_heads=2, **sizes)


def peer(model: ModelConfig, device: str) -> Any:
    """The mixture layer of a model of one layer, built as its users build one."""
    import transformers

    config = transformers.DeepseekV3Config(**hf.to_hf(model))
    with torch.device(device):
        whole = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, experts_implementation="grouped_mm"
        )
    return whole.train().model.layers[0].mlp


@torch.no_grad()
def copy_weights(first: nn.Module, second: nn.Module, peer: nn.Module) -> None:
    """Those of our first layer into our second and into the peer's."""
    weights = dict(first.named_parameters())
    for name, param in second.named_parameters():
        param.copy_(weights[name])
    gate, up = weights["shared.gate_up.weight"]
    named = {
        "gate.weight": weights["gate.weight"],
        "experts.gate_up_proj": weights["experts.gate_up"].flatten(1, 2),
        "experts.down_proj": weights["experts.down"],
        "shared_experts.gate_proj.weight": gate,
        "shared_experts.up_proj.weight": up,
        "shared_experts.down_proj.weight": weights["shared.down.weight"],
    }
    for name, param in peer.named_parameters():
        param.copy_(named.pop(name))
    assert not named, f"not copied: {sorted(named)}"  # noqa: S101 (a benchmark's check)
