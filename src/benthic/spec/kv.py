"""Bytes of KV cache per token, for this architecture and for the attention it replaced.

Rules read: MLA `2 B x (C + r) x layers`; expanded `2 B x heads x (n + r + v) x layers`; MHA, GQA and MQA
`2 B x 2 (key and value) x kv heads x head dim x layers`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from benthic.spec.figure import Figure

if TYPE_CHECKING:
    from benthic.spec.model import ModelConfig

BF16_BYTES: Final = 2
_V2_REPORT: Final = "DeepSeek-V2 report table 1"
_FP8_GROUP: Final = 128


@dataclass(frozen=True)
class KVRow:
    """One line of a KV table: who, with which attention, how many bytes."""

    model: str
    attention: str
    figure: Figure


@dataclass(frozen=True)
class OtherModel:
    """What the KV cache of a model of another family depends on."""

    name: str
    attention: str
    layers: int
    kv_heads: int
    head_dim: int


OTHERS: Final = (
    OtherModel("Qwen2.5-72B", "GQA-8", 80, 8, 128),
    OtherModel("Llama-3.1-405B", "GQA-8", 126, 8, 128),
    OtherModel("Llama-3-70B", "GQA-8", 80, 8, 128),
    OtherModel("OPT-13B", "MHA", 40, 40, 128),
    OtherModel("OPT-66B", "MHA", 64, 72, 128),
    OtherModel("OPT-175B", "MHA", 96, 96, 128),
)


def mla(config: ModelConfig, *, mtp: bool = False) -> Figure:
    """BF16 bytes per token of the latent cache: `2 (C + r) L`; drafting with MTP caches its layers too."""
    layers = config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0)
    value = BF16_BYTES * config.latent_dim * layers
    return Figure(value, "B/token", f"2 B x {config.latent_dim} x {layers}", _V2_REPORT)


def mla_fp8(config: ModelConfig) -> Figure:
    """Bytes per token with an FP8 latent: e4m3 with a float32 scale per 128 elements; the rotary key in BF16.

    DeepSeek-V3: 512 + 4 * 4 + 2 * 64 = 656 B a layer.
    """
    latent, rope = config.kv_lora_rank, config.qk_rope_head_dim
    layer = latent + 4 * -(-latent // _FP8_GROUP) + BF16_BYTES * rope
    value = layer * config.num_hidden_layers
    return Figure(value, "B/token", f"{layer} B x {config.num_hidden_layers}", "FlashMLA FP8 cache")


def expanded(config: ModelConfig) -> Figure:
    """BF16 bytes per token if every head's key and value were cached: `2 H (n + r + v) L`."""
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    width = config.qk_head_dim + config.v_head_dim
    value = BF16_BYTES * heads * width * layers
    return Figure(value, "B/token", f"2 B x {heads} x {width} x {layers}", _V2_REPORT)


def grouped(layers: int, kv_heads: int, head_dim: int) -> Figure:
    """BF16 bytes per token of MHA (kv_heads = heads), GQA or MQA (kv_heads = 1): `2 * 2 g d_h L`."""
    value = BF16_BYTES * 2 * kv_heads * head_dim * layers
    return Figure(value, "B/token", f"2 B x 2 x {kv_heads} x {head_dim} x {layers}", _V2_REPORT)


def equivalent_groups(config: ModelConfig) -> float:
    """How many GQA groups would cache as much: `(C + r) / (2 d_h)`; 2.25 for DeepSeek-V3."""
    return config.latent_dim / (2 * config.v_head_dim)


def table(config: ModelConfig) -> tuple[KVRow, ...]:
    """The model's own cache, what other attentions would cache at its dims, and models of other families."""
    layers, heads, dim = config.num_hidden_layers, config.num_attention_heads, config.v_head_dim
    own = [KVRow(config.name, "MLA", mla(config))]
    if config.num_nextn_predict_layers:
        own.append(KVRow(config.name, "MLA + MTP", mla(config, mtp=True)))
    own.append(KVRow(config.name, "MLA, FP8", mla_fp8(config)))
    own.append(KVRow(config.name, "MLA, expanded", expanded(config)))
    shapes = [("MHA", heads), ("GQA-8", 8), ("MQA", 1)]
    same = [KVRow("same dims", kind, grouped(layers, g, dim)) for kind, g in shapes if g <= heads]
    others = [KVRow(o.name, o.attention, grouped(o.layers, o.kv_heads, o.head_dim)) for o in OTHERS]
    return (*own, *same, *others)
