"""`--set a.b=c`: change any field of a nested frozen config by its dotted name."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, TypeVar

from benthic.errors import BenthicError, ConfigError, UnknownFieldError
from benthic.train.curve import Curve
from benthic.train.fields import field_types, flatten, read

if TYPE_CHECKING:
    from collections.abc import Iterable

Config = TypeVar("Config")
Changes = dict[str, Any]


def apply(config: Config, settings: Iterable[str]) -> Config:
    """A copy of `config` with every `a.b=value` applied at once, later ones winning.

    Raises:
        ConfigError: one line for each setting that is malformed, unknown ("did you mean") or of a wrong type,
            or what the changed config itself refuses; nothing is applied then.
    """
    problems: list[str] = []
    changes: Changes = {}
    for setting in settings:
        try:
            _collect(config, setting, changes)
        except BenthicError as error:
            problems.append(f"--set {setting}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    return _rebuild(config, changes)


def typed(value: object) -> str:
    """A field's value as `apply` reads it."""
    if isinstance(value, tuple):
        return ",".join(map(typed, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _collect(config: object, setting: str, changes: Changes) -> None:
    """Add one setting to `changes`, a tree of dicts with the new leaves."""
    name, equals, word = setting.partition("=")
    name = name.strip()
    if not equals or not name:
        msg = "is no setting. Write section.field=value, e.g. train.lr=3e-4."
        raise ConfigError(msg)
    *sections, leaf = name.split(".")
    here: Any = config
    for section in sections:
        if section not in _names(here):
            msg = "config field"
            raise UnknownFieldError(msg, name, flatten(config))
        here, changes = getattr(here, section), changes.setdefault(section, {})
    if leaf not in _names(here):
        msg = "config field"
        raise UnknownFieldError(msg, name, flatten(config))
    if isinstance(getattr(here, leaf), _section_types(here)):
        msg = f"{name} is a section. Set one of its fields: {', '.join(_names(getattr(here, leaf)))}."
        raise ConfigError(msg)
    changes[leaf] = read(field_types(type(here))[leaf], word.strip())


def _names(value: object) -> tuple[str, ...]:
    """Names of the fields of a section; a leaf has none."""
    if isinstance(value, Curve) or not dataclasses.is_dataclass(value):
        return ()
    return tuple(field.name for field in dataclasses.fields(value))


def _section_types(value: object) -> tuple[type, ...]:
    """The types of the fields of `value` that are sections by themselves (not optional values)."""
    kinds = field_types(type(value)).values()
    return tuple(k for k in kinds if isinstance(k, type) and dataclasses.is_dataclass(k) and k is not Curve)


def _rebuild(config: Any, changes: Changes) -> Any:
    leaves = {
        name: _rebuild(getattr(config, name), change) if isinstance(change, dict) else change
        for name, change in changes.items()
    }
    return dataclasses.replace(config, **leaves) if leaves else config
