"""The operations of one serving step on one GPU, per layer, from what the step holds.

Letters as in `benthic.spec.flops`. Sizes are those of one rank under its layout; `tokens` are its rows of
the step. Products that checkpoints keep in FP8 run in the layout's dtype, the rest in BF16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benthic.plan.cost.ops import ChunkedPrefill, Gemm, GroupedGemm, MemoryBound, MlaDecode
from benthic.plan.cost.transfers import AllToAll, Collective

if TYPE_CHECKING:
    from benthic.plan.cost.ops import Op
    from benthic.plan.serving.layout import ServingLayout
    from benthic.spec.model import ModelConfig

FEW_TOKENS = 256
"""Up to so many tokens a rank, an exchange sends every copy by itself, for latency; above, one a rank."""


@dataclass(frozen=True, kw_only=True)
class StepOperations:
    """Lists operations of `model` under `layout`, on nodes of `gpus_per_node`."""

    model: ModelConfig
    layout: ServingLayout
    gpus_per_node: int = 8

    # --- attention

    def projections(self, tokens: float) -> list[Op]:
        """Queries, latents and the output of one layer, with its norms, rotations and tensor-parallel sum."""
        model, dtype, heads = self.model, self.layout.weights, self._heads
        d, latent = model.hidden_size, model.latent_dim
        queries = heads * model.qk_head_dim
        if model.q_lora_rank:
            products: list[Op] = [
                Gemm(m=tokens, n=model.q_lora_rank + latent, k=d, dtype=dtype),
                Gemm(m=tokens, n=queries, k=model.q_lora_rank, dtype=dtype),
            ]
        else:
            products = [Gemm(m=tokens, n=queries + latent, k=d, dtype=dtype)]
        return [
            *products,
            Gemm(m=tokens, n=d, k=heads * model.v_head_dim, dtype=dtype),
            MemoryBound(bytes=tokens * d * 8.0, name="add_rms_norm"),
            MemoryBound(bytes=tokens * heads * model.qk_rope_head_dim * 4.0, name="rope"),
            *self._quantised(tokens, d, heads * model.v_head_dim),
            *self._summed(tokens),
        ]

    def absorb(self, tokens: float) -> list[Op]:
        """Queries into the latent space and outputs out of it, of one layer's decoding tokens."""
        heads, latent = self._heads, self.model.kv_lora_rank
        return [
            Gemm(m=tokens, n=heads * latent, k=self.model.qk_nope_head_dim),
            Gemm(m=tokens, n=heads * self.model.v_head_dim, k=latent),
        ]

    def decode(self, sequences: float, tokens: float, context: float) -> list[Op]:
        """Absorbed attention of one layer over the cached latents."""
        return [
            MlaDecode(
                requests=sequences,
                context=context,
                heads=self._heads,
                queries=tokens / sequences,
                kv_lora_rank=self.model.kv_lora_rank,
                rope_dim=self.model.qk_rope_head_dim,
                cache_dtype=self.layout.cache,
            )
        ]

    def prefill(self, tokens: float, pairs: float, context: float) -> list[Op]:
        """Expanded attention of one layer: latents in sight to keys and values, then pairs."""
        model, heads = self.model, self._heads
        width = heads * (model.qk_nope_head_dim + model.v_head_dim)
        requests = max(1.0, context * tokens / max(2.0 * pairs, 1.0)) if context else 1.0
        return [
            Gemm(m=context, n=width, k=model.kv_lora_rank, dtype=self.layout.weights),
            ChunkedPrefill(
                requests=requests,
                tokens=tokens,
                pairs=pairs,
                heads=heads,
                qk_dim=model.qk_head_dim,
                v_dim=model.v_head_dim,
            ),
        ]

    # --- feed-forward

    def dense(self, tokens: float) -> list[Op]:
        """The feed-forward network of one dense layer."""
        width = self.model.intermediate_size / self.layout.tp_degree
        return [*self._mlp(tokens, width), *self._summed(tokens)]

    def shared(self, tokens: float) -> list[Op]:
        """Shared experts and the router of one MoE layer."""
        model = self.model
        width = model.n_shared_experts * model.moe_intermediate_size / self.layout.tp_degree
        router = Gemm(m=tokens, n=model.n_routed_experts, k=model.hidden_size)
        return [router, *(self._mlp(tokens, width) if width else ())]

    def experts(self, tokens: float) -> list[Op]:
        """Routed experts of one MoE layer on one GPU, when every data-parallel rank has `tokens`.

        Only experts that somebody chose are read: all but `(1 - K / E) ^ tokens` of them, if tokens choose
        alike and alone.
        """
        model, layout = self.model, self.layout
        everywhere = tokens * layout.dp_degree
        rows = everywhere * model.num_experts_per_tok / layout.gpus
        held = (model.n_routed_experts + layout.redundant_experts) / layout.gpus
        passed_over = (1.0 - model.num_experts_per_tok / model.n_routed_experts) ** everywhere
        held = max(min(1.0, held), held * (1.0 - passed_over))
        d, f, dtype = model.hidden_size, model.moe_intermediate_size, layout.weights
        skew = layout.skew if layout.gpus > 1 else 1.0
        return [
            GroupedGemm(rows=rows, experts=held, n=2 * f, k=d, dtype=dtype, skew=skew),
            GroupedGemm(rows=rows, experts=held, n=d, k=f, dtype=dtype, skew=skew),
            MemoryBound(bytes=rows * f * 6.0, name="swiglu"),
            MemoryBound(bytes=rows * d * 4.0, name="permute"),
            MemoryBound(bytes=rows * d * 4.0, name="unpermute"),
            *self._quantised(rows, d, f),
        ]

    def exchange(self, tokens: float) -> list[Op]:
        """Tokens to their experts and back, of one MoE layer; each tensor-parallel rank sends its share."""
        layout = self.layout
        if layout.gpus == 1 or not self.model.n_routed_experts:
            return []
        mine = tokens / layout.tp_degree
        d = self.model.hidden_size
        there = d * (1.0 + 4.0 / 128.0) if layout.weights == "fp8" else 2.0 * d
        return [self._all_to_all(mine, size) for size in (there, 2.0 * d)]

    def head(self, rows: float) -> list[Op]:
        """Logits and drawing of one token a row."""
        words = self.model.vocab_size / self.layout.tp_degree
        return [
            Gemm(m=rows, n=words, k=self.model.hidden_size),
            MemoryBound(bytes=rows * words * 12.0),
        ]

    # --- parts

    @property
    def _heads(self) -> float:
        return self.model.num_attention_heads / self.layout.tp_degree

    def _mlp(self, tokens: float, width: float) -> list[Op]:
        d, dtype = self.model.hidden_size, self.layout.weights
        return [
            Gemm(m=tokens, n=2 * width, k=d, dtype=dtype),
            Gemm(m=tokens, n=d, k=width, dtype=dtype),
            MemoryBound(bytes=tokens * width * 6.0, name="swiglu"),
            MemoryBound(bytes=tokens * d * 8.0, name="add_rms_norm"),
            *self._quantised(tokens, d, width),
        ]

    def _quantised(self, rows: float, *widths: float) -> list[Op]:
        """One launch for what each product reads."""
        if self.layout.weights != "fp8":
            return []
        return [MemoryBound(bytes=rows * width * 3.0, name="quantise 1x128") for width in widths]

    def _summed(self, tokens: float) -> list[Op]:
        tp = self.layout.tp_degree
        if tp == 1:
            return []
        size = tokens * self.model.hidden_size * 2.0
        return [Collective(name="all-reduce", bytes=size, ranks=tp, per_node=min(tp, self.gpus_per_node))]

    def _all_to_all(self, tokens: float, size: float) -> Op:
        """What leaves a rank: one copy an expert for few tokens, else one a node and one a rank."""
        model, ranks = self.model, self.layout.gpus
        nodes = max(1, ranks // self.gpus_per_node)
        k = model.num_experts_per_tok
        if tokens <= FEW_TOKENS and nodes > 1:
            away = tokens * k * size * (ranks - self.gpus_per_node) / ranks
            return AllToAll(nvlink=tokens * k * size - away, network=away, ranks=ranks)
        over = distinct(ranks, k, model.n_routed_experts)
        inside = tokens * size * over * (ranks - 1) / ranks
        reached = min(distinct(nodes, k, model.n_routed_experts), float(max(1, model.topk_group)))
        across = tokens * size * reached * (nodes - 1) / nodes
        return AllToAll(nvlink=inside, network=across, ranks=ranks)


def distinct(places: int, top_k: int, experts: int) -> float:
    """Mean number of places that `top_k` different ones of `experts`, spread evenly, are at.

    `R (1 - C(E - E/R, k) / C(E, k))`: 5.295 for 8 ranks, 256 experts and top-8.
    """
    if places <= 1:
        return float(places)
    own = experts / places
    miss = math.prod([max(0.0, (experts - own - i) / (experts - i)) for i in range(top_k)])
    return places * (1.0 - miss)
