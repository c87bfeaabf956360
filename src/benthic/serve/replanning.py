"""Lets instances change their roles while they serve: looks at what they report, and turns one at a time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from typing import TYPE_CHECKING, Self

from benthic.sched.replan import Change, Replanner, Report
from benthic.serve.metrics import kv_usage

if TYPE_CHECKING:
    from collections.abc import Callable

    from benthic.sched.replan import Needs, ReplanConfig
    from benthic.sched.routing import Role
    from benthic.serve.members import Member, Members
    from benthic.serve.messages import Stats

logger = logging.getLogger("benthic.serve.router")


class Replanning:
    """Watches the instances of one router; belongs to its event loop.

    Args:
        members: the instances.
        config: when they change.
        clock: seconds, monotonic.
    """

    def __init__(self, members: Members, config: ReplanConfig, clock: Callable[[], float]) -> None:
        self.changes: Counter[Role] = Counter()
        self._members = members
        self._look_s = config.look_s
        self._clock = clock
        self._replanner = Replanner(config)
        self._task = asyncio.create_task(self._run())

    @classmethod
    def start(cls, members: Members, config: ReplanConfig | None, clock: Callable[[], float]) -> Self | None:
        """Begin to watch; without a config nobody watches."""
        return None if config is None else cls(members, config, clock)

    @property
    def needs(self) -> Needs | None:
        """How many instances the load needs in each role, as far as that is known."""
        return self._replanner.needs

    async def stop(self) -> None:
        """Change nothing more. Raises what made watching end before, if something did."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._look_s)
            change = self._replanner.observe(self._clock(), [report(member) for member in self._members])
            if change is not None:
                await self._carry_out(change)

    async def _carry_out(self, change: Change) -> None:
        logger.info("%s", change)
        if await self._members.turn(change.name, change.role):
            self.changes[change.role] += 1
            logger.info("%s %ss from now on", change.name, change.role)
        else:
            logger.warning("%s does not change: it ended, or is the last of its role", change.name)


def report(member: Member) -> Report:
    """What the rule sees of an instance: what the router assigned, and the totals of its last report."""
    loads, stats = member.loads.values(), member.client.stats
    if stats is None:
        return Report(member.name, member.role, steady=False)
    return Report(
        name=member.name,
        role=member.role,
        steady=member.open,
        num_requests=len(loads),
        queued_tokens=sum([load.queued_tokens for load in loads]),
        num_waiting=stats.num_waiting,
        used_share=kv_usage(stats),
        steps=stats.steps,
        step_seconds=stats.step_seconds,
        computed_tokens=stats.computed_tokens,
        rows=_rows(stats),
        tokens=stats.generation_tokens,
    )


def _rows(stats: Stats) -> int:
    """Rows of sequences: each gave one token, and those of its drafts that held."""
    return stats.generation_tokens - stats.accepted_tokens
