"""Linear layers in FP8 (DeepSeek-V3 report section 3.3): E4M3 everywhere, a scale for every tile.

| operand          | tiles                                | read by                         |
|------------------|--------------------------------------|---------------------------------|
| rows             | 1 x 128, kept in FP8 for backward    | output                          |
| rows, re-tiled   | 128 x 1                              | weight gradient                 |
| weight           | 128 x 128                            | output, input gradient          |
| output gradient  | 1 x 128                              | input gradient                  |
| output gradient  | 128 x 1                              | weight gradient                 |

Scales come from the tile's own largest magnitude, now ("online"), not from earlier steps. Every 128 of the
inner dimension are scaled and added in float32. Weight gradients leave in float32, the other two products in
the dtype of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from benthic.errors import ScheduleError
from benthic.kernels import ops
from benthic.kernels.ops import Fp8
from benthic.model.products import Kept, Sum, owner_of
from benthic.model.sockets import Linear
from benthic.spec.parameters import parameters

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from benthic.model.network import DeepSeek
    from benthic.model.sockets import Mixture
    from benthic.model.split_linear import SplitLinear


def fp8_parameters(model: DeepSeek) -> dict[str, Tensor]:
    """The parameters whose products run in FP8, by name: those that released checkpoints store in FP8.

    Embedding, head, gates, norms and the MTP projection are not among them (report section 3.3.1). This is
    the one place that decides.
    """
    narrow = {p.name for p in parameters(model.config) if p.fp8}
    return {name: param for name, param in model.named_parameters() if name in narrow}


class Copy(NamedTuple):
    """FP8 tiles of a weight as it was at a version of its parameter, and those of the transposed weight."""

    weight: Tensor
    version: int
    tiles: Fp8
    turned: Fp8

    def renewed(self, other: Copy) -> Copy:
        """What another copy of the same weight holds, where this one is."""
        for own, new in zip((*self.tiles, *self.turned), (*other.tiles, *other.turned), strict=True):
            own.copy_(new)
        return self._replace(version=other.version)


@dataclass
class RunningWeights:
    """FP8 copies of weights, made when first multiplied and again once their parameter has changed.

    So each is quantised once per optimizer step, however many microbatches read it, and laid out once more
    for the input's gradient: products in FP8 read both operands along the dim that they sum over. Cost: 2
    bytes per weight and 8 per 128 x 128 tile.

    Attributes:
        recorded: a recorded step makes all copies itself, and reads them where it made them.
    """

    power_of_two: bool = False
    recorded: bool = False
    _held: dict[tuple[Tensor, torch.Size, int], Copy] = field(default_factory=dict, repr=False)

    def of(self, weight: Tensor) -> Copy:
        """The copy of a parameter or of a view of one: [O, I] or [E, O, I].

        Raises:
            ScheduleError: a copy must be made, but the parameter is in shards.
        """
        owner = owner_of(weight)
        key, version = (owner, weight.shape, int(weight.storage_offset())), owner._version  # noqa: SLF001
        held = self._held.get(key)
        if held is None or held.version != version:
            if owner.untyped_storage().nbytes() == 0:
                message = (
                    f"the FP8 copy of a weight {tuple(weight.shape)} is of version "
                    f"{None if held is None else held.version}, the weight of {version} and in shards: 0 "
                    "bytes of it are here. Acquire its bucket first."
                )
                raise ScheduleError(message)
            fresh = self._copy_of(weight.detach(), version)
            held = self._held[key] = fresh if held is None or not self.recorded else held.renewed(fresh)
        return held

    def renew(self) -> None:
        """Make copies of what has changed now, but for parameters in shards.

        In the next forward pass a GPU would wait for the host, who has four calls more for every product
        there; behind an update it is busy.
        """
        for key, held in () if self.recorded else self._held.items():
            version = key[0]._version  # noqa: SLF001
            if version != held.version and held.weight.untyped_storage().nbytes():
                self._held[key] = self._copy_of(held.weight, version)

    def forget(self, *, recorded: bool) -> None:
        """Every copy. Those that a recorded step makes are its own: they stay where it writes them."""
        self.recorded = recorded
        self._held.clear()

    def _copy_of(self, weight: Tensor, version: int) -> Copy:
        tiles = ops.quantise_fp8_weight(weight, power_of_two=self.power_of_two)
        return Copy(weight, version, tiles, ops.turn_fp8(tiles))

    def bytes_of(self, param: Tensor) -> int:
        """Bytes held for views of `param`, scales included."""
        copies = (held for (owner, *_), held in self._held.items() if owner is param)
        return sum(part.nbytes for held in copies for part in (*held.tiles, *held.turned))


@dataclass(frozen=True)
class Fp8Products:
    """The three products in FP8; see `benthic.model.products.Products`.

    power_of_two: scales of rows and gradients are powers of two, which makes re-tiling exact but for
        underflow. The report does so where a tile is cut twice or sent to experts.
    """

    weights: RunningWeights = field(default_factory=RunningWeights)
    power_of_two: bool = False

    def keep_rows(self, x_RI: Tensor, ends_E: Tensor | None) -> Kept:  # noqa: ARG002 (rows are tiled apart)
        """Row tiles."""
        return ops.quantise_fp8_rows(x_RI, power_of_two=self.power_of_two, by_column=True)

    def keep_weight(self, weight: Tensor) -> Kept:
        """Block tiles for both products, made once per step."""
        _, _, tiles, turned = self.weights.of(weight)
        return *tiles, *turned

    def keep_gradient(self, dy_RO: Tensor, ends_E: Tensor | None) -> tuple[Kept, Kept]:
        """Row tiles for the input gradient, column tiles for the weight gradient, both from `dy` itself."""
        return ops.quantise_fp8_both(dy_RO.contiguous(), ends_E, power_of_two=self.power_of_two)

    def keep_hidden(self, gate_up_RF2: Tensor) -> Kept:
        """Row tiles of SwiGLU, which is not written wide."""
        return ops.swiglu_fp8(gate_up_RF2, power_of_two=self.power_of_two)

    def keep_hidden_gradient(
        self, gate_up_RF2: Tensor, dhidden_RF: Tensor, ends_E: Tensor | None
    ) -> tuple[Kept, Kept]:
        """Row and column tiles of SwiGLU's gradient, which is not written wide."""
        return ops.swiglu_gradient_fp8_both(gate_up_RF2, dhidden_RF, ends_E, power_of_two=self.power_of_two)

    def output(self, rows: Kept, weight: Kept, ends_E: Tensor | None, *, dtype: torch.dtype) -> Tensor:
        """`x W^T`."""
        return ops.fp8_linear(Fp8(*rows), Fp8(*weight[:2]), ends_E, dtype=dtype)

    network_output = output

    def input_gradient(self, dy: Kept, weight: Kept, ends_E: Tensor | None, *, dtype: torch.dtype) -> Tensor:
        """`dy W`: a block of the transposed weight is the transposed block, so nothing is rounded again."""
        return ops.fp8_linear(Fp8(*dy), Fp8(*weight[2:]), ends_E, dtype=dtype)

    def weight_gradient(self, dy: Kept, rows: Kept, ends_E: Tensor | None, sum_: Sum | None = None) -> Tensor:
        """`dy^T x` in float32, from rows re-tiled."""
        columns = ops.retile_fp8(Fp8(*rows), ends_E, power_of_two=self.power_of_two)
        if sum_ is None:
            return ops.fp8_weight_gradient(Fp8(*dy), columns, ends_E)
        into, fresh, wanted = sum_.into, sum_.fresh, sum_.squares is not None
        sum_.give(ops.add_fp8_weight_gradient(into, Fp8(*dy), columns, ends_E, fresh=fresh, squares=wanted))
        return into

    def of_copies(self) -> Fp8Products:
        """Tiles of tokens are copied, with a byte a value."""
        return self

    def spread(self, tokens: Kept, row_TK: Tensor) -> Kept:
        """Row tiles of all copies."""
        return ops.spread_fp8(Fp8(*tokens), row_TK, rows=row_TK.numel())

    def keep_copies_gradient(self, dout_TD: Tensor, row_TK: Tensor, ends_E: Tensor) -> tuple[Kept, Kept]:
        """Row tiles of all copies, and column tiles made of these.

        Their scales are powers of two whatever `power_of_two` says: nothing but underflow is rounded twice.
        """
        tiles = Fp8(*ops.quantise_fp8_rows(dout_TD.contiguous(), power_of_two=True, by_column=True))
        rows = ops.spread_fp8(tiles, row_TK, rows=row_TK.numel())
        return rows, ops.retile_fp8(rows, ends_E, power_of_two=True)

    def keep_weighted_gradient(
        self, gate_up_RF2: Tensor, dhidden_RF: Tensor, weight_R: Tensor, ends_E: Tensor
    ) -> tuple[Kept, Kept, Tensor]:
        """Row and column tiles of SwiGLU's gradient, which is not written wide."""
        return ops.weighted_swiglu_gradient_fp8_both(
            gate_up_RF2, dhidden_RF, weight_R, ends_E, power_of_two=self.power_of_two
        )

    def weighted(self, hidden: Kept, weight_R: Tensor) -> Kept:
        """The weights go into the scales, so that re-tiling multiplies by them."""
        values, scale = hidden
        return values, scale * weight_R[:, None]


@dataclass(frozen=True)
class MixedLinear(Linear):
    """The `linear` socket that multiplies the `narrow` parameters in FP8 and all others in `wide`."""

    narrow: frozenset[Tensor]
    fp8: SplitLinear
    wide: SplitLinear
    running: RunningWeights

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x_..I @ weight_OI.T`."""
        return self._of(weight)(x, weight)

    def grouped(self, rows_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        """Each expert's rows times its own `weight_OI.T`."""
        return self._of(weight_EOI).grouped(rows_RI, weight_EOI, ends_E)

    def network(self, x_RD: Tensor, gate_up: Tensor, down: Tensor, ends_E: Tensor | None = None) -> Tensor:
        """`down(swiglu(gate_up(x_RD)))`; both weights are narrow, or both wide."""
        return self._of(gate_up).network(x_RD, gate_up, down, ends_E)

    def mixture(self, gate_up: Tensor, down: Tensor) -> Mixture | None:
        """That of their socket."""
        return self._of(gate_up).mixture(gate_up, down)

    def renew(self) -> None:
        """FP8 copies."""
        self.running.renew()

    def recorded(self, *, begin: bool) -> None:
        """FP8 copies."""
        self.running.forget(recorded=begin)

    def _of(self, weight: Tensor) -> SplitLinear:
        return self.fp8 if owner_of(weight) in self.narrow else self.wide
