"""What the engine refuses before the scheduler sees it: ids and sampling values that no tensor could hold."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from benthic.errors import AdmissionError

if TYPE_CHECKING:
    from benthic.serve.messages import Generate, SamplingParams

MOST = 3.4e38
"""What float32 holds. A bias of minus infinity is allowed: it forbids a token."""


def check(request: Generate, *, vocab_size: int, max_logprobs: int) -> None:
    """Refuse a request with token ids outside the vocabulary or sampling values outside their ranges.

    Raises:
        AdmissionError: names every offending field, its value and its bounds.
    """
    params = request.params
    problems = [
        *_outside("prompt", request.prompt, vocab_size),
        *_outside("output", request.output, vocab_size),
        *_outside("stop_token_ids", params.stop_token_ids, vocab_size),
        *_outside("logit_bias", params.logit_bias, vocab_size),
        *_ranges(params),
        *_counts(params, max_logprobs),
    ]
    if problems:
        msg = f"request {request.request_id!r}: " + "; ".join(problems) + "."
        raise AdmissionError(msg)


def _outside(name: str, tokens: tuple[int, ...] | dict[int, float], vocab_size: int) -> list[str]:
    if not tokens:
        return []
    low, high = min(tokens), max(tokens)
    if low >= 0 and high < vocab_size:
        return []
    wrong = low if low < 0 else high
    return [f"{name} holds token {wrong}, but the vocabulary has ids 0 to {vocab_size - 1}"]


def _ranges(params: SamplingParams) -> list[str]:
    problems = []
    for name, value, low, high in (
        ("temperature", params.temperature, 0.0, MOST),
        ("top_p", params.top_p, 0.0, 1.0),
        ("min_p", params.min_p, 0.0, 1.0),
        ("repetition_penalty", params.repetition_penalty, 0.0, math.inf),
        ("presence_penalty", params.presence_penalty, -math.inf, math.inf),
        ("frequency_penalty", params.frequency_penalty, -math.inf, math.inf),
    ):
        if not (low <= value <= high and math.isfinite(value)):
            problems.append(f"{name} = {value}, but it must be a finite number from {low:g} to {high:g}")
    problems += [
        f"{name} = 0, but it must be above 0"
        for name, value in (("top_p", params.top_p), ("repetition_penalty", params.repetition_penalty))
        if value == 0.0
    ]
    problems += [
        f"logit_bias of token {token} = {value}, but it must be a number up to {MOST:g}"
        for token, value in params.logit_bias.items()
        if not value <= MOST
    ]
    return problems


def _counts(params: SamplingParams, max_logprobs: int) -> list[str]:
    problems = [
        f"{name} = {value}, but it must be at least 0"
        for name, value in (
            ("max_tokens", params.max_tokens),
            ("min_tokens", params.min_tokens),
            ("logprobs", params.logprobs or 0),
            ("prompt_logprobs", params.prompt_logprobs or 0),
        )
        if value < 0
    ]
    problems += [
        f"{name} = {value}, but max_logprobs = {max_logprobs}"
        for name, value in (
            ("logprobs", params.logprobs or 0),
            ("prompt_logprobs", params.prompt_logprobs or 0),
        )
        if value > max_logprobs
    ]
    return problems
