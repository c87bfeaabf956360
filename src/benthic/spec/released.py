"""The `config.json` of each released model, as its publisher wrote it.

The fields that shape the network come from `benthic.spec.presets`; this file adds what the publisher wrote
beside them, and the `initializer_range` of 0.02 that every file carries whatever the training used.
"""

from __future__ import annotations

from typing import Final

from benthic.errors import UnknownFieldError
from benthic.spec import presets
from benthic.spec.hf import FP8_QUANTIZATION, HFConfig, HFDict, from_hf, to_hf

_EVERYWHERE: Final[HFDict] = {
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "initializer_range": 0.02,
    "pretraining_tp": 1,
    "seq_aux": True,
}
_FP8: Final[HFDict] = {"quantization_config": FP8_QUANTIZATION}
_BESIDE: Final[dict[str, HFDict]] = {
    "deepseek-v3": {"transformers_version": "4.33.1", **_FP8},
    "deepseek-r1": {"transformers_version": "4.46.3", **_FP8},
    "deepseek-v2": {"transformers_version": "4.39.3"},
    "deepseek-v2-lite": {"transformers_version": "4.33.1"},
    "moonlight-16b-a3b": {"transformers_version": "4.46.3"},
    "kimi-k2": {"model_type": "kimi_k2", "transformers_version": "4.48.3", **_FP8},
}
_NOT_IN_V2: Final = ("num_nextn_predict_layers",)


def published(name: str) -> HFConfig:
    """The released `config.json` of a model, fields in alphabetical order as in the files.

    Raises:
        UnknownFieldError: `name` is no released model (our own small ones never were).
    """
    if name not in _BESIDE:
        raise UnknownFieldError(kind="released model", name=name, known=_BESIDE)
    config = presets.get(name)
    file = to_hf(config) | _EVERYWHERE | _BESIDE[name] | {"auto_map": _auto_map(config.scoring_func)}
    del file["rope_interleave"]
    if config.rope_scaling is None:
        del file["rope_scaling"]
    if config.scoring_func == "softmax":
        file = {key: value for key, value in file.items() if key not in _NOT_IN_V2}
    return from_hf(dict(sorted(file.items())), name=config.name)


def _auto_map(scoring_func: str) -> HFDict:
    version = "V3" if scoring_func == "sigmoid" else "V2"
    return {
        "AutoConfig": f"configuration_deepseek.Deepseek{version}Config",
        "AutoModel": f"modeling_deepseek.Deepseek{version}Model",
        "AutoModelForCausalLM": f"modeling_deepseek.Deepseek{version}ForCausalLM",
    }
