"""Engines by name or from a file: what each adds to its kernels (`priced.Engine`), and where that comes from.

`benthic.json` was fitted by `benthic plan engine` to measured steps of our own engine; "tuned" adds nothing.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from benthic.errors import ConfigError, UnknownFieldError
from benthic.plan.serving.fronts import FrontCost
from benthic.plan.serving.priced import TUNED, Curve, Engine

SHIPPED: Final = ("benthic",)
NAMES: Final = (TUNED.name, *SHIPPED)
FORMAT: Final = 7

_SECONDS: Final = {"eager_layer_s": 0.0, "graph_layer_s": -1e-3, "prompt_layer_s": 0.0}
"""Seconds a layer and the least each may be: kernels of decode steps overlap."""
_STRETCHES: Final = ("stretch", "prompt_stretch")
_ROWS: Final = "graph_rows"
_HOST: Final = "prompt_host_s"
_CURVES: Final = ("curve", "prompt_curve", "mixed_curve")
_FRONT: Final = "front"
_FRONT_SECONDS: Final = frozenset(field.name for field in fields(FrontCost))
_KEYS: Final = frozenset({"format", "name", "source", *_STRETCHES, *_SECONDS, _ROWS, _HOST, *_CURVES, _FRONT})


def get(word: str) -> Engine:
    """The engine called `word`, or that of the file `word`.

    Raises:
        UnknownFieldError: neither a name nor a path.
        ConfigError: there is no such file, or it is no engine.
    """
    if word == TUNED.name:
        return TUNED
    if word in SHIPPED:
        file = resources.files("benthic.plan.serving") / "engines" / f"{word}.json"
        return parse(file.read_text(encoding="utf-8"), where=f"engine {word}")
    path = Path(word)
    if path.is_file():
        return parse(path.read_text(encoding="utf-8"), where=word)
    if path.suffix == ".json" or len(path.parts) > 1:
        message = f"there is no engine {word}. Write one with `benthic plan engine MEASURED --out {word}`."
        raise ConfigError(message)
    raise UnknownFieldError(kind="engine", name=word, known=NAMES)


def as_json(engine: Engine, source: str) -> str:
    """The engine as text that `parse` takes."""
    return json.dumps({"format": FORMAT, "source": source, **asdict(engine)}, indent=1) + "\n"


def parse(text: str, *, where: str) -> Engine:
    """An engine from what `as_json` wrote.

    Raises:
        ConfigError: names what is missing, unknown or out of range.
    """
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        message = f"{where} is no JSON: {error}. Write it with `benthic plan engine`."
        raise ConfigError(message) from error
    if isinstance(record, dict) and record.get("format", FORMAT) != FORMAT:
        message = (
            f"{where} is an engine of format {record['format']}, but {FORMAT} is read. Write it again with "
            "`benthic plan engine`."
        )
        raise ConfigError(message)
    _check(record, _KEYS, f"an engine of format {FORMAT}", where)
    _check(record[_FRONT], _FRONT_SECONDS, "an engine's front", where)
    seconds = {name: _number(record, name, where, least=least) for name, least in _SECONDS.items()}
    stretches = {name: _number(record, name, where, least=0.1) for name in _STRETCHES}
    rows = int(_number(record, _ROWS, where, least=0.0))
    front = {name: _number(record[_FRONT], name, where, least=0.0) for name in _FRONT_SECONDS}
    return Engine(
        name=str(record["name"]),
        graph_rows=rows,
        prompt_host_s=_number(record, _HOST, where, least=0.0),
        curve=_points(record, "curve", where),
        prompt_curve=_points(record, "prompt_curve", where),
        mixed_curve=_points(record, "mixed_curve", where),
        front=FrontCost(**front),
        **stretches,
        **seconds,
    )


def _check(record: object, keys: frozenset[str], what: str, where: str) -> None:
    found = set(record) if isinstance(record, dict) else set()
    if found != keys:
        message = (
            f"{where} has {len(found & keys)} of the {len(keys)} fields of {what}; missing or unknown: "
            f"{', '.join(sorted(found ^ keys))}. Write it again with `benthic plan engine`."
        )
        raise ConfigError(message)


def _points(record: dict[str, Any], name: str, where: str) -> Curve:
    """Pairs of rows, which rise, and a share."""
    pairs = record[name] if isinstance(record[name], list) else [record[name]]
    found: list[tuple[float, float]] = []
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            message = f"{where}: {name} has {pair!r}, but it is a list of pairs of rows and a share."
            raise ConfigError(message)
        named = dict(zip(("rows", "share"), pair, strict=True))
        found.append((_number(named, "rows", where, least=1.0), _number(named, "share", where, least=0.1)))
    if any(high[0] <= low[0] for low, high in pairwise(found)):
        message = f"{where}: {name} has rows {[rows for rows, _ in found]}, but they must rise."
        raise ConfigError(message)
    return tuple(found)


def _number(record: dict[str, Any], name: str, where: str, *, least: float) -> float:
    value = record[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
        message = f"{where}: {name} is {value!r}, but it must be a finite number of {least:g} or more."
        raise ConfigError(message)
    return float(value)
