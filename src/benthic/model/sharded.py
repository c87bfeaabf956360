"""A model of which this rank holds a shard: the same network, its parameters cut by `spec.shard.Shard`.

Of each tensor a rank reads the rows and columns that it holds. How the ranks' products become whole again is
not known here, see `benthic.parallel.divided`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from benthic.errors import ConfigError
from benthic.kernels.ops import Fp8
from benthic.model.block_scaled import order_within_blocks, stays_narrow
from benthic.model.checkpoint import loaded_dtype, open_checkpoint
from benthic.model.network import DeepSeek
from benthic.model.region import read_stretch, stretches
from benthic.model.tensor_check import FP8_BLOCK, SCALE_SUFFIX, Table
from benthic.spec.parameters import parameters

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from benthic.model.block_scaled import Scales
    from benthic.model.shards import Source
    from benthic.spec.model import ModelConfig
    from benthic.spec.parameters import HFTensor, Param
    from benthic.spec.shard import Box, Shard


def load_shard(
    path: Path,
    shard: Shard,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    mtp: bool = False,
    narrow: bool = False,
) -> tuple[DeepSeek, Scales]:
    """Load this rank's part of a checkpoint: the model, and the scales of weights that stay in FP8.

    With `narrow`, FP8 weights stay as `block_scaled.load_block_scaled` keeps them, else they are widened.

    Raises:
        ConfigError: the model does not divide so, or an FP8 weight would be cut inside a block.
        CheckpointError: as `benthic.model.checkpoint.load_pretrained`.
    """
    opened = open_checkpoint(path, mtp=mtp)
    config = opened.config
    shard.check(config)
    with torch.device("meta"):
        model = DeepSeek(config)
    hold(model, shard)
    state: dict[str, Tensor] = {}
    scales: Scales = {}
    with opened.source as source:
        opened.check(Table.of(config))
        for param in parameters(config):
            box = shard.box(param)
            if narrow and stays_narrow(param, source):
                state[param.name], scales[param.name] = _read_tiles(source, param, box, config, device)
            else:
                state[param.name] = _read(source, param, box, config, device, dtype)
    for weight in model.parameters():
        weight.requires_grad_(False)  # noqa: FBT003 (torch names it by place)
    model.load_state_dict(state, assign=True)
    model.rotary.to(device)
    return model, scales


def hold(model: DeepSeek, shard: Shard) -> None:
    """Give the parameters of a model without memory the shapes that this rank holds."""
    held = dict(model.named_parameters())
    for param in parameters(model.config):
        if param.name in held:
            owner, _, last = param.name.rpartition(".")
            empty = held[param.name].new_empty(_shape(shard.box(param)))
            setattr(model.get_submodule(owner), last, nn.Parameter(empty))


def _shape(box: Box) -> tuple[int, ...]:
    return tuple(piece.stop - piece.start for piece in box)


def _read(
    source: Source,
    param: Param,
    box: Box,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype | None,
) -> Tensor:
    """`parameter[box]`, dequantised where it is FP8."""
    value = torch.empty(_shape(box), dtype=loaded_dtype(source, param.hf[0], dtype), device=device)
    flat = value.view(-1)
    for found in stretches(param, box, 0, flat.numel()):
        name = found.tensor.name
        piece = read_stretch(source, name, param, found, interleaved=config.rope_interleave, device=device)
        flat[found.at : found.at + piece.numel()].copy_(piece)
    return value


def _read_tiles(source: Source, param: Param, box: Box, config: ModelConfig, device: torch.device) -> Fp8:
    """Values and scales of `parameter[box]`, whose rows and columns are whole blocks."""
    _refuse_cut_blocks(param, box)
    rows, columns = box[-2:]
    tiles = tuple(slice(s.start // FP8_BLOCK, math.ceil(s.stop / FP8_BLOCK)) for s in (rows, columns))
    values = torch.empty(_shape(box), dtype=torch.float8_e4m3fn, device=device)
    scale = torch.empty((*_shape(box[:-2]), *_shape(tiles)), device=device)
    order = order_within_blocks(param) if param.rope_rows and config.rope_interleave else None
    for tensor, at in _tensors(param, box):
        piece = source.read(tensor.name).view(torch.uint8)
        piece = piece[rows] if order is None else piece[order[rows]]
        values[at].copy_(piece[:, columns].view(torch.float8_e4m3fn))
        scale[at].copy_(source.read(tensor.name + SCALE_SUFFIX)[tiles])
    return Fp8(values, scale)


def _tensors(param: Param, box: Box) -> list[tuple[HFTensor, tuple[int, ...]]]:
    """The tensors of which something is held, and where in the held part they lie."""
    found = []
    for tensor in param.hf:
        leading = box[: len(tensor.index)]
        if tensor.duplicate or not all(
            s.start <= i < s.stop for i, s in zip(tensor.index, leading, strict=True)
        ):
            continue
        found.append((tensor, tuple(i - s.start for i, s in zip(tensor.index, leading, strict=True))))
    return found


def _refuse_cut_blocks(param: Param, box: Box) -> None:
    """Raises: ConfigError when a border lies inside a block, whose scale two ranks would need."""
    for piece, size in zip(box[-2:], param.shape[-2:], strict=True):
        width = piece.stop - piece.start
        if width < size and width % FP8_BLOCK:
            msg = (
                f"{param.name}: {size} rows or columns over {size // width} ranks are {width} each, which "
                f"cuts FP8 blocks of {FP8_BLOCK}. Use --enable-expert-parallel for routed experts, fewer "
                "ranks, or --quantization none."
            )
            raise ConfigError(msg)
