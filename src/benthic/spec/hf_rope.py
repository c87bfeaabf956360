"""Rotary fields of `config.json`, in their older (`rope_scaling`) and newer (`rope_parameters`) form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final

from benthic.errors import ConfigError, did_you_mean
from benthic.spec.model import ModelConfig, Yarn

ROPE_FIELDS: Final = ("rope_theta", "rope_scaling", "rope_parameters")

_DEFAULT_THETA: Final = 10000.0
_YARN: Final = tuple(f.name for f in fields(Yarn))
_INNER: Final = frozenset({*_YARN, "type", "rope_type", "rope_theta"})


@dataclass(frozen=True)
class Rope:
    """The rotary base and its context extension."""

    theta: float
    yarn: Yarn | None


def read_rope(file: Mapping[str, object], wrong: list[str]) -> Rope:
    """Read the rotary fields of a `config.json`; what cannot be used is appended to `wrong`."""
    found = {key: _inner(key, file[key], wrong) for key in ("rope_scaling", "rope_parameters") if key in file}
    yarns = list(dict.fromkeys(yarn for yarn, _ in found.values()))
    thetas = [theta for _, theta in found.values() if theta is not None]
    if file.get("rope_theta") is not None:
        thetas.append(file["rope_theta"])
    if len(yarns) > 1:
        old, new = file["rope_scaling"], file["rope_parameters"]
        wrong.append(f"rope_scaling = {old!r} contradicts rope_parameters = {new!r}")
    if any(theta != thetas[0] for theta in thetas):
        wrong.append(f"rope_theta is given as {' and as '.join(map(repr, thetas))}")
    theta = thetas[0] if thetas else _DEFAULT_THETA
    if isinstance(theta, bool) or not isinstance(theta, int | float):
        wrong.append(f"rope_theta = {theta!r} is no number")
        theta = _DEFAULT_THETA
    return Rope(theta, yarns[0] if yarns else None)


def write_rope(config: ModelConfig, *, modern: bool) -> dict[str, object]:
    """Rotary fields of `config`: `rope_parameters` if `modern`, else `rope_theta` and `rope_scaling`."""
    yarn = config.rope_scaling
    inner = {key: getattr(yarn, key) for key in _YARN} if yarn else {}
    if modern:
        kind = "yarn" if yarn else "default"
        return {"rope_parameters": {**inner, "rope_theta": config.rope_theta, "rope_type": kind}}
    scaling = dict(sorted({**inner, "type": "yarn"}.items())) if yarn else None
    return {"rope_theta": config.rope_theta, "rope_scaling": scaling}


def _inner(where: str, value: object, wrong: list[str]) -> tuple[Yarn | None, object]:
    """One of the two nested objects: the extension in it, and the base if it names one."""
    if value is None:
        return None, None
    if not isinstance(value, Mapping):
        wrong.append(f"{where} = {value!r} is no object")
        return None, None
    wrong.extend(
        f"unknown field {where}.{key}. {did_you_mean(key, _INNER)}" for key in value if key not in _INNER
    )
    kinds = {str(value[key]) for key in ("type", "rope_type") if key in value}
    if kinds == {"yarn"}:
        return _yarn(where, value, wrong), value.get("rope_theta")
    if kinds - {"default"}:
        wrong.append(
            f"{where} has type {' and '.join(sorted(map(str, kinds)))}, but only yarn and default exist here"
        )
    elif not kinds and any(key in value for key in _YARN):
        wrong.append(f"{where} has no type; say yarn or default")
    return None, value.get("rope_theta")


def _yarn(where: str, value: Mapping[str, object], wrong: list[str]) -> Yarn | None:
    missing = [key for key in ("factor", "original_max_position_embeddings") if key not in value]
    if missing:
        wrong.append(f"{where} is yarn without {' and '.join(missing)}")
        return None
    # A file without mscale_all_dim leaves the softmax scale alone and warms cos and sin instead.
    given = {"mscale_all_dim": 0.0} | {key: value[key] for key in _YARN if key in value}
    try:
        return Yarn(**given)  # type: ignore[arg-type]  # __post_init__ checks every type and names the field
    except ConfigError as error:
        wrong.append(f"{where}: {error}")
        return None
