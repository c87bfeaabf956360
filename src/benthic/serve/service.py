"""What every route works with: engine, tokenizer, limits, and the checks before a request is taken."""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from benthic.serve import api_errors
from benthic.serve.generation import Asked, Generation, Piece
from benthic.serve.protocol_responses import PromptTokensDetails, Usage
from benthic.serve.sampling_defaults import SamplingDefaults, check_ids
from benthic.serve.structured import binds, grammar_of
from benthic.serve.tools import AnswerFormats, ToolPlan, forces, plan_tools

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from benthic.serve.chat_template import ChatTemplate
    from benthic.serve.client import Client
    from benthic.serve.journal import Journal
    from benthic.serve.messages import Ready
    from benthic.serve.protocol_requests import ChatBody, SamplingBody
    from benthic.serve.tokenizer import Tokenizer
    from benthic.serve.whole import Whole

logger = logging.getLogger("benthic.serve.api")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """How the HTTP side behaves.

    Attributes:
        served_names: model names that requests may use; answers carry the first.
        root: where the model came from, as /v1/models shows it.
        max_num_seqs: sequences the engine runs at once.
        max_waiting: sequences that may wait beyond those; more are answered with 503.
        defaults: sampling values for fields a request leaves out.
        request_timeout_s: a request that is not complete so long after its arrival ends; None sets no limit.
        formats: how the model writes tool calls and reasoning.
        kv_transfer: `kv_transfer_params` are taken.
        log_requests: one line when a request starts and one when it ends.
    """

    served_names: tuple[str, ...]
    root: str
    max_num_seqs: int
    max_waiting: int
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    request_timeout_s: float | None = None
    formats: AnswerFormats = field(default_factory=AnswerFormats)
    kv_transfer: bool = False
    log_requests: bool = True

    def excess(self, in_flight: int, sequences: int) -> str | None:
        """Why there is no room for so many more sequences now; None when there is."""
        if in_flight + sequences <= self.max_num_seqs + self.max_waiting:
            return None
        return (
            f"{in_flight} sequences in flight + {sequences} new ones exceed "
            f"max_num_seqs + max_waiting = {self.max_num_seqs} + {self.max_waiting}. Try again later."
        )


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt as token ids; `text` where the client sent text."""

    ids: tuple[int, ...]
    text: str | None


class Service:
    """The server's state, one a process.

    Args:
        client: the engine.
        ready: what the engine said of its model.
        journal: what becomes of requests; its clock is the server's.
        whole: what is one for all processes that answer.
        wall: seconds since 1970.
    """

    def __init__(
        self,
        *,
        client: Client,
        ready: Ready,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        journal: Journal,
        settings: ServiceSettings,
        whole: Whole,
        wall: Callable[[], float],
    ) -> None:
        self.client = client
        self.ready = ready
        self.tokenizer = tokenizer
        self.template = template
        self.metrics = whole.metrics
        self.journal = journal
        self.settings = settings
        self.whole = whole
        self.clock = journal.clock
        self.wall = wall
        self.started_at = int(wall())
        self.draining = False
        self.drained = False
        self._eos_ids = frozenset(ready.eos_token_ids)
        self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="tokenize")

    @property
    def model_name(self) -> str:
        """The name that answers carry."""
        return self.settings.served_names[0]

    def close(self) -> None:
        """Stop the tokenizing threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def check_model(self, name: str | None) -> None:
        """Raises: ApiError 404 for a model that is not served here."""
        if name is not None and name not in self.settings.served_names:
            served = ", ".join(self.settings.served_names)
            msg = f"the model {name[:80]!r} does not exist. Served here: {served}."
            raise api_errors.ApiError(404, msg, param="model", code="model_not_found")

    def check_health(self) -> None:
        """Raises: ApiError 503 while draining, loading, silent or dead."""
        if self.draining:
            msg = "the server is shutting down and takes no new requests"
            raise api_errors.closing(msg)
        trouble = self.client.trouble
        if trouble is not None:
            raise api_errors.ApiError(503, trouble, code="engine_unavailable")

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        """Run tokenizing or rendering beside the event loop, so that a 1 MB prompt stalls nobody."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> Prompt:
        """Tokenize one prompt."""
        ids = await self.in_thread(lambda: self.tokenizer.encode(text, add_special_tokens=add_special_tokens))
        return Prompt(ids=tuple(ids), text=text)

    async def grammar(self, body: SamplingBody) -> str | None:
        """What the answer must follow; None for free text. Raises: ApiError 400."""
        if not binds(body):
            return None
        return await self.in_thread(lambda: grammar_of(body))

    async def tool_plan(self, body: ChatBody, prompt: Prompt) -> ToolPlan:
        """What binds a chat's answers and how they are read. Raises: ApiError 400."""
        formats = self.settings.formats
        if not (forces(body) or binds(body)):
            return plan_tools(body, formats, grammar=None, prompt_text=prompt.text)
        return await self.in_thread(
            lambda: plan_tools(body, formats, grammar=grammar_of(body), prompt_text=prompt.text)
        )

    def token_prompt(self, ids: Sequence[int], *, field: str = "prompt") -> Prompt:
        """A prompt that came as token ids. Raises: ApiError 400 for ids outside the vocabulary."""
        check_ids(field, tuple(ids), self.ready.vocab_size)
        return Prompt(ids=tuple(ids), text=None)

    def output_budget(self, prompt: Prompt, asked: int | None, default: int | None, *, param: str) -> int:
        """How many tokens may be generated: what was asked, else `default` cut to what fits, else what fits.

        Raises:
            ApiError: 400 when prompt and output exceed the context, or the prompt is empty.
        """
        used, longest = len(prompt.ids), self.ready.max_model_len
        if used == 0:
            msg = "the prompt has 0 tokens, but at least 1 is needed"
            raise api_errors.invalid(msg, param=param)
        room = longest - used
        wanted = asked if asked is not None else min(room, room if default is None else default)
        if wanted > room or room < (asked is None):
            more = f" and max_tokens = {asked}: together {used + asked}" if asked else ""
            msg = (
                f"the prompt has {used} tokens{more}, but the context holds {longest} tokens "
                "(max_model_len). Shorten the prompt or lower max_tokens."
            )
            raise api_errors.invalid(msg, param=param, code="context_length_exceeded")
        return wanted

    async def generate(
        self, asked: Sequence[Asked], arrival_s: float, *, timeout_s: float | None = None
    ) -> AsyncGenerator[Piece]:
        """Pieces of all the sequences of one request.

        Args:
            asked: the sequences.
            arrival_s: when the request came, on the service's clock.
            timeout_s: after which it ends; None takes the server's own limit, if there is one.

        Raises:
            ApiError: 503 when draining, full or without an engine; 408 when the time is over.
            BenthicError: see `Generation.pieces`.
        """
        self.check_health()
        self._check_capacity(len(asked))
        first = asked[0].request
        self.metrics.asked(n=len(asked), max_tokens=first.params.max_tokens)
        if self.settings.log_requests:
            logger.info(
                "%s: sequences: %d, prompt tokens: %d, max_tokens: %d",
                first.request_id, len(asked), len(first.prompt), first.params.max_tokens,
            )  # fmt: skip
        generation = Generation(
            asked,
            client=self.client,
            tokenizer=self.tokenizer,
            metrics=self.metrics,
            journal=self.journal,
            eos_ids=self._eos_ids,
            arrival_s=arrival_s,
            clock=self.clock,
        )
        try:
            limit_s = timeout_s or self.settings.request_timeout_s
            async with aclosing(generation.pieces(limit_s)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            if self.settings.log_requests:
                logger.info("%s: %s", first.request_id, generation.summary())

    def _check_capacity(self, sequences: int) -> None:
        running, waiting = self.settings.max_num_seqs, self.settings.max_waiting
        if sequences > running + waiting:
            msg = (
                f"the request asks for {sequences} sequences (prompts x n), but this server holds "
                f"max_num_seqs + max_waiting = {running} + {waiting}. Split it."
            )
            raise api_errors.invalid(msg, param="n")
        excess = self.settings.excess(self.client.in_flight, sequences)
        if excess is not None:
            raise api_errors.overloaded(excess)


class Tally:
    """Counts one HTTP request's tokens for `usage`: each prompt once, every generated token."""

    def __init__(self, prompts: Sequence[Prompt], n: int) -> None:
        self._prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
        self._n = n
        self._cached: dict[int, int] = {}
        self._generated: dict[int, int] = {}

    def take(self, piece: Piece) -> None:
        """Count one piece."""
        self._generated[piece.index] = piece.completion_tokens
        if piece.index % self._n == 0 and piece.cached_tokens:
            self._cached[piece.index] = piece.cached_tokens

    def usage(self) -> Usage:
        """The totals so far."""
        generated = sum(self._generated.values())
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=generated,
            total_tokens=self._prompt_tokens + generated,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._cached.values())),
        )


def new_id(prefix: str) -> str:
    """A request id no other request has."""
    return f"{prefix}-{uuid.uuid4().hex}"


def says_nothing(piece: Piece) -> bool:
    """Whether a stream may skip the piece: its text is held back and it carries nothing else."""
    return not piece.text and piece.logprobs is None and piece.finish_reason is None
