"""Drafting by prediction modules on several ranks: all run them, and rank 0 alone makes tokens of logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from benthic.serve.commands import Draft, Learn, Step
from benthic.serve.sampler import Drawing
from benthic.serve.transit import Homeward

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from benthic.parallel.team import Team
    from benthic.sched.plans import StepPlan
    from benthic.serve.drafters import Drafter, Guesser
    from benthic.serve.drafts import Drafts, Trial
    from benthic.serve.followers import Followers
    from benthic.serve.messages import Generate
    from benthic.serve.runner import StepResult


@dataclass(frozen=True)
class LeadingDrafter:
    """Rank 0's drafter (a `benthic.serve.drafters.Drafter`): the others are told before it runs anything."""

    drafter: Drafter
    followers: Followers
    team: Team

    def admit(self, request: Generate) -> None:
        """As the drafter's."""
        self.drafter.admit(request)

    def release(self, request_id: str) -> None:
        """As the drafter's."""
        self.drafter.release(request_id)

    def told(self, request_id: str, tokens: Sequence[int]) -> None:
        """As the drafter's."""
        self.drafter.told(request_id, tokens)

    @torch.inference_mode()
    def draft(self, plan: StepPlan, positions: Sequence[int]) -> Drafts | None:
        """Draft, and let the others run the same passes."""
        if any(plan.decode_drafts):
            self.followers.tell(Draft(Step.of(plan, None)))
        return self.drafter.draft(plan, positions)

    @torch.inference_mode()
    def learn(
        self, plan: StepPlan, result: StepResult, drawing: Drawing | None, positions: Sequence[int]
    ) -> None:
        """Tell the others what was drawn, and run the modules over the step as they do."""
        self.followers.tell(Learn(0 if drawing is None else len(drawing.token_R)))
        if drawing is not None:
            self.team.told(drawing.token_R.contiguous())
        self.drafter.learn(plan, result, drawing, positions)


@dataclass(frozen=True)
class LeadingGuesser:
    """Rank 0's sampler, whose guesses go to the others."""

    sampler: Guesser
    team: Team

    def guess(self, logits_SV: Tensor, request_ids: tuple[str, ...], position_S: Tensor) -> Tensor:
        """Guess."""
        return self.team.told(self.sampler.guess(logits_SV, request_ids, position_S).contiguous())


@dataclass(frozen=True)
class ToldGuesser:
    """Another rank's: it takes what rank 0 guesses."""

    team: Team

    def guess(
        self,
        logits_SV: Tensor,
        request_ids: tuple[str, ...],  # noqa: ARG002 (the protocol's)
        position_S: Tensor,  # noqa: ARG002 (the protocol's)
    ) -> Tensor:
        """Rank 0's guesses."""
        return self.team.told(torch.empty(len(logits_SV), dtype=torch.int64, device=logits_SV.device))


def told_drawing(rows: int, trial: Trial | None, team: Team) -> Drawing | None:
    """What rank 0 has drawn, as far as a drafter looks at it; None when nothing was."""
    if not rows:
        return None
    token_R = team.told(torch.empty(rows, dtype=torch.int64, device=team.device))
    verdict = None if trial is None else trial.judge(token_R)
    newest_S = token_R if verdict is None else verdict.newest_S
    return Drawing(newest_S, token_R, Homeward((), None), verdict=verdict)
