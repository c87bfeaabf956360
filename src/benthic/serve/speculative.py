"""How an engine drafts: what `--speculative-config` says, in the words of vLLM."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Final, Literal, get_type_hints

from benthic.errors import ConfigError

Method = Literal["mtp", "ngram"]

METHODS: Final[dict[str, Method]] = {"mtp": "mtp", "deepseek_mtp": "mtp", "ngram": "ngram"}
"""vLLM names the modules of this architecture both ways."""


@dataclass(frozen=True, kw_only=True)
class Speculative:
    """Who drafts, and how much.

    Attributes:
        method: "mtp" drafts with the checkpoint's prediction modules, the last one used again and again;
            "ngram" proposes what followed the same tokens earlier in the sequence (prompt lookup).
        num_speculative_tokens: most drafts of a sequence in one step.
        prompt_lookup_max: longest run of tokens that "ngram" looks up.
        prompt_lookup_min: shortest one.
        adaptive: draft fewer, or nothing, where measured step times say that it does not pay.

    Raises:
        ConfigError: a value is out of range; all of them are named.
    """

    method: Method
    num_speculative_tokens: int
    prompt_lookup_max: int = 4
    prompt_lookup_min: int = 2
    adaptive: bool = True

    def __post_init__(self) -> None:
        problems = [
            f"{name} = {getattr(self, name)}, but it must be at least 1"
            for name in ("num_speculative_tokens", "prompt_lookup_min")
            if getattr(self, name) < 1
        ]
        if self.prompt_lookup_max < self.prompt_lookup_min:
            problems.append(
                f"prompt_lookup_max = {self.prompt_lookup_max} is below prompt_lookup_min = "
                f"{self.prompt_lookup_min}"
            )
        if problems:
            raise ConfigError("speculative config: " + "; ".join(problems))


def parse(text: str) -> Speculative:
    """Read `{"method": "mtp", "num_speculative_tokens": 2}`.

    Raises:
        ConfigError: not a JSON object, a field is missing, unknown or of another type, or out of range.
    """
    try:
        given = json.loads(text)
    except ValueError as error:
        msg = f"--speculative-config is not JSON ({error}): {text!r}"
        raise ConfigError(msg) from error
    if not isinstance(given, dict):
        msg = f"--speculative-config is a {type(given).__name__}, not an object: {text!r}"
        raise ConfigError(msg)
    method = given.get("method")
    if isinstance(method, str) and method not in METHODS:  # before fields that only others have
        msg = f"--speculative-config: method = {method!r}, but only {', '.join(METHODS)} draft here."
        raise ConfigError(msg)
    _check_names(given)
    _check_types(given)
    return Speculative(**{**given, "method": METHODS[given["method"]]})


def _check_names(given: dict[str, Any]) -> None:
    known = [field.name for field in fields(Speculative)]
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known are {', '.join(known)}."
            msg = f"--speculative-config has no field {name!r}. {hint}"
            raise ConfigError(msg)
    for name in ("method", "num_speculative_tokens"):
        if name not in given:
            msg = f"--speculative-config lacks {name!r}. Give both method and num_speculative_tokens."
            raise ConfigError(msg)


def _check_types(given: dict[str, Any]) -> None:
    kinds = get_type_hints(Speculative) | {"method": str}
    for name, value in given.items():
        if type(value) is not kinds[name]:
            msg = f"--speculative-config: {name} = {value!r} is not {kinds[name].__name__}."
            raise ConfigError(msg)
