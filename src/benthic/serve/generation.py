"""From an engine's deltas to pieces of text: detokenising, stop strings, counting and timing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from benthic.errors import AdmissionError, EngineDeadError, ServeError
from benthic.serve import api_errors
from benthic.serve.detokenize import Detokenizer, StopMatcher, StopRule

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from benthic.serve.client import Client
    from benthic.serve.journal import Journal
    from benthic.serve.messages import Delta, FinishReason, Generate, Remote, TokenLogprob
    from benthic.serve.metrics import Metrics
    from benthic.serve.tokenizer import Tokenizer

Rows = tuple[tuple["TokenLogprob", ...], ...]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One sequence: what goes to the engine, and what this side does with its text.

    Attributes:
        index: of the choice in the answer.
        stop: strings that end it.
        skip_special_tokens: leave control symbols out of the text.
    """

    index: int
    request: Generate
    stop: StopRule
    skip_special_tokens: bool = True


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one delta adds to one choice.

    `logprobs[i]` belongs to `tokens[i]`. Text may lag behind tokens: incomplete characters and possible
    beginnings of stop strings are held back. `stop_reason` is the stop string or the stop token id; None for
    the model's own end. `prompt_logprobs` and `cached_tokens` come with the first piece, `remote` with the
    last one of a held request; `completion_tokens` is the running count.
    """

    index: int
    text: str
    tokens: tuple[int, ...]
    logprobs: Rows | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    prompt_logprobs: Rows | None
    cached_tokens: int
    completion_tokens: int
    remote: Remote | None = None


class SequenceText:
    """Turns one sequence's deltas into pieces.

    Args:
        asked: the sequence.
        tokenizer: gives each token's bytes.
        eos_ids: tokens that are the model's own end and thus no `stop_reason`.
    """

    def __init__(self, asked: Asked, tokenizer: Tokenizer, eos_ids: frozenset[int]) -> None:
        self.asked = asked
        self.count = 0
        self.done = False
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=asked.skip_special_tokens)
        self._stop = StopMatcher(asked.stop)
        self._min_tokens = asked.request.params.min_tokens
        self._eos_ids = eos_ids

    def take(self, delta: Delta) -> Piece:
        """The piece that `delta` makes; `done` is set with the last one."""
        text, used = self._read(delta)
        if delta.finish_reason is not None and self._stop.matched is None:
            text += self._flush()
        finish, stop_reason = self._ending(delta)
        self.done = finish is not None
        return Piece(
            index=self.asked.index,
            text=text,
            tokens=delta.tokens[:used],
            logprobs=None if delta.logprobs is None else delta.logprobs[:used],
            finish_reason=finish,
            stop_reason=stop_reason,
            prompt_logprobs=delta.prompt_logprobs,
            cached_tokens=delta.cached_tokens,
            completion_tokens=self.count,
            remote=delta.remote,
        )

    def _read(self, delta: Delta) -> tuple[str, int]:
        """Text of the tokens up to the one that completes a stop string, and how many those are."""
        shown = []
        for used, token in enumerate(delta.tokens, start=1):
            self.count += 1
            if self._is_stop_token(delta, used):
                continue
            text = self._detokenizer.push((token,))
            searched = self.count > self._min_tokens
            shown.append(self._stop.push(text) if searched else self._stop.pass_through(text))
            if self._stop.matched is not None:
                return "".join(shown), used
        return "".join(shown), len(delta.tokens)

    def _is_stop_token(self, delta: Delta, used: int) -> bool:
        """The token that stopped the engine is counted but not shown (unless stops are to be shown)."""
        last = used == len(delta.tokens) and delta.finish_reason == "stop"
        return last and delta.tokens[-1] == delta.stop_token and not self.asked.stop.include

    def _ending(self, delta: Delta) -> tuple[FinishReason | None, str | int | None]:
        if self._stop.matched is not None:
            return "stop", self._stop.matched
        own_end = delta.stop_token is None or delta.stop_token in self._eos_ids
        return delta.finish_reason, None if own_end else delta.stop_token

    def _flush(self) -> str:
        """What was held back; an incomplete character may still complete a stop string."""
        text = self._stop.push(self._detokenizer.finish())
        return text if self._stop.matched is not None else text + self._stop.finish()


@dataclass
class Timer:
    """When one sequence showed its first and its latest token; seconds of the server's clock."""

    first_s: float | None = None
    latest_s: float = 0.0


class Generation:
    """All sequences of one HTTP request, from submission to the last piece.

    Args:
        asked: the sequences; their request ids must be new.
        client: where they run.
        tokenizer: for their text.
        metrics: where their times go.
        journal: where their phases go.
        eos_ids: the model's own end tokens.
        arrival_s: when the HTTP request came in, on `clock`.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        asked: Sequence[Asked],
        *,
        client: Client,
        tokenizer: Tokenizer,
        metrics: Metrics,
        journal: Journal,
        eos_ids: frozenset[int],
        arrival_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._texts = {each.request.request_id: SequenceText(each, tokenizer, eos_ids) for each in asked}
        self._timers = {request_id: Timer() for request_id in self._texts}
        self._client = client
        self._metrics = metrics
        self._journal = journal
        self._submitted_s = arrival_s
        self._arrival_s = arrival_s
        self._clock = clock

    async def pieces(self, timeout_s: float | None = None) -> AsyncGenerator[Piece]:
        """Pieces of every choice as they come; closing the iterator early aborts what is unfinished.

        `timeout_s` seconds from the request's arrival are the most that it may take; None sets no limit.

        Raises:
            AdmissionError: the engine refuses one of the sequences.
            EngineDeadError: the engine ended.
            ServeError: the engine failed at one of the sequences.
            ApiError: 408 when the time is over.
        """
        outcome: FinishReason = "abort"
        requests = [text.asked.request for text in self._texts.values()]
        self._submitted_s = self._clock()
        for request in requests:
            self._journal.begin(
                request.request_id, arrival_s=self._arrival_s, prompt_tokens=len(request.prompt)
            )
        try:
            async with self._client.open(requests) as stream:
                if timeout_s is not None:
                    left_s = self._arrival_s + timeout_s - self._clock()
                    stream.limit(left_s, api_errors.late(timeout_s))
                async for delta in stream:
                    if delta.finish_reason in ("error", "abort"):
                        outcome = "error"
                        raise ServeError(delta.error or "the engine gave the request up")
                    piece = self._take(delta)
                    if piece.finish_reason is not None and delta.finish_reason is None:
                        stream.abort(delta.request_id)
                    yield piece
        except (AdmissionError, EngineDeadError):
            outcome = "error"
            raise
        finally:
            for request_id, text in self._texts.items():
                if not text.done:
                    self._finished(request_id, outcome)

    def summary(self) -> str:
        """One line for the log: how it went."""
        counts = [text.count for text in self._texts.values()]
        ended = sum(text.done for text in self._texts.values())
        took_s = self._clock() - self._arrival_s
        return f"{ended} of {len(counts)} sequences finished, {sum(counts)} tokens in {took_s:.3f} s"

    def _take(self, delta: Delta) -> Piece:
        piece = self._texts[delta.request_id].take(delta)
        if piece.tokens:
            self._time(delta, len(piece.tokens))
        if piece.finish_reason is not None:
            self._finished(delta.request_id, piece.finish_reason)
        return piece

    def _time(self, delta: Delta, tokens: int) -> None:
        now, timer = self._clock(), self._timers[delta.request_id]
        if timer.first_s is None:
            timer.first_s = now
            self._metrics.first_token(now - self._arrival_s)
            self._journal.first_token(
                delta.request_id,
                submitted_s=self._submitted_s,
                queued_s=delta.queued_s,
                cached_tokens=delta.cached_tokens,
            )
        else:
            self._metrics.next_tokens(now - timer.latest_s, tokens)
        timer.latest_s = now

    def _finished(self, request_id: str, reason: FinishReason) -> None:
        text, timer = self._texts[request_id], self._timers[request_id]
        first_s = timer.latest_s if timer.first_s is None else timer.first_s
        met = self._metrics.finished(
            reason,
            prompt=len(text.asked.request.prompt),
            generated=text.count,
            whole_s=self._clock() - self._arrival_s,
            decode_s=timer.latest_s - first_s,
            ttft_s=None if timer.first_s is None else timer.first_s - self._arrival_s,
        )
        self._journal.end(request_id, reason, tokens=text.count, met=met)
