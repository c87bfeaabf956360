"""Weights that stay in FP8 while they are served: E4M3 values with one float32 scale per 128 x 128 block.

The parameters of such a model hold the values; their scales lie beside the model and reach the products
through the `linear` socket. Which parameters these are, `fp8_parameters` decides, except for `kv_b`: a decode
step multiplies it head by head with queries (absorbed attention), so it is widened. It holds 0.4 % of
Moonlight's weights and 0.2 % of DeepSeek-V3's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from benthic.errors import CheckpointError
from benthic.kernels import ops
from benthic.kernels.ops import Fp8
from benthic.model.checkpoint import assemble, open_checkpoint
from benthic.model.fp8_products import fp8_parameters
from benthic.model.joined import latent_pairs, lay_together
from benthic.model.local import plain_linear
from benthic.model.network import DeepSeek
from benthic.model.part import Part
from benthic.model.rope_layout import half_split_order
from benthic.model.shards import read_config
from benthic.model.sockets import Linear
from benthic.model.tensor_check import FP8_BLOCK, FP8_CODE, SCALE_SUFFIX, Table
from benthic.spec.parameters import parameters

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from benthic.model.shards import Source
    from benthic.spec.model import ModelConfig
    from benthic.spec.parameters import Param

Scales = dict[str, "Tensor"]
"""Scales by the parameter's name: float32 [..., ceil(O / 128), ceil(I / 128)] for a parameter [..., O, I]."""

WIDENED: Final = ".kv_b.weight"
GATE_UP: Final = "gate_up"


class NarrowRows(NamedTuple):
    """Rows that are quantised already, in 1 x 128 tiles, and the dtype that they would have had."""

    tiles: Fp8
    dtype: torch.dtype

    @classmethod
    def of(cls, rows_RI: Tensor | NarrowRows) -> NarrowRows:
        """Rows quantised now, if they are not yet."""
        if isinstance(rows_RI, NarrowRows):
            return rows_RI
        return cls(Fp8(*ops.quantise_fp8_rows(rows_RI, by_column=True)), rows_RI.dtype)


@dataclass(frozen=True)
class BlockScaledLinear(Linear):
    """The `linear` socket that multiplies some weights in FP8 and all others as they are.

    Rows are quantised in 1 x 128 tiles as they come (DeepSeek-V3 report section 3.3.2), or have been:
    `benthic.model.narrow_rows` has norms and SwiGLUs do so.

    Attributes:
        parts: block tiles by the address of their parameter. Several where the matrices that a parameter
            stacks (gate and up) end inside a block: each then has a product of its own.
        narrow_hidden: SwiGLU quantises what it computes, where the product behind it is in FP8.
        joined: block tiles of several weights that lie behind one another, by the address of the first.
    """

    parts: Mapping[int, tuple[Fp8, ...]]
    narrow_hidden: bool = False
    joined: Mapping[int, Fp8] = field(default_factory=dict)

    def __call__(self, x: Tensor | NarrowRows, weight: Tensor) -> Tensor:
        """`x_..I @ weight_OI.T`, in the dtype of x."""
        if isinstance(x, NarrowRows):
            return _product(x, self.parts[weight.data_ptr()], None)
        parts = self.parts.get(weight.data_ptr())
        if parts is None:
            return plain_linear(x, weight)
        y_RO = _product(x.reshape(-1, x.shape[-1]), parts, None)
        return y_RO.view(*x.shape[:-1], -1)

    def together(self, x: Tensor | NarrowRows, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """See `benthic.model.sockets.Linear`."""
        tiles = self.joined.get(weights[0].data_ptr())
        return None if tiles is None else _product(x, (tiles,), None).split([len(w) for w in weights], -1)

    def grouped(self, rows_RI: Tensor | NarrowRows, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        """Each expert's rows times its own `weight_OI.T`, in the dtype of the rows."""
        if isinstance(rows_RI, NarrowRows):
            return _product(rows_RI, self.parts[weight_EOI.data_ptr()], ends_E)
        parts = self.parts.get(weight_EOI.data_ptr())
        if parts is None:
            return plain_linear.grouped(rows_RI, weight_EOI, ends_E)
        return _product(rows_RI, parts, ends_E)

    def network(
        self, x_RD: Tensor | NarrowRows, gate_up: Tensor, down: Tensor, ends_E: Tensor | None = None
    ) -> Tensor:
        """`down(swiglu(gate_up(x_RD)))`, in the dtype of x."""
        gate_up_RF2 = self.product(x_RD, gate_up, ends_E)
        if self.narrow_hidden and down.data_ptr() in self.parts:
            hidden = NarrowRows(ops.swiglu_fp8(gate_up_RF2), gate_up_RF2.dtype)
            return self.product(hidden, down, ends_E)
        return self.product(ops.swiglu(gate_up_RF2), down, ends_E)

    def product(self, x_RI: Tensor | NarrowRows, weight: Tensor, ends_E: Tensor | None) -> Tensor:
        """As every socket's."""
        return self(x_RI, weight) if ends_E is None else self.grouped(x_RI, weight, ends_E)


def _product(rows_RI: Tensor | NarrowRows, parts: tuple[Fp8, ...], ends_E: Tensor | None) -> Tensor:
    rows, dtype = NarrowRows.of(rows_RI)
    outs = [ops.fp8_linear(rows, part, ends_E, dtype=dtype) for part in parts]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)


def block_scaled_linear(model: DeepSeek, scales: Scales) -> BlockScaledLinear:
    """The socket for a model whose parameters named in `scales` hold FP8 values."""
    state = dict(model.named_parameters())
    tiles = {name: Fp8(state[name].data, _read_in_place(scale)) for name, scale in scales.items()}
    return BlockScaledLinear(
        {
            own.values.data_ptr(): side_by_side(own) if GATE_UP in name else (own,)
            for name, own in tiles.items()
        }
    )


def join_latents(model: DeepSeek, scales: Scales) -> dict[int, Fp8]:
    """Queries' first weights with latents', where the former are whole blocks: `BlockScaledLinear.joined`."""
    names = {id(param): name for name, param in model.named_parameters()}
    joined = {}
    for pair in latent_pairs(model):
        own = [scales[names[id(weight)]] for weight in pair if names[id(weight)] in scales]
        if len(own) == len(pair) and len(pair[0]) % FP8_BLOCK == 0:
            values = lay_together(pair)
            joined[values.data_ptr()] = Fp8(values, _read_in_place(torch.cat(own)))
    return joined


def _read_in_place(scale: Tensor) -> Tensor:
    """Scales of one matrix laid out as its products read them; those of experts stay as they are."""
    return ops.spaced(scale) if scale.dim() == 2 else scale


def side_by_side(tiles: Fp8) -> tuple[Fp8, ...]:
    """Gate and up, [..., 2, F, D], as one matrix [..., 2 F, D] where F is whole blocks, else as two."""
    values, scale = tiles
    if values.shape[-2] % FP8_BLOCK == 0:
        return (Fp8(values.flatten(-3, -2), scale.flatten(-3, -2)),)
    pairs = zip(values.unbind(-3), scale.unbind(-3), strict=True)
    return tuple(Fp8(value.contiguous(), own.contiguous()) for value, own in pairs)


@torch.no_grad()
def narrow(model: DeepSeek) -> Scales:
    """Quantise a loaded model in place, one parameter at a time, as released checkpoints are."""
    scales: Scales = {}
    for name, param in fp8_parameters(model).items():
        if name.endswith(WIDENED):
            continue
        flat = param.data.flatten(0, -3) if param.dim() > 2 else param.data
        values, scale = ops.quantise_fp8_weight(flat)
        param.requires_grad_(False)  # noqa: FBT003 (torch names it by place)
        param.data = values.view(param.shape)
        scales[name] = scale.view(*param.shape[:-2], *scale.shape[-2:])
    return scales


def stored_in_fp8(folder: Path) -> bool:
    """Whether a checkpoint's `config.json` says that its matrices are FP8."""
    return (read_config(folder).get("quantization_config") or {}).get("quant_method") == "fp8"


def load_block_scaled(
    path: Path, *, device: torch.device, dtype: torch.dtype | None = None, mtp: bool = False
) -> tuple[DeepSeek, Scales]:
    """Load a block-scaled checkpoint without widening it: the model, with MTP modules if asked, and scales.

    A weight that the checkpoint stores in another type keeps that type, or takes `dtype`.

    Raises: as `benthic.model.checkpoint.load_pretrained`; CheckpointError also when rotary rows would have to
        move to another block.
    """
    opened = open_checkpoint(path, mtp=mtp)
    with torch.device("meta"):
        model = DeepSeek(opened.config, Part.whole(opened.config))
    state, scales = {}, {}
    with opened.source as source:
        opened.check(Table.of(opened.config))
        for param in parameters(opened.config):
            if stays_narrow(param, source):
                tiles = _read_tiles(source, param, opened.config, device)
                state[param.name], scales[param.name] = tiles
            else:
                state[param.name] = assemble(source, param, opened.config, device, dtype)
    for weight in model.parameters():
        weight.requires_grad_(False)  # noqa: FBT003 (torch names it by place)
    model.load_state_dict(state, assign=True)
    model.rotary.to(device)
    return model, scales


def stays_narrow(param: Param, source: Source) -> bool:
    """Whether a parameter is served in FP8 as the checkpoint stores it."""
    stored = {source.tensors[tensor.name].dtype for tensor in param.hf if not tensor.duplicate}
    return param.fp8 and stored == {FP8_CODE} and not param.name.endswith(WIDENED)


def _read_tiles(source: Source, param: Param, config: ModelConfig, device: torch.device) -> Fp8:
    """A parameter's values and scales, filled from its tensors."""
    outer, inner = param.shape[-2:]
    tiles = (-(-outer // FP8_BLOCK), -(-inner // FP8_BLOCK))
    values = torch.empty(param.shape, dtype=torch.float8_e4m3fn, device=device)
    scale = torch.empty(*param.shape[:-2], *tiles, device=device)
    for tensor in param.hf:
        if tensor.duplicate:
            continue
        piece = source.read(tensor.name)
        if param.rope_rows and config.rope_interleave:
            order = order_within_blocks(param)
            piece = piece.view(torch.uint8)[order].view(torch.float8_e4m3fn)
        values[tensor.index].copy_(piece)
        scale[tensor.index].copy_(source.read(tensor.name + SCALE_SUFFIX))
    return Fp8(values, scale)


def order_within_blocks(param: Param) -> Tensor:
    """Where module rows come from, for rows that share a block's scale before and after.

    Raises:
        CheckpointError: a row would leave its block.
    """
    order = half_split_order(param)
    rows = torch.arange(len(order))
    leaving = int((order // FP8_BLOCK != rows // FP8_BLOCK).sum())
    if leaving:
        msg = (
            f"{param.name}: {leaving} rotary rows lie in another block of {FP8_BLOCK} rows in the module "
            "than in the checkpoint, so their scales would not fit. Load it with --quantization none."
        )
        raise CheckpointError(msg)
    return order
