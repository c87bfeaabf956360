"""Read and write `config.json` of DeepSeek-V2/V3, Moonlight and Kimi-K2 checkpoints without loss.

A file is either understood to its last field or refused: fields that shape the network become a
`ModelConfig`, known fields that do not are kept as they are and in their order, anything else is named in
the error.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Final

from benthic.errors import ConfigError, did_you_mean
from benthic.spec.hf_rope import ROPE_FIELDS, Rope, read_rope, write_rope
from benthic.spec.model import ModelConfig

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

HFDict = dict[str, object]

_SHAPING: Final = tuple(
    f.name for f in fields(ModelConfig) if f.name not in {"name", "rope_theta", "rope_scaling"}
)
_KEPT: Final = frozenset(
    {
        "_name_or_path",
        "architectures",
        "auto_map",
        "aux_loss_alpha",
        "chunk_size_feed_forward",
        "dtype",
        "ep_size",
        "id2label",
        "is_encoder_decoder",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "quantization_config",
        "return_dict",
        "seq_aux",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
# A field that may hold one value only, because the network has no other form.
_FIXED: Final[dict[str, tuple[object, ...]]] = {
    "attention_bias": (False,),
    "attention_dropout": (0, None),
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "moe_layer_freq": (1,),
}
_DERIVED: Final = ("head_dim", "num_key_value_heads", "qk_head_dim")
_NULL_MEANS: Final[dict[str, object]] = {
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 0,
    "n_shared_experts": 0,
    "num_experts_per_tok": 0,
    "rope_interleave": True,
    "norm_topk_prob": False,
}
# What the architecture's own code assumes when a file leaves the field out.
_COMMON: Final[HFDict] = {"initializer_range": 0.02, "rms_norm_eps": 1e-6}
_ABSENT_MEANS: Final[dict[str, HFDict]] = {
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "kimi_k2": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "deepseek_v2": {
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    },
}
# Fields for which code in the wild disagrees on the default, so that a file must say them.
_NEVER_ASSUMED: Final = (
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
)
_REQUIRED: Final = (*(f.name for f in fields(ModelConfig) if f.default is MISSING), *_NEVER_ASSUMED)
_KNOWN: Final = frozenset({*_SHAPING, *_KEPT, *_FIXED, *_DERIVED, *ROPE_FIELDS, "model_type"})

FP8_QUANTIZATION: Final[HFDict] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


@dataclass(frozen=True)
class HFConfig:
    """A config and the file it came from; `to_hf` writes the file back, changed only where the config was."""

    config: ModelConfig
    file: Mapping[str, object]


def from_hf(file: Mapping[str, object], *, name: str = "custom") -> HFConfig:
    """Understand the contents of a `config.json`.

    Raises:
        ConfigError: the architecture is another one, or fields are unknown, missing or contradict each other;
            one message names them all.
    """
    model_type = file.get("model_type")
    if model_type not in _ABSENT_MEANS:
        message = f"model_type = {model_type!r} in config.json, but benthic reads {', '.join(_ABSENT_MEANS)}"
        raise ConfigError(message)
    defaults = _COMMON | _ABSENT_MEANS[str(model_type)]
    wrong = [*_unknown(file), *_missing(file, defaults), *_wrongly_fixed(file)]
    rope = read_rope(file, wrong)
    if wrong:
        raise ConfigError(_report(name, wrong))
    values = defaults | {key: _value(file, key) for key in _SHAPING if key in file}
    config = _build(name, values, rope)
    contradictions = list(_wrongly_derived(file, config))
    if contradictions:
        raise ConfigError(_report(name, contradictions))
    return HFConfig(config, dict(file))


def to_hf(hf: HFConfig | ModelConfig, *, dtype: str = "bfloat16", fp8: bool = False) -> HFDict:
    """Write a `config.json` that transformers loads and that other engines understand.

    A `ModelConfig` gives all fields in alphabetical order; softmax models become `deepseek_v2`, sigmoid ones
    `deepseek_v3`. An `HFConfig` gives its file back, with only those fields changed whose values differ in
    its config (`dtype` and `fp8` do not apply: the file says).

    Args:
        hf: what to write.
        dtype: the type of the unquantised weights, for `torch_dtype`.
        fp8: whether the weights are stored as FP8 with 128x128 block scales.
    """
    if isinstance(hf, ModelConfig):
        return _native(hf, dtype=dtype, fp8=fp8)
    before = from_hf(hf.file, name=hf.config.name).config
    if before == hf.config:
        return dict(hf.file)
    return _changed(hf, before)


def read(path: Path) -> HFConfig:
    """Read `config.json` from a file or from the folder that holds it; the model takes the folder's name.

    Raises:
        ConfigError: there is no such file, it is not JSON, or `from_hf` refuses it.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        message = f"no config.json at {path}; give a checkpoint folder, a config.json or a preset's name"
        raise ConfigError(message)
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        message = f"{file} is not JSON: {error}"
        raise ConfigError(message) from error
    if not isinstance(contents, dict):
        message = f"{file} holds a {type(contents).__name__}, not an object with fields"
        raise ConfigError(message)
    return from_hf(contents, name=file.resolve().parent.name or "custom")


def nearest_checkpoint(folder: Path) -> str:
    """Where the folder in Hugging Face format is, of what `benthic train` writes."""
    if (folder / "hf" / "config.json").is_file():
        return f"The run's model is in {folder / 'hf'}."
    if (folder / "manifest.json").is_file():
        return f"`benthic convert {folder} FOLDER` makes one of this step of a run."
    names = [found.parent.name for found in folder.glob("checkpoint/step-*/manifest.json")]
    steps = [int(number) for name in names if (number := name.removeprefix("step-")).isdigit()]
    if steps:
        newest = folder / "checkpoint" / f"step-{max(steps)}"
        return f"`benthic convert {newest} FOLDER` makes one of the run's newest step."
    return "Point to a folder in the Hugging Face format."


def dumps(hf: HFConfig | ModelConfig, *, dtype: str = "bfloat16", fp8: bool = False) -> str:
    """The text of a `config.json`, indented as transformers does it."""
    return json.dumps(to_hf(hf, dtype=dtype, fp8=fp8), indent=2) + "\n"


def _report(name: str, wrong: list[str]) -> str:
    return f"config.json of {name!r} cannot be used:" + "".join(f"\n  - {line}" for line in wrong)


def _unknown(file: Mapping[str, object]) -> Iterator[str]:
    for key in file:
        if key not in _KNOWN:
            hint = did_you_mean(key, _KNOWN)
            yield f"unknown field {key!r}. " + (
                hint if hint.startswith("Did") else "It may change the network."
            )


def _missing(file: Mapping[str, object], defaults: HFDict) -> Iterator[str]:
    for key in _REQUIRED:
        if key not in file and key not in defaults:
            yield f"{key} is missing"


def _wrongly_fixed(file: Mapping[str, object]) -> Iterator[str]:
    for key, allowed in _FIXED.items():
        if key in file and file[key] not in allowed:
            yield f"{key} = {file[key]!r}, but this architecture has only {key} = {allowed[0]!r}"


def _wrongly_derived(file: Mapping[str, object], config: ModelConfig) -> Iterator[str]:
    """Fields that repeat what others say; null says nothing."""
    for key, value in _derived(config).items():
        if file.get(key) is not None and file[key] != value:
            source = "num_attention_heads" if key == "num_key_value_heads" else "the qk head dims"
            yield f"{key} = {file[key]!r} contradicts {source}, which give {value}"


def _derived(config: ModelConfig) -> HFDict:
    return {
        "head_dim": config.qk_rope_head_dim,
        "num_key_value_heads": config.num_attention_heads,
        "qk_head_dim": config.qk_head_dim,
    }


def _value(file: Mapping[str, object], key: str) -> object:
    value = file[key]
    return _NULL_MEANS.get(key, value) if value is None else value


def _build(name: str, values: Mapping[str, object], rope: Rope) -> ModelConfig:
    known = {"name": name, "rope_theta": rope.theta, "rope_scaling": rope.yarn, **values}
    return ModelConfig(**known)  # type: ignore[arg-type]  # __post_init__ checks every type and names the field


def _native(config: ModelConfig, *, dtype: str, fp8: bool) -> HFDict:
    version = "V3" if config.scoring_func == "sigmoid" else "V2"
    written: HFDict = {
        "architectures": [f"Deepseek{version}ForCausalLM"],
        "model_type": f"deepseek_{version.lower()}",
        "torch_dtype": dtype,
        "use_cache": True,
        "num_key_value_heads": config.num_attention_heads,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "moe_layer_freq": 1,
        **{key: getattr(config, key) for key in _SHAPING},
        **write_rope(config, modern=False),
    }
    if config.mtp_hidden == "pre_norm":
        del written["mtp_hidden"]
    if fp8:
        written["quantization_config"] = dict(FP8_QUANTIZATION)
    return dict(sorted(written.items()))


def _changed(hf: HFConfig, before: ModelConfig) -> HFDict:
    after = hf.config
    new = {key: getattr(after, key) for key in _SHAPING if getattr(after, key) != getattr(before, key)}
    if "scoring_func" in new:
        native = _native(after, dtype="", fp8=False)
        new |= {key: native[key] for key in ("architectures", "model_type")}
    new |= {key: value for key, value in _derived(after).items() if key in hf.file}
    if (after.rope_theta, after.rope_scaling) != (before.rope_theta, before.rope_scaling):
        modern = "rope_parameters" in hf.file
        kept = {key: value for key, value in hf.file.items() if key not in ROPE_FIELDS}
        return kept | new | write_rope(after, modern=modern)
    return dict(hf.file) | new
