"""What one block of the network does on one rank, operation by operation, for one microbatch.

The phases are those of `benthic.model.block`; sizes with tensor and context parallelism as in
`benthic.parallel.tensor` and `.context`; what is computed again as in `benthic.train.recompute`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from benthic.plan.cost.ops import (
    Attention,
    Collective,
    Gemm,
    GroupedGemm,
    MemoryBound,
)
from benthic.plan.training.travel import travel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benthic.plan.cost.ops import Dtype, Op
    from benthic.plan.training.shape import Shape

Part = Literal["F", "I", "W"]

_SUM: Final = 8.0
"""Bytes of an element of an FP32 sum, read and written."""
LOGITS: Final = 600 * 2**20
"""Bytes of one chunk of logits on a GPU (`kernels.ops.linear_cross_entropy_sum`)."""


class Step(NamedTuple):
    """One operation: whether forward, backward to the input, or weights; what it is for; the operation.

    inside: what the same kernel moves while it multiplies; it takes the longer of both.
    """

    part: Part
    name: str
    op: Op
    inside: Op | None = None


def block(shape: Shape, *, moe: bool) -> Iterator[Step]:
    """Every operation of one block, forward and backward."""
    yield from _attention(shape)
    if moe:
        yield from _routed(shape)
        shared = shape.model.n_shared_experts * shape.model.moe_intermediate_size
        if shared:
            yield from _mlp(shape, shared, "shared experts")
    else:
        yield from _mlp(shape, shape.model.intermediate_size, "dense MLP")


def embedding(shape: Shape) -> Iterator[Step]:
    """Looking rows up; their gradients go into a dense array that is then added to its sum."""
    size = 2.0 * shape.tokens * shape.model.hidden_size
    elements = shape.model.vocab_size * shape.model.hidden_size
    yield Step("F", "embedding", MemoryBound(bytes=2 * size))
    yield Step("W", "embedding", MemoryBound(bytes=6 * size + 2.0 * elements))
    yield Step("W", "gradients", MemoryBound(bytes=(2 + _SUM) * elements, name="accumulate"))


def head(shape: Shape) -> Iterator[Step]:
    """The last norm, logits and cross-entropy in BF16, whose gradients are made in the forward pass.

    Chunk by chunk of logits: three products, one kernel between them, and the weight's FP32 sum each time.
    """
    model, tokens = shape.model, shape.tokens
    size, logits = 2.0 * tokens * model.hidden_size, 2.0 * tokens * model.vocab_size
    yield Step("F", "norms", MemoryBound(bytes=2 * size, name="rms_norm"))
    yield Step("I", "norms", MemoryBound(bytes=3 * size, name="rms_norm backward"))
    m, n, k = tokens, model.vocab_size, model.hidden_size
    chunks = max(1.0, logits / LOGITS)
    yield Step("F", "head", Gemm(m=m, n=n, k=k))
    yield Step("F", "head", Gemm(m=m, n=k, k=n))
    yield Step("F", "head", Gemm(m=n, n=k, k=m), MemoryBound(bytes=_SUM * chunks * n * k))
    yield Step("F", "head", MemoryBound(bytes=2 * logits))
    yield Step("I", "head", MemoryBound(bytes=2 * size))


def projection(shape: Shape) -> Iterator[Step]:
    """An MTP module's two norms and its projection of `[hidden; embedding]`, which stays in BF16."""
    size = shape.model.hidden_size
    row = 2.0 * shape.tokens * size
    yield Step("F", "norms", MemoryBound(bytes=4 * row, name="rms_norm"))
    yield Step("I", "norms", MemoryBound(bytes=6 * row, name="rms_norm backward"))
    yield from _product(shape, "MTP projection", shape.tokens, size, 2 * size, dtype="bf16")


def _attention(shape: Shape) -> Iterator[Step]:
    model, tokens, wide = shape.model, shape.tokens, shape.gathered
    size, heads = model.hidden_size, model.num_attention_heads / shape.tp
    again = "attention" in shape.again
    up = again or "up_projections" in shape.again
    yield from _norm(shape, "rms_norm", 2.0, again=again or "norms" in shape.again)
    yield from _narrowed(shape, tokens * size)
    latent = model.kv_lora_rank + model.qk_rope_head_dim
    yield from _product(shape, "attention products", tokens, latent, size, again=again)
    q_width = heads * model.qk_head_dim
    if model.q_lora_rank is None:
        yield from _product(shape, "attention products", wide, q_width, size, again=up)
    else:
        yield from _product(shape, "attention products", tokens, model.q_lora_rank, size, again=again)
        yield from _product(shape, "attention products", wide, q_width, model.q_lora_rank, again=up)
        yield from _narrowed(shape, wide * model.q_lora_rank)
    yield from _narrowed(shape, wide * model.kv_lora_rank)
    kv_width = heads * (model.qk_nope_head_dim + model.v_head_dim)
    yield from _product(shape, "attention products", wide * shape.cp, kv_width, model.kv_lora_rank, again=up)
    moved = 4.0 * wide * heads * (2 * model.qk_head_dim)
    yield from _twice("rotations", MemoryBound(bytes=moved, name="rope"), again=up)
    for backward in (False, True):
        core = Attention(
            rows=shape.rows,
            heads=heads / shape.cp,
            seq_len=shape.seq_len,
            qk_dim=model.qk_head_dim,
            v_dim=model.v_head_dim,
            backward=backward,
            packed=shape.kept_pairs is not None or shape.cp > 1,
            kept=shape.kept_pairs or 1.0,
        )
        yield Step("I" if backward else "F", "attention core", core)
        if again and not backward:
            yield Step("I", "recomputation", core)
    o_width = heads * model.v_head_dim
    if shape.e5m6_attention and not again:
        yield from _twice("quantisation", MemoryBound(bytes=3.5 * wide * o_width, name="e5m6"))
    yield from _narrowed(shape, wide * o_width)
    yield from _product(shape, "attention products", wide, size, o_width, again=again)
    yield from _assembled(shape, wide * heads, again=again)
    yield from _norm(shape, "add_rms_norm", 4.0, again=again or "norms" in shape.again)
    yield from _shared_tokens(shape, latent)


def _assembled(shape: Shape, rows: float, *, again: bool) -> Iterator[Step]:
    """Queries and keys put together from two parts, values laid out; in backward taken apart and summed.

    `rows` is tokens times heads. Counted from the tensors that autograd reads and writes between our kernels:
    in backward a slice's gradient fills its whole, and gradients of what several read are added one by one.
    """
    model = shape.model
    parts = 2.0 * rows * (2 * 2 * model.qk_head_dim + 2 * model.v_head_dim)
    sums = 2.0 * shape.tokens * model.hidden_size
    yield Step("F", "copies and sums", MemoryBound(bytes=parts + 3 * sums))
    if again:
        yield Step("I", "recomputation", MemoryBound(bytes=parts))
    apart = 2.0 * rows * (9 * model.qk_head_dim + 8 * model.v_head_dim)
    yield Step("I", "copies and sums", MemoryBound(bytes=apart + 20 * sums))


def _shared_tokens(shape: Shape, latent: int) -> Iterator[Step]:
    """What tensor and context parallelism move around attention: latents gathered, outputs summed."""
    model, tokens = shape.model, shape.tokens
    if shape.tp > 1:
        q = model.q_lora_rank or model.hidden_size
        yield from _tensor(shape, 2.0 * tokens * shape.tp * (latent + q + model.hidden_size))
    if shape.cp > 1:
        moved = 2.0 * tokens * shape.tp * shape.cp * latent
        yield from _twice("context parallelism", _collective(shape, "all-gather", moved, shape.cp))
        seen = 1.0 + 0.5 / shape.cp  # a beginning of every row is expanded for both of a rank's pieces
        yield from _twice("context parallelism", MemoryBound(bytes=2 * seen * moved))


def _tensor(shape: Shape, moved: float) -> Iterator[Step]:
    """What a tensor group gathers or sums, and lays out anew where a microbatch has several rows."""
    yield from _twice("tensor parallelism", _collective(shape, "all-gather", moved, shape.tp))
    if shape.rows > 1:
        yield from _twice("tensor parallelism", MemoryBound(bytes=2 * moved))


def _mlp(shape: Shape, width: int, name: str) -> Iterator[Step]:
    """A SwiGLU network on this rank's tokens, its columns divided by tensor parallelism.

    Of a dense layer the last product is not computed again: nothing of its phase needs what it gave.
    """
    model, tokens, columns = shape.model, shape.gathered, width / shape.tp
    again = "experts" in shape.again
    if name == "dense MLP":
        yield from _narrowed(shape, tokens * model.hidden_size)
    yield from _product(shape, name, tokens, 2 * columns, model.hidden_size, again=again, gated=True)
    yield from _swiglu(shape, tokens, columns)
    last = again and name != "dense MLP"
    yield from _product(shape, name, tokens, model.hidden_size, columns, again=last)
    if shape.tp > 1:
        yield from _tensor(shape, 2 * 2.0 * tokens * model.hidden_size)


def _routed(shape: Shape) -> Iterator[Step]:
    """Gate, exchange, and the experts of this rank on the rows that come to it."""
    model, tokens = shape.model, shape.tokens
    size, ffn, rows = model.hidden_size, model.moe_intermediate_size, tokens * model.num_experts_per_tok
    again = "experts" in shape.again
    yield from _product(shape, "router", tokens, model.n_routed_experts, size, dtype="bf16")
    yield from _twice("router", MemoryBound(bytes=24.0 * tokens * model.n_routed_experts))
    yield from _exchange(shape)
    copies = 2.0 * size * (tokens + rows) * shape.skew
    narrow = MemoryBound(bytes=copies / 2, name="spread_fp8")
    there = narrow if shape.joined else MemoryBound(bytes=copies, name="permute")
    yield Step("F", "permutation", there)
    yield Step("I", "permutation", MemoryBound(bytes=copies, name="permute backward"))
    if again or "expert_inputs" in shape.again:
        yield Step("I", "recomputation", there)
    if shape.joined:  # tokens are brought into FP8, and so is the gradient of their sum
        yield from _narrowed(shape, tokens * size)
        yield _retiled(rows * size)
        yield Step("I", "quantisation", MemoryBound(bytes=3.0 * tokens * size, name="quantise 1x128"))
        yield Step("I", "permutation", narrow)
        yield Step("I", "quantisation", MemoryBound(bytes=2.0 * rows * size, name="retile"))
    elif shape.products == "fp8":
        yield from _narrowed(shape, rows * size)
    yield from _grouped(shape, 2 * ffn, size, again=again, gated=True)
    yield from _swiglu(shape, rows * shape.skew, ffn, weighted=shape.joined)
    down = again or ("expert_outputs" in shape.again and not shape.joined)
    yield from _grouped(shape, size, ffn, again=down, gated=shape.joined)
    yield Step("F", "permutation", MemoryBound(bytes=copies, name="unpermute"))
    if not shape.joined:
        yield Step("I", "permutation", MemoryBound(bytes=2 * copies, name="unpermute backward"))


def _grouped(shape: Shape, n: float, k: float, *, again: bool, gated: bool = False) -> Iterator[Step]:
    """A product of every expert here with its rows, and its two gradients; `gated`: these come in FP8."""
    model = shape.model
    rows = shape.tokens * model.num_experts_per_tok
    experts = model.n_routed_experts / shape.ep * (1.0 - shape.idle)

    def product(n: float, k: float, *, gradient: bool = False) -> GroupedGemm:
        kind, skew = shape.products, shape.skew
        return GroupedGemm(rows=rows, experts=experts, n=n, k=k, dtype=kind, skew=skew, gradient=gradient)

    yield Step("F", "routed experts", product(n, k))
    if again:
        yield Step("I", "recomputation", product(n, k))
    yield Step("I", "routed experts", product(k, n))
    yield from _weights("routed experts", product(n, k, gradient=True), experts * n * k)
    if not gated:
        yield from _gradients_narrowed(shape, rows * n)


def _product(
    shape: Shape,
    name: str,
    m: float,
    n: float,
    k: float,
    *,
    dtype: Dtype | None = None,
    again: bool = False,
    gated: bool = False,
) -> Iterator[Step]:
    """A dense product and its two gradients; `gated`: in front of a SwiGLU."""
    kind = dtype or shape.products
    yield Step("F", name, Gemm(m=m, n=n, k=k, dtype=kind))
    if again:
        yield Step("I", "recomputation", Gemm(m=m, n=n, k=k, dtype=kind))
    yield Step("I", name, Gemm(m=m, n=k, k=n, dtype=kind))
    yield from _weights(name, Gemm(m=n, n=k, k=m, dtype=kind, name="gradient"), n * k)
    if kind == "fp8" and not gated:
        yield from _gradients_narrowed(shape, m * n)


def _weights(name: str, product: Gemm | GroupedGemm, elements: float) -> Iterator[Step]:
    """A weight gradient that the product adds to its FP32 sum."""
    yield Step("W", name, product, MemoryBound(bytes=_SUM * elements))


def _narrowed(shape: Shape, elements: float) -> Iterator[Step]:
    """Quantising what a product reads; for the weights' gradient it is turned round and quantised again."""
    if shape.products == "fp8":
        yield Step("F", "quantisation", MemoryBound(bytes=3.0 * elements, name="quantise 1x128"))
        yield _retiled(elements)


def _retiled(elements: float) -> Step:
    return Step("W", "quantisation", MemoryBound(bytes=2.0 * elements, name="retile"))


def _gradients_narrowed(shape: Shape, elements: float) -> Iterator[Step]:
    """Quantising an output's gradient along both of its dims, in one pass."""
    if shape.products == "fp8":
        yield Step("I", "quantisation", MemoryBound(bytes=4.0 * elements, name="quantise both"))


def _swiglu(shape: Shape, rows: float, width: float, *, weighted: bool = False) -> Iterator[Step]:
    """SwiGLU and its gradient; in FP8 each leaves as the products read it, the gradient along both dims.

    `weighted`: each row's gradient is that of its product with a weight, which gets one too.
    """
    values, fp8 = rows * width, shape.products == "fp8"
    once = MemoryBound(bytes=(5.0 if fp8 else 6.0) * values, name="swiglu_fp8" if fp8 else "swiglu")
    gradient = f"{'weighted_' * weighted}swiglu_gradient_fp8_both" if fp8 else "swiglu backward"
    yield Step("F", "SwiGLU", once)
    yield Step("I", "SwiGLU", MemoryBound(bytes=10.0 * values, name=gradient))
    if {"swiglu", "experts"} & shape.again:
        yield Step("I", "recomputation", once)
    if shape.fp8_swiglu and "experts" not in shape.again:  # gates and ups are kept narrow
        yield Step("F", "quantisation", MemoryBound(bytes=6.0 * values, name="quantise 1x128"))
        yield Step("I", "quantisation", MemoryBound(bytes=6.0 * values, name="dequantise"))
    if fp8:
        yield _retiled(values)


def _norm(shape: Shape, name: str, passes: float, *, again: bool) -> Iterator[Step]:
    size = 2.0 * shape.tokens * shape.model.hidden_size
    yield Step("F", "norms", MemoryBound(bytes=passes * size, name=name))
    yield Step("I", "norms", MemoryBound(bytes=1.5 * passes * size, name=f"{name} backward"))
    if again:
        yield Step("I", "recomputation", MemoryBound(bytes=2.0 * size, name="rms_norm"))


def _twice(name: str, op: Op, *, again: bool = False) -> Iterator[Step]:
    """The same forward and backward."""
    yield Step("F", name, op)
    yield Step("I", name, op)
    if again:
        yield Step("I", "recomputation", op)


def _collective(shape: Shape, name: Literal["all-gather"], moved: float, ranks: int) -> Collective:
    """Over neighbours; context ranks lie tensor groups apart."""
    apart = shape.tp if ranks == shape.cp and shape.cp > 1 and shape.tp > 1 else 1
    per_node = max(1, min(ranks, shape.gpus_per_node // apart))
    return Collective(name=name, bytes=moved, ranks=ranks, per_node=per_node)


def _exchange(shape: Shape) -> Iterator[Step]:
    """Tokens to their experts and home; in FP8 what goes out is narrow, forward and backward."""
    if shape.ep == 1:
        return
    size = shape.model.hidden_size
    out = size + 4.0 * math.ceil(size / 128) if shape.products == "fp8" else 2.0 * size
    yield from _twice("exchange", travel(shape, out))
    yield from _twice("exchange", travel(shape, 2.0 * size))
