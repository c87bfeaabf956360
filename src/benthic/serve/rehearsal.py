"""Requests that a server answers before anybody asks, so that nobody waits for a kernel to be compiled."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

import msgspec

from benthic.errors import ServeError
from benthic.serve.messages import Generate, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benthic.serve.client import Client
    from benthic.serve.messages import Ready

LENGTHS: Final = (1, 40, 700, 5000)
"""Tokens of prompts: a row, few rows, a graph of some, more than one has; less where they do not fit."""

TOKENS: Final = 8
"""Put out for each."""

SETTINGS: Final = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.7, seed=1),
    SamplingParams(temperature=0.7, top_p=0.9, top_k=50, min_p=0.01, seed=1),
    SamplingParams(repetition_penalty=1.1, presence_penalty=0.1, logprobs=1, seed=1),
)
"""Ways of drawing that have kernels of their own."""


async def rehearse(client: Client, ready: Ready) -> int:
    """Answer a request of every length and every way of drawing, all at once; returns how many.

    Raises:
        ServeError: one of them did not come to its end; says why.
        EngineDeadError: the engine ended.
    """
    asked = list(requests(ready))
    async with client.open(asked) as stream:
        async for delta in stream:
            if delta.finish_reason in ("error", "abort"):
                msg = f"a rehearsal failed: {delta.error or 'the engine gave the request up'}"
                raise ServeError(msg)
    return len(asked)


def requests(ready: Ready) -> Iterator[Generate]:
    """The rehearsal's requests, each with a prompt of its own."""
    rng = random.Random(0)  # noqa: S311 (prompts)
    tokens = min(TOKENS, ready.max_model_len - 1)
    most = min(ready.max_model_len, ready.num_blocks * ready.block_size // len(SETTINGS)) - tokens
    for length in sorted({max(1, min(length, most)) for length in LENGTHS}):
        for number, params in enumerate(SETTINGS):
            yield Generate(
                request_id=f"rehearsal-{length}-{number}",
                prompt=tuple(rng.randrange(ready.vocab_size) for _ in range(length)),
                params=msgspec.structs.replace(params, max_tokens=tokens, ignore_eos=True),
            )
