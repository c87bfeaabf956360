"""Hugging Face checkpoints in and out: `load_pretrained` and `save_pretrained`.

Both go tensor by tensor, so memory peaks at the model plus one tensor. Layout differences are settled here:
one tensor per expert on disk and one for all in the module, rotary rows interleaved on disk and half-split
in the module.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benthic.errors import CheckpointError, TensorMismatchError
from benthic.kernels import ops
from benthic.model.export import Format, Progress, Report, in_file_order
from benthic.model.network import DeepSeek
from benthic.model.part import Part
from benthic.model.rope_layout import to_half_split, to_interleaved
from benthic.model.shard_writer import ShardWriter
from benthic.model.shards import CONFIG_FILE, DTYPES, Source, read_config, stored_bytes
from benthic.model.tensor_check import FP8_BLOCK, FP8_CODE, SCALE_SUFFIX, Table, check
from benthic.spec.hf import from_hf, to_hf
from benthic.spec.parameters import parameters

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from benthic.spec.model import ModelConfig
    from benthic.spec.parameters import HFTensor, Param

MAX_SHARD_BYTES = 5_000_000_000


def load_pretrained(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    mtp: bool = True,
    part: Part | None = None,
    progress: Report | None = None,
) -> DeepSeek:
    """Load a Hugging Face checkpoint folder: released, written by transformers, or by `save_pretrained`.

    FP8 weights are dequantised. Router biases stay float32 whatever `dtype` says.

    Args:
        path: the folder with `config.json` and safetensors files.
        device: where the parameters go.
        dtype: what they become; None keeps the stored type (bfloat16 for FP8 weights).
        mtp: False leaves the MTP modules out, and also accepts a checkpoint that lacks them.
        part: which pieces to hold and read; None for all.
        progress: called after every parameter.

    Raises:
        NotACheckpointError: the folder lacks `config.json` or weights.
        TensorMismatchError: tensors are missing, extra, misshapen, or copies differ; all of them are named.
        CheckpointError: a file is truncated, or quantised in a way that is not read here.
        ConfigError: `config.json` describes another architecture.
    """
    opened = open_checkpoint(Path(path), mtp=mtp)
    part = Part.whole(opened.config) if part is None else part
    with torch.device("meta"):
        model = DeepSeek(opened.config, part)
    held = [p for p in parameters(opened.config) if part.holds(p.name)]
    with opened.source as source:
        opened.check(Table.of(opened.config, held))
        total = sum(stored_bytes(source.tensors[t.name]) for p in held for t in p.hf if not t.duplicate)
        state, done = {}, 0
        for param in held:
            state[param.name] = assemble(source, param, opened.config, torch.device(device), dtype)
            done += sum(stored_bytes(source.tensors[t.name]) for t in param.hf if not t.duplicate)
            if progress is not None:
                progress(Progress(param.name, done, total))
    model.load_state_dict(state, assign=True)
    model.rotary.to(device)
    return model


@dataclass(frozen=True)
class Opened:
    """A checkpoint folder whose config has been understood and whose headers have been read."""

    config: ModelConfig
    file: Mapping[str, Any]
    source: Source
    dropped_prefixes: tuple[str, ...]

    def check(self, table: Table) -> None:
        """Refuse tensors that do not match, and copies that differ from what they copy."""
        check(self.source, table, whole=Table.of(self.config), dropped_prefixes=self.dropped_prefixes)
        _check_twins(self.source, table)


def open_checkpoint(folder: Path, *, mtp: bool = True) -> Opened:
    """Read a folder's config and headers; `mtp=False` drops the MTP layers from both.

    Raises: as `load_pretrained`.
    """
    file = read_config(folder)
    config = from_hf(file, name=folder.resolve().name).config
    _check_quantisation(folder, file)
    first, depth = config.num_hidden_layers, config.num_nextn_predict_layers
    if mtp:
        return Opened(config, file, Source(folder), ())
    dropped = tuple(f"model.layers.{layer}." for layer in range(first, first + depth))
    return Opened(replace(config, num_nextn_predict_layers=0), file, Source(folder), dropped)


def save_pretrained(
    model: DeepSeek,
    path: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    fp8: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    config_extra: Mapping[str, Any] | None = None,
    progress: Report | None = None,
) -> None:
    """Write the model as a Hugging Face checkpoint that transformers, vLLM and `load_pretrained` read.

    Files are written aside, flushed to disk and moved into `path`, `config.json` last; after an error
    nothing of them is left. Other files already in `path`, such as a tokenizer's, stay.

    Args:
        model: a whole model, not a part.
        path: the folder; created if needed, and refused if it already holds a checkpoint.
        dtype: type of the weights that are not quantised.
        fp8: store matrices as float8_e4m3fn with 128 x 128 block scales, as released checkpoints do.
        max_shard_bytes: largest file (a single larger tensor has a file of its own).
        config_extra: fields to add to or replace in `config.json`.
        progress: called after every tensor.

    Raises:
        CheckpointError: the folder is taken, the disk is full, or the model is only a part.
    """
    _refuse_part(model)
    state = model.state_dict()
    save_weights(
        lambda param: state[param.name],
        model.config,
        Path(path),
        Format(dtype, fp8),
        max_shard_bytes=max_shard_bytes,
        config_extra=config_extra,
        progress=progress,
    )


def save_weights(
    read: Callable[[Param], Tensor],
    config: ModelConfig,
    folder: Path,
    form: Format,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    config_extra: Mapping[str, Any] | None = None,
    progress: Report | None = None,
) -> None:
    """What `save_pretrained` does, with parameters that `read` brings one at a time.

    Raises: as `save_pretrained`, and what `read` does.
    """
    pairs = in_file_order(parameters(config))
    planned = [item for _, tensor in pairs for item in form.plan(tensor)]
    with ShardWriter(folder, planned, max_shard_bytes) as writer:
        for _, run in groupby(pairs, key=lambda pair: pair[0].name):
            same = list(run)
            param = same[0][0]
            whole = read(param)
            for _, tensor in same:
                for name, stored in form.encode(tensor, _extract(whole, param, tensor, config)):
                    writer.write(name, stored)
                    if progress is not None:
                        progress(Progress(name, writer.done_bytes, writer.total_bytes))
        described = to_hf(config, dtype=form.dtype_name, fp8=form.fp8)
        writer.write_json(CONFIG_FILE, {**described, **(config_extra or {})})


def read_weight(source: Source, name: str, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """One tensor in `dtype` on `device` (None: the CPU), dequantised there if it is stored as FP8."""
    stored = source.read(name).to(device or torch.device("cpu"))
    if stored.dtype != torch.float8_e4m3fn:
        return stored.to(dtype)
    scale = source.read(name + SCALE_SUFFIX).to(stored.device).float()
    return ops.dequantise_fp8(stored, scale, block=FP8_BLOCK, dtype=dtype)


def assemble(
    source: Source, param: Param, config: ModelConfig, device: torch.device, dtype: torch.dtype | None
) -> Tensor:
    """The parameter, filled from its tensors, dequantised where they are FP8."""
    own = [t for t in param.hf if not t.duplicate]
    kind = loaded_dtype(source, own[0], dtype)
    value = torch.empty(param.shape, dtype=kind, device=device)
    for tensor in own:
        piece = read_weight(source, tensor.name, kind, device)
        if param.rope_rows and config.rope_interleave:
            piece = to_half_split(piece, param)
        value[tensor.index].copy_(piece)
    return value


def loaded_dtype(source: Source, tensor: HFTensor, dtype: torch.dtype | None) -> torch.dtype:
    """What a parameter is loaded as: `dtype`, else as stored (FP8 as bfloat16); router biases as float32."""
    if tensor.precision == "fp32":
        return torch.float32
    if dtype is not None:
        return dtype
    code = source.tensors[tensor.name].dtype
    return torch.bfloat16 if code == FP8_CODE else DTYPES[code]


def _extract(value: Tensor, param: Param, tensor: HFTensor, config: ModelConfig) -> Tensor:
    """One checkpoint tensor out of a parameter."""
    piece = value[tensor.index]
    if param.rope_rows and config.rope_interleave:
        piece = to_interleaved(piece, param)
    return piece


def _check_twins(source: Source, table: Table) -> None:
    differing = []
    for name, original in table.twins.items():
        if name in source.tensors and not torch.equal(source.read(name), source.read(original.name)):
            differing.append(f"{name} (a copy of {original.name})")
    if differing:
        message = (
            f"{source.folder}: {len(differing)} tensors differ from those they should repeat: "
            f"{', '.join(differing)}. The model shares them; load with mtp=False to leave the MTP layers out."
        )
        raise TensorMismatchError(message)


def _check_quantisation(folder: Path, file: Mapping[str, Any]) -> None:
    given = file.get("quantization_config")
    if given is None:
        return
    method, block = given.get("quant_method"), given.get("weight_block_size")
    if method != "fp8" or block != [FP8_BLOCK, FP8_BLOCK]:
        message = (
            f"{folder}: quantization_config has quant_method={method!r}, weight_block_size={block}; read: "
            f"'fp8' with [{FP8_BLOCK}, {FP8_BLOCK}]. Use a bfloat16 or FP8 release of it."
        )
        raise CheckpointError(message)


def _refuse_part(model: DeepSeek) -> None:
    whole = Part.whole(model.config)
    if model.part != whole:
        message = (
            f"a checkpoint holds the whole model: {len(whole.layers)} layers and all else, this instance has "
            f"{len(model.part.layers)} (embed={model.part.embed}, head={model.part.head}). Gather the parts."
        )
        raise CheckpointError(message)
