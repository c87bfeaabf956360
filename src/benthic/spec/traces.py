"""Recorded workloads: when real requests came and how long they were, in the two published formats.

Azure: `TIMESTAMP,ContextTokens,GeneratedTokens` (Azure/AzurePublicDataset, CC-BY 4.0; Splitwise, ISCA'24).
Mooncake: JSON lines `{timestamp, input_length, output_length, hash_ids}`, milliseconds and hashes of prompt
blocks of 512 tokens (kvcache-ai/Mooncake, Apache-2.0; FAST'25): equal hashes are equal prefixes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from typing import TYPE_CHECKING

from benthic.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

MOONCAKE_BLOCK = 512
"""Prompt tokens that one of Mooncake's hashes stands for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceRequest:
    """One recorded request.

    Attributes:
        at_s: seconds after the trace's first request.
        prompt_tokens: length of the prompt.
        output_tokens: length of the answer.
        block_hashes: identity of each block of `MOONCAKE_BLOCK` prompt tokens, the last one perhaps partial;
            empty when the trace does not say.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    block_hashes: tuple[int, ...] = ()


Trace = tuple[TraceRequest, ...]


def read_azure(lines: Iterable[str]) -> Trace:
    """Parse the CSV of the Azure traces.

    Raises:
        DataError: a line is not of the format, or earlier than the one above it; its number is named.
    """
    rows = iter(lines)
    head = next(rows, "").strip().lstrip("\ufeff")
    if head.split(",")[:3] != ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]:
        msg = f"line 1 is {head[:60]!r}, but an Azure trace begins TIMESTAMP,ContextTokens,GeneratedTokens"
        raise DataError(msg)
    return _from_zero(
        [(number, _read(_azure_row, number, line)) for number, line in enumerate(rows, 2) if line.strip()]
    )


def read_mooncake(lines: Iterable[str]) -> Trace:
    """Parse the JSON lines of the Mooncake traces.

    Raises:
        DataError: a line is not of the format, or earlier than the one above it; its number is named.
    """
    return _from_zero(
        [(number, _read(_mooncake_row, number, line)) for number, line in enumerate(lines, 1) if line.strip()]
    )


def at_speed(trace: Trace, speed: float) -> Trace:
    """The trace played `speed` times as fast. Raises: ConfigError for a speed that is not above 0."""
    if not speed > 0.0:
        msg = f"the trace's speed is {speed}, but it must be above 0 (2 plays it twice as fast)"
        raise ConfigError(msg)
    return tuple(replace(request, at_s=request.at_s / speed) for request in trace)


def at_rate(trace: Trace, rate: float) -> Trace:
    """The trace at the speed that makes its mean rate `rate` requests a second.

    Raises:
        ConfigError: a trace whose requests all come at once has no rate.
    """
    if len(trace) < 2 or trace[-1].at_s == 0.0:
        msg = f"the trace's {len(trace)} requests span 0 s, so they cannot be spread to {rate} requests/s"
        raise ConfigError(msg)
    return at_speed(trace, rate / mean_rate(trace))


def mean_rate(trace: Trace) -> float:
    """Requests a second: gaps over the time from the first to the last request."""
    return (len(trace) - 1) / trace[-1].at_s


def with_lengths_scaled(trace: Trace, factor: float) -> Trace:
    """The trace with every prompt and answer `factor` times as long, but at least 1 token.

    Block hashes are dropped: their blocks would no longer be of `MOONCAKE_BLOCK` tokens.
    """
    if factor == 1.0:
        return trace
    return tuple(
        replace(
            request,
            prompt_tokens=max(1, round(request.prompt_tokens * factor)),
            output_tokens=max(1, round(request.output_tokens * factor)),
            block_hashes=(),
        )
        for request in trace
    )


def that_fit(trace: Trace, max_model_len: int) -> Trace:
    """The requests whose prompt and answer fit in `max_model_len` tokens together."""
    return tuple(each for each in trace if each.prompt_tokens + each.output_tokens <= max_model_len)


def _read(row: Callable[[str], TraceRequest], number: int, line: str) -> TraceRequest:
    try:
        request = row(line)
    except (ValueError, KeyError, TypeError) as error:
        msg = f"line {number} is not a request of this trace format: {line.strip()[:80]!r} ({error})"
        raise DataError(msg) from error
    if not 0.0 <= request.at_s < math.inf:
        msg = f"line {number} has the timestamp {request.at_s:g} s, but times are finite and not negative"
        raise DataError(msg)
    if request.prompt_tokens < 1 or request.output_tokens < 0:
        msg = (
            f"line {number} has {request.prompt_tokens} prompt and {request.output_tokens} output tokens, "
            "but at least 1 and 0 are needed"
        )
        raise DataError(msg)
    return replace(request, output_tokens=max(1, request.output_tokens))


def _azure_row(line: str) -> TraceRequest:
    stamp, prompt, output = line.strip().split(",")[:3]
    at_s = datetime.fromisoformat(stamp.strip()).replace(tzinfo=None)
    seconds = (at_s - datetime(2000, 1, 1)).total_seconds()  # noqa: DTZ001 (only differences are used)
    return TraceRequest(at_s=seconds, prompt_tokens=int(prompt), output_tokens=int(output))


def _mooncake_row(line: str) -> TraceRequest:
    found = json.loads(line)
    prompt, hashes = int(found["input_length"]), tuple(int(each) for each in found.get("hash_ids") or ())
    if hashes and len(hashes) != -(-prompt // MOONCAKE_BLOCK):
        blocks = -(-prompt // MOONCAKE_BLOCK)
        msg = f"{len(hashes)} hash_ids, but {prompt} tokens are {blocks} blocks of {MOONCAKE_BLOCK}"
        raise ValueError(msg)
    return TraceRequest(
        at_s=float(found["timestamp"]) / 1000.0,
        prompt_tokens=prompt,
        output_tokens=int(found["output_length"]),
        block_hashes=hashes,
    )


def _from_zero(numbered: Sequence[tuple[int, TraceRequest]]) -> Trace:
    """The requests of lines in order, the first at 0 s."""
    if not numbered:
        msg = "the trace holds 0 requests, but at least 1 is needed"
        raise DataError(msg)
    zero = numbered[0][1].at_s
    for (above, before), (number, request) in pairwise(numbered):
        if request.at_s < before.at_s:
            msg = (
                f"line {number} comes {before.at_s - request.at_s:.6g} s before line {above} above it "
                f"({request.at_s - zero:.6f} and {before.at_s - zero:.6f} s after the first request). "
                "Sort the lines by their timestamps."
            )
            raise DataError(msg)
    return tuple(replace(request, at_s=request.at_s - zero) for _, request in numbered)
