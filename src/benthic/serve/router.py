"""Several instances behind the interface of one: prefill here, decode there, and what to do when one dies.

Every request runs in a task of its own:

    place it (it may have to wait)  ->  prefill, the blocks stay under a lease  ->  decode pulls and goes on

What is computed of a long prompt is pulled while prefill goes on.
What a request has put out is remembered, so that it goes on behind it elsewhere when its instance dies: a
request with a seed (the router gives one to those without) or a greedy one gets the tokens it would have got.
The HTTP side sees an `EngineClient`'s interface and nothing of this.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from benthic.errors import BenthicError, EngineDeadError, OverloadedError
from benthic.sched.routing import Policy, Query, Role, Route, choose
from benthic.serve.ahead import Ahead
from benthic.serve.client import EngineClient
from benthic.serve.line import Line
from benthic.serve.members import Load, Member, Members
from benthic.serve.replanning import Replanning
from benthic.serve.streams import EngineStream

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from benthic.sched.replan import ReplanConfig
    from benthic.serve.journal import Journal, PhaseName
    from benthic.serve.messages import Delta, Generate, Ready, Remote, Stats
    from benthic.serve.process import EngineFactory, Place

logger = logging.getLogger("benthic.serve.router")


@dataclass(frozen=True, kw_only=True)
class RouterOptions:
    """How a router treats its instances.

    Attributes:
        policy: where requests go.
        retries: how often a request is moved to other instances before it ends with an error.
        restarts: how many instances that died are replaced in an hour.
        stall_s: an instance silent for so long is killed (its requests move).
        seed: from which requests without a seed get theirs, in order of arrival.
        log_level: of the instances.
        replan: when instances change their roles; None leaves them as they are.
        together: they share experts: none can serve without the others, come or leave.
    """

    policy: Policy = field(default_factory=Policy)
    retries: int = 3
    restarts: int = 16
    stall_s: float = 300.0
    seed: int = 0
    log_level: int = logging.INFO
    replan: ReplanConfig | None = None
    together: bool = False


@dataclass(eq=False)
class Journey:
    """One request, and what has been put out for it so far.

    `number` counts arrivals. `alone`: one instance shall do all of it. `keys` name the beginnings of its
    prompt, once it was placed.
    """

    request: Generate
    stream: EngineStream
    number: int
    output: list[int] = field(default_factory=list)
    attempts: int = 0
    alone: bool = False
    keys: tuple[bytes, ...] = ()

    def part(self) -> Generate:
        """The request as the next instance sees it; every attempt has an id of its own."""
        return msgspec.structs.replace(
            self.request, request_id=f"{self.request.request_id}/{self.attempts}", output=tuple(self.output)
        )

    def deliver(self, delta: Delta, *, more: bool = False) -> None:
        """Pass a part's delta on; with `more`, its end is not the request's."""
        self.output += delta.tokens
        self.stream.put(
            msgspec.structs.replace(
                delta,
                request_id=self.request.request_id,
                finish_reason=None if more else delta.finish_reason,
                remote=None,
            )
        )


class Router:
    """Starts instances and spreads requests over them; belongs to one event loop.

    Args:
        factory: gives the engine factory of an instance, by its name and its index (from 0, never reused).
        roles: how many instances of each role to start with.
        options: how they are treated.
        journal: where the phases of requests go.
        folder: where the instances' desks are; deleted at the end.
        place: where instances run; None for this host.
        gone: called with the name of an instance whose process has ended, before another one replaces it.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        factory: Callable[[str, int], EngineFactory],
        roles: Mapping[Role, int],
        options: RouterOptions,
        *,
        journal: Journal,
        folder: Path | None = None,
        place: Place | None = None,
        gone: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        def connect(name: str, index: int) -> EngineClient:
            return EngineClient(
                factory(name, index),
                place=place,
                stall_s=options.stall_s,
                log_level=options.log_level,
                clock=clock,
            )

        self.members = Members(connect, restarts=options.restarts, together=options.together, gone=gone)
        self.retried = 0
        self._options = options
        self._journal = journal
        self._folder = folder
        self._cluster = place
        self._journeys: dict[str, asyncio.Task[None]] = {}
        self._line = Line()
        self._num_opened = 0
        self._num_seeds = 0
        self._closing = False
        for role, count in roles.items():
            for _ in range(count):
                self.members.join(role)
        self.replanning = Replanning.start(self.members, options.replan, clock)

    # --- what the HTTP side uses

    async def wait_ready(self) -> Ready:
        """Wait until every first instance is up. Raises: EngineDeadError in the words of one that is not."""
        return await self.members.wait_ready()

    @property
    def stats(self) -> Stats | None:
        """The instances' reports, added up; None before the first."""
        return self.members.stats

    @property
    def in_flight(self) -> int:
        """Requests submitted that have not ended."""
        return len(self._journeys)

    @property
    def trouble(self) -> str | None:
        """Why no instance can be relied on; None while one can."""
        return self.members.trouble

    def open(self, requests: Sequence[Generate]) -> EngineStream:
        """Submit requests that belong together; their deltas come on one stream.

        Raises:
            EngineDeadError: no instance is left.
        """
        if not len(self.members):
            raise EngineDeadError(self.trouble)
        stream = EngineStream(self, [request.request_id for request in requests])
        for request in requests:
            if request.request_id in self._journeys:
                msg = f"request id {request.request_id!r} is already in flight"
                raise ValueError(msg)
            self._num_opened += 1
            task = asyncio.create_task(self._run(Journey(self._seeded(request), stream, self._num_opened)))
            self._journeys[request.request_id] = task
        return stream

    def abort(self, request_id: str) -> None:
        """Stop a request wherever it is; an id that is not in flight is ignored."""
        task = self._journeys.pop(request_id, None)
        if task is not None:
            task.cancel()

    async def close(self) -> None:
        """End every request with an error and every instance; once."""
        self._closing = True
        if self.replanning is not None:
            await self.replanning.stop()
        await self.members.close()
        for task in self._journeys.values():
            task.cancel()
        await asyncio.gather(*self._journeys.values(), return_exceptions=True)
        if self._folder is not None:
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)
        if self._cluster is not None:
            await asyncio.to_thread(self._cluster.close)

    # --- one request

    def _seeded(self, request: Generate) -> Generate:
        """The request with a seed, so that it can be moved and both sides draw the same numbers."""
        if request.params.seed is not None:
            return request
        self._num_seeds += 1
        seed = self._options.seed + (self._num_seeds << 32)
        return msgspec.structs.replace(request, params=msgspec.structs.replace(request.params, seed=seed))

    async def _run(self, journey: Journey) -> None:
        request_id = journey.request.request_id
        try:
            await self._travel(journey)
        except BenthicError as error:
            journey.stream.fail(error)
        finally:
            if self._journeys.get(request_id) is asyncio.current_task():
                del self._journeys[request_id]

    async def _travel(self, journey: Journey) -> None:
        """Try until the request has ended. Raises: EngineDeadError when it was moved too often."""
        while True:
            journey.attempts += 1
            try:
                await self._attempt(journey)
            except OverloadedError:  # others' requests are held there: compute it in one place
                journey.alone = True
            except EngineDeadError as error:
                self._count_loss(journey, error)
            else:
                return

    def _count_loss(self, journey: Journey, error: EngineDeadError) -> None:
        if self._closing or not len(self.members):
            raise error
        if journey.attempts > self._options.retries:
            msg = f"given up after {journey.attempts} attempts: {error}"
            raise EngineDeadError(msg) from error
        self.retried += 1
        logger.warning(
            "%s: %s; going on elsewhere after %d tokens",
            journey.request.request_id, error, len(journey.output),
        )  # fmt: skip

    async def _attempt(self, journey: Journey) -> None:
        if journey.attempts > 1:
            self._note(journey, "queue")
        decode, prefill = await self._place(journey)
        self._note(journey, "prefill", decode if prefill is None else prefill)
        part = journey.part()
        try:
            if prefill is None:
                await self._finish_on(decode, part, journey)
                return
            remote = await self._prefill(prefill, part, journey, Ahead(decode.client, part))
            if remote is not None:
                await self._decode(decode, prefill, remote, journey)
        finally:
            for member in (decode, prefill):
                if member is not None:
                    member.loads.pop(part.request_id, None)
            self.members.changed.set()

    def _note(self, journey: Journey, phase: PhaseName, member: Member | None = None) -> None:
        self._journal.enter(journey.request.request_id, phase, "" if member is None else member.name)

    async def _place(self, journey: Journey) -> tuple[Member, Member | None]:
        """Choose instances, waiting in line while none has room, and note what will be asked of them.

        Raises:
            EngineDeadError: no instance is left.
        """
        with self._line.spot(journey.request.priority, journey.number) as spot:
            while True:
                await self._line.first(spot)
                if not len(self.members):
                    raise EngineDeadError(self.trouble)
                route = self._choose(journey)
                if route is not None:
                    return self._assign(journey, route)
                self.members.changed.clear()
                await self.members.changed.wait()

    def _choose(self, journey: Journey) -> Route | None:
        places, output = self.members.places, journey.output
        if places is None:
            return None
        journey.keys = journey.keys or places.keys(journey.request.prompt)
        query = Query(
            len(journey.request.prompt) + len(output),
            decodes=journey.request.params.max_tokens > len(output) + 1,
            cached=places.cached(journey.keys),
        )
        route = choose(query, self.members.states(), self._options.policy)
        return route._replace(prefill=None) if route is not None and journey.alone else route

    def _assign(self, journey: Journey, route: Route) -> tuple[Member, Member | None]:
        decode = self.members[route.decode]
        prefill = None if route.prefill is None else self.members[route.prefill]
        computing = decode if prefill is None else prefill
        name = journey.part().request_id
        num_tokens = len(journey.request.prompt) + len(journey.output)
        for member in {decode, computing}:
            block_size = 1 if member.ready is None else member.ready.block_size
            blocks = -(-(num_tokens + 1) // block_size)
            member.loads[name] = Load(num_tokens if member is computing else 0, blocks)
            if self.members.places is not None:
                self.members.places.note(member.name, journey.keys)
        return decode, prefill

    async def _prefill(self, member: Member, part: Generate, journey: Journey, ahead: Ahead) -> Remote | None:
        """Compute the prompt and one token; returns where the blocks are, or None when that was the end."""
        last = len(part.output) + 1
        params = msgspec.structs.replace(
            part.params, max_tokens=last, min_tokens=min(part.params.min_tokens, last)
        )
        remote = None
        try:
            with contextlib.closing(
                member.client.open([msgspec.structs.replace(part, params=params, hold=True, lend=True)])
            ) as stream:
                async for delta in stream:
                    if delta.remote is not None and delta.finish_reason is None:
                        ahead.tell(delta.remote)
                        continue
                    remote = delta.remote
                    journey.deliver(delta, more=remote is not None)
        finally:
            ahead.stop()
            if remote is None:  # also when its end was on the way while the request was aborted
                member.client.release(part.request_id)
        member.computed(part.request_id)
        self.members.changed.set()
        return remote

    async def _decode(self, member: Member, owner: Member, remote: Remote, journey: Journey) -> None:
        """Pull and go on. The owner hears that its blocks are wanted no more, whatever happens here."""
        wanted = True
        self._note(journey, "transfer", member)
        try:
            part = msgspec.structs.replace(journey.part(), pull=remote)
            with contextlib.closing(member.client.open([part])) as stream:
                first = await anext(stream)
                wanted = self._let_go(owner, remote.lease_id)
                self._note(journey, "decode", member)
                journey.deliver(first)
                await stream.relay(journey.deliver)
        finally:
            if wanted:
                self._let_go(owner, remote.lease_id)

    def _let_go(self, owner: Member, lease_id: str) -> bool:
        """Release a lease; returns that it is wanted no more."""
        owner.client.release(lease_id)
        owner.loads.pop(lease_id, None)
        self.members.changed.set()
        return False

    async def _finish_on(self, member: Member, part: Generate, journey: Journey) -> None:
        """Compute everything in one place."""
        with contextlib.closing(member.client.open([part])) as stream:
            first = await anext(stream)
            self._note(journey, "decode", member)
            member.computed(part.request_id)
            self.members.changed.set()
            journey.deliver(first)
            await stream.relay(journey.deliver)
