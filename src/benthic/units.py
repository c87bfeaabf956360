"""Numbers as people read them. Prefixes are decimal (1 kB = 1000 B) except in `binary_bytes`."""

from __future__ import annotations

from typing import Final

_DECIMAL: Final = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_COUNT: Final = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_BINARY: Final = ((2**50, "Pi"), (2**40, "Ti"), (2**30, "Gi"), (2**20, "Mi"), (2**10, "Ki"))
_SECONDS: Final = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def count(value: float, digits: int = 4) -> str:
    """How many: `671.0 B` for 671026419200 (k, M, B, T as of parameters and tokens)."""
    return _scaled(value, _COUNT, "", digits)


def size(value: float, digits: int = 4) -> str:
    """Bytes with decimal prefixes: `70.27 kB` for 70272."""
    return _scaled(value, _DECIMAL, "B", digits)


def binary_bytes(value: float, digits: int = 4) -> str:
    """Bytes with binary prefixes: `4.5 MiB` for 4718592."""
    return _scaled(value, _BINARY, "B", digits)


def flops(value: float, digits: int = 4) -> str:
    """Floating-point operations: `250.5 GFLOP` for 250.46e9."""
    return _scaled(value, _DECIMAL, "FLOP", digits)


def rate(value: float, unit: str, digits: int = 4) -> str:
    """Something a second: `989 TFLOP/s`, `3.35 TB/s`."""
    return _scaled(value, _DECIMAL, f"{unit}/s", digits)


def seconds(value: float, digits: int = 3) -> str:
    """A duration in the largest unit that fits: `19.9 s`, `250 µs`, `54.2 d`."""
    for scale, name in _SECONDS:
        if abs(value) >= scale:
            return f"{_number(value / scale, digits)} {name}"
    return f"{_number(value * 1e9, digits)} ns" if value else "0 s"


def percent(fraction: float, digits: int = 1) -> str:
    """A fraction of one as percent: `38.9%`."""
    return f"{100 * fraction:.{digits}f}%"


def plural(number: int, noun: str) -> str:
    """A number of things: `1 rank`, `2 ranks`, `2 microbatches`, `2 copies`."""
    if number == 1:
        return f"1 {noun}"
    ending = {"ch": "ches", "py": "pies"}.get(noun[-2:], f"{noun[-2:]}s")
    return f"{number} {noun[:-2]}{ending}"


def _scaled(value: float, prefixes: tuple[tuple[float, str], ...], unit: str, digits: int) -> str:
    for scale, prefix in prefixes:
        if abs(value) >= scale:
            return f"{_number(value / scale, digits)} {prefix}{unit}"
    return f"{_number(value, digits)} {unit}".rstrip()


def _number(value: float, digits: int) -> str:
    """`digits` significant digits, no exponent, no trailing zeros after the point."""
    whole = len(str(int(abs(value))))
    text = f"{value:.{max(digits - whole, 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
