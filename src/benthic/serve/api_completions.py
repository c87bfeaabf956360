"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, NamedTuple

from benthic.serve import kv_params
from benthic.serve.detokenize import StopRule
from benthic.serve.generation import Asked, Piece
from benthic.serve.logprobs import CompletionLogprobWriter, TokenNames, join, prompt_logprobs
from benthic.serve.messages import Generate
from benthic.serve.protocol_responses import Completion, CompletionChoice, CompletionLogprobs
from benthic.serve.sampling_defaults import sampling_params
from benthic.serve.service import Prompt, Service, Tally, new_id, says_nothing

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence

    from benthic.serve.protocol_requests import CompletionBody

DEFAULT_MAX_TOKENS = 16


async def read_prompts(service: Service, body: CompletionBody) -> list[Prompt]:
    """The prompts of a request, tokenized.

    Raises:
        ApiError: 400 for token ids outside the vocabulary.
    """
    given = body.prompt
    several: list[str | list[int]] = []
    if isinstance(given, str) or isinstance(given[0], int):
        several.append(given)  # type: ignore[arg-type]
    else:
        several.extend(given)  # type: ignore[arg-type]
    special = body.add_special_tokens is not False
    reading = [_read(service, each, add_special_tokens=special) for each in several]
    if len(reading) == 1:  # not in a task of its own, which would wait its turn
        return [await reading[0]]
    return list(await asyncio.gather(*reading))


async def _read(service: Service, given: str | list[int], *, add_special_tokens: bool) -> Prompt:
    if isinstance(given, str):
        return await service.encode(given, add_special_tokens=add_special_tokens)
    return service.token_prompt(given)


class CompletionJob:
    """One request: its sequences, and how their pieces become choices.

    Args:
        service: the server's state.
        body: the request.
        prompts: its prompts, tokenized.
        grammar: what every answer must follow, or None.
    Raises: ApiError 400 for what only the model's sizes can tell.
    """

    def __init__(
        self,
        service: Service,
        body: CompletionBody,
        prompts: Sequence[Prompt],
        grammar: str | None = None,
    ) -> None:
        self._service = service
        self._body = body
        self._prompts = prompts
        self._grammar = grammar
        self._n = body.n or 1
        self._sampled = body.best_of or self._n
        self._names = TokenNames(service.tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
        self._writers: dict[int, CompletionLogprobWriter] = {}
        self._tally = Tally(prompts, self._sampled)
        self._id = new_id("cmpl")
        self._created = int(service.wall())
        self.asked = [self._ask(index) for index in range(len(prompts) * self._sampled)]

    async def collect(self, arrival_s: float) -> Completion:
        """The whole answer."""
        parts: dict[int, list[CompletionChoice]] = {asked.index: [] for asked in self.asked}
        scores = dict.fromkeys(parts, Score())
        remote = None
        async with aclosing(self._generate(arrival_s)) as pieces:
            async for piece in pieces:
                scores[piece.index] = scores[piece.index].add(piece)
                parts[piece.index].append(self._choice(piece))
                remote = piece.remote
        answer = self._wrap(self._best([_merge(choices) for choices in parts.values()], scores))
        answer.kv_transfer_params = kv_params.write(remote)
        return answer

    async def events(self, arrival_s: float) -> AsyncGenerator[bytes]:
        """The answer's chunks as JSON."""
        options = self._body.stream_options
        include_usage = options is not None and options.include_usage
        continuous = options is not None and options.continuous_usage_stats
        async with aclosing(self._generate(arrival_s)) as pieces:
            async for piece in pieces:
                choice = self._choice(piece)
                if says_nothing(piece) and not (choice.text or choice.token_ids):
                    continue
                yield self._wrap([choice], usage=continuous).model_dump_json().encode()
        if include_usage:
            yield self._wrap([]).model_dump_json().encode()

    def _best(self, choices: list[CompletionChoice], scores: Mapping[int, Score]) -> list[CompletionChoice]:
        """The `n` likeliest of each prompt's `best_of`, numbered anew."""
        if self._sampled == self._n:
            return choices
        kept: list[CompletionChoice] = []
        for first in range(0, len(choices), self._sampled):
            own = choices[first : first + self._sampled]
            own.sort(key=lambda choice: scores[choice.index].mean, reverse=True)
            kept += own[: self._n]
        return [choice.model_copy(update={"index": index}) for index, choice in enumerate(kept)]

    def _generate(self, arrival_s: float) -> AsyncGenerator[Piece]:
        return self._service.generate(self.asked, arrival_s, timeout_s=self._body.timeout_s)

    def _ask(self, index: int) -> Asked:
        body, number = self._body, index % self._sampled
        prompt = self._prompts[index // self._sampled]
        budget = self._service.output_budget(prompt, body.max_tokens, DEFAULT_MAX_TOKENS, param="prompt")
        params = sampling_params(
            body,
            self._service.settings.defaults,
            self._service.ready,
            max_tokens=budget,
            logprobs=self._ranked_logprobs(),
            prompt_logprobs=self._prompt_logprobs(),
            nth=number,
            grammar=self._grammar,
        )
        hold, pull = kv_params.read(
            body.kv_transfer_params,
            offered=self._service.settings.kv_transfer,
            sequences=len(self._prompts) * self._sampled,
            prompt_tokens=len(prompt.ids),
        )
        return Asked(
            index=index,
            request=Generate(
                request_id=f"{self._id}-{index}",
                prompt=prompt.ids,
                params=params,
                priority=body.priority or 0,
                hold=hold,
                pull=pull,
            ),
            stop=StopRule(strings=body.stop_strings, include=bool(body.include_stop_str_in_output)),
            skip_special_tokens=body.skip_special_tokens is not False,
        )

    def _ranked_logprobs(self) -> int | None:
        """What was asked; to rank sequences, at least that of every chosen token."""
        return 0 if self._body.logprobs is None and self._sampled > self._n else self._body.logprobs

    def _prompt_logprobs(self) -> int | None:
        """Echoed tokens carry log-probabilities too."""
        asked = [self._body.prompt_logprobs, self._body.logprobs if self._body.echo else None]
        return max((count for count in asked if count is not None), default=None)

    def _choice(self, piece: Piece) -> CompletionChoice:
        first = piece.index not in self._writers
        if first:
            self._writers[piece.index] = self._writer()
        writer = self._writers[piece.index]
        self._tally.take(piece)
        echo = first and bool(self._body.echo)
        own, ids = self._body.prompt_logprobs, bool(self._body.return_token_ids)
        return CompletionChoice(
            index=piece.index,
            text=self._echo_text(piece.index) + piece.text if echo else piece.text,
            logprobs=None if self._body.logprobs is None else self._logprobs(writer, piece, echo=echo),
            finish_reason=piece.finish_reason,  # type: ignore[arg-type]
            stop_reason=piece.stop_reason,
            prompt_logprobs=None
            if own is None or piece.prompt_logprobs is None
            else prompt_logprobs(piece.prompt_logprobs, self._names, own),
            prompt_token_ids=list(self._prompts[piece.index // self._sampled].ids) if ids and first else None,
            token_ids=list(piece.tokens) if ids else None,
        )

    def _logprobs(
        self, writer: CompletionLogprobWriter, piece: Piece, *, echo: bool
    ) -> CompletionLogprobs | None:
        prompt = self._prompts[piece.index // self._sampled]
        parts = [writer.write(prompt.ids, piece.prompt_logprobs or ())] if echo else []
        if piece.tokens:
            parts.append(writer.write(piece.tokens, piece.logprobs or ()))
        return join(parts)

    def _writer(self) -> CompletionLogprobWriter:
        body = self._body
        return CompletionLogprobWriter(
            self._service.tokenizer,
            self._names,
            best=body.logprobs or 0,
            skip_special=body.skip_special_tokens is not False,
        )

    def _echo_text(self, index: int) -> str:
        prompt = self._prompts[index // self._sampled]
        if prompt.text is not None:
            return prompt.text
        skip = self._body.skip_special_tokens is not False
        return self._service.tokenizer.decode(prompt.ids, skip_special_tokens=skip)

    def _wrap(self, choices: list[CompletionChoice], *, usage: bool = True) -> Completion:
        return Completion(
            id=self._id,
            created=self._created,
            model=self._service.model_name,
            choices=choices,
            usage=self._tally.usage() if usage else None,
        )


class Score(NamedTuple):
    """How likely a sequence is: the log-probabilities of its tokens, added up."""

    total: float = 0.0
    tokens: int = 0

    def add(self, piece: Piece) -> Score:
        """With the tokens of one more piece."""
        rows = piece.logprobs or ()
        return Score(self.total + sum([row[0].logprob for row in rows]), self.tokens + len(rows))

    @property
    def mean(self) -> float:
        """A token's, on average; that of no tokens is 0."""
        return self.total / max(1, self.tokens)


def _merge(parts: Sequence[CompletionChoice]) -> CompletionChoice:
    """One choice from its chunks."""
    rows = [part.logprobs for part in parts if part.logprobs is not None]
    return CompletionChoice(
        index=parts[0].index,
        text="".join(part.text for part in parts),
        logprobs=join(rows) if rows else None,
        finish_reason=parts[-1].finish_reason,
        stop_reason=parts[-1].stop_reason,
        prompt_logprobs=parts[0].prompt_logprobs,
        prompt_token_ids=parts[0].prompt_token_ids,
        token_ids=None
        if parts[0].token_ids is None
        else [token for part in parts for token in part.token_ids or ()],
    )
