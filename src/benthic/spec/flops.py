"""Floating-point operations per token, each figure with its counting rule.

A multiply-add counts as two. Matrices are counted through the activated parameters (norms and router bias
ride along, below 0.01%), attention through its two products. Softmax, norms and rotations are not counted.

In the rules: L layers, H heads, n nope dim, r rope dim, v value dim, C kv latent, s tokens of context;
"activated" is `totals.active(config, "head")`, "body" is `totals.active(config, "body")`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from benthic.errors import ConfigError
from benthic.spec import totals
from benthic.spec.figure import Figure
from benthic.spec.parameters import parameters

if TYPE_CHECKING:
    from benthic.spec.model import ModelConfig

AttentionForm = Literal["expanded", "absorbed"]

_INSIGHTS = "Insights into DeepSeek-V3 (ISCA 2025), tables 2 and 4"


def training(
    config: ModelConfig, seq_len: int, *, causal: bool = True, mtp: bool = False, kept_pairs: float = 1.0
) -> Figure:
    """FLOPs of one token's forward and backward pass in sequences of `seq_len` tokens; no recomputation.

    6 * activated parameters (without embedding, with head) + 3 * 2 * L * H * (n + r + v) * seq_len, the
    second term halved if `causal`. DeepSeek-V3 at 4096: 250.46 GFLOP causal (published: 250), 281.16 not.
    `mtp` adds the MTP modules, each with its own pass through the head; published figures leave them out.
    `kept_pairs` is the share of pairs that document masks leave.
    """
    _check_length("seq_len", seq_len)
    layers, weights = config.num_hidden_layers, totals.active(config, "head")
    if mtp:
        layers += config.num_nextn_predict_layers
        weights += _mtp_active(config)
    pairs = kept_pairs * (seq_len / 2 if causal else seq_len)
    value = 6 * weights + 3 * layers * pair_flops(config, "expanded") * pairs
    rule = f"6 x activated{' + MTP' if mtp else ''} + 3 x 2LH(n+r+v) s"
    rule += "/2" if causal else ""
    return Figure(value, "FLOP/token", rule if kept_pairs == 1.0 else f"{rule} x {kept_pairs:g}", _INSIGHTS)


def prefill(config: ModelConfig, prompt_len: int) -> Figure:
    """FLOPs of one prompt token, averaged over `prompt_len`; the head runs once and is left out."""
    _check_length("prompt_len", prompt_len)
    pairs = (prompt_len + 1) / 2
    attention = config.num_hidden_layers * pair_flops(config, "expanded") * pairs
    value = 2 * totals.active(config, "body") + attention
    rule = "2 x body + 2LH(n+r+v) (s+1)/2"
    return Figure(value, "FLOP/token", rule, "forward third of the training rule, causal pairs exact")


def decode(config: ModelConfig, context: int, form: AttentionForm = "absorbed") -> Figure:
    """FLOPs of generating one token that attends to `context` tokens.

    "absorbed" attends in the latent space: 2 * (2 C + r) per head and pair. Moving queries into it and
    outputs out of it costs 2 * H * C * (n + v) a layer, just what expanding the token's own latent would.
    "expanded" attends to a cache of full keys and values: 2 * (n + r + v) per head and pair, but
    H * (n + r + v) cached elements.
    """
    _check_length("context", context)
    value = 2 * totals.active(config, "head")
    value += config.num_hidden_layers * pair_flops(config, form) * context
    pair = "2LH(2C+r)" if form == "absorbed" else "2LH(n+r+v)"
    return Figure(value, "FLOP/token", f"2 x activated + {pair} s", "FlashMLA notes")


def pair_flops(config: ModelConfig, form: AttentionForm) -> int:
    """FLOPs of all heads of one layer for one query and one key: scores and weighted sum.

    DeepSeek-V3: 128 heads * 640 expanded, 128 * 2176 absorbed (3.4 times as many).
    """
    if form == "absorbed":
        width = config.latent_dim + config.kv_lora_rank
    else:
        width = config.qk_head_dim + config.v_head_dim
    return 2 * config.num_attention_heads * width


def attention_layer(batch: int, seq_len: int, heads: int, head_dim: int, *, causal: bool = False) -> Figure:
    """FLOPs of one layer's two attention products, forward: `4 b s^2 H d` (FlashAttention's convention)."""
    value = 4 * batch * seq_len**2 * heads * head_dim
    rule = "4 b s^2 H d per layer, forward"
    if causal:
        return Figure(value / 2, "FLOP", f"{rule}, halved as causal", "FlashAttention benchmarks")
    return Figure(value, "FLOP", rule, "FlashAttention benchmarks")


def score_elements(batch: int, seq_len: int, heads: int) -> Figure:
    """Elements of one layer's score matrices `b H s^2`, which attention without tiling keeps in memory."""
    return Figure(batch * heads * seq_len**2, "elements", "b H s^2 per layer", "standard attention")


def _mtp_active(config: ModelConfig) -> int:
    """Activated parameters of all MTP modules, each with a pass through the shared head."""
    own = sum((p.numel * p.active for p in parameters(config) if p.mtp), start=0)
    return int(own) + config.num_nextn_predict_layers * config.vocab_size * config.hidden_size


def _check_length(name: str, length: int) -> None:
    if length < 1:
        message = f"{name} = {length}, but FLOPs per token need at least one token"
        raise ConfigError(message)
