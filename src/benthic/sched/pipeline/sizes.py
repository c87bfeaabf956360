"""What sizes a schedule takes: one refusal each, with the two numbers and the remedy."""

from __future__ import annotations

from benthic.errors import ConfigError


def at_least(name: str, field: str, value: int, least: int, why: str = "") -> None:
    """Refuse `value` below `least`.

    Raises:
        ConfigError: names both.
    """
    if value < least:
        reason = f" ({why})" if why else ""
        wrong = f"{field} = {value}, but schedule {name!r} needs at least {least}{reason}"
        message = f"{wrong}. Set {field} to {least} or more."
        raise ConfigError(message)


def multiple(name: str, field: str, value: int, of: int, why: str = "") -> None:
    """Refuse `value` unless `of` divides it.

    Raises:
        ConfigError: names both, and the nearest values that would do.
    """
    if value % of:
        reason = f" ({why})" if why else ""
        wrong = f"{field} = {value}, but schedule {name!r} needs a multiple of {of}{reason}"
        below, above = value // of * of, (value // of + 1) * of
        message = f"{wrong}. Set {field} to {f'{below} or {above}' if below else above}."
        raise ConfigError(message)


def check_sizes(name: str, ranks: int, microbatches: int) -> None:
    """Refuse a schedule without ranks or microbatches.

    Raises:
        ConfigError: names the number.
    """
    at_least(name, "ranks", ranks, 1)
    at_least(name, "microbatches", microbatches, 1)
