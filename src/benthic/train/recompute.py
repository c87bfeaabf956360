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
from benthic.model.block import PHASES, Attended, Sent
from benthic.model.fp8_products import MixedLinear
from benthic.model.local import PackedAttend
from benthic.model.mla import LowRankAttention
from benthic.model.sockets import InFlight
from benthic.model.split_linear import SplitLinear
from benthic.parallel.context import ContextAttend
from benthic.parallel.setup import PIECES, expanded
from benthic.train.rebuild import Keeper, Recipe, as_before

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from benthic.model.block import Block
    from benthic.model.local import Core
    from benthic.model.mla import Attention
    from benthic.model.network import DeepSeek
    from benthic.model.norm import Norm
    from benthic.model.products import CopyProducts, Kept, Products, Sum
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
    pieces: frozenset[str]
    precision: PrecisionConfig

    def keep_rows(self, x_RI: Tensor, ends_E: Tensor | None) -> Kept:
        """The rows; what was made of a noted operand is noted."""
        rows = self.keeper.once(x_RI, lambda: self.inner.keep_rows(x_RI, ends_E))
        if self.keeper.knows(x_RI):
            source = self.keeper.source(x_RI)
            self.keeper.note_all(rows, Recipe(lambda: self.inner.keep_rows(source(), ends_E)))
        return rows

    def keep_weight(self, weight: Tensor) -> Kept:
        """The weight, which is in memory anyway."""
        kept = self.inner.keep_weight(weight)
        self.keeper.stays(kept)
        return kept

    def keep_gradient(self, dy_RO: Tensor, ends_E: Tensor | None) -> tuple[Kept, Kept]:
        """As the products do."""
        return self.inner.keep_gradient(dy_RO, ends_E)

    def keep_hidden(self, gate_up_RF2: Tensor) -> Kept:
        """SwiGLU, whose output, and in FP8 whose input, need not be kept."""
        if self.precision.fp8_swiglu and self.keeper.running:
            self.keeper.narrow(gate_up_RF2, *_fp8(gate_up_RF2, self.precision))
        hidden = self.inner.keep_hidden(gate_up_RF2)
        if "swiglu" in self.pieces and self.keeper.running:
            source = self.keeper.source(gate_up_RF2)
            self.keeper.note_all(hidden, Recipe(lambda: self.inner.keep_hidden(source())))
        return hidden

    def keep_hidden_gradient(
        self, gate_up_RF2: Tensor, dhidden_RF: Tensor, ends_E: Tensor | None
    ) -> tuple[Kept, Kept]:
        """As the products do."""
        return self.inner.keep_hidden_gradient(gate_up_RF2, dhidden_RF, ends_E)

    def output(self, rows: Kept, weight: Kept, ends_E: Tensor | None, *, dtype: torch.dtype) -> Tensor:
        """As the products do."""
        return self.inner.output(rows, weight, ends_E, dtype=dtype)

    def network_output(
        self, hidden: Kept, weight: Kept, ends_E: Tensor | None, *, dtype: torch.dtype
    ) -> Tensor:
        """Experts' rows need not be kept for their weights' gradient in combine."""
        out_RD = self.inner.network_output(hidden, weight, ends_E, dtype=dtype)
        if "expert_outputs" in self.pieces and ends_E is not None and self.keeper.running:
            sources = [self.keeper.source(part) for part in hidden]
            self.keeper.note(
                out_RD,
                lambda: self.inner.network_output(
                    tuple(source() for source in sources), weight, ends_E, dtype=dtype
                ),
            )
        return out_RD

    def input_gradient(self, dy: Kept, weight: Kept, ends_E: Tensor | None, *, dtype: torch.dtype) -> Tensor:
        """As the products do."""
        return self.inner.input_gradient(dy, weight, ends_E, dtype=dtype)

    def weight_gradient(self, dy: Kept, rows: Kept, ends_E: Tensor | None, sum_: Sum | None = None) -> Tensor:
        """As the products do."""
        return self.inner.weight_gradient(dy, rows, ends_E, sum_)

    def of_copies(self) -> _CopyProducts | None:
        """With copies that are made again of their tokens."""
        inner = self.inner.of_copies()
        return None if inner is None else _CopyProducts(inner, self.keeper, self.pieces, self.precision)


@dataclass(frozen=True)
class _CopyProducts(_Products):
    """The same for experts as one step."""

    inner: CopyProducts

    def spread(self, tokens: Kept, row_TK: Tensor) -> Kept:
        """Copies, which need not be kept beside what they are copies of."""
        rows = self.inner.spread(tokens, row_TK)
        if "expert_inputs" in self.pieces and self.keeper.running:
            sources, places = [self.keeper.source(part) for part in tokens], self.keeper.source(row_TK)
            again = Recipe(lambda: self.inner.spread(tuple(source() for source in sources), places()))
            self.keeper.note_all(rows, again)
        return rows

    def keep_copies_gradient(self, dout_TD: Tensor, row_TK: Tensor, ends_E: Tensor) -> tuple[Kept, Kept]:
        """As the products do."""
        return self.inner.keep_copies_gradient(dout_TD, row_TK, ends_E)

    def keep_weighted_gradient(
        self, gate_up_RF2: Tensor, dhidden_RF: Tensor, weight_R: Tensor, ends_E: Tensor
    ) -> tuple[Kept, Kept, Tensor]:
        """As the products do."""
        return self.inner.keep_weighted_gradient(gate_up_RF2, dhidden_RF, weight_R, ends_E)

    def weighted(self, hidden: Kept, weight_R: Tensor) -> Kept:
        """As the products do."""
        return self.inner.weighted(hidden, weight_R)


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
        return replace(linear, products=_Products(linear.products, self.keeper, self.pieces, self.precision))

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
            self.keeper.narrow(out_THv, *_e5m6(out_THv.detach().flatten(1)))
        elif self.precision.matmul == "fp8" and out_THv.is_contiguous():
            self.keeper.note(out_THv, self.keeper.source(out_THv))
        return out_THv


def _fp8(rows: Tensor, precision: PrecisionConfig) -> tuple[tuple[Tensor, ...], Callable[..., Tensor]]:
    parts = ops.quantise_fp8_rows(rows.detach(), power_of_two=precision.power_of_two_scales)
    return parts, functools.partial(ops.dequantise_fp8_rows, dtype=rows.dtype)


def _e5m6(rows: Tensor) -> tuple[tuple[Tensor, ...], Callable[..., Tensor]]:
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
