"""From a request body to the engine's `SamplingParams`: defaults, bounds that depend on the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from benthic.errors import ConfigError
from benthic.serve import api_errors
from benthic.serve.messages import SamplingParams
from benthic.serve.protocol_requests import SamplingBody

if TYPE_CHECKING:
    from pathlib import Path

    from benthic.serve.messages import Ready

NUMBERS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """What a request that leaves a field out gets; a checkpoint's `generation_config.json` may change it."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def from_file(cls, path: Path) -> SamplingDefaults:
        """Read a `generation_config.json`; fields it leaves out keep the API's defaults.

        A value that no request may carry is refused, not dropped: the server would answer otherwise than the
        file says.

        Raises:
            ConfigError: the file is not a JSON object, or a value is not a number within a request's bounds.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            chosen = {name: found[name] for name in NUMBERS if found.get(name) is not None}
        except (ValueError, AttributeError) as error:
            msg = f"{path} is not a JSON object: {error}. Repair it, or pass --generation-config none."
            raise ConfigError(msg) from error
        try:
            SamplingBody.model_validate(chosen)
        except ValidationError as error:
            reason = api_errors.of_validation(error.errors())
            msg = f"{path}: {reason}. Repair it, or pass --generation-config none."
            raise ConfigError(msg) from error
        return cls(**chosen)

    def changed(self) -> str:
        """The values that are not the API's own, in words; empty without any."""
        plain = SamplingDefaults()
        values = {name: getattr(self, name) for name in NUMBERS}
        return ", ".join(
            f"{name} = {value}" for name, value in values.items() if value != getattr(plain, name)
        )


def sampling_params(
    body: SamplingBody,
    defaults: SamplingDefaults,
    ready: Ready,
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    nth: int = 0,
    grammar: str | None = None,
) -> SamplingParams:
    """What the engine is told for the `nth` of a prompt's `n` sequences; each draws from its own seed.

    Raises:
        ApiError: 400 for token ids outside the vocabulary, or `min_tokens` above `max_tokens`.
    """
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        msg = f"min_tokens = {min_tokens}, but max_tokens = {max_tokens}. Lower min_tokens."
        raise api_errors.invalid(msg, param="min_tokens")
    stop_ids = tuple(body.stop_token_ids or ())
    check_ids("stop_token_ids", stop_ids, ready.vocab_size)
    return SamplingParams(
        temperature=_or(body.temperature, defaults.temperature),
        top_p=_or(body.top_p, defaults.top_p),
        top_k=max(0, _or(body.top_k, defaults.top_k)),
        min_p=_or(body.min_p, defaults.min_p),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, defaults.repetition_penalty),
        logit_bias=logit_bias(body.logit_bias or {}, ready.vocab_size),
        seed=None if body.seed is None else _wrapped(body.seed + nth),
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=stop_ids,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=grammar,
    )


def logit_bias(written: dict[str, float], vocab_size: int) -> dict[int, float]:
    """JSON keys are text; these must be token ids. Raises: ApiError 400."""
    bias: dict[int, float] = {}
    for key, value in written.items():
        if not (key.isascii() and key.isdigit() and len(key) < 12):
            msg = f"logit_bias: the key {key[:40]!r} is not a token id"
            raise api_errors.invalid(msg, param="logit_bias")
        bias[int(key)] = float(value)
    check_ids("logit_bias", tuple(bias), vocab_size)
    return bias


def check_ids(field: str, ids: tuple[int, ...], vocab_size: int) -> None:
    """Raises: ApiError 400 for an id outside the vocabulary."""
    largest = max(ids, default=0)
    if largest >= vocab_size:
        msg = f"{field} holds token {largest}, but the vocabulary has ids 0 to {vocab_size - 1}"
        raise api_errors.invalid(msg, param=field)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _wrapped(seed: int) -> int:
    """The seed in signed 64 bits."""
    return (seed + 2**63) % 2**64 - 2**63
