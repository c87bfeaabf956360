"""Comparing what a checkpoint stores with what a model needs; everything wrong is named at once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from benthic.errors import TensorMismatchError
from benthic.model.shards import DTYPES
from benthic.spec.parameters import parameters
from benthic.spec.totals import scale_shape

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from benthic.model.shards import Source, Stored
    from benthic.spec.model import ModelConfig
    from benthic.spec.parameters import HFTensor, Param

SCALE_SUFFIX: Final = "_scale_inv"
FP8_CODE: Final = "F8_E4M3"
FP8_BLOCK: Final = 128
SHOWN: Final = 100

_IGNORED: Final = re.compile(r"\.rotary_emb\.inv_freq$")
"""Extras that old exports carry and that the config determines."""


@dataclass(frozen=True)
class Table:
    """The tensors a model needs from a checkpoint.

    `twins` maps the name of a stored copy to the tensor it copies: the MTP layers' embedding and head, and
    the head itself when it is tied to the embedding. A twin may be absent; if present it must be equal.
    """

    params: tuple[Param, ...]
    needed: Mapping[str, HFTensor]
    twins: Mapping[str, HFTensor]

    @classmethod
    def of(cls, config: ModelConfig, params: Iterable[Param] | None = None) -> Table:
        """The table of a config, or of the given parameters of it."""
        params = tuple(parameters(config) if params is None else params)
        needed = {t.name: t for p in params for t in p.hf if not t.duplicate}
        twins = {t.name: p.hf[0] for p in params for t in p.hf if t.duplicate}
        if config.tie_word_embeddings:
            embed = next((p.hf[0] for p in params if p.name == "embed.weight"), None)
            twins |= {name: embed for name in _heads(config) if embed is not None}
        return cls(params, needed, twins)


def _heads(config: ModelConfig) -> list[str]:
    first = config.num_hidden_layers
    layers = range(first, first + config.num_nextn_predict_layers)
    return ["lm_head.weight", *(f"model.layers.{layer}.shared_head.head.weight" for layer in layers)]


def check(source: Source, table: Table, *, whole: Table, dropped_prefixes: tuple[str, ...] = ()) -> None:
    """Refuse a checkpoint whose tensors are not those of the table.

    `whole` is the table of the whole model: what belongs to it is not unexpected when only a part is loaded.
    `dropped_prefixes` name tensors that the caller chose to leave unread.

    Raises:
        TensorMismatchError: names every missing, misshapen, oddly stored and unexpected tensor.
    """
    found = source.tensors
    expected = {**whole.needed, **whole.twins}
    here = [(n, t) for n, t in {**table.needed, **table.twins}.items() if n in found]
    lists = {
        "missing": [name for name in table.needed if name not in found],
        "misshapen": [text for name, tensor in here for text in _misshapen(name, tensor, found)],
        "stored in a type that is not a weight's": [
            f"{name} ({found[name].dtype})" for name, _ in here if found[name].dtype not in DTYPES
        ],
        "unexpected": [name for name in found if not _known(name, expected, dropped_prefixes, found)],
    }
    wrong = {kind: names for kind, names in lists.items() if names}
    if wrong:
        raise TensorMismatchError(_message(source, wrong, _remedy(wrong, whole)))


def _known(
    name: str,
    expected: Mapping[str, HFTensor],
    dropped_prefixes: tuple[str, ...],
    found: Mapping[str, Stored],
) -> bool:
    base = name.removesuffix(SCALE_SUFFIX)
    # transformers stores the shared experts of a model without any as tensors without elements.
    empty = 0 in found[name].shape
    return base in expected or empty or name.startswith(dropped_prefixes) or _IGNORED.search(name) is not None


def _misshapen(name: str, tensor: HFTensor, found: Mapping[str, Stored]) -> list[str]:
    stored = found[name]
    wrong = []
    if stored.shape != tensor.shape:
        wrong.append(f"{name} (stored {list(stored.shape)}, config says {list(tensor.shape)})")
    if stored.dtype != FP8_CODE:
        return wrong
    scale, want = found.get(name + SCALE_SUFFIX), scale_shape(tensor.shape, (FP8_BLOCK, FP8_BLOCK))
    if scale is None:
        wrong.append(f"{name}{SCALE_SUFFIX} (missing, but the weight is FP8)")
    elif scale.shape != want:
        wrong.append(
            f"{name}{SCALE_SUFFIX} (stored {list(scale.shape)}, blocks of {FP8_BLOCK} need {list(want)})"
        )
    return wrong


def _message(source: Source, wrong: Mapping[str, list[str]], remedy: str) -> str:
    counts = ", ".join(f"{len(names)} {kind}" for kind, names in wrong.items())
    lines = [f"{source.folder}: tensors do not match config.json: {counts}."]
    for kind, names in wrong.items():
        more = f" … and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        lines.append(f"  {kind}: {', '.join(names[:SHOWN])}{more}")
    return "\n".join([*lines, remedy])


def _remedy(wrong: Mapping[str, list[str]], whole: Table) -> str:
    """What to do about it; the one common case is a copy without the MTP layers that its config announces."""
    mtp = {t.name for p in whole.params if p.mtp for t in p.hf}
    if set(wrong) == {"missing"} and set(wrong["missing"]) <= mtp:
        return "Only MTP layers are missing: load with mtp=False, or set num_nextn_predict_layers to 0."
    return "Check that config.json and the weights are of the same model, and that every file was fetched."
