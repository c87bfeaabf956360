"""Operations with what they must do at least: FLOPs, and bytes over each link.

Sizes are those of one GPU. `kind` names what measurements an operation can be compared with, `at` where among
them it is; `alike` are other kinds, and places there, that say something about it where its own was not
measured. All sizes are positive; a multiply-add counts as two FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, Literal

from benthic.plan.cost.transfers import Alike, AllToAll, Collective, PointToPoint

if TYPE_CHECKING:
    from collections.abc import Callable

Dtype = Literal["fp8", "bf16", "fp32"]

SIZES: Final[dict[Dtype, int]] = {"fp8": 1, "bf16": 2, "fp32": 4}
_BACKWARD: Final = 2.5  # products of FlashAttention's backward over its forward: five for two


@dataclass(frozen=True, kw_only=True, slots=True)
class Gemm:
    """`[m, k] x [k, n]`, read once and written once; FP8 operands carry block scales and give BF16.

    `name` is another where the product is part of a measured whole, as "cross entropy" after the head.
    """

    m: float
    n: float
    k: float
    dtype: Dtype = "bf16"
    name: str = "gemm"

    @property
    def portable(self) -> bool:
        """Whether another machine's measurements speak for this one.

        A named whole is one implementation, and kernels in FP8 differ too much.
        """
        return self.name == "gemm" and self.dtype != "fp8"

    @property
    def kind(self) -> str:
        """By name and dtype."""
        return f"{self.name} {self.dtype}"

    @property
    def at(self) -> tuple[float, ...]:
        """m, n, k."""
        return (self.m, self.n, self.k)

    @property
    def alike(self) -> tuple[Alike, ...]:
        """The product alone, and in BF16."""
        kinds = dict.fromkeys((f"gemm {self.dtype}", "gemm bf16"))
        return tuple((kind, self.at) for kind in kinds if kind != self.kind)

    @property
    def flops(self) -> float:
        """2 m n k."""
        return 2.0 * self.m * self.n * self.k

    @property
    def bytes(self) -> float:
        """Both operands, and a result in at least BF16."""
        size = SIZES[self.dtype]
        return size * self.k * (self.m + self.n) + max(2, size) * self.m * self.n


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupedGemm:
    """`experts` products with `[k, n]` each, over `rows` rows in all.

    `skew` is what the busiest GPU gets over the mean of all GPUs: it works on `rows x skew` rows.
    gradient: the weights' gradient, a product over rows that our kernel adds to an FP32 sum; `n` and `k` are
        still the weights' sizes.
    """

    rows: float
    experts: float
    n: float
    k: float
    dtype: Dtype = "bf16"
    skew: float = 1.0
    gradient: bool = False

    @property
    def portable(self) -> bool:
        """Whether another machine's measurements speak for this one: kernels in FP8 differ too much."""
        return self.dtype != "fp8"

    @property
    def kind(self) -> str:
        """By dtype and by what it makes."""
        return f"grouped gemm {self.dtype}{' gradient' if self.gradient else ''}"

    @property
    def at(self) -> tuple[float, ...]:
        """Experts, rows of an expert, n, k."""
        return (self.experts, self.rows * self.skew / self.experts, self.n, self.k)

    @property
    def alike(self) -> tuple[Alike, ...]:
        """Grouped, in BF16, or one product with all rows."""
        one = (max(1.0, self.rows * self.skew), self.n, self.k)
        kinds = dict.fromkeys((f"grouped gemm {self.dtype}", "grouped gemm bf16"))
        grouped = tuple((kind, self.at) for kind in kinds if kind != self.kind)
        return (*grouped, (f"gemm {self.dtype}", one))

    @property
    def flops(self) -> float:
        """2 rows n k, of the busiest GPU."""
        return 2.0 * self.rows * self.skew * self.n * self.k

    @property
    def bytes(self) -> float:
        """Rows in and out, and the weights of the experts that have any rows."""
        size, rows = SIZES[self.dtype], self.rows * self.skew
        read = min(self.experts, max(rows, 1.0))
        return size * self.k * (rows + read * self.n) + max(2, size) * rows * self.n


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Attention of packed rows in training: `rows` rows of `seq_len` queries, expanded keys and values.

    packed: rows hold sequences of several lengths, or queries see keys of other ranks: another kernel.
    kept: share of the pairs of a whole row that document masks leave.
    """

    rows: float
    heads: float
    seq_len: float
    qk_dim: int
    v_dim: int
    causal: bool = True
    backward: bool = False
    packed: bool = False
    kept: float = 1.0

    dtype: ClassVar[Dtype] = "bf16"
    portable: ClassVar[bool] = True

    @property
    def kind(self) -> str:
        """By head dims, mask, packing and direction."""
        mask, way = "causal" if self.causal else "full", " backward" if self.backward else ""
        return f"attention {self.qk_dim}x{self.v_dim} {mask}{' packed' if self.packed else ''}{way}"

    @property
    def at(self) -> tuple[float, ...]:
        """Rows x heads, queries of a sequence."""
        return (self.rows * self.heads, self.seq_len * self.kept)

    @property
    def alike(self) -> tuple[Alike, ...]:
        """Rows of one length."""
        kind = self.kind.replace(" packed", "")
        return ((kind, self.at),) if self.packed else ()

    @property
    def flops(self) -> float:
        """2 rows heads s^2 (qk + v), halved if causal, 2.5 times as much backward, of the pairs kept."""
        pairs = self.kept * self.seq_len**2 / (2 if self.causal else 1)
        once = 2.0 * self.rows * self.heads * pairs * (self.qk_dim + self.v_dim)
        return once * (_BACKWARD if self.backward else 1.0)

    @property
    def bytes(self) -> float:
        """Queries, keys, values and output; backward also their gradients."""
        once = 2.0 * self.rows * self.heads * self.seq_len * 2 * (self.qk_dim + self.v_dim)
        return once * (2 if self.backward else 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkedPrefill:
    """Attention of prompt chunks in serving: `tokens` new queries of `requests` requests, expanded.

    `pairs` is the sum over queries of the keys that each meets: `new x before + new (new + 1)/2` a chunk.
    """

    requests: float
    tokens: float
    pairs: float
    heads: float
    qk_dim: int = 192
    v_dim: int = 128

    dtype: ClassVar[Dtype] = "bf16"
    portable: ClassVar[bool] = True

    @property
    def kind(self) -> str:
        """By head dims."""
        return f"chunked prefill {self.qk_dim}x{self.v_dim}"

    @property
    def at(self) -> tuple[float, ...]:
        """Heads, new tokens, keys that a token meets on average."""
        return (self.heads, self.tokens, self.pairs / self.tokens)

    @property
    def alike(self) -> tuple[Alike, ...]:
        """Causal attention of rows whose queries meet as many keys on average."""
        keys = self.pairs / self.tokens
        return ((f"attention {self.qk_dim}x{self.v_dim} causal", (self.heads * self.requests, 2 * keys)),)

    @property
    def flops(self) -> float:
        """2 pairs heads (qk + v)."""
        return 2.0 * self.pairs * self.heads * (self.qk_dim + self.v_dim)

    @property
    def bytes(self) -> float:
        """Queries and output; keys and values of the mean context once a request."""
        width = self.heads * (self.qk_dim + self.v_dim)
        return 2.0 * width * (self.tokens + self.requests * self.pairs / self.tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class MlaDecode:
    """Absorbed attention of a decode step: `requests` requests over `context` cached tokens in all.

    `queries` is how many tokens of a request are decoded at once (1, or drafts and one more).
    """

    requests: float
    context: float
    heads: float
    queries: float = 1
    kv_lora_rank: int = 512
    rope_dim: int = 64
    cache_dtype: Dtype = "bf16"

    dtype: ClassVar[Dtype] = "bf16"
    portable: ClassVar[bool] = True

    @property
    def kind(self) -> str:
        """By cache dtype."""
        return f"mla decode {self.cache_dtype}"

    @property
    def at(self) -> tuple[float, ...]:
        """Requests, mean context, rows of queries that share a latent."""
        return (self.requests, max(1.0, self.context / self.requests), self.heads * self.queries)

    @property
    def alike(self) -> tuple[Alike, ...]:
        """The same over a BF16 cache."""
        return (("mla decode bf16", self.at),)

    @property
    def flops(self) -> float:
        """2 context queries heads (2 C + r)."""
        width = 2 * self.kv_lora_rank + self.rope_dim
        return 2.0 * self.context * self.queries * self.heads * width

    @property
    def bytes(self) -> float:
        """The cached latents once; queries in and latents out."""
        latent, rope = self.kv_lora_rank * SIZES[self.cache_dtype], 2 * self.rope_dim
        ends = 2.0 * self.requests * self.queries * self.heads * (2 * self.kv_lora_rank + self.rope_dim)
        return self.context * (latent + rope) + ends


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryBound:
    """Anything whose time is reading and writing `bytes` of GPU memory; `name` is the op's, as measured."""

    bytes: float
    name: str = "copy"

    dtype: ClassVar[Dtype] = "bf16"
    flops: ClassVar[float] = 0.0
    portable: ClassVar[bool] = True

    @property
    def kind(self) -> str:
        """By name."""
        return f"memory {self.name}"

    @property
    def at(self) -> tuple[float, ...]:
        """Bytes read and written."""
        return (max(1.0, self.bytes),)

    @property
    def alike(self) -> tuple[Alike, ...]:
        """A copy of as many bytes."""
        return (("memory copy", self.at),)


Compute = Gemm | GroupedGemm | Attention | ChunkedPrefill | MlaDecode | MemoryBound
Transfer = AllToAll | PointToPoint | Collective
Op = Compute | Transfer

BY_NAME: Final[dict[str, Callable[..., Op]]] = {
    "Gemm": Gemm,
    "GroupedGemm": GroupedGemm,
    "Attention": Attention,
    "ChunkedPrefill": ChunkedPrefill,
    "MlaDecode": MlaDecode,
    "MemoryBound": MemoryBound,
    "AllToAll": AllToAll,
    "PointToPoint": PointToPoint,
    "Collective": Collective,
}
