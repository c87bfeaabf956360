"""An engine without a model: counts upwards from the last prompt token, or misbehaves as the prompt asks."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field

from benthic.errors import AdmissionError, CheckpointError
from benthic.serve.messages import Delta, Generate, Ready, Stats, TokenLogprob

VOCAB = 320
CONTEXT = 256
BLOCK = 16
BLOCKS = 64

POISON_CRASH = 315  # as the first prompt token: the step raises
POISON_REJECT = 316  # the engine refuses it
POISON_ERROR = 317  # the request alone fails
POISON_HANG = 318  # the step never returns
POISON_KILL = 319  # the process kills itself
EOS = 1


@dataclass
class Running:
    request: Generate
    tokens: list[int] = field(default_factory=list)


@dataclass
class FakeEngine:
    """`step_seconds` slows every step down."""

    step_seconds: float = 0.0
    max_num_seqs: int = 32
    queue: dict[str, Running] = field(default_factory=dict)
    prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0

    @property
    def has_work(self) -> bool:
        return bool(self.queue)

    def ready(self) -> Ready:
        return Ready(
            model_name="fake",
            max_model_len=CONTEXT,
            vocab_size=VOCAB,
            eos_token_ids=(EOS,),
            num_blocks=BLOCKS,
            block_size=BLOCK,
        )

    def add(self, request: Generate) -> None:
        if request.prompt[0] == POISON_REJECT:
            msg = f"request {request.request_id!r}: prompt needs 9 blocks, but the cache has 4"
            raise AdmissionError(msg)
        self.queue[request.request_id] = Running(request)

    def abort(self, request_id: str) -> None:
        self.queue.pop(request_id, None)

    def step(self) -> list[Delta]:
        self.steps += 1
        if self.step_seconds:
            time.sleep(self.step_seconds)
        batch = list(self.queue.values())[: self.max_num_seqs]
        return [self._advance(running) for running in batch]

    def _advance(self, running: Running) -> Delta:
        request, params = running.request, running.request.params
        misbehave(request.prompt[0])
        first = not running.tokens
        if first:
            self.prompt_tokens += len(request.prompt)
        if request.prompt[0] == POISON_ERROR:
            del self.queue[request.request_id]
            return Delta(
                request_id=request.request_id, tokens=(), finish_reason="error", error="the sampler saw NaN"
            )
        if params.max_tokens == 0:
            del self.queue[request.request_id]
            return Delta(
                request_id=request.request_id,
                tokens=(),
                finish_reason="length",
                prompt_logprobs=prompt_rows(request),
            )
        token = next_token(request, running.tokens)
        running.tokens.append(token)
        self.generation_tokens += 1
        finish, stop = finish_of(request, running.tokens)
        if finish:
            del self.queue[request.request_id]
        rows = None if params.logprobs is None else (row_of(token, params.logprobs),)
        return Delta(
            request_id=request.request_id,
            tokens=(token,),
            finish_reason=finish,
            stop_token=stop,
            logprobs=rows,
            prompt_logprobs=prompt_rows(request) if first else None,
            cached_tokens=BLOCK * ((len(request.prompt) - 1) // BLOCK) if first else 0,
        )

    def stats(self) -> Stats:
        running = min(len(self.queue), self.max_num_seqs)
        used = sum(1 + (len(r.request.prompt) + len(r.tokens)) // BLOCK for r in self.queue.values())
        return Stats(
            num_running=running,
            num_waiting=len(self.queue) - running,
            num_blocks=BLOCKS,
            num_free_blocks=max(0, BLOCKS - used),
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            prefix_cache_queries=0,
            prefix_cache_hits=0,
            preemptions=0,
            steps=self.steps,
            step_seconds=self.steps * self.step_seconds,
        )


def misbehave(poison: int) -> None:
    if poison == POISON_CRASH:
        msg = "index out of range in the embedding"
        raise RuntimeError(msg)
    if poison == POISON_HANG:
        time.sleep(3600)
    if poison == POISON_KILL:
        os.kill(os.getpid(), signal.SIGKILL)


def next_token(request: Generate, tokens: list[int]) -> int:
    """A bias of 100 forces a token; otherwise count upwards, staying clear of the special ids."""
    forced = [token for token, bias in request.params.logit_bias.items() if bias >= 100]
    if forced:
        return forced[len(tokens) % len(forced)]
    last = tokens[-1] if tokens else request.prompt[-1]
    return last + 1 if last + 1 < VOCAB else 4


def finish_of(request: Generate, tokens: list[int]) -> tuple[str | None, int | None]:
    params = request.params
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS})
    if tokens[-1] in stops and len(tokens) > params.min_tokens:
        return "stop", tokens[-1]
    return ("length", None) if len(tokens) >= params.max_tokens else (None, None)


def row_of(token: int, best: int) -> tuple[TokenLogprob, ...]:
    """The chosen token (rank 1, logprob -0.1), then the `best` ones."""
    others = [TokenLogprob((token + i) % VOCAB, -0.1 - i, i + 1) for i in range(best)]
    return (TokenLogprob(token, -0.1, 1), *others)


def prompt_rows(request: Generate) -> tuple[tuple[TokenLogprob, ...], ...] | None:
    best = request.params.prompt_logprobs
    if best is None:
        return None
    return ((), *(row_of(token, best) for token in request.prompt[1:]))


def fake(step_seconds: float = 0.0, max_num_seqs: int = 32) -> FakeEngine:
    return FakeEngine(step_seconds=step_seconds, max_num_seqs=max_num_seqs)


@dataclass
class PatientEngine(FakeEngine):
    """Its next step may wait a while, from the last one on."""

    stepped_s: float = 0.0

    @property
    def patience_s(self) -> float:
        return max(0.0, self.stepped_s + 1.0 - time.monotonic())

    def step(self) -> list[Delta]:
        deltas = super().step()
        self.stepped_s = time.monotonic()
        return deltas


def patient() -> FakeEngine:
    return PatientEngine()


def broken() -> FakeEngine:
    msg = "weights.safetensors is truncated: 100 bytes of 200"
    raise CheckpointError(msg)
