"""The one list of parameters of a model: names, shapes, logical axes, and the checkpoint tensors behind each.

The torch module, the checkpoint reader, the sharder and the planner all read this table. Sums over it are in
`benthic.spec.totals`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benthic.spec.model import ModelConfig

Precision = Literal["fp8", "bf16", "fp32"]
Part = Literal[
    "embedding",
    "attention",
    "dense MLP",
    "router",
    "routed experts",
    "shared experts",
    "norms",
    "MTP projection",
    "head",
]

_WHOLE = Fraction(1)


@dataclass(frozen=True, slots=True)
class HFTensor:
    """One tensor of a Hugging Face checkpoint.

    `index` says where it lies in the parameter: the tensor equals `parameter[index]`.
    `precision` is the narrowest type a released checkpoint stores it in: "fp8" tensors may be float8_e4m3fn
    with a float32 `weight_scale_inv` per 128x128 block, "bf16" ones never are, "fp32" is the router's bias.
    `duplicate` marks a second copy of a shared parameter (the MTP layer's embedding and head): read it only
    to check it, write it so that other engines find it.
    """

    name: str
    shape: tuple[int, ...]
    index: tuple[int, ...] = ()
    precision: Precision = "bf16"
    duplicate: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Param:
    """One parameter (or, for the router's bias, one float32 buffer) of the torch module.

    `axes` names each dimension for the sharder; None is a dimension that is never sharded.
    `active` is the fraction of the parameter that the product with one token touches.
    `rope_rows` are the `(start, stop)` row ranges whose outputs are rotary pairs: interleaved in Hugging Face
    checkpoints when `rope_interleave` is set, half-split in the module; the loader alone permutes them.
    `trainable` is False for the router's correction bias, which no gradient reaches.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    part: Part
    hf: tuple[HFTensor, ...]
    active: Fraction = _WHOLE
    rope_rows: tuple[tuple[int, int], ...] = ()
    trainable: bool = True
    mtp: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def fp8(self) -> bool:
        """Whether released checkpoints store it in FP8; its products are those that training runs in FP8."""
        return self.hf[0].precision == "fp8"  # a parameter's tensors are stored alike


@functools.lru_cache(maxsize=32)
def parameters(config: ModelConfig, *, include_mtp: bool = True) -> tuple[Param, ...]:
    """List every parameter of `config`, in the order of the network.

    With `include_mtp=False` the MTP modules and their copies of the embedding and the head are left out.
    """
    return tuple(_walk(config, config.num_nextn_predict_layers if include_mtp else 0))


def _walk(config: ModelConfig, mtp_depth: int) -> Iterator[Param]:
    copies = range(config.num_hidden_layers, config.num_hidden_layers + mtp_depth)
    yield _table(
        config, "embed.weight", "embedding", "model.embed_tokens.weight", copies, "embed_tokens.weight"
    )
    for layer in range(config.num_hidden_layers):
        yield from _block(config, f"layers.{layer}", layer)
    yield _norm("norm.weight", config.hidden_size, "model.norm.weight")
    if not config.tie_word_embeddings:
        yield _table(config, "head.weight", "head", "lm_head.weight", copies, "shared_head.head.weight")
    for depth in range(mtp_depth):
        yield from _mtp(config, depth)


def _table(config: ModelConfig, name: str, part: Part, hf: str, copies: range, copy: str) -> Param:
    """The embedding or the head, with the copies that every MTP layer of a checkpoint stores."""
    shape = (config.vocab_size, config.hidden_size)
    own = HFTensor(hf, shape)
    others = (HFTensor(f"model.layers.{layer}.{copy}", shape, duplicate=True) for layer in copies)
    return Param(name=name, shape=shape, axes=("vocab", "model"), part=part, hf=(own, *others))


def _norm(name: str, size: int, hf: str, *, axis: str = "model", mtp: bool = False) -> Param:
    tensor = HFTensor(hf, (size,))
    return Param(name=name, shape=(size,), axes=(axis,), part="norms", hf=(tensor,), mtp=mtp)


def _mtp(config: ModelConfig, depth: int) -> Iterator[Param]:
    layer = config.num_hidden_layers + depth
    hf, name, size = f"model.layers.{layer}", f"mtp.{depth}", config.hidden_size
    yield _norm(f"{name}.embed_norm.weight", size, f"{hf}.enorm.weight", mtp=True)
    yield _norm(f"{name}.hidden_norm.weight", size, f"{hf}.hnorm.weight", mtp=True)
    shape = (size, 2 * size)
    tensor = HFTensor(f"{hf}.eh_proj.weight", shape)
    yield Param(
        name=f"{name}.proj.weight",
        shape=shape,
        axes=("model", None),
        part="MTP projection",
        hf=(tensor,),
        mtp=True,
    )
    yield from _block(config, f"{name}.block", layer)
    yield _norm(f"{name}.norm.weight", size, f"{hf}.shared_head.norm.weight", mtp=True)


def _block(config: ModelConfig, name: str, layer: int) -> Iterator[Param]:
    hf, mtp = f"model.layers.{layer}", layer >= config.num_hidden_layers
    size = config.hidden_size
    yield _norm(f"{name}.attn_norm.weight", size, f"{hf}.input_layernorm.weight", mtp=mtp)
    yield from _attention(config, f"{name}.attn", f"{hf}.self_attn", mtp=mtp)
    yield _norm(f"{name}.ffn_norm.weight", size, f"{hf}.post_attention_layernorm.weight", mtp=mtp)
    if config.is_moe(layer):
        yield from _moe(config, f"{name}.moe", f"{hf}.mlp", mtp=mtp)
    else:
        yield from _mlp(size, config.intermediate_size, f"{name}.mlp", f"{hf}.mlp", "dense MLP", mtp=mtp)


def _attention(config: ModelConfig, name: str, hf: str, *, mtp: bool) -> Iterator[Param]:
    size, heads, rope = config.hidden_size, config.num_attention_heads, config.qk_rope_head_dim
    latent, q_rows = config.kv_lora_rank, heads * config.qk_head_dim

    def linear(
        ours: str,
        theirs: str,
        shape: tuple[int, int],
        axes: tuple[str, str],
        rope_rows: tuple[tuple[int, int], ...] = (),
    ) -> Param:
        tensor = HFTensor(f"{hf}.{theirs}.weight", shape, precision="fp8")
        return Param(
            name=f"{name}.{ours}.weight",
            shape=shape,
            axes=axes,
            part="attention",
            hf=(tensor,),
            rope_rows=rope_rows,
            mtp=mtp,
        )

    q_rope = tuple((end - rope, end) for end in range(config.qk_head_dim, q_rows + 1, config.qk_head_dim))
    if config.q_lora_rank is None:
        yield linear("q", "q_proj", (q_rows, size), ("heads", "model"), q_rope)
    else:
        rank = config.q_lora_rank
        yield linear("q_a", "q_a_proj", (rank, size), ("q_latent", "model"))
        yield _norm(f"{name}.q_a_norm.weight", rank, f"{hf}.q_a_layernorm.weight", axis="q_latent", mtp=mtp)
        yield linear("q_b", "q_b_proj", (q_rows, rank), ("heads", "q_latent"), q_rope)
    kv_rows, up_rows = latent + rope, heads * (config.qk_nope_head_dim + config.v_head_dim)
    yield linear("kv_a", "kv_a_proj_with_mqa", (kv_rows, size), ("kv_latent", "model"), ((latent, kv_rows),))
    yield _norm(f"{name}.kv_a_norm.weight", latent, f"{hf}.kv_a_layernorm.weight", axis="kv_latent", mtp=mtp)
    yield linear("kv_b", "kv_b_proj", (up_rows, latent), ("heads", "kv_latent"))
    yield linear("o", "o_proj", (size, heads * config.v_head_dim), ("model", "heads"))


def _mlp(size: int, ffn: int, name: str, hf: str, part: Part, *, mtp: bool) -> Iterator[Param]:
    """A SwiGLU MLP: gate and up stacked as `gate_up[0]` and `gate_up[1]`."""
    yield Param(
        name=f"{name}.gate_up.weight",
        shape=(2, ffn, size),
        axes=(None, "ffn", "model"),
        part=part,
        hf=_gate_and_up(hf, ffn, size),
        mtp=mtp,
    )
    down = HFTensor(f"{hf}.down_proj.weight", (size, ffn), precision="fp8")
    yield Param(
        name=f"{name}.down.weight", shape=(size, ffn), axes=("model", "ffn"), part=part, hf=(down,), mtp=mtp
    )


def _gate_and_up(hf: str, ffn: int, size: int, at: tuple[int, ...] = ()) -> tuple[HFTensor, HFTensor]:
    return (
        HFTensor(f"{hf}.gate_proj.weight", (ffn, size), (*at, 0), "fp8"),
        HFTensor(f"{hf}.up_proj.weight", (ffn, size), (*at, 1), "fp8"),
    )


def _moe(config: ModelConfig, name: str, hf: str, *, mtp: bool) -> Iterator[Param]:
    size, ffn, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    yield from _router(config, f"{name}.gate", f"{hf}.gate", mtp=mtp)
    used = Fraction(config.num_experts_per_tok, experts)
    yield Param(
        name=f"{name}.experts.gate_up",
        shape=(experts, 2, ffn, size),
        axes=("expert", None, "ffn", "model"),
        part="routed experts",
        hf=tuple(t for e in range(experts) for t in _gate_and_up(f"{hf}.experts.{e}", ffn, size, (e,))),
        active=used,
        mtp=mtp,
    )
    yield Param(
        name=f"{name}.experts.down",
        shape=(experts, size, ffn),
        axes=("expert", "model", "ffn"),
        part="routed experts",
        hf=tuple(
            HFTensor(f"{hf}.experts.{e}.down_proj.weight", (size, ffn), (e,), "fp8") for e in range(experts)
        ),
        active=used,
        mtp=mtp,
    )
    if config.n_shared_experts:
        width = config.n_shared_experts * ffn
        yield from _mlp(size, width, f"{name}.shared", f"{hf}.shared_experts", "shared experts", mtp=mtp)


def _router(config: ModelConfig, name: str, hf: str, *, mtp: bool) -> Iterator[Param]:
    """The gate; every rank holds all of it, so its expert dimension is not the sharded axis "expert"."""
    shape = (config.n_routed_experts, config.hidden_size)
    weight = HFTensor(f"{hf}.weight", shape)
    yield Param(
        name=f"{name}.weight", shape=shape, axes=(None, "model"), part="router", hf=(weight,), mtp=mtp
    )
    if config.topk_method == "noaux_tc":
        bias = HFTensor(f"{hf}.e_score_correction_bias", shape[:1], precision="fp32")
        yield Param(
            name=f"{name}.bias",
            shape=shape[:1],
            axes=(None,),
            part="router",
            hf=(bias,),
            trainable=False,
            mtp=mtp,
        )
