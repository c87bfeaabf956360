"""Activation checkpointing: phases and pieces of each block are computed again in the backward pass.

A whole phase goes through torch's checkpoint, which keeps what enters it. Pieces are smaller:

| piece            | not kept                                 | made again from                        |
|------------------|------------------------------------------|----------------------------------------|
| "norms"          | outputs of RMSNorm, and what linear      | their inputs, which are kept anyway    |
|                  | layers make of them (FP8 tiles)          |                                        |
| "up_projections" | queries, keys and values                 | the two latents before their norms     |
| "swiglu"         | outputs of SwiGLU                        | its input                              |
| "expert_inputs"  | a token's copies for its experts here    | its one row that arrived               |
| "expert_outputs" | rows that combine weighs                 | one more down-projection               |

The blocks do not know: their modules and phases are replaced by ones that tell the block's `Keeper`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from benthic.kernels import ops
from benthic.model.block import PHASES, Attended, MoeBlock, Sent
from benthic.model.fp8_products import MixedLinear
from benthic.model.local import PackedAttend
from benthic.model.mla import LowRankAttention
from benthic.model.products import Kept, Products, SplitLinear, Sum
from benthic.model.sockets import InFlight
from benthic.parallel.context import ContextAttend
from benthic.parallel.setup import PIECES, expanded
from benthic.train.rebuild import Keeper, Recipe, as_before

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from benthic.model.block import Block
    from benthic.model.local import Core
    from benthic.model.mla import Attention
    from benthic.model.mlp import Mlp
    from benthic.model.moe import Experts
    from benthic.model.network import DeepSeek
    from benthic.model.norm import Norm
    from benthic.model.rope import Angles
    from benthic.model.sockets import Arrived, Attend, Exchange, Linear, Sockets
    from benthic.train.config import PrecisionConfig, RunConfig


def recompute(model: DeepSeek, config: RunConfig) -> None:
    """Let every block, MTP blocks included, keep for backward what the config says and no more.

    Phases keep no state, so running one twice counts nothing twice; only the tensors that enter a phase are
    kept. Cost: the forward FLOPs of the phase or piece once more.
    """
    wanted, precision = expanded(config.recompute), config.precision
    pieces = wanted & set(PIECES) | ({"swiglu"} if precision.fp8_swiglu else set())
    keeps = bool(pieces or config.offload or precision.e5m6_attention or precision.matmul == "fp8")
    depths = range(len(model.mtp))
    for block in [*model.blocks, *(model.mtp_module(depth).block for depth in depths)]:
        if keeps:
            _Keeping(frozenset(pieces), precision, frozenset(config.offload)).apply(block, wanted)
        for phase in PHASES:
            if phase in wanted:
                setattr(block, phase, _checkpointed(getattr(block, phase)))


def _checkpointed(phase: Callable[..., Any]) -> Callable[..., Any]:
    # no phase draws random numbers, so their state need not be kept
    return functools.partial(checkpoint, phase, use_reentrant=False, preserve_rng_state=False)


@dataclass(frozen=True)
class _Products:
    """Products whose rows are made again where the operand is, and once for two products of one operand."""

    inner: Products
    keeper: Keeper

    def keep_rows(self, x_RI: Tensor, ends_E: Tensor | None) -> Kept:
        """The rows; what was made of a noted operand is noted."""
        rows = self.keeper.once(x_RI, lambda: self.inner.keep_rows(x_RI, ends_E))
        if self.keeper.knows(x_RI):
            source = self.keeper.source(x_RI)
            again = Recipe(lambda: self.inner.keep_rows(source(), ends_E))
            for i, part in enumerate(rows):
                if not self.keeper.knows(part):
                    self.keeper.note(part, lambda i=i: again.value()[i])  # type: ignore[misc]
        return rows

    def keep_weight(self, weight: Tensor) -> Kept:
        """The weight, which is in memory anyway."""
        kept = self.inner.keep_weight(weight)
        self.keeper.stays(kept)
        return kept

    def keep_gradient(self, dy_RO: Tensor, ends_E: Tensor | None) -> tuple[Kept, Kept]:
        """As the products do."""
        return self.inner.keep_gradient(dy_RO, ends_E)

    def output(self, rows: Kept, weight: Kept, ends_E: Tensor | None, *, dtype: torch.dtype) -> Tensor:
        """As the products do."""
        return self.inner.output(rows, weight, ends_E, dtype=dtype)

    def input_gradient(self, dy: Kept, weight: Kept, ends_E: Tensor | None, *, dtype: torch.dtype) -> Tensor:
        """As the products do."""
        return self.inner.input_gradient(dy, weight, ends_E, dtype=dtype)

    def weight_gradient(self, dy: Kept, rows: Kept, ends_E: Tensor | None, sum_: Sum | None = None) -> Tensor:
        """As the products do."""
        return self.inner.weight_gradient(dy, rows, ends_E, sum_)


@dataclass(frozen=True)
class _Exchange:
    """An exchange whose arrived rows are copied to the experts again for backward; nothing travels twice."""

    inner: Exchange
    keeper: Keeper

    def start_dispatch(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> InFlight:
        """As the exchange does."""
        return self.inner.start_dispatch(x_TD, expert_TK, weight_TK)

    def finish_dispatch(self, flight: InFlight) -> Arrived:
        """The rows, which are noted."""
        arrived = self.inner.finish_dispatch(flight)
        if self.keeper.running:
            sources, handle = [self.keeper.source(tensor) for tensor in flight.tensors], flight.handle
            self.keeper.note(
                arrived.rows_RD,
                lambda: self.inner.finish_dispatch(InFlight(tuple(s() for s in sources), handle)).rows_RD,
            )
        return arrived

    def start_combine(self, rows_RD: Tensor, arrived: Arrived, beside: tuple[Tensor, ...] = ()) -> InFlight:
        """As the exchange does."""
        return self.inner.start_combine(rows_RD, arrived, beside)

    def finish_combine(self, flight: InFlight) -> Tensor:
        """As the exchange does."""
        return self.inner.finish_combine(flight)


@dataclass
class _Keeping:
    """Puts a `Keeper` round the phases of one block and tells it what can be made again."""

    pieces: frozenset[str]
    precision: PrecisionConfig
    offload: frozenset[str]
    keeper: Keeper = field(default_factory=Keeper)

    def apply(self, block: Block, recomputed: frozenset[str]) -> None:
        """Replace what notes; phases that are recomputed as a whole stay as they are."""
        self._attention(block.attn)
        if "norms" in self.pieces:
            _replace(block.attn_norm, "with_input", self._norm_with_input(block.attn_norm))
            norms = [block.attn.kv_a_norm]
            norms += [block.attn.q_a_norm] if isinstance(block.attn, LowRankAttention) else []
            for norm in norms:
                _replace(norm, "forward", self._norm(norm))
        if "swiglu" in self.pieces:
            for module in self._gated(block):
                _replace(module, "activate", self._activate)
        if "expert_outputs" in self.pieces and isinstance(block, MoeBlock):
            experts = block.moe.experts
            _replace(experts, "project_down", self._project_down(experts.project_down))
        for phase in PHASES:
            if phase not in recomputed:
                setattr(block, phase, self._phase(block, phase))

    def _phase(self, block: Block, name: str) -> Callable[..., Any]:
        run = getattr(block, name)

        def keeping(*args: Any) -> Any:
            if not torch.is_grad_enabled():
                return run(*args)
            with self.keeper.phase(offload=name in self.offload, staying=block.parameters()):
                first, *rest, sockets = args
                self._arrived(first, block.ffn_norm)
                return run(first, *rest, self._sockets(sockets))

        return keeping

    def _arrived(self, state: Any, norm: Norm) -> None:
        """The norm between attention and what follows is read in later phases than it is computed in."""
        attended = state.attended if isinstance(state, Sent) else state
        if "norms" in self.pieces and isinstance(attended, Attended):
            self.keeper.note(attended.normed_TD, self._normed(norm, attended.residual_TD))

    def _sockets(self, sockets: Sockets) -> Sockets:
        exchange: Exchange = sockets.exchange
        if "expert_inputs" in self.pieces:
            exchange = _Exchange(exchange, self.keeper)
        return replace(sockets, exchange=exchange, linear=self._linear(sockets.linear))

    def _linear(self, linear: Linear) -> Linear:
        if isinstance(linear, MixedLinear):
            return replace(linear, fp8=self._split(linear.fp8), wide=self._split(linear.wide))
        assert isinstance(linear, SplitLinear), "training multiplies through split products"  # noqa: S101
        return self._split(linear)

    def _split(self, linear: SplitLinear) -> SplitLinear:
        return replace(linear, products=_Products(linear.products, self.keeper))

    def _norm(self, norm: Norm) -> Callable[[Tensor], Tensor]:
        forward = norm.forward

        def noting(x: Tensor) -> Tensor:
            out = forward(x)
            self.keeper.note(out, self._normed(norm, x))
            return out

        return noting

    def _norm_with_input(self, norm: Norm) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        with_input = norm.with_input

        def noting(x_TD: Tensor) -> tuple[Tensor, Tensor]:
            normed_TD, input_TD = with_input(x_TD)
            self.keeper.note(normed_TD, self._normed(norm, x_TD))
            return normed_TD, input_TD

        return noting

    def _normed(self, norm: Norm, x: Tensor) -> Callable[[], Tensor]:
        source = self.keeper.source(x)
        return lambda: as_before(lambda again: ops.rms_norm(again, norm.weight, norm.eps), source())

    def _gated(self, block: Block) -> list[Mlp | Experts]:
        if isinstance(block, MoeBlock):
            shared = [] if block.moe.shared is None else [block.moe.shared]
            return [block.moe.experts, *shared]
        mlp: Mlp = block.get_submodule("mlp")  # type: ignore[assignment]
        return [mlp]

    def _activate(self, gate_up_RF2: Tensor) -> Tensor:
        """SwiGLU, whose output, and in FP8 whose input, need not be kept."""
        if self.precision.fp8_swiglu and self.keeper.running:
            self._narrow(gate_up_RF2, *self._fp8(gate_up_RF2))
        hidden_RF = ops.swiglu(gate_up_RF2)
        if self.keeper.running:
            source = self.keeper.source(gate_up_RF2)
            self.keeper.note(hidden_RF, lambda: as_before(ops.swiglu, source()))
        return hidden_RF

    def _project_down(self, project: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noting(hidden_RF: Tensor, ends_E: Tensor, linear: Linear) -> Tensor:
            rows_RD = project(hidden_RF, ends_E, linear)
            if self.keeper.running:
                source = self.keeper.source(hidden_RF)
                self.keeper.note(rows_RD, lambda: project(source(), ends_E, linear))
            return rows_RD

        return noting

    def _attention(self, attention: Attention) -> None:
        meet = attention.meet

        def noting(compressed_TX: Tensor, kv_TCr: Tensor, angles: Angles, sockets: Sockets) -> Tensor:
            if not self.keeper.running:
                return meet(compressed_TX, kv_TCr, angles, sockets)
            attend = sockets.attend
            operands = None
            if "up_projections" in self.pieces:
                query, latent = self.keeper.source(compressed_TX), self.keeper.source(kv_TCr)
                operands = Recipe(lambda: _operands(meet, query(), latent(), angles, sockets))
            core = functools.partial(self._core, _core_of(attend), operands)
            return meet(compressed_TX, kv_TCr, angles, replace(sockets, attend=_with_core(attend, core)))

        _replace(attention, "meet", noting)

    def _core(self, core: Core, operands: Recipe | None, *args: Any, **lengths: Any) -> Tensor:
        """Attention, whose operands are rebuilt together and whose output is kept once, whoever reads it."""
        if operands is not None:
            for i in range(3):
                self.keeper.note(args[i], lambda i=i: operands.value()[i])  # type: ignore[misc]
        out_THv = core(*args, **lengths)
        if self.precision.e5m6_attention:
            out_THv = out_THv.contiguous()  # some kernels pad it; the padding is theirs
            self._narrow(out_THv, *self._e5m6(out_THv.detach().flatten(1)))
        elif self.precision.matmul == "fp8" and out_THv.is_contiguous():
            self.keeper.note(out_THv, self.keeper.source(out_THv))
        return out_THv

    def _narrow(self, tensor: Tensor, parts: tuple[Tensor, ...], widen: Callable[..., Tensor]) -> None:
        """Keep `parts` instead of `tensor`, which `widen` makes of them."""
        sources, shape = [self.keeper.source(part) for part in parts], tensor.shape
        self.keeper.note(tensor, lambda: widen(*(source() for source in sources)).view(shape))

    def _fp8(self, rows: Tensor) -> tuple[tuple[Tensor, ...], Callable[..., Tensor]]:
        parts = ops.quantise_fp8_rows(rows.detach(), power_of_two=self.precision.power_of_two_scales)
        return parts, functools.partial(ops.dequantise_fp8_rows, dtype=rows.dtype)

    def _e5m6(self, rows: Tensor) -> tuple[tuple[Tensor, ...], Callable[..., Tensor]]:
        width, dtype = rows.shape[1], rows.dtype
        return ops.quantise_e5m6(rows), lambda packed, scale: ops.dequantise_e5m6(
            packed, scale, width, dtype=dtype
        )


def _operands(
    meet: Callable[..., Tensor], compressed_TX: Tensor, kv_TCr: Tensor, angles: Angles, sockets: Sockets
) -> tuple[Tensor, ...]:
    """Queries, keys and values as `meet` gives them to attention, which is not computed."""
    found: list[Tensor] = []

    def stop(*args: Tensor, **lengths: Any) -> Tensor:  # noqa: ARG001 (attention's signature)
        found.extend(operand.detach() for operand in args[:3])
        return args[2].new_empty(args[0].shape[0], args[0].shape[1], args[2].shape[2])

    stopped = replace(sockets, attend=_with_core(sockets.attend, stop))
    as_before(lambda *latents: meet(*latents, angles, stopped), compressed_TX, kv_TCr)
    return tuple(found)


def _core_of(attend: Attend) -> Core:
    assert isinstance(attend, PackedAttend | ContextAttend), "training attends to packs"  # noqa: S101
    return attend.core


def _with_core(attend: Attend, core: Core) -> Attend:
    assert isinstance(attend, PackedAttend | ContextAttend), "training attends to packs"  # noqa: S101
    return replace(attend, core=core)


def _replace(module: torch.nn.Module, name: str, function: Callable[..., Any]) -> None:
    setattr(module, name, function)
