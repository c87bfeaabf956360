"""What crosses the border between the HTTP process and the engine process, and nothing else does.

Text never crosses: prompts arrive as token ids and answers leave as token ids. Stop strings, chat templates
and detokenising belong to the HTTP side; stop token ids, lengths and sampling belong to the engine.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]

LEAST_TEMPERATURE: Final = 1e-5
"""Below it sampling is greedy: logits divided by less would leave float32's range, and no other token has a
chance anyway. vLLM draws the same line."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How tokens are drawn; the names and defaults are those of the OpenAI API and of vLLM.

    A `temperature` below 1e-5 is greedy. `top_k=0` keeps every token. `logprobs=n` returns the n best and the
    chosen one; `prompt_logprobs=n` does so for every prompt position but the first. `max_tokens=0` generates
    nothing (used for echo). `seed=None` lets the engine choose one. `grammar` is what the whole output must
    be, as llguidance writes it.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: str | None = None

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, without a draw."""
        return self.temperature < LEAST_TEMPERATURE


class Remote(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt's cache blocks in another instance, under a lease.

    `address` is its desk and `instance_id` this life of its process; `blocks` hold `num_tokens` positions, or
    will hold the whole prompt while it is being computed.
    """

    instance_id: str
    address: str
    lease_id: str
    blocks: tuple[int, ...]
    num_tokens: int


class Generate(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Ask for one sequence. `priority`: lower numbers go first.

    `output` was put out before, by another engine: generation goes on behind it (`params` still speak of the
    whole). `hold` keeps the blocks for another instance when the request ends by length; with `lend`, deltas
    without tokens say what is ready of a prompt before that. `pull` says where another instance keeps those
    of the prompt.
    """

    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    output: tuple[int, ...] = ()
    hold: bool = False
    lend: bool = False
    pull: Remote | None = None


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Stop a request and free its blocks; unknown ids are ignored (it may just have ended)."""

    request_id: str


class PullEarly(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Pull what is ready of a prompt that another instance computes, as far as there is room; unanswered.

    `request` has a name of its own, which `Abort` ends; its `pull` says how much is ready.
    """

    request: Generate


class MoreReady(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """More is ready of a prompt that is pulled early; unknown ids are ignored (it may have failed)."""

    request_id: str
    num_tokens: int


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability (natural log, of the raw model distribution) of one token, with its rank from 1."""

    token: int
    logprob: float
    rank: int


class Delta(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """New tokens of one request.

    `logprobs[i]` belongs to `tokens[i]`: the chosen token first, then the best ones.
    `prompt_logprobs` comes once, with the first delta; its first entry is empty.
    `cached_tokens` counts the prompt tokens found in the prefix cache (first delta).
    `queued_s` is how long the request waited for its first step (first delta).
    `remote` comes with the end of a held request: where its blocks are, and until when (a lease). It comes
    without tokens before that, where what is ready is lent.
    """

    request_id: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    error: str | None = None
    logprobs: tuple[tuple[TokenLogprob, ...], ...] | None = None
    prompt_logprobs: tuple[tuple[TokenLogprob, ...], ...] | None = None
    cached_tokens: int = 0
    queued_s: float = 0.0
    remote: Remote | None = None

    def then(self, later: Delta) -> Delta:
        """This delta and the request's next one, as one; what was lent before is out of date."""
        if self.remote is not None:
            return later
        logprobs = (self.logprobs or ()) + (later.logprobs or ())
        return msgspec.structs.replace(
            later,
            tokens=self.tokens + later.tokens,
            logprobs=None if self.logprobs is None and later.logprobs is None else logprobs,
            prompt_logprobs=self.prompt_logprobs,
            cached_tokens=self.cached_tokens,
            queued_s=self.queued_s,
        )


class Stats(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Totals and gauges of the engine at one instant (counters since the start).

    `early_blocks` of the `pulled_blocks` came while their prompt was still being computed.
    `drafts` counts rows with drafts, `draft_tokens` and `accepted_tokens` drafts given and accepted,
    `accepted_at[i]` those accepted at place i. `host_blocks` are those of host memory, `host_hits` tokens
    that came back from there, and bytes are of one rank. `computed_tokens` are those of all steps, of prompts
    and of outputs, drafts included.
    """

    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    prompt_tokens: int
    generation_tokens: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    preemptions: int
    steps: int
    step_seconds: float
    leased_blocks: int = 0
    pulled_blocks: int = 0
    early_blocks: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_at: tuple[int, ...] = ()
    host_blocks: int = 0
    host_blocks_held: int = 0
    host_hits: int = 0
    host_bytes_out: int = 0
    host_bytes_in: int = 0
    computed_tokens: int = 0


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine is up: what the HTTP side needs to know about the model it serves."""

    model_name: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    num_blocks: int
    block_size: int


class Drain(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Take no new requests, finish those in flight, then exit."""


class Rejected(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A request that could never be served (`AdmissionError` text), or not `now` (`OverloadedError` text)."""

    request_id: str
    message: str
    now: bool = False


class Fatal(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine cannot go on (or could not start) and is about to exit; `message` says why."""

    message: str
