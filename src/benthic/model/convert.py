"""Checkpoint to checkpoint, one tensor at a time, without building the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from benthic.errors import CheckpointError
from benthic.model.checkpoint import MAX_SHARD_BYTES, Opened, open_checkpoint, read_weight
from benthic.model.export import Format, Progress, Report, in_file_order
from benthic.model.shard_writer import ShardWriter
from benthic.model.shards import CONFIG_FILE
from benthic.model.tensor_check import FP8_CODE, SCALE_SUFFIX, Table
from benthic.spec.hf import FP8_QUANTIZATION
from benthic.spec.parameters import parameters

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from benthic.model.shards import Source
    from benthic.spec.parameters import HFTensor

_CARRIED: Final = frozenset({".json", ".jinja", ".md", ".model", ".py", ".tiktoken", ".txt"})
"""Files that travel with the weights: tokenizer, chat template, generation defaults, remote code, notes."""


def convert(
    source: Path,
    target: Path,
    form: Format,
    *,
    mtp: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Report | None = None,
) -> None:
    """Rewrite the checkpoint in `source` in another type into `target`; memory holds one tensor at a time.

    A tensor already in the wanted form is copied bit by bit. `config.json` keeps its fields but for the type
    and the quantisation; tokenizer files are copied along. `mtp=False` leaves the MTP layers out.

    Raises:
        CheckpointError: either folder cannot be used; see `load_pretrained` and `save_pretrained`.
    """
    if target.resolve() == source.resolve():
        message = f"{target} is both source and target. Choose another folder to write into."
        raise CheckpointError(message)
    opened = open_checkpoint(source, mtp=mtp)
    tensors = [tensor for _, tensor in in_file_order(parameters(opened.config))]
    originals = {t.name: p.hf[0] for p in parameters(opened.config) for t in p.hf if t.duplicate}
    planned = [item for tensor in tensors for item in form.plan(tensor)]
    with opened.source as weights:
        opened.check(Table.of(opened.config))
        with ShardWriter(target, planned, max_shard_bytes) as writer:
            for tensor in tensors:
                kept = originals.get(tensor.name, tensor)
                for name, value in _encoded(weights, tensor, kept, form):
                    writer.write(name, value)
                    if progress is not None:
                        progress(Progress(name, writer.done_bytes, writer.total_bytes))
            for file in _companions(source):
                writer.copy(file)
            writer.write_json(CONFIG_FILE, converted_config(opened, form))


def _encoded(weights: Source, tensor: HFTensor, kept: HFTensor, form: Format) -> Iterator[tuple[str, Tensor]]:
    """The tensor in its new form; `kept` is where the source surely has it."""
    if form.quantises(tensor) and weights.tensors[kept.name].dtype == FP8_CODE:
        yield tensor.name, weights.read(kept.name)
        yield tensor.name + SCALE_SUFFIX, weights.read(kept.name + SCALE_SUFFIX).float()
        return
    wide = torch.float32 if form.quantises(tensor) or tensor.precision == "fp32" else form.dtype
    yield from form.encode(tensor, read_weight(weights, kept.name, wide))


def converted_config(opened: Opened, form: Format) -> dict[str, Any]:
    """The source's `config.json` with the new type, quantisation and number of MTP layers."""
    file = {key: value for key, value in opened.file.items() if key != "quantization_config"}
    file["dtype" if "dtype" in file else "torch_dtype"] = form.dtype_name
    if "num_nextn_predict_layers" in file:
        file["num_nextn_predict_layers"] = opened.config.num_nextn_predict_layers
    if form.fp8:
        file["quantization_config"] = dict(FP8_QUANTIZATION)
    return file


def _companions(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and path.suffix in _CARRIED
        and path.name != CONFIG_FILE
        and not path.name.endswith(".index.json")
    )
