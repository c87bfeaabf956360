"""The engine: plan, run, sample, commit. Requests go in as messages and tokens come out as messages.

The scheduler decides everything; this loop only carries its plans to the device and the tokens back. Steps
are launched and landed apart: the plain loop lands each step before it plans the next; the overlapped loop
plans and launches step n + 1 while the device runs n, whose tokens stay there and feed n + 1. The host learns
them one step late, so a request that a stop token ends has one surplus row in flight, which is dropped. A
request that the device cannot serve (its distribution is not finite, its step does not fit in memory) ends
with an error of its own and frees its blocks; the others go on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from benthic.errors import BenthicError
from benthic.kernels.reference.sampling import splitmix64
from benthic.sched.batching import Request, Started
from benthic.sched.replay import RecordingScheduler
from benthic.serve.admission import check
from benthic.serve.build import Parts, assemble, from_checkpoint
from benthic.serve.drafters import drafter_for
from benthic.serve.drafts import Trial
from benthic.serve.grammar import matcher_for
from benthic.serve.launched import InFlight, Launched, PromptRows, Row
from benthic.serve.messages import Delta, Generate, Ready, Stats
from benthic.serve.overlap import overlaps, tempo_for
from benthic.serve.sample import Logprobs, measure, to_int64
from benthic.serve.sampler import Drawing, Sampler
from benthic.serve.transit import to_device

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benthic.model.network import DeepSeek
    from benthic.sched.batching import Finished, StepPlan
    from benthic.serve.options import EngineOptions
    from benthic.serve.runner import StepResult

Clock = Callable[[], float]


class Engine:
    """One model serving requests.

    Args:
        parts: runner, scheduler and what to tell the HTTP side; see `benthic.serve.build`.
        options: settings.
        clock: seconds since some fixed moment; only differences matter.
    """

    def __init__(self, parts: Parts, options: EngineOptions, *, clock: Clock = time.monotonic) -> None:
        self.parts = parts
        self._runner = parts.runner
        self._scheduler = parts.scheduler
        self._ready = parts.ready
        self._grammars = parts.grammars
        self._options = options
        self._clock = clock
        self._device = parts.runner.cache.pages_LPBW.device
        self._sampler = Sampler(parts.ready.vocab_size, self._device)
        if self._device.type == "cuda":
            self._sampler.warm_up(parts.runner.model.head_weight().dtype)
            if self._grammars is not None:
                self._grammars.warm_up()
        self._drafter = drafter_for(options, parts.runner, self._sampler)
        self._in_flight: dict[str, InFlight] = {}
        self._depth = 2 if overlaps(options, self._device) else 1
        self._launched: deque[Launched] = deque()
        self._tempo = tempo_for(options, self._device)
        self._num_added = 0
        self._step_seconds = 0.0
        self.observers: list[Callable[[StepPlan], None]] = []  # called with every plan before it runs
        self.movers: list[Callable[[], None]] = []  # called when a plan's copies are queued, before its step

    @classmethod
    def from_pretrained(
        cls, path: Path | str, options: EngineOptions, *, clock: Clock = time.monotonic
    ) -> Engine:
        """Load a Hugging Face checkpoint, size the cache and be ready for requests.

        Raises:
            CheckpointError: the folder cannot be read.
            ConfigError: the options contradict the model or the machine.
        """
        return cls(from_checkpoint(Path(path), options), options, clock=clock)

    @classmethod
    def of(
        cls, model: DeepSeek, options: EngineOptions, *, eos: tuple[int, ...], clock: Clock = time.monotonic
    ) -> Engine:
        """Serve a model that is in memory already; `eos` are the tokens that end a sequence."""
        parts = assemble(model, options, model_name=model.config.name, eos=eos)
        return cls(parts, options, clock=clock)

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting or running."""
        return self._scheduler.has_work

    @property
    def in_flight(self) -> bool:
        """Whether a step is launched that has not landed."""
        return bool(self._launched)

    @property
    def patience_s(self) -> float:
        """How long `step` may wait for more requests without a pause of the device."""
        if self._tempo is None or self._sampler.follows_grammars:
            return 0.0
        return max(0.0, self._tempo.due() - self._clock())

    def ready(self) -> Ready:
        """What the HTTP side needs to know about the model."""
        return self._ready

    def add(self, request: Generate) -> None:
        """Queue a request.

        Raises:
            AdmissionError: it could never be served; names the fields, the values and their bounds.
            OverloadedError: it is to be held, and there is no room for that now.
        """
        params = request.params
        check(request, vocab_size=self._ready.vocab_size, max_logprobs=self._options.max_logprobs)
        matcher = matcher_for(self._grammars, params.grammar)
        self._scheduler.add(_wanted(request), self._clock())
        eos = () if params.ignore_eos else self._ready.eos_token_ids
        self._sampler.admit(
            request.request_id,
            params,
            request.prompt,
            seed=self._next_seed() if params.seed is None else params.seed,
            stop_tokens=tuple({*params.stop_token_ids, *eos}),
            matcher=matcher,
            output=request.output,
        )
        if self._drafter is not None:
            self._drafter.admit(request)
        told = bool(request.output) or params.prompt_logprobs is None
        asked: list[Logprobs | None] = [] if told else [None] * len(request.prompt)
        entry = InFlight(request, self._clock(), announced=bool(request.output), prompt_logprobs=asked)
        self._in_flight[request.request_id] = entry

    def abort(self, request_id: str) -> None:
        """Forget a request and free its blocks; an unknown id is ignored."""
        self._scheduler.abort(request_id, self._clock())
        self._forget(request_id)

    def step(self) -> list[Delta]:
        """Launch what is planned and land the oldest step; returns what is new, at most one delta a request.

        The overlapped loop returns nothing at its first call and goes on until nothing is in flight
        (`has_work`). While some request follows a grammar, no step is launched before the one before has
        landed: a grammar must see a token before it says what may come next. Errors that belong to requests
        become deltas. Others (a bug, a lost device) are raised: the engine's state is then undefined and its
        process should end.
        """
        began = self._clock()
        if self._launched and self._sampler.follows_grammars:
            deltas = self._land(self._launched.popleft())
            self._step_seconds += self._clock() - began
            return deltas
        plan = self._scheduler.plan(began)
        self._observe(plan, began)
        self._runner.move(plan)
        for move in self.movers:
            move()
        if plan.number >= 0:
            self._launched.append(self._launch(plan))
            if isinstance(self._scheduler, RecordingScheduler):
                self._scheduler.launched(plan, self._clock())
            if self._tempo is not None:
                self._tempo.launched(plan, began, self._clock())
        if not self._launched:
            return []
        full = self._sampler.follows_grammars or len(self._launched) >= self._depth
        deltas = self._land(self._launched.popleft()) if full or plan.number < 0 else []
        self._step_seconds += self._clock() - began
        return deltas

    def _observe(self, plan: StepPlan, now: float) -> None:
        """Note what planning decided about requests at `now`."""
        for event in plan.events:
            if isinstance(event, Started) and not event.resumed:
                entry = self._in_flight[event.request_id]
                entry.cached_tokens, entry.queued_s = event.cached_tokens, now - entry.added_s
        for observe in self.observers:
            observe(plan)

    def stats(self) -> Stats:
        """Totals since the start and gauges of this instant."""
        totals, layout = self._scheduler.totals, self._runner.cache.layout
        return Stats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_blocks=self._ready.num_blocks,
            num_free_blocks=self._scheduler.num_free_blocks,
            prompt_tokens=totals.prompt_tokens,
            generation_tokens=totals.generated_tokens,
            prefix_cache_queries=totals.prefix_queries,
            prefix_cache_hits=totals.prefix_hits,
            preemptions=totals.preemptions,
            steps=totals.steps,
            step_seconds=self._step_seconds,
            leased_blocks=self._scheduler.leases.num_blocks,
            pulled_blocks=totals.pulled_blocks,
            early_blocks=totals.early_blocks,
            drafts=totals.drafts,
            draft_tokens=totals.drafted,
            accepted_tokens=totals.accepted_drafts,
            accepted_at=tuple(totals.accepted_at),
            host_blocks=self._scheduler.config.host_blocks,
            host_blocks_held=self._scheduler.num_host_blocks,
            host_hits=totals.host_blocks_in * layout.block_size,
            host_bytes_out=totals.host_blocks_out * layout.block_bytes,
            host_bytes_in=totals.host_blocks_in * layout.block_bytes,
            computed_tokens=totals.scheduled_tokens,
        )

    def profile_tapes(self, clock: Clock) -> dict[int, dict[str, float]]:
        """Seconds of one taped decode step by batch size and native function; empty without tapes."""
        tapes = self._runner.tapes
        return {} if tapes is None else tapes.profile(clock)

    def _next_seed(self) -> int:
        """The seed of a request that brings none: a hash of the engine's seed and its place in line."""
        self._num_added += 1
        word = torch.tensor([to_int64(self._options.seed + (self._num_added << 32))])
        return int(splitmix64(word))

    def _launch(self, plan: StepPlan) -> Launched:
        """Queue a step's work and note whose it is; nothing waits for the device."""
        entries = tuple(self._in_flight[request_id] for request_id in plan.sampled_ids)
        positions = _positions(plan, entries)
        try:
            drafts = None if self._drafter is None else self._drafter.draft(plan, positions)
            trial = None if drafts is None else Trial.of(drafts, len(entries))
            result = self._runner.run(plan, drafts)
            prompts = self._measure_prompts(plan, result)
            drawing = self._draw(plan, result, positions, trial) if entries else None
            if self._drafter is not None:
                self._drafter.learn(plan, result, drawing, positions)
        except (BenthicError, torch.OutOfMemoryError) as error:
            return Launched(plan, entries, error=error)
        written = self._mark_if_lent(plan)
        return Launched(plan, entries, drawing=drawing, prompts=prompts, trial=trial, written=written)

    def _mark_if_lent(self, plan: StepPlan) -> torch.cuda.Event | None:
        """The end of the step on the device, where others are to read what it writes of a prompt."""
        chunks = [chunk for chunk in plan.prefills if not chunk.samples]
        lent = any(self._in_flight[chunk.request_id].request.lend for chunk in chunks)
        if not lent or self._device.type != "cuda":
            return None
        written = torch.cuda.Event()
        written.record()
        return written

    def _draw(self, plan: StepPlan, result: StepResult, positions: list[int], trial: Trial | None) -> Drawing:
        """Draw a token from every row of logits; each sequence's newest feeds its next step."""
        ids = plan.sampled_ids
        if result.drawn is not None and self._sampler.plain(ids):
            return Drawing.of(result.drawn)
        if trial is not None:
            ids, positions = trial.spread(ids, positions)
        drawing = self._sampler.start(result.logits_SV, ids, positions, trial)
        self._runner.remember(plan.sampled_slots, drawing.token_S)
        return drawing

    def _land(self, launched: Launched) -> list[Delta]:
        """Wait for a step's tokens, commit them and say what is new."""
        plan = launched.plan
        if self._tempo is not None:
            self._tempo.waits(self._clock())
        rows = launched.collect() if launched.error is None else []
        now = self._clock()
        if self._tempo is not None:
            self._tempo.landed(now)
        if launched.error is not None:
            return self._fail(plan, launched.error)
        # An id may have ended, and even come back, while its row was in flight: the row is then nobody's.
        kept = [self._in_flight.get(entry.request.request_id) is entry for entry in launched.entries]
        for request_id, row, mine in zip(plan.sampled_ids, rows, kept, strict=True):
            if mine and row.failure is not None:
                self._scheduler.abort(request_id, now)
        accepted = [row.tokens or (0,) for row in rows]
        commit = self._scheduler.commit(plan, accepted, now, launched.given)
        ended = {event.request_id: event for event in commit}
        deltas = []
        for request_id, row, mine in zip(plan.sampled_ids, rows, kept, strict=True):
            if mine:
                deltas.append(self._tell(request_id, row, ended.pop(request_id, None)))
        deltas.extend(self._delta(request_id, [], event, None) for request_id, event in ended.items())
        return deltas

    def _tell(self, request_id: str, row: Row, end: Finished | None) -> Delta:
        """What a row says, less the tokens behind its end."""
        if row.failure is not None:
            return self._error(request_id, row.failure)
        kept = len(row.tokens) if end is None else end.kept
        if self._drafter is not None:
            self._drafter.told(request_id, row.tokens)
        return self._delta(request_id, row.tokens[:kept], end, tuple(row.logprobs[:kept]) or None)

    def _delta(
        self, request_id: str, tokens: list[int], end: Finished | None, logprobs: tuple[Logprobs, ...] | None
    ) -> Delta:
        entry = self._in_flight[request_id]
        first = not entry.announced
        entry.announced = True
        if end is not None:
            self._forget(request_id)
        return Delta(
            request_id=request_id,
            tokens=tuple(tokens),
            finish_reason=None if end is None else end.reason,
            stop_token=None if end is None else end.stop_token,
            logprobs=logprobs,
            prompt_logprobs=_complete(entry.prompt_logprobs) if first and entry.prompt_logprobs else None,
            cached_tokens=entry.cached_tokens if first else 0,
            queued_s=entry.queued_s if first else 0.0,
        )

    def _error(self, request_id: str, message: str) -> Delta:
        self._forget(request_id)
        return Delta(request_id=request_id, tokens=(), finish_reason="error", error=message)

    def _fail(self, plan: StepPlan, error: Exception) -> list[Delta]:
        """End every request of a step that could not run, and that has not ended meanwhile."""
        message = f"the step of {plan.num_tokens} tokens failed: {error}"
        return [self._error(event.request_id, message) for event in self._scheduler.fail(plan, self._clock())]

    def _forget(self, request_id: str) -> None:
        self._in_flight.pop(request_id, None)
        self._sampler.release(request_id)
        if self._drafter is not None:
            self._drafter.release(request_id)

    @torch.inference_mode()
    def _measure_prompts(self, plan: StepPlan, result: StepResult) -> list[PromptRows]:
        """Start log-probabilities of the prompt tokens that this step's chunks predict, where asked for."""
        measured: list[PromptRows] = []
        for chunk, rows in zip(plan.prefills, result.chunk_rows, strict=True):
            entry = self._in_flight[chunk.request_id]
            if entry.prompt_logprobs:
                measured += self._measure_prompt(entry, chunk.start, rows, result)
        return measured

    def _measure_prompt(
        self, entry: InFlight, start: int, rows: range, result: StepResult
    ) -> Iterator[PromptRows]:
        """Row i of a chunk stands at position `start + i` and predicts the prompt token one further on."""
        prompt, best = entry.request.prompt, entry.request.params.prompt_logprobs or 0
        length = min(len(rows), len(prompt) - 1 - start)
        if length <= 0:
            return
        first = start + 1
        for logits_LV in self._runner.row_logits(result, rows[:length]):
            tokens = np.array(prompt[first : first + logits_LV.shape[0]], dtype=np.int64)
            measured = measure(logits_LV, to_device(tokens, self._device), best)
            yield PromptRows.start(entry, first, measured)
            first += len(tokens)


def _positions(plan: StepPlan, entries: tuple[InFlight, ...]) -> list[int]:
    """How many tokens each sampled request has put out when this step's row is drawn."""
    ends = [position + 1 for position in plan.decode_positions]
    ends += [chunk.start + chunk.length for chunk in plan.prefills if chunk.samples]
    return [end - len(entry.request.prompt) for end, entry in zip(ends, entries, strict=True)]


def _wanted(request: Generate) -> Request:
    """What the scheduler needs to know; tokens put out elsewhere count as prompt."""
    params, before = request.params, len(request.output)
    return Request(
        request_id=request.request_id,
        prompt=request.prompt + request.output,
        max_tokens=params.max_tokens - before,
        min_tokens=max(0, params.min_tokens - before),
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        priority=request.priority,
        reuse_prefix=params.prompt_logprobs is None or before > 0,
        speculate=params.grammar is None,
        hold=request.hold,
        pull=request.pull is not None,
    )


def _complete(rows: list[Logprobs | None]) -> tuple[Logprobs, ...]:
    """Prompt log-probabilities as they go out: the first token has none."""
    return tuple(() if row is None else row for row in rows)
