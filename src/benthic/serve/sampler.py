"""From logits to tokens: every row of a batch with its own settings, in a handful of tensor operations.

Nothing here waits for the device but `Drawing.collect`: settings go there through pinned memory, tokens and
log-probabilities come back the same way.

Order of the steps, as in vLLM: raw log-probabilities are taken; logit bias; min_tokens; repetition, frequency
and presence penalties; what a grammar forbids; then argmax, or temperature, min-p, top-k, top-p and the draw.

Shape suffixes: S rows that sample this step, V vocabulary, N slots of the penalty table, L rows that a step
singles out (those with penalties, or those that want log-probabilities).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from benthic.kernels.ops import Filters, best_tokens, draw_tokens
from benthic.kernels.reference.sampling import NO_TOKEN
from benthic.serve.grammar import GrammarMasks, accept
from benthic.serve.messages import SamplingParams
from benthic.serve.penalties import Penalties, PenaltyTable
from benthic.serve.sample import Logprobs, Measured, logprobs_from, measure, to_int64
from benthic.serve.transit import Homeward, tensor_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llguidance import LLMatcher
    from torch import Tensor

    from benthic.serve.drafts import Trial, Verdict
    from benthic.serve.step_graphs import Drawn


KEPT_BATCHES: Final = 4
"""Settings of batches that are kept: with drafts, a step asks for those of its sequences and of its rows."""


@dataclass(frozen=True)
class Row:
    """The sampling side of one request.

    `stop_tokens` are those that end it (used by min_tokens); `slot` is its line in the penalty table, -1
    without one.
    """

    params: SamplingParams
    seed: int
    stop_tokens: tuple[int, ...]
    slot: int = -1


@dataclass(frozen=True)
class Batch:
    """The settings of one step's rows as tensors, built once for each composition of the batch.

    A tensor that no row needs is None: that is what makes greedy and plain-temperature batches fast.
    """

    all_greedy: bool
    temperature_S: Tensor | None
    seed_S: Tensor | None
    filters: Filters | None
    bias: tuple[Tensor, Tensor, Tensor] | None
    penalties: Penalties | None
    min_tokens: tuple[tuple[int, int, tuple[int, ...]], ...]
    logprobs: LogprobRows | None

    @property
    def plain(self) -> bool:
        """Whether every token is the best one of its row, and nothing but tokens is wanted."""
        return self.all_greedy and not self.changes and self.logprobs is None

    @property
    def changes(self) -> bool:
        """Whether logits are changed before tokens are drawn."""
        return self.bias is not None or self.penalties is not None or bool(self.min_tokens)

    @classmethod
    def of(cls, rows: Sequence[Row], vocab_size: int, device: torch.device) -> Batch:
        """Stack the rows' settings."""
        params = [row.params for row in rows]
        all_greedy = all(p.greedy for p in params)
        temperatures = [0.0 if p.greedy else p.temperature for p in params]
        return cls(
            all_greedy=all_greedy,
            temperature_S=None if all_greedy else tensor_of(temperatures, np.float32, device),
            seed_S=None if all_greedy else tensor_of([to_int64(row.seed) for row in rows], np.int64, device),
            filters=None if all_greedy else _filters(params, vocab_size, device),
            bias=_bias(params, device),
            penalties=Penalties.of([row.slot for row in rows], params, device),
            min_tokens=tuple(
                (i, row.params.min_tokens, row.stop_tokens)
                for i, row in enumerate(rows)
                if row.params.min_tokens > 0 and row.stop_tokens
            ),
            logprobs=LogprobRows.of(params, device),
        )


@dataclass(frozen=True)
class LogprobRows:
    """Rows that want log-probabilities: their places in the batch, also on the device, and how many each."""

    rows: tuple[int, ...]
    row_L: Tensor
    best: tuple[int, ...]

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device) -> LogprobRows | None:
        """The rows that ask; None when there are none."""
        asking = [(i, p.logprobs) for i, p in enumerate(params) if p.logprobs is not None]
        if not asking:
            return None
        rows, best = zip(*asking, strict=True)
        return cls(rows, tensor_of(rows, np.int64, device), best)


def _filters(params: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> Filters | None:
    if all(p.top_k <= 0 and p.top_p >= 1.0 and p.min_p <= 0.0 for p in params):
        return None
    top_k = [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params]
    return Filters(
        min_p_S=tensor_of([p.min_p for p in params], np.float32, device),
        top_k_S=tensor_of(top_k, np.int64, device),
        top_p_S=tensor_of([p.top_p for p in params], np.float32, device),
        most_k=max(top_k),
        some_top_k=min(top_k) < vocab_size,
        some_top_p=any(p.top_p < 1.0 for p in params),
    )


def _bias(params: Sequence[SamplingParams], device: torch.device) -> tuple[Tensor, Tensor, Tensor] | None:
    entries = [(i, token, value) for i, p in enumerate(params) for token, value in p.logit_bias.items()]
    if not entries:
        return None
    rows, tokens, values = zip(*entries, strict=True)
    return (
        tensor_of(rows, np.int64, device),
        tensor_of(tokens, np.int64, device),
        tensor_of(values, np.float32, device),
    )


@dataclass(frozen=True)
class Sampled:
    """One token a row, `NO_TOKEN` where the distribution was not finite; log-probabilities by row.

    `failures` says, by row, what else left a row without a token. With drafts, `held` counts those of each
    sequence that held, whose rows are then one after another.
    """

    tokens: list[int]
    logprobs: dict[int, Logprobs] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    held: list[int] | None = None


@dataclass(frozen=True)
class Drawing:
    """Tokens that are being drawn, their way home, and the grammars that wait.

    `token_R` has one for each row of logits and `token_S` each sequence's newest: the same without drafts.
    `drawn`: by the step's graph, which has noted the newest tokens as well.
    """

    token_S: Tensor
    token_R: Tensor
    homeward: Homeward
    following: dict[int, LLMatcher] = field(default_factory=dict)
    asked: LogprobRows | None = None
    verdict: Verdict | None = None
    drawn: Drawn | None = None

    @classmethod
    def of(cls, drawn: Drawn) -> Drawing:
        """What a step's graph has drawn."""
        return cls(drawn.newest_S, drawn.token_R, drawn.bring(), verdict=drawn.verdict, drawn=drawn)

    def collect(self) -> Sampled:
        """Wait for the tokens, and move grammars past theirs."""
        token_R, *others = self.homeward.wait()
        if self.drawn is not None:
            token_R, held_S = self.drawn.read(token_R)
            return Sampled(token_R.tolist(), held=None if held_S is None else held_S.tolist())
        held = None if self.verdict is None else others.pop(0).tolist()
        tokens = token_R.tolist()
        failures = accept(self.following, tokens) if self.following else {}
        if self.asked is None:
            return Sampled(tokens, failures=failures, held=held)
        found = logprobs_from(Measured(*others), self.asked.best)
        return Sampled(tokens, dict(zip(self.asked.rows, found, strict=True)), failures, held)


class Sampler:
    """Draws tokens for the requests that were admitted to it."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._rows: dict[str, Row] = {}
        self._table = PenaltyTable(vocab_size, device)
        self._grammars = GrammarMasks(device)
        self._batches: dict[tuple[str, ...], Batch] = {}

    @torch.inference_mode()
    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile what draws from logits of `dtype` and from changed ones, before a request waits for it."""
        filters = _filters([SamplingParams(top_k=2, top_p=0.5)], self._vocab_size, self._device)
        zero = torch.zeros(1, dtype=torch.int64, device=self._device)
        for each in {dtype, torch.float32}:
            logits_SV = torch.zeros(1, self._vocab_size, dtype=each, device=self._device)
            _greedy(logits_SV)
            for some in (None, filters):
                draw_tokens(logits_SV, torch.ones(1, device=self._device), zero, zero, some)

    def admit(
        self,
        request_id: str,
        params: SamplingParams,
        prompt: Sequence[int],
        *,
        seed: int,
        stop_tokens: tuple[int, ...],
        matcher: LLMatcher | None = None,
        output: Sequence[int] = (),
    ) -> None:
        """Register a request.

        `stop_tokens` are the ids that would end it, `matcher` its grammar, and `output` what it has put out
        already, elsewhere.
        """
        if matcher is not None:
            for token in output:
                matcher.consume_token(token)
            self._grammars.admit(request_id, matcher)
        slot = self._table.admit(prompt, output) if _has_penalty(params) else -1
        self._rows[request_id] = Row(params, seed, stop_tokens, slot)

    def plain(self, request_ids: tuple[str, ...]) -> bool:
        """Whether the tokens of these requests are the best of raw logits, and nothing else is asked."""
        return not self._grammars.any and self._batch_for(request_ids).plain

    @property
    def follows_grammars(self) -> bool:
        """Whether some request here has a grammar."""
        return self._grammars.any

    def release(self, request_id: str) -> None:
        """Forget a request; unknown ids are ignored."""
        self._grammars.release(request_id)
        row = self._rows.pop(request_id, None)
        if row is not None and row.slot >= 0:
            self._table.release(row.slot)
        for ids in [ids for ids in self._batches if request_id in ids]:
            del self._batches[ids]

    def sample(self, logits_SV: Tensor, request_ids: tuple[str, ...], positions: Sequence[int]) -> Sampled:
        """`start`, then wait for the tokens."""
        return self.start(logits_SV, request_ids, positions).collect()

    @torch.inference_mode()
    def start(
        self,
        logits_SV: Tensor,
        request_ids: tuple[str, ...],
        positions: Sequence[int],
        trial: Trial | None = None,
    ) -> Drawing:
        """Draw one token a row, without waiting for the device.

        Args:
            logits_SV: raw logits of any float dtype; what changes them does so in place where it is float32.
            request_ids: whose row each is; all admitted.
            positions: how many tokens each has put out before this one.
            trial: which rows verify drafts; a request with a grammar has none.

        Cost on a GPU: greedy batches and plain temperature read the logits once, a filter up to ten times.
        """
        batch = self._batch_for(request_ids)
        if batch.changes or self._grammars.any:
            logits_SV = logits_SV.to(torch.float32)
        asked = batch.logprobs
        raw_LV = None if asked is None else logits_SV.index_select(0, asked.row_L)
        self._adjust(logits_SV, batch, positions, trial)
        following = self._grammars.apply(logits_SV, request_ids)
        position_R = None if batch.all_greedy else tensor_of(positions, np.int64, self._device)
        token_R = _choose(logits_SV, batch, position_R)
        verdict = None if trial is None else trial.judge(token_R)
        if batch.penalties is not None:
            kept_R = None if trial is None or verdict is None else trial.kept(verdict)
            self._table.count(token_R, batch.penalties, kept_R)
        home = [token_R] if verdict is None else [token_R, verdict.held_S]
        if asked is not None and raw_LV is not None:
            token_L = token_R.index_select(0, asked.row_L).clamp(min=0)
            home += measure(raw_LV, token_L, max(asked.best))
        newest_S = token_R if verdict is None else verdict.newest_S
        return Drawing(newest_S, token_R, Homeward.start(*home), following, asked, verdict)

    @torch.inference_mode()
    def guess(self, logits_SV: Tensor, request_ids: tuple[str, ...], position_S: Tensor) -> Tensor:
        """What a drafter's logits make of the random numbers that `start` will use at these positions.

        Temperature and filters apply; penalties, biases and grammars do not, which costs acceptance at most.
        """
        batch = self._batch_for(request_ids)
        return _choose(logits_SV, batch, position_S).clamp(min=0)

    def _batch_for(self, request_ids: tuple[str, ...]) -> Batch:
        batch = self._batches.pop(request_ids, None)
        if batch is None:
            rows = [self._rows[request_id] for request_id in request_ids]
            batch = Batch.of(rows, self._vocab_size, self._device)
        self._batches[request_ids] = batch
        if len(self._batches) > KEPT_BATCHES:
            del self._batches[next(iter(self._batches))]
        return batch

    def _adjust(self, logits_SV: Tensor, batch: Batch, positions: Sequence[int], trial: Trial | None) -> None:
        if batch.bias is not None:
            rows, tokens, values = batch.bias
            logits_SV.index_put_((rows, tokens), values, accumulate=True)
        early = [(i, t) for i, least, stops in batch.min_tokens if positions[i] < least for t in stops]
        if early:
            rows, tokens = (tensor_of(column, np.int64, self._device) for column in zip(*early, strict=True))
            # not `logits_SV[rows, tokens] = -torch.inf`: that number would cross, and the host wait for it
            logits_SV.index_put_((rows, tokens), logits_SV.new_full((), -torch.inf))
        if batch.penalties is not None:
            self._table.apply(logits_SV, batch.penalties, trial)


def _choose(logits_SV: Tensor, batch: Batch, position_S: Tensor | None) -> Tensor:
    if batch.temperature_S is None or batch.seed_S is None or position_S is None:
        return _greedy(logits_SV)
    return draw_tokens(logits_SV, batch.temperature_S, batch.seed_S, position_S, batch.filters)


def _greedy(logits_SV: Tensor) -> Tensor:
    """The token of each row's greatest entry, `NO_TOKEN` where it is not finite (a NaN is the greatest).

    On a CPU by numpy, whose search is vectorised (14 us against 172 for 16 rows of 2,048) and wakes no
    thread.
    """
    if logits_SV.device.type != "cpu":
        return best_tokens(logits_SV)
    values_SV = logits_SV.to(torch.float32).numpy()
    found_S = values_SV.argmax(-1)
    value_S = values_SV[np.arange(len(found_S)), found_S]
    return torch.from_numpy(np.where(np.isfinite(value_S), found_S, NO_TOKEN))


def _has_penalty(params: SamplingParams) -> bool:
    return (params.repetition_penalty, params.frequency_penalty, params.presence_penalty) != (1.0, 0.0, 0.0)
