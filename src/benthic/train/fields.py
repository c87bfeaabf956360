"""Typed reading and writing of frozen config values: from words, from JSON, to JSON.

One function decides what a word means for a field's type, so that `--set`, a run folder's `resolved.json` and
a checkpoint's record of its config agree.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from benthic.errors import BenthicError, ConfigError, UnknownFieldError
from benthic.train.curve import Curve

Config = TypeVar("Config")


def field_types(cls: Any) -> dict[str, Any]:
    """The resolved type of every field of a dataclass."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def describe(kind: Any) -> str:
    """A type in words, for messages."""
    if get_origin(kind) is Literal:
        return " or ".join(repr(value) for value in get_args(kind))
    if _is_union(kind):
        return " or ".join(describe(part) for part in get_args(kind))
    names = {
        bool: "true or false",
        int: "an integer",
        float: "a finite number",
        str: "text",
        type(None): "none",
    }
    if kind is Curve:
        return "a number or a curve such as 0.3@10T,0.1"
    if get_origin(kind) is tuple:
        return f"a comma-separated list of {describe(get_args(kind)[0])}"
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def read(kind: Any, word: str) -> Any:
    """What `word` means for a field of type `kind`.

    Raises:
        ConfigError: it means nothing there; the message says what would.
    """
    if _is_union(kind):
        return _read_union(kind, word)
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        return tuple(read(item, part.strip()) for part in word.strip("()[] ").split(",") if part.strip())
    if get_origin(kind) is Literal:
        return _read_literal(kind, word)
    if dataclasses.is_dataclass(kind) and kind is not Curve:
        return _read_dataclass(kind, word)
    return _read_scalar(kind, word)


def to_json(value: Any) -> Any:
    """`value` as what `json.dumps` takes: dataclasses become objects, curves become their text."""
    if isinstance(value, Curve):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [to_json(part) for part in value]
    return value


def from_json(kind: Any, value: Any) -> Any:
    """The opposite of `to_json`.

    Raises:
        UnknownFieldError: a key that the dataclass does not have.
        ConfigError: a value that does not fit its field.
    """
    if _is_union(kind):
        return None if value is None else _from_json_union(kind, value)
    if kind is Curve:
        return Curve.parse(str(value))
    if dataclasses.is_dataclass(kind):
        return _from_object(kind, value)
    if get_origin(kind) is tuple:
        return tuple(from_json(get_args(kind)[0], part) for part in value)
    allowed = get_args(kind) if get_origin(kind) is Literal else None
    if allowed is not None and value not in allowed:
        msg = f"{value!r} is not {describe(kind)}."
        raise ConfigError(msg)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if allowed is None and isinstance(kind, type) and type(value) is not kind:
        msg = f"{value!r} is not {describe(kind)}."
        raise ConfigError(msg)
    return value


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf of nested dataclasses by its dotted name."""
    leaves: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value, name = getattr(config, f.name), f"{prefix}{f.name}"
        nested = dataclasses.is_dataclass(value) and not isinstance(value, Curve)
        leaves.update(flatten(value, f"{name}.") if nested else {name: value})
    return leaves


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in {Union, types.UnionType}


def _read_union(kind: Any, word: str) -> Any:
    for part in get_args(kind):
        try:
            return read(part, word)
        except BenthicError:
            continue
    msg = f"{word!r} is not {describe(kind)}."
    raise ConfigError(msg)


def _from_json_union(kind: Any, value: Any) -> Any:
    for part in get_args(kind):
        try:
            return from_json(part, value)
        except BenthicError:
            continue
    msg = f"{value!r} is not {describe(kind)}."
    raise ConfigError(msg)


def _read_literal(kind: Any, word: str) -> Any:
    for value in get_args(kind):
        if str(value) == word:
            return value
    msg = f"{word!r} is not {describe(kind)}."
    raise ConfigError(msg)


def _read_dataclass(kind: Any, word: str) -> Any:
    try:
        value = json.loads(word)
    except json.JSONDecodeError:
        msg = f"{word!r} is not a JSON object of {kind.__name__}."
        raise ConfigError(msg) from None
    return from_json(kind, value)


def _read_scalar(kind: Any, word: str) -> Any:
    if kind is Curve:
        return Curve.parse(word)
    if kind is str:
        return word
    lowered = word.strip().lower()
    if kind is type(None) and lowered in {"none", "null"}:
        return None
    if kind is bool and lowered in {"true", "false", "yes", "no", "on", "off", "1", "0"}:
        return lowered in {"true", "yes", "on", "1"}
    try:
        if kind is int:
            return int(word.replace("_", ""))
        if kind is float and math.isfinite(number := float(word)):
            return number
    except ValueError:
        pass
    msg = f"{word!r} is not {describe(kind)}."
    raise ConfigError(msg)


def _from_object(kind: Any, value: Any) -> Any:
    if not isinstance(value, dict):
        msg = f"{value!r} is not an object of {kind.__name__}."
        raise ConfigError(msg)
    known = field_types(kind)
    for name in value:
        if name not in known:
            msg = f"field of {kind.__name__}"
            raise UnknownFieldError(msg, name, known)
    try:
        return kind(**{name: from_json(known[name], part) for name, part in value.items()})
    except TypeError as error:
        msg = f"{kind.__name__}: {error}."
        raise ConfigError(msg) from None
