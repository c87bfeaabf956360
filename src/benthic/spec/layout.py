"""How the ranks of a training run divide the work: five degrees, and who is where.

Ranks are numbered with tensor parallelism innermost, then context, data and pipeline parallelism, so that
neighbours share a host. Inside one pipeline rank the `dp x cp x tp` ranks all hold the dense parameters of
the same stages; experts are folded over these same ranks, `ep_degree` of them hold one copy of all experts.
Dense and expert data-parallel degrees are therefore different numbers: DeepSeek-V3 trains on 2,048 ranks as
16 pipeline x 128 data ranks with `ep_degree` 64, and has two copies of every expert.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benthic.spec.model import ModelConfig
    from benthic.spec.parameters import Param


class Place(NamedTuple):
    """Where one rank is: its index along every axis; `ep` counts along the folded expert axis."""

    pp: int
    dp: int
    cp: int
    tp: int
    ep: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees of parallelism of one training run.

    pp_degree: pipeline ranks.
    dp_degree: ranks that see different rows (of the dense parameters).
    cp_degree: ranks that share the tokens of each row, for long sequences.
    tp_degree: ranks that share attention heads and feed-forward columns; their tokens are divided between
        the layers (sequence parallelism).
    ep_degree: ranks over which one copy of all routed experts is spread; divides dp x cp x tp.
    zero_stage: what is sharded over the ranks that hold the same parameters: 1 the optimizer's state, 2 also
        gradients, 3 also weights.
    schedule: pipeline table, see `benthic draw schedule`.
    virtual_stages: stages of each pipeline rank, for schedules that have a choice; None: the schedule's own.
    layers_per_stage: how many layers each stage holds; empty balances their FLOPs.
    """

    pp_degree: int = 1
    dp_degree: int = 1
    cp_degree: int = 1
    tp_degree: int = 1
    ep_degree: int = 1
    zero_stage: int = 1
    schedule: str = "1f1b"
    virtual_stages: int | None = None
    layers_per_stage: tuple[int, ...] = ()

    @property
    def ranks(self) -> int:
        """Ranks of the whole run."""
        return self.pp_degree * self.ranks_per_stage

    @property
    def ranks_per_stage(self) -> int:
        """Ranks that hold the dense parameters of one pipeline rank's stages."""
        return self.dp_degree * self.cp_degree * self.tp_degree

    @property
    def expert_dp_degree(self) -> int:
        """Copies of every expert within one pipeline rank."""
        return self.ranks_per_stage // self.ep_degree

    @property
    def token_shards(self) -> int:
        """Ranks among which the tokens of one microbatch are divided."""
        return self.cp_degree * self.tp_degree

    def place(self, rank: int) -> Place:
        """Where `rank` is."""
        pp, inner = divmod(rank, self.ranks_per_stage)
        rest, tp = divmod(inner, self.tp_degree)
        dp, cp = divmod(rest, self.cp_degree)
        return Place(pp, dp, cp, tp, inner % self.ep_degree)

    def rank_at(self, pp: int, inner: int) -> int:
        """The rank that is number `inner` of pipeline rank `pp`."""
        return pp * self.ranks_per_stage + inner

    def expert_groups(self) -> list[tuple[int, ...]]:
        """Ranks that together hold one copy of all experts of some stages: neighbours, in order."""
        return [tuple(range(first, first + self.ep_degree)) for first in range(0, self.ranks, self.ep_degree)]

    def problems(self, model: ModelConfig, *, ranks: int, seq_len: int) -> Iterator[str]:
        """Everything that keeps `model` from running on this layout, a line each with its numbers."""
        yield from self._sizes(ranks)
        yield from self._experts(model)
        yield from self._shards(model, seq_len)

    def _sizes(self, ranks: int) -> Iterator[str]:
        for name in ("pp_degree", "dp_degree", "cp_degree", "tp_degree", "ep_degree"):
            if getattr(self, name) < 1:
                yield f"layout.{name}={getattr(self, name)} is not positive. Set it to 1 or more."
        if self.zero_stage not in {1, 2, 3}:
            yield f"layout.zero_stage={self.zero_stage} does not exist. Set it to 1, 2 or 3."
        if self.ranks != ranks:
            product = f"{self.pp_degree} x {self.dp_degree} x {self.cp_degree} x {self.tp_degree}"
            yield (
                f"pp x dp x cp x tp = {product} = {self.ranks} ranks, but {ranks} were started. "
                "Change a degree of the layout or the number of processes."
            )

    def _experts(self, model: ModelConfig) -> Iterator[str]:
        if self.ep_degree > 1 and self.ranks_per_stage % max(1, self.ep_degree):
            yield (
                f"layout.ep_degree={self.ep_degree} does not divide the {self.ranks_per_stage} ranks of a "
                "stage (dp x cp x tp). Set it to a divisor."
            )
        experts = model.n_routed_experts
        if self.ep_degree > 1 and experts % self.ep_degree:
            yield (
                f"n_routed_experts={experts} does not divide over layout.ep_degree={self.ep_degree}. "
                f"Set ep_degree to a divisor of {experts}."
            )

    def _shards(self, model: ModelConfig, seq_len: int) -> Iterator[str]:
        tp, cp = self.tp_degree, self.cp_degree
        for name, width in _divided_widths(model).items():
            if tp > 1 and width % tp:
                yield (
                    f"{name} = {width} does not divide over layout.tp_degree={tp}. "
                    f"Set tp_degree to a divisor of {width}."
                )
        if tp < 1 or cp < 1:
            return
        if cp > 1 and seq_len % (unit := cp * math.lcm(2, tp)):
            yield (
                f"train.seq_len={seq_len} is no multiple of {unit}: layout.cp_degree={cp} gives every rank "
                f"an early and a late chunk of each row, whose tokens layout.tp_degree={tp} divides. "
                f"Set seq_len to a multiple of {unit}, or lower a degree."
            )
        elif seq_len % tp:
            yield (
                f"train.seq_len={seq_len} does not divide over layout.tp_degree={tp}, whose ranks hold equal "
                f"parts of each row. Set seq_len to a multiple of {tp}, or lower tp_degree."
            )


def _divided_widths(model: ModelConfig) -> dict[str, int]:
    """What tensor parallelism divides in this model, by name."""
    widths = {"num_attention_heads": model.num_attention_heads}
    if not all(model.is_moe(layer) for layer in range(model.num_hidden_layers)):
        widths["intermediate_size"] = model.intermediate_size
    if model.n_shared_experts and model.n_routed_experts:
        width = model.n_shared_experts * model.moe_intermediate_size
        widths["n_shared_experts x moe_intermediate_size"] = width
    return widths


def box(param: Param, layout: Layout, place: Place) -> tuple[slice, ...]:
    """The part of `param` that the rank at `place` holds: one slice for each dim.

    Experts are divided over the expert axis; heads and the columns of dense and shared feed-forward networks
    over the tensor axis; everything else is whole. Routed experts are divided by expert alone.
    """
    routed = "expert" in param.axes
    divided = {"expert": (place.ep, layout.ep_degree)}
    if not routed:
        divided |= {"heads": (place.tp, layout.tp_degree), "ffn": (place.tp, layout.tp_degree)}
    return tuple(
        _piece(size, *divided.get(axis or "", (0, 1)))
        for size, axis in zip(param.shape, param.axes, strict=True)
    )


def _piece(size: int, index: int, pieces: int) -> slice:
    width = size // pieces
    return slice(index * width, (index + 1) * width)
