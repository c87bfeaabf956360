"""What a microbatch in flight keeps on a rank between forward and backward, tensor by tensor.

Counted are the tensors that autograd saves and those that recomputation starts from. The test of this module
holds them against the memory that is really alive after a forward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from benthic.parallel.parts import parts_of, stages_of
from benthic.parallel.setup import expanded, number

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benthic.model.part import Part
    from benthic.parallel.setup import Setup
    from benthic.sched.pipeline.table import Table
    from benthic.spec.layout import Layout
    from benthic.spec.model import ModelConfig

_BYTES: Final = {"float32": 4, "bfloat16": 2, "fp8": 2}
_STATISTIC: Final = 4  # of a row, in float32: a norm's reciprocal root mean square, a log-sum-exp
_INDEX: Final = 8  # int64
_TILE: Final = 128


@dataclass(frozen=True)
class Kept:
    """Bytes of one tensor per token, and the phases that keep it; all being offloaded, it is on the host.

    Phase "none" stands for what is not moved.
    """

    name: str
    bytes: float
    phases: tuple[str, ...]


def peak_bytes(config: Setup, table: Table, pp: int) -> int:
    """The most that the microbatches in flight keep on a pipeline rank at once.

    As in `peak_activations`, the end of a backward gives back, a W if it is split.
    """
    parts = parts_of(config.model, config.layout, table.stages)
    size = {stage: stage_bytes(config, parts[stage]) for stage in stages_of(table, pp)}
    held = peak = 0
    for slot in table.slots[pp]:
        for action in slot.actions:
            held += {"F": 1, "B": -1, "I": 0, "W": -1}[action.kind] * size[action.stage]
            peak = max(peak, held)
    return peak


def stage_bytes(config: Setup, part: Part) -> int:
    """What one microbatch keeps in a stage."""
    model, layout = config.model, config.layout
    tokens = number(config.train.local_batch_size) * number(config.train.seq_len) // layout.token_shards
    layers = [*part.layers, *(model.num_hidden_layers + depth for depth in part.mtp)]
    kinds = {model.is_moe(layer): layer for layer in layers}
    size = {moe: block_bytes(config, layer) for moe, layer in kinds.items()}
    per_token = sum(size[model.is_moe(layer)] for layer in layers)
    width = _BYTES[config.precision.weights] * model.hidden_size
    loss = 2 * width + _STATISTIC  # input of the norm, and the gradient of its output, made ahead
    if part.head:
        per_token += loss
    per_token += len(part.mtp) * (loss + 3 * width + 2 * _STATISTIC)  # embedding, and both halves normed
    per_token += 4 * model.qk_rope_head_dim * layout.tp_degree  # cosines and sines in float32
    return round(tokens * per_token)


def block_bytes(config: Setup, layer: int) -> float:
    """What one block keeps of a token on the device."""
    away = set(config.offload)
    return sum(one.bytes for one in block_tensors(config, layer) if set(one.phases) - away)


def block_tensors(config: Setup, layer: int) -> tuple[Kept, ...]:
    """Every tensor that one block keeps."""
    counted = _Block(config, layer)
    return tuple(one for one in counted.tensors() if one.bytes and one.phases)


class _Block:
    """The sizes of one block under one config."""

    def __init__(self, config: Setup, layer: int) -> None:
        self.model, self.layout, self.precision = config.model, config.layout, config.precision
        wanted = expanded(config.recompute)
        self.again = wanted | ({"swiglu"} if self.precision.fp8_swiglu else set())
        self.moe = self.model.is_moe(layer)
        self.size = _BYTES[self.precision.weights]
        matmul = self.precision.matmul
        self.fp8 = matmul == "fp8"
        self.shares = not self.fp8 and _BYTES[matmul] == self.size
        self.joined = self.fp8 and self.layout.ep_degree == 1  # experts are one step, see model.mixture
        self.noting = self.fp8 or self.precision.e5m6_attention or bool(self.again or config.offload)

    def tensors(self) -> Iterator[Kept]:
        """Phase by phase."""
        yield from self._between()
        if "attention" not in self.again:
            yield from self._attention()
        if self.moe:
            yield from self._routing()
            if "experts" in self.again:
                yield from self._rows_arrived()
            else:
                yield from self._shared()
                yield from self._routed()
        elif "experts" not in self.again:
            yield from self._gated("mlp", self.model.intermediate_size, 1.0)

    def _wide(self, width: float) -> float:
        """A row as it passes through the network."""
        return self.size * width

    def _row(self, width: float) -> float:
        """A row as a linear layer keeps it for its weight gradient."""
        if self.fp8:
            return _fp8(width)
        return _BYTES[self.precision.matmul] * width

    def _between(self) -> Iterator[Kept]:
        """The residual stream where it enters, after attention, and its norm."""
        size, again, tp = self.model.hidden_size, self.again, self.layout.tp_degree
        yield Kept("x", self._wide(size), ("attention",))
        later: list[str] = [phase for phase in ("dispatch", "experts") if phase in again]
        readers: list[str] = [p for p in ("dispatch", "experts") if p not in again and "norms" in again]
        if not self.moe:  # its dispatch reads nothing
            later, readers = ([p for p in phases if p == "experts"] for phases in (later, readers))
        own = [] if "attention" in again else ["attention"]
        yield Kept("residual", self._wide(size), (*own, *later, *readers))
        if "norms" not in again:
            if self.moe and "dispatch" not in again:
                later.append("dispatch")  # the gate
            if self.moe and "expert_inputs" in again and "experts" not in again:
                later += ["experts"] if self.layout.ep_degree == 1 and not self.joined else []
            if self.shares and tp == 1 and "experts" not in again:
                later.append("experts")
        yield Kept("normed", self._wide(size), tuple(dict.fromkeys(later)))
        copied = not self.shares and "norms" not in again
        if (copied or tp > 1) and "experts" not in again and (not self.moe or self.model.n_shared_experts):
            yield Kept("normed, as rows", tp * self._row(size), ("experts",))

    def _attention(self) -> Iterator[Kept]:
        model, phase = self.model, ("attention",)
        heads, again = model.num_attention_heads, self.again
        if "norms" not in again:
            copies = 1 if self.shares or self.noting else 2  # one for queries and latents each, unless shared
            yield Kept("normed x, as rows", copies * self._row(model.hidden_size), phase)
        yield Kept("statistics", _STATISTIC * (3 + (model.q_lora_rank is not None)), phase)
        yield from self._latents()
        if "up_projections" not in again:
            key = model.qk_nope_head_dim + model.qk_rope_head_dim
            expanded_kv = key + model.qk_nope_head_dim + model.v_head_dim
            yield Kept("q", self._wide(heads * key), phase)
            yield Kept("k and v", keys_of(self.layout) * self._wide(heads * expanded_kv), phase)
        width = heads * model.v_head_dim
        e5m6 = self.precision.e5m6_attention
        yield Kept("attention output", _e5m6(width) if e5m6 else self._wide(width), phase)
        if not (self.shares or self.fp8 or e5m6):
            yield Kept("attention output, as rows", self._row(width), phase)
        yield Kept("log-sum-exp", _STATISTIC * heads, phase)

    def _latents(self) -> Iterator[Kept]:
        model, tp, phase = self.model, self.layout.tp_degree, ("attention",)
        yield Kept("latent and key", tp * self._wide(model.latent_dim), phase)
        if model.q_lora_rank is not None:
            yield Kept("compressed query", self._wide(model.q_lora_rank), phase)
        elif "up_projections" in self.again and "norms" not in self.again and not self.shares:
            yield Kept("compressed query", self._wide(model.hidden_size), phase)
        if model.q_lora_rank is None and tp > 1:
            yield Kept("normed x of all, as rows", tp * self._row(model.hidden_size), phase)
        if "norms" not in self.again or self.layout.cp_degree > 1:
            yield Kept(
                "normed latent, as rows", keys_of(self.layout) * tp * self._row(model.kv_lora_rank), phase
            )
        if model.q_lora_rank is not None and ("norms" not in self.again or tp > 1):
            yield Kept("normed query, as rows", tp * self._row(model.q_lora_rank), phase)

    def _routing(self) -> Iterator[Kept]:
        """Scores, choice and weights; the balance loss reads the scores in the experts' phase."""
        model, top_k = self.model, self.model.num_experts_per_tok
        yield Kept("scores", 4 * model.n_routed_experts + _STATISTIC, ("none",))
        yield Kept("weights", 4 * top_k, ("none",))
        if "dispatch" not in self.again:
            normed = 4 * top_k + _STATISTIC if model.norm_topk_prob else 0
            yield Kept("choice", _INDEX * top_k + normed, ("dispatch",))
        if self.layout.ep_degree > 1:
            routes = top_k + self.layout.ep_degree + arrivals(self.model, self.layout.ep_degree)
            yield Kept("routes", _INDEX * routes, ("none",))

    def _rows_arrived(self) -> Iterator[Kept]:
        """What recomputing the experts or their inputs starts from, beside `normed`: rows as they came.

        The exchange holds them, so they stay on the device.
        """
        top_k = self.model.num_experts_per_tok
        yield Kept("expert numbers", 4 * top_k, ("none",))
        if self.layout.ep_degree > 1:
            arrived = self._wide(self.model.hidden_size) + 8 * top_k
            yield Kept("arrived rows", arrivals(self.model, self.layout.ep_degree) * arrived, ("none",))

    def _shared(self) -> Iterator[Kept]:
        shared = self.model.n_shared_experts * self.model.moe_intermediate_size
        if shared:
            yield from self._gated("shared experts", shared, 1.0)

    def _routed(self) -> Iterator[Kept]:
        model, top_k, phase = self.model, self.model.num_experts_per_tok, ("experts",)
        if "expert_inputs" in self.again:
            if not self.joined:  # there it starts from the tokens, as products read them
                yield from self._rows_arrived()
        else:
            yield Kept("expert rows", top_k * self._row(model.hidden_size), phase)
        yield from self._gated("experts", model.moe_intermediate_size, top_k)
        if "expert_outputs" not in self.again and not self.joined:
            yield Kept("expert outputs", top_k * self._wide(model.hidden_size), phase)
        maps = 2.0 * _INDEX * top_k
        if self.layout.ep_degree > 1:
            maps = arrivals(self.model, self.layout.ep_degree) * top_k * (_INDEX + 4)
        yield Kept("maps", maps, phase)

    def _gated(self, name: str, width: int, rows: float) -> Iterator[Kept]:
        gate_up = _fp8(2 * width) if self.precision.fp8_swiglu else self._wide(2 * width)
        yield Kept(f"{name}: gate and up", rows * gate_up, ("experts",))
        if "swiglu" not in self.again:
            yield Kept(f"{name}: product", rows * self._row(width), ("experts",))


def keys_of(layout: Layout) -> float:
    """Keys that a rank expands for each of its tokens: both its pieces of a row may meet the beginning."""
    return layout.cp_degree + 0.5 if layout.cp_degree > 1 else 1.0


def arrivals(model: ModelConfig, ranks: int) -> float:
    """Ranks that a token goes to, if its experts are drawn evenly from those that its groups allow.

    b (1 - C(E - E/b, k)/C(E, k)) over the b ranks and E experts that these allow; DeepSeek-V3 and 8 nodes:
    3.63 of the 4 allowed.
    """
    chosen = model.topk_group / model.n_group if model.n_group > 1 else 1.0
    experts = round(model.n_routed_experts * chosen)
    reached = ranks * chosen if ranks >= model.n_group else float(ranks)
    here = max(1, round(experts / reached))
    top_k = model.num_experts_per_tok
    return reached * (1 - math.comb(max(experts - here, 0), top_k) / math.comb(experts, top_k))


def _fp8(width: float) -> float:
    """A row of E4M3 with its float32 scales."""
    return width + 4 * math.ceil(width / _TILE)


def _e5m6(width: float) -> float:
    """A row of 12-bit values with its float32 scales."""
    return 3 * math.ceil(width / 2) + 4 * math.ceil(width / _TILE)
