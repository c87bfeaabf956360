"""An engine that is rank 0 of several: it starts the others, leads them, and ends when one of them ends."""

from __future__ import annotations

import functools
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benthic.errors import PeerLostError
from benthic.parallel.team import open_store
from benthic.serve.build import with_grammars
from benthic.serve.drafters import drafter_for
from benthic.serve.engine import Engine
from benthic.serve.follow import follow
from benthic.serve.followers import Followers
from benthic.serve.ranks import build_shard, join, own_options, shard_of
from benthic.serve.spread_drafts import LeadingDrafter, LeadingGuesser
from benthic.serve.weights import drafts_with_mtp
from benthic.spec import hf

if TYPE_CHECKING:
    from collections.abc import Callable

    from benthic.parallel.team import Team
    from benthic.sched.plans import StepPlan
    from benthic.serve.build import Parts
    from benthic.serve.engine import Clock
    from benthic.serve.launched import Launched
    from benthic.serve.messages import Delta
    from benthic.serve.options import EngineOptions
    from benthic.serve.pages import Mover

logger = logging.getLogger("benthic.serve.engine")


class SpreadEngine(Engine):
    """One model on several ranks serving requests.

    Args:
        parts: as for `Engine`, of rank 0's shard.
        options: settings.
        followers: the other ranks.
        team: rank 0's place among them.
        clock: as for `Engine`.
    """

    def __init__(
        self,
        parts: Parts,
        options: EngineOptions,
        followers: Followers,
        team: Team,
        *,
        clock: Clock = time.monotonic,
    ) -> None:
        super().__init__(parts, options, clock=clock)
        self.followers = followers
        self._team = team
        if drafts_with_mtp(options):
            modules = drafter_for(options, parts.runner, LeadingGuesser(self._sampler, team))
            assert modules is not None  # noqa: S101 (these options ask for one)
            self._drafter = LeadingDrafter(modules, followers, team)

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str,
        options: EngineOptions,
        *,
        clock: Clock = time.monotonic,
        mover: Mover | None = None,
    ) -> SpreadEngine:
        """Start the other ranks and load a shard of the checkpoint on each; `leave` lets them go.

        With `mover` they can pull blocks, see `benthic.serve.spread_pages.SpreadPages`, which has to be made
        before the first step.

        Raises:
            ConfigError: the model or the machine's GPUs do not divide so.
            CheckpointError: the folder cannot be read.
            PeerLostError: another rank could not start.
        """
        folder = Path(path)
        shard_of(options, 0).check(hf.read(folder).config)
        own, store = own_options(options, 0), open_store()
        body = functools.partial(follow, folder, options, store.port, logging.getLogger().level, mover)
        followers, rank = Followers(body, options.tensor_parallel_size), None
        try:
            followers.meet("started")
            rank = join(own, store, 0, followers)
            logger.info("ranks: %d, %s", options.tensor_parallel_size, describe(options))
            parts = build_shard(folder, own, rank, followers.meet)
        except Exception:
            if rank is not None:
                rank.team.part(orderly=False)
            followers.end()
            raise
        return cls(with_grammars(parts, folder), own, followers, rank.team, clock=clock)

    def step(self) -> list[Delta]:
        """As `Engine.step`, but what a rank cannot do ends them all.

        Raises:
            PeerLostError: naming the rank and what it said.
        """
        try:
            return super().step()
        except PeerLostError:
            raise
        except Exception as error:
            raise self.followers.lost(error) from error

    def _launch(self, plan: StepPlan) -> Launched:
        """As `Engine._launch`; a step that fails half-way leaves ranks in different places."""
        launched = super()._launch(plan)
        if launched.error is not None:
            raise launched.error
        return launched

    def watch(self, last_words: Callable[[str], None]) -> None:
        """Call `last_words` from a thread when another rank has ended and this one waits for it."""
        self.followers.watch(last_words)

    def leave(self) -> None:
        """Let the other ranks go; the engine can do nothing more. Once."""
        self._runner.release()
        self._team.part(orderly=self.followers.dismiss())
        self.followers.end()


def describe(options: EngineOptions) -> str:
    """How the ranks divide the experts, in words."""
    how = "whole experts on each" if options.enable_expert_parallel else "a part of every expert on each"
    return f"heads, columns and vocabulary divided, {how}"
