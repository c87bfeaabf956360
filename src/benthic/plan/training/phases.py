"""What each phase of a stage keeps and works with, in bytes of one microbatch on one rank.

A backward meets its own activations whole and frees them as it goes, so its peak is one of a few instants:
when the gradients of the experts' outputs, of their hidden rows or of their inputs are made; in FP8 with the
rows' copies in both tilings and a weight gradient that waits to be added to its sum. What is computed again
is there as if it had been kept. `benchmarks/peaks.py` holds all of it against the trainer's own allocations.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from benthic.parallel.activations import Kept, arrivals, block_tensors, keys_of
from benthic.parallel.footprint import replicas_of
from benthic.parallel.parts import kind_of
from benthic.plan.training.block import LOGITS
from benthic.spec.layout import Layout
from benthic.spec.parameters import parameters

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benthic.model.part import Part
    from benthic.plan.training.candidate import Candidate
    from benthic.spec.model import ModelConfig
    from benthic.spec.parameters import Param

GPUS_OF_A_HOST: Final = 8
"""Up to so many ranks share experts through memory that they write for each other (`exchange_choice`)."""
_TILE: Final = 128
_WIDE: Final = 4  # bytes of a float32 sum, master or gradient
_MADE: Final = {
    "dispatch": ("scores", "weights", "choice", "routes"),
    "experts": ("normed, as rows", "mlp", "shared", "expert", "arrived", "maps"),
}
"""How names of kept tensors begin, by the phase that makes them; attention makes the others."""
_EXPERTS: Final = ("expert rows", "experts: ", "expert outputs")
"""How names of tensors begin that have a row for every copy of a token that came to an expert here."""
_NOT_ROWS: Final = ("expert outputs", "expert numbers")
_ROWS: Final = ("as rows", "attention output", "normed", "expert rows", "product")
"""How names of tensors end that are rows of a product, which a weight gradient that is put off waits with."""


@dataclass(frozen=True)
class Phase:
    """Bytes of a phase.

    network: its lane, else it computes. keeps: from its forward to the end of its backward. forward,
    backward, deferred: the most beside that; `deferred`, where weight gradients are put off, which then wait
    with `leaves` and need `apart` to be added. Of its unit of parameters, where ZeRO keeps shards, sums: the
    whole gradients, which are there from the backward on, or if eager from the forward; early: those that are
    not put off; weights: those that are gathered; masters: those gathered for FP8 copies, once a step.
    """

    network: bool = False
    eager: bool = False
    keeps: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    deferred: float = 0.0
    leaves: float = 0.0
    apart: float = 0.0
    sums: float = 0.0
    early: float = 0.0
    weights: float = 0.0
    masters: float = 0.0


Phases = tuple[tuple[str, Phase], ...]
"""Of a stage, each with its unit of parameters, as in `parallel.parts`."""


def core_of(candidate: Candidate) -> Candidate:
    """The candidate without what phases do not depend on."""
    one = candidate.layout
    inner = Layout(
        dp_degree=one.dp_degree,
        tp_degree=one.tp_degree,
        cp_degree=one.cp_degree,
        ep_degree=one.ep_degree,
        zero_stage=one.zero_stage,
    )
    return replace(candidate, layout=inner, rows=1)


@functools.lru_cache(maxsize=1 << 13)
def phases_of(core: Candidate, part: Part, *, first: bool) -> Phases:
    """A stage's phases in the order of `train.stage`; `first`: microbatches enter here."""
    return tuple(_phases(core, part, first=first))


def _phases(core: Candidate, part: Part, *, first: bool) -> Iterator[tuple[str, Phase]]:
    model, row = core.model, row_of(core)
    table = 2.0 * model.vocab_size * model.hidden_size  # the embedding's gradient is dense
    if first:
        embed = _unit(core, "embed")
        yield "embed", replace(embed, forward=row, backward=table + row, deferred=table + row)
    angles = 4.0 * model.qk_rope_head_dim * core.layout.tp_degree * tokens_of(core)
    for layer in part.layers:
        attention, *others = _block(core, _like(model, layer))
        if angles:
            attention, angles = replace(attention, keeps=attention.keeps + angles), 0.0
        yield from ((f"layers.{layer}", phase) for phase in (attention, *others))
    if part.head:
        yield "head", _head(core)
    for depth in part.mtp:
        yield f"mtp.{depth}", _projection(core, depth)
        yield from ((f"mtp.{depth}", phase) for phase in _block(core, model.num_hidden_layers + depth))
        yield "head", _head(core)


def _projection(core: Candidate, depth: int) -> Phase:
    """Of a prediction module: embedding and hidden state, both normed; it reads the embedding's table too."""
    model, row = core.model, row_of(core)
    unit, words = _unit(core, f"mtp.{depth}"), _unit(core, "embed")
    most = 2.0 * model.vocab_size * model.hidden_size + 4 * row
    return replace(
        unit,
        keeps=3 * row + 8 * tokens_of(core),
        forward=2 * row,
        backward=most,
        deferred=most,
        sums=unit.sums + words.sums,
        early=unit.early + words.early,
        weights=unit.weights + words.weights,
    )


def tokens_of(candidate: Candidate) -> float:
    """Tokens of a microbatch on one rank."""
    train = candidate.train
    return float(train.local_batch_size * train.seq_len // candidate.layout.token_shards)


def row_of(candidate: Candidate) -> float:
    """Bytes of the residual stream of a microbatch on one rank."""
    return _size(candidate) * candidate.model.hidden_size * tokens_of(candidate)


def _size(candidate: Candidate) -> int:
    return 4 if candidate.precision.weights == "float32" else 2


def _head(core: Candidate) -> Phase:
    """Logits chunk by chunk beside normed rows; gradients, the weight's too, are made in the forward pass."""
    size, row, vocabulary = _size(core), row_of(core), core.model.vocab_size
    logits = size * vocabulary * chunk_of(tokens_of(core), vocabulary, size)
    unit = _unit(core, "head")
    return replace(
        unit,
        eager=True,
        keeps=2 * row + _WIDE * tokens_of(core),
        forward=logits + row + 8 * tokens_of(core),
        backward=2 * row,
        deferred=2 * row,
    )


def chunk_of(tokens: float, vocabulary: int, size: int) -> float:
    """Tokens whose logits exist at once: `kernels.chunked_loss.chunk_of` with the room of a GPU."""
    most = max(1, LOGITS // (size * vocabulary))
    even = math.ceil(tokens / max(1, math.ceil(tokens / most)))
    return max(1, min(most, math.ceil(even / _TILE) * _TILE))


# --- parameters of a unit


def _unit(core: Candidate, unit: str) -> Phase:
    """A phase that is nothing yet but what its parameters take where they are in shards."""
    model, layout = core.model, core.layout
    sums = early = weights = masters = 0.0
    for param in _params_of(model, unit):
        count, shared = numel(param, layout), replicas_of(layout, kind_of(param)) > 1
        copied = core.precision.weights == "fp8" and param.fp8
        if layout.zero_stage > 1:
            sums += _WIDE * count
            early += _WIDE * count if kind_of(param) == "dense" and not copied else 0.0
        if copied and shared:
            masters += _WIDE * count
        elif layout.zero_stage == 3 and shared:
            weights += _size(core) * count
    return Phase(sums=sums, early=early, weights=weights, masters=masters)


def numel(param: Param, layout: Layout) -> float:
    """Elements of a parameter on one rank."""
    return param.numel / {"expert": layout.ep_degree, "sharded": layout.tp_degree}.get(kind_of(param), 1)


@functools.lru_cache(maxsize=1 << 8)
def _params_of(model: ModelConfig, unit: str) -> tuple[Param, ...]:
    names = ("norm.", "head.") if unit == "head" else (f"{unit}.",)
    return tuple(p for p in parameters(model) if p.trainable and p.name.startswith(names))


@functools.lru_cache(maxsize=1 << 10)
def _like(model: ModelConfig, layer: int) -> int:
    """The first layer of the same kind."""
    return next(one for one in range(layer + 1) if model.is_moe(one) == model.is_moe(layer))


# --- a block


@functools.lru_cache(maxsize=1 << 12)
def _block(core: Candidate, layer: int) -> tuple[Phase, ...]:
    """Its four phases, as those of a layer of the model."""
    sizes = _Block(core, layer)
    unit = _unit(core, f"layers.{layer}") if layer < core.model.num_hidden_layers else _unit(core, "mtp.0")
    found = (sizes.attention(), sizes.dispatch(), sizes.experts(), sizes.combine())
    return tuple(
        replace(each, sums=unit.sums, early=unit.early, weights=unit.weights, masters=unit.masters)
        for each in found
    )


class _Block:
    """The sizes of one block, all of them bytes of a microbatch."""

    def __init__(self, core: Candidate, layer: int) -> None:
        self.model, self.layout, self.size = core.model, core.layout, _size(core)
        self.tokens, self.row = tokens_of(core), row_of(core)
        self.moe = self.model.is_moe(layer)
        self.fp8 = core.precision.matmul == "fp8"
        self.fullest = max(core.skew, core.first_skew)
        self.experts_here = self.model.n_routed_experts / self.layout.ep_degree
        plain = replace(core.precision, fp8_swiglu=False, e5m6_attention=False)
        everything = replace(core, recompute=(), offload=(), precision=plain)
        away = set(core.offload)
        self.whole = {one.name: self._slots(one) for one in block_tensors(everything, layer)}
        kept = (one for one in block_tensors(core, layer) if set(one.phases) - away)
        self.kept = {one.name: self._slots(one) for one in kept}

    def _reached(self) -> float:
        """Ranks from which rows arrive for each token here; in mailboxes every token of each has a slot."""
        ranks = self.layout.ep_degree
        return float(ranks) if ranks <= GPUS_OF_A_HOST else arrivals(self.model, ranks)

    def _slots(self, one: Kept) -> Kept:
        """As it is kept beside mailboxes, whose empty slots are copied too, where most rows are."""
        if one.name in {"arrived rows", "maps"} and self.layout.ep_degree > 1:
            slots = self._reached() / arrivals(self.model, self.layout.ep_degree)
            return replace(one, bytes=one.bytes * slots)
        if one.name.startswith(_EXPERTS):
            return replace(one, bytes=one.bytes * self._uneven)
        return one

    @property
    def _uneven(self) -> float:
        return self.fullest if self.layout.ep_degree > 1 else 1.0

    def attention(self) -> Phase:
        """Gradients of queries, keys, values and output beside the residual stream's."""
        model, heads = self.model, self.model.num_attention_heads
        nope, key, value = model.qk_nope_head_dim, model.qk_head_dim, model.v_head_dim
        cores = self.size * heads * (key + keys_of(self.layout) * (key + value) + value) + _WIDE * heads
        peak = self.tokens * cores
        apart = 0.0
        if self.fp8:
            peak += self.tokens * 2 * model.hidden_size
            apart = self.tokens * heads * value
            apart += 2 * _WIDE * model.hidden_size * heads * max(key, value) / self.layout.tp_degree
        forward = self.size * heads * (key + model.qk_rope_head_dim) * self.tokens + self.row
        gradients = heads * (key + nope + value) + model.latent_dim + model.hidden_size
        gradients += model.q_lora_rank or 0
        return self._phase("attention", forward, (peak + apart, peak, apart), gradients)

    def dispatch(self) -> Phase:
        """Scores, and the gradient of what was sent."""
        gate = 3 * _WIDE * self.model.n_routed_experts * self.tokens if self.moe else 0.0
        return replace(self._phase("dispatch", gate, (gate, gate, 0.0), 0), network=True)

    def experts(self) -> Phase:
        """The routed experts, which stand before the shared ones in backward; or the dense network."""
        model, top_k = self.model, float(self.model.num_experts_per_tok)
        if not self.moe:
            width = model.intermediate_size
            return self._phase("experts", 2 * self.row, self._gated(width), 2 * width + model.hidden_size)
        width, shared = model.moe_intermediate_size, model.n_shared_experts * model.moe_intermediate_size
        top_k *= self._uneven
        now, later, apart = self._gated(width, top_k, experts=self.experts_here)
        later = max(later, self._gated(shared)[1]) + self._returning()
        gradients = top_k * (2 * width + model.hidden_size) + (2 * shared + model.hidden_size) * bool(shared)
        forward = 2 * self.row + self._returning()
        if "expert outputs" not in self.kept:
            forward += self.size * top_k * self.tokens * (model.hidden_size + 3 * width)
        found = self._phase("experts", forward, (now + self._returning(), later, apart), gradients)
        return replace(found, leaves=found.leaves + self._spare(width))

    def combine(self) -> Phase:
        """The sum, and the gradient that goes out."""
        return Phase(network=True, forward=self.row, backward=2 * self.row, deferred=2 * self.row)

    def _phase(self, name: str, forward: float, peaks: tuple[float, float, float], gradients: float) -> Phase:
        """With what the phase keeps and makes again; `gradients`: elements a token of all its outputs'.

        `peaks`: beside what is kept, of a backward, of one whose weight gradients are put off, and of these.
        Rows that wait in BF16 hold the graph that made them, and with it gradients of the residual stream.
        """
        mine = [one for one in self.whole.values() if _made_in(one) == name]
        keeps = self.tokens * sum(one.bytes for one in self.kept.values() if _made_in(one) == name)
        made = [one for one in mine if self.kept.get(one.name, _NONE).bytes < one.bytes]
        again = self.tokens * sum(map(self._remade, made))
        leaves = self.tokens * (gradients + sum(one.bytes for one in mine if _is_rows(one)))
        if not self.fp8:
            leaves += (self.size - 1) * self.tokens * gradients + 1.5 * self.row
        now, later, apart = peaks
        return Phase(
            keeps=keeps,
            forward=forward,
            backward=self._carried() + now + again,
            deferred=self._carried() + later + again,
            leaves=leaves if gradients else 0.0,
            apart=apart,
        )

    def _remade(self, one: Kept) -> float:
        """What stands in for a tensor that is not kept; what FP8 is made of is there beside it."""
        if not self.fp8 or one.name not in {"expert rows", "expert outputs"}:
            return one.bytes
        wide = self.size * self.model.num_experts_per_tok * self.model.hidden_size
        return one.bytes + self._uneven * wide

    def _carried(self) -> float:
        """Gradients of the residual stream and of what is beside it."""
        return (2 + (self.layout.tp_degree if self.layout.tp_degree > 1 else 0)) * self.row

    def _gated(self, width: int, rows: float = 1.0, experts: float = 0.0) -> tuple[float, float, float]:
        """The most that a gated network's backward needs beside what it keeps: at once, put off, then.

        `rows` of a token. The outputs of `experts` were kept, and are free once their gradient is there.
        FP8 has the gradient of a dense matrix apart before it is added; experts' are added in their products.
        """
        size, wide, narrow = self.size, rows * self.model.hidden_size, rows * width
        made = size * wide if experts else 0.0
        if not self.fp8:
            now, later = max(made, size * narrow, 2 * size * narrow - made), max(made, 3 * size * narrow)
            return self.tokens * now, self.tokens * later, 0.0
        spare = self._spare(width) if experts else 0.0
        weight = 0.0 if experts else self.model.hidden_size * width / self.layout.tp_degree
        down, up = 2 * wide + size * narrow, (size + 1) * wide + 4 * narrow - made
        now = max(
            self.tokens * made,
            self.tokens * (down + narrow) + _WIDE * weight,
            self.tokens * (up - narrow) + 2 * _WIDE * weight,
        )
        later = self.tokens * max(made, down, wide - made + 3 * size * narrow, up)
        return now + spare, later + spare, self.tokens * wide + 2 * _WIDE * weight + spare

    def _spare(self, width: int) -> float:
        """FP8 columns of the experts' rows are padded, expert by expert."""
        return _TILE * self.experts_here * (self.model.hidden_size + 2 * width) if self.fp8 else 0.0

    def _returning(self) -> float:
        """Rows of a gradient that arrive, unless they are read where peers wrote them in BF16."""
        ranks, width = self.layout.ep_degree, self.model.hidden_size
        if ranks == 1 or (ranks <= GPUS_OF_A_HOST and not self.fp8):
            return 0.0
        each = self.size * width + (width if self.fp8 else 0)
        return self._reached() * self.tokens * each


_NONE: Final = Kept("", 0.0, ())


def _made_in(one: Kept) -> str:
    return _phase_of(one.name)


@functools.lru_cache(maxsize=1 << 7)
def _phase_of(name: str) -> str:
    return next((phase for phase, names in _MADE.items() if name.startswith(names)), "attention")


def _is_rows(one: Kept) -> bool:
    return one.name.endswith(_ROWS) and not one.name.startswith(_NOT_ROWS)
