"""Who drafts: the model's prediction modules, or the sequence's own past. Both sit behind one protocol.

Drafts change how fast tokens come, never which (`benthic.serve.drafts`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from benthic.serve.drafts import Drafts
from benthic.serve.lookup import PromptLookup
from benthic.serve.transit import tensor_of, to_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from benthic.model.network import Hidden
    from benthic.sched.plans import StepPlan
    from benthic.serve.attend import StepLayout
    from benthic.serve.messages import Generate
    from benthic.serve.options import EngineOptions
    from benthic.serve.runner import Runner, StepResult
    from benthic.serve.sampler import Drawing
    from benthic.serve.step_graphs import Drawn


class Drafter(Protocol):
    """Proposes tokens for the decodes of a step."""

    def admit(self, request: Generate) -> None:
        """A request was queued."""
        ...

    def release(self, request_id: str) -> None:
        """A request ended; unknown ids are ignored."""
        ...

    def draft(self, plan: StepPlan, positions: Sequence[int]) -> Drafts | None:
        """At most `plan.decode_drafts` tokens for each decode, before the step runs; None without any.

        `positions` says how many tokens each of `plan.sampled_ids` has put out.
        """
        ...

    def learn(
        self, plan: StepPlan, result: StepResult, drawing: Drawing | None, positions: Sequence[int]
    ) -> None:
        """The step has been launched, and `drawing` holds what it draws (None: nothing)."""
        ...

    def told(self, request_id: str, tokens: Sequence[int]) -> None:
        """The host has learnt new tokens of a request."""
        ...


class Guesser(Protocol):
    """Makes drafts of logits; a `Sampler` does."""

    def guess(self, logits_SV: Tensor, request_ids: tuple[str, ...], position_S: Tensor) -> Tensor:
        """The token that each row would draw at these positions, or nearly; int64."""
        ...


def drafter_for(options: EngineOptions, runner: Runner, guesser: Guesser) -> Drafter | None:
    """The drafter that the options ask for."""
    chosen = options.speculative
    if chosen is None:
        return None
    if chosen.method == "ngram":
        device = runner.cache.pages_LPBW.device
        return NgramDrafter(chosen.prompt_lookup_min, chosen.prompt_lookup_max, device)
    return MtpDrafter(runner, guesser, options.max_num_seqs)


class NgramDrafter:
    """Prompt lookup for every sequence, on the host. It must know all tokens: steps cannot overlap.

    Args:
        least: shortest run of tokens to look up.
        most: longest one.
        device: where drafts are verified.
    """

    def __init__(self, least: int, most: int, device: torch.device) -> None:
        self._least = least
        self._most = most
        self._device = device
        self._known: dict[str, PromptLookup] = {}

    def admit(self, request: Generate) -> None:
        """Read its prompt, and what it has put out elsewhere."""
        tokens = request.prompt + request.output
        self._known[request.request_id] = PromptLookup(tokens, least=self._least, most=self._most)

    def release(self, request_id: str) -> None:
        """Forget it."""
        self._known.pop(request_id, None)

    def draft(self, plan: StepPlan, positions: Sequence[int]) -> Drafts | None:  # noqa: ARG002 (the protocol's)
        """What followed the newest tokens of each sequence when they last stood in it."""
        wanted = zip(plan.decode_ids, plan.decode_drafts, strict=True)
        found = [self._known[name].draft(count) if count else [] for name, count in wanted]
        counts = tuple(map(len, found))
        if not any(counts):
            return None
        token_DK = np.zeros((len(found), max(counts)), dtype=np.int64)
        for row, tokens in zip(token_DK, found, strict=True):
            row[: len(tokens)] = tokens
        return Drafts(counts, to_device(token_DK, self._device))

    def learn(
        self, plan: StepPlan, result: StepResult, drawing: Drawing | None, positions: Sequence[int]
    ) -> None:
        """Nothing: tokens are learnt when the host is told."""

    def told(self, request_id: str, tokens: Sequence[int]) -> None:
        """Append them."""
        known = self._known.get(request_id)
        if known is not None:
            known.extend(tokens)


class States(NamedTuple):
    """What the last module left of some sequences: to make logits of, and to feed to the next pass."""

    hidden_SD: Tensor
    previous_SD: Tensor


class MtpDrafter:
    """Multi-token prediction as section 5.4.3 of DeepSeek-V3's report uses it; nothing waits for the device.

    After a step, every module runs over the step's own rows, so that its latent cache follows the sequences:
    row i takes the state of row i and the token behind it (eq. (21)). For a row whose token was rejected, or
    for a deeper module one that is a guess, the entry is wrong; the next steps overwrite those of the first
    module, and what stays wrong costs acceptance alone. The last module's newest state gives the first draft,
    and is then fed its own state and draft again and again.

    Behind a step with drafts the next ones are made at once, while the host has yet to learn what this one
    drew: how many drafts held, and so where the newest token stands, is known on the device. Otherwise they
    are made before the step that verifies them.

    Cost: one layer a module for every row, also while nothing is drafted; a layer and a head for each draft.

    Args:
        runner: whose model has modules, and whose cache has layers for them.
        sampler: draws the drafts.
        max_num_seqs: scheduler slots.
    """

    def __init__(self, runner: Runner, sampler: Guesser, max_num_seqs: int) -> None:
        self._runner = runner
        self._sampler = sampler
        self._model = runner.model
        self._depth = runner.model.config.num_nextn_predict_layers
        self._hidden_ND, self._previous_ND = runner.ahead_ND, runner.ahead_previous_ND
        device = self._hidden_ND.device
        self._early_NK = torch.zeros((max_num_seqs, self._depth - 1), dtype=torch.int64, device=device)
        self._made: dict[int, int] = {}  # how many drafts lie ready, by slot

    def admit(self, request: Generate) -> None:
        """Nothing: all it needs is on the device."""

    def release(self, request_id: str) -> None:
        """Nothing: before a slot's next owner decodes, a step has drawn its first token."""

    def told(self, request_id: str, tokens: Sequence[int]) -> None:
        """Nothing."""

    @torch.inference_mode()
    def draft(self, plan: StepPlan, positions: Sequence[int]) -> Drafts | None:
        """Drafts for all decodes, as many as the one that gets the most has; surplus ones mean nothing."""
        counts = plan.decode_drafts
        if not any(counts):
            return None
        most = max(counts)
        slots = self._runner.steps.on_device(plan.decode_slots)
        if all(self._made.get(slot, 0) >= most for slot in plan.decode_slots):
            return Drafts(counts, self._runner.steps.fed_NF[:, 1 : 1 + most], slots)
        self._runner.write(plan.tables)
        states = States(*(each.index_select(0, slots) for each in (self._hidden_ND, self._previous_ND)))
        early = list(self._early_NK.index_select(0, slots).unbind(1))
        passes = self._runner.steps.passes(plan, counts)
        position_D = tensor_of(positions[: len(counts)], np.int64, slots.device)
        return Drafts(counts, self._chain(states, early, passes, plan.decode_ids, position_D))

    def _chain(
        self,
        states: States,
        early: list[Tensor],
        passes: Sequence[tuple[Tensor, StepLayout]],
        ids: tuple[str, ...],
        position_S: Tensor,
    ) -> Tensor:
        """Drafts one after another, one more than `passes`, of which the deeper modules made the first."""
        tokens, most = early[: len(passes) + 1], len(passes) + 1
        while len(tokens) < most:
            made = len(tokens) + 1 - self._depth
            if made:
                position_D, layout = passes[made - 1]
                ahead = self._runner.ahead(
                    self._depth - 1, states.previous_SD, tokens[-1], position_D, layout
                )
                states = States(ahead.hidden_TD, self._model.mtp_input(ahead))
            logits_DV = self._runner.logits(states.hidden_SD)
            tokens.append(self._sampler.guess(logits_DV, ids, position_S + len(tokens)))
        return torch.stack(tokens, dim=1)

    @torch.inference_mode()
    def learn(
        self, plan: StepPlan, result: StepResult, drawing: Drawing | None, positions: Sequence[int]
    ) -> None:
        """Run every module over the step's rows, and keep the last one's state of each newest row."""
        if drawing is not None and drawing.drawn is not None and self._replayed(plan, result, drawing.drawn):
            return
        step, previous_TD = result.step, result.previous_TD
        newest_S = None if drawing is None else self._newest_rows(result, drawing)
        token_T = self._behind(plan, result, drawing)
        for depth in range(self._depth):
            ahead = self._runner.ahead(depth, previous_TD, token_T, step.positions_T, step.layout)
            previous_TD = self._model.mtp_input(ahead)
            if depth + 1 < self._depth:
                token_T = self._further(plan, result, token_T, newest_S, depth + 1, ahead)
        if newest_S is None or drawing is None:
            return
        slots = self._slots(plan)
        states = States(ahead.hidden_TD.index_select(0, newest_S), previous_TD.index_select(0, newest_S))
        self._hidden_ND.index_copy_(0, slots, states.hidden_SD)
        self._previous_ND.index_copy_(0, slots, states.previous_SD)
        most = max(plan.decode_drafts, default=0)
        self._made.update(dict.fromkeys(plan.sampled_slots, most))
        if most:
            made_SK = self._chain_behind(plan, drawing, states, positions, most)
            self._runner.steps.offer(slots, made_SK)

    def _replayed(self, plan: StepPlan, result: StepResult, drawn: Drawn) -> bool:
        """Whether one graph has done all of `learn`, behind a step's graph that drew its tokens."""
        decode = result.step.layout.decode
        tail = None if decode is None else self._runner.tails.get(decode.queries)
        if decode is None or tail is None:
            return False
        tail.replay(drawn.size)
        self._made.update(dict.fromkeys(plan.sampled_slots, decode.queries - 1))
        return True

    def _chain_behind(
        self, plan: StepPlan, drawing: Drawing, states: States, positions: Sequence[int], most: int
    ) -> Tensor:
        """Drafts behind what a step draws, for all sequences that draw."""
        held_S = None if drawing.verdict is None else drawing.verdict.held_S
        early = list(self._early_NK.index_select(0, self._slots(plan)).unbind(1))
        passes = self._runner.steps.passes_behind(plan, held_S, most - 1)
        position_S = tensor_of(positions, np.int64, self._hidden_ND.device) + 1
        if held_S is not None:
            position_S = position_S + held_S
        return self._chain(states, early, passes, plan.sampled_ids, position_S)

    def _newest_rows(self, result: StepResult, drawing: Drawing) -> Tensor:
        """The step's row behind which each sequence's newest token was drawn."""
        sampled_R = result.step.sampled_S
        if drawing.verdict is None:
            if sampled_R is None:
                return torch.arange(len(drawing.token_S), device=drawing.token_S.device)
            return sampled_R
        row_S = drawing.verdict.row_S
        return row_S if sampled_R is None else sampled_R.index_select(0, row_S)

    def _behind(self, plan: StepPlan, result: StepResult, drawing: Drawing | None) -> Tensor:
        """The token behind every row: drawn from it, or known because it is in the prompt."""
        sampled_R = result.step.sampled_S
        if drawing is not None and sampled_R is None:
            return drawing.token_R.clamp(min=0)
        known_T = np.zeros(len(result.step.positions_T), dtype=np.int64)
        for chunk, rows in zip(plan.prefills, result.chunk_rows, strict=True):
            tokens = ((chunk.tokens or ()) + chunk.ahead)[1 : 1 + len(rows)]
            known_T[rows.start : rows.start + len(tokens)] = tokens
        token_T = to_device(known_T, self._hidden_ND.device)
        if drawing is None or sampled_R is None:
            return token_T
        return token_T.index_copy(0, sampled_R, drawing.token_R.clamp(min=0))

    def _further(
        self,
        plan: StepPlan,
        result: StepResult,
        token_T: Tensor,
        newest_S: Tensor | None,
        depth: int,
        ahead: Hidden,
    ) -> Tensor:
        """The tokens one further on, for the next deeper module; a sequence's newest row gets a guess."""
        token_T = F.pad(token_T[1:], (0, 1))
        for chunk, rows in zip(plan.prefills, result.chunk_rows, strict=True):
            if len(chunk.ahead) > depth:
                token_T[rows[-1]] = chunk.ahead[depth]
        if newest_S is None:
            return token_T
        logits_SV = self._runner.logits(ahead.hidden_TD.index_select(0, newest_S))
        guess_S = logits_SV.argmax(-1)
        self._early_NK[:, depth - 1].index_copy_(0, self._slots(plan), guess_S)
        return token_T.index_copy(0, newest_S, guess_S)

    def _slots(self, plan: StepPlan) -> Tensor:
        return self._runner.steps.on_device(plan.sampled_slots)
