"""A deployment under load, event by event: arrivals, routing, steps, hand-overs and their back-pressure.

Every decision is the live one: `sched.routing` places requests as the router does, `sched.batching` plans the
steps, leases keep what was prefilled and pulls bring it over. Here is only the clock and the wire.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from itertools import count
from typing import TYPE_CHECKING

from benthic.errors import AdmissionError, ConfigError, OverloadedError
from benthic.plan.serving.demand import check
from benthic.plan.serving.fronts import FREE, Front, FrontCost
from benthic.plan.serving.group import Group
from benthic.plan.serving.journey import Journey, block_names, chain, early_name, known, served
from benthic.plan.serving.outcome import GroupUse, Outcome, Served
from benthic.sched.batching import Request
from benthic.sched.routing import Policy, PrefixMap, Query, Route, choose

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benthic.plan.serving.demand import Ask
    from benthic.plan.serving.group import GroupSpec, Lane
    from benthic.sched.plans import Finished, StepPlan, TransferPlan


@dataclass(frozen=True, kw_only=True)
class Link:
    """How blocks get from a prefill to a decode rank: each has one port, which carries one after another.

    Raises:
        ConfigError: the bandwidth is not above 0, or a size is negative.
    """

    block_bytes: float
    bytes_per_second: float
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.bytes_per_second > 0.0 or self.block_bytes < 0.0 or self.latency_s < 0.0:
            msg = (
                f"a link of {self.bytes_per_second} B/s and {self.latency_s} s for blocks of "
                f"{self.block_bytes} B. The rate must be above 0, the others not negative."
            )
            raise ConfigError(msg)

    def seconds(self, blocks: int) -> float:
        """Time on the wire."""
        return self.latency_s + blocks * self.block_bytes / self.bytes_per_second


NO_LINK = Link(block_bytes=0.0, bytes_per_second=math.inf)
"""Blocks move at once, as in DistServe's own simulator."""


@dataclass(eq=False)
class Cluster:
    """Plays demand against instances; once.

    Args:
        specs: the instances, each one group.
        policy: where requests go. A single lane has no router in front of it, as a single server has none.
        link: how blocks move.
        front: what a process costs that answers HTTP; the way to an engine and back is all on the way in.
        fronts: how many there are; requests go to them in turn.
    """

    specs: Sequence[GroupSpec]
    policy: Policy = field(default_factory=Policy)
    link: Link = NO_LINK
    front: FrontCost = FREE
    fronts: int = 1
    now: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if not self.specs or self.fronts < 1:
            msg = (
                f"a deployment of {len(self.specs)} instances and {self.fronts} fronts serves nobody; give "
                "at least 1 of each"
            )
            raise ConfigError(msg)
        self._fronts = [Front(self.front) for _ in range(self.fronts)]
        self._groups = [Group(index, spec, self) for index, spec in enumerate(self.specs)]
        self._lanes = {lane.name: lane for group in self._groups for lane in group.lanes}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._journeys: dict[str, Journey] = {}
        self._line: deque[Journey] = deque()
        self._served: dict[int, Served] = {}
        self._refused = 0
        self._places: PrefixMap | None = None

    def play(self, demand: Sequence[Ask]) -> Outcome:
        """Serve everything and say what became of it.

        Raises:
            DataError: the demand cannot be played; see `demand.check`.
        """
        asks = check(demand)
        if len(self._lanes) > 1 and any(ask.keys for ask in asks):
            self._places = PrefixMap(block_size=self.specs[0].batching.block_size)
        upcoming, total = 0, len(asks)
        while upcoming < total or self._events:
            if upcoming < total and (not self._events or asks[upcoming].at_s <= self._events[0][0]):
                self.now = asks[upcoming].at_s
                self._arrive(upcoming, asks[upcoming])
                upcoming += 1
            else:
                self.now, _, action = heappop(self._events)
                action()
        assert not self._journeys, "a request waits for an event that never comes"  # noqa: S101 (ours to keep)
        return self._outcome()

    def _outcome(self) -> Outcome:
        uses = [
            GroupUse(
                group.lanes[0].name,
                group.steps,
                group.busy_s,
                tuple([lane.scheduler.totals for lane in group.lanes]),
            )
            for group in self._groups
        ]
        return Outcome(
            served=tuple([self._served[index] for index in sorted(self._served)]),
            refused=self._refused,
            end_s=self.now,
            groups=tuple(uses),
            transferred_blocks=sum([t.pulled_blocks for use in uses for t in use.totals]),
            front_busy_s=tuple([front.busy_s for front in self._fronts]),
        )

    def _at(self, time: float, action: Callable[[], None]) -> None:
        heappush(self._events, (time, next(self._order), action))

    # --- placing requests

    def _arrive(self, index: int, ask: Ask) -> None:
        keys = () if self._places is None else chain(ask.keys)
        journey = Journey(str(index), ask, keys, self._fronts[index % self.fronts])
        self._journeys[journey.request_id] = journey
        taken = journey.front.take(self.now, ask.prompt_tokens) + self.front.way_of(self.fronts)
        if taken > self.now:
            self._at(taken, partial(self._place, journey))
        else:
            self._place(journey)

    def _place(self, journey: Journey) -> None:
        if len(self._lanes) == 1:
            journey.decode = next(iter(self._lanes.values()))
            self._send_whole(journey)
            return
        self._line.append(journey)
        self._place_waiting()

    def _place_waiting(self) -> None:
        """First come, first placed: nobody overtakes the head of the line."""
        while self._line:
            route = self._choose(self._line[0])
            if route is None:
                return
            self._send(self._line.popleft(), route)

    def _choose(self, journey: Journey) -> Route | None:
        cached = {} if self._places is None else self._places.cached(journey.keys)
        query = Query(journey.ask.prompt_tokens, decodes=journey.ask.output_tokens > 1, cached=cached)
        route = choose(query, [lane.state() for lane in self._lanes.values()], self.policy)
        return route._replace(prefill=None) if route is not None and journey.alone else route

    def _send(self, journey: Journey, route: Route) -> None:
        journey.decode = self._lanes[route.decode]
        journey.owner = None if route.prefill is None else self._lanes[route.prefill]
        computing = journey.owner or journey.decode
        tokens = journey.ask.prompt_tokens
        for lane in {journey.decode.name: journey.decode, computing.name: computing}.values():
            blocks = -(-(tokens + 1) // lane.scheduler.config.block_size)
            lane.assign(journey.request_id, tokens if lane is computing else 0, blocks)
            if self._places is not None:
                self._places.note(lane.name, journey.keys)
        if journey.owner is None:
            self._send_whole(journey)
        else:
            self._send_prefill(journey, journey.owner)

    def _send_whole(self, journey: Journey) -> None:
        ask = journey.ask
        lane = known(journey.decode)
        request = Request(
            request_id=journey.request_id,
            prompt_len=ask.prompt_tokens,
            max_tokens=ask.output_tokens,
            ignore_eos=True,
            block_keys=ask.keys,
        )
        self._add(journey, lane, request)

    def _send_prefill(self, journey: Journey, owner: Lane) -> None:
        request = Request(
            request_id=journey.request_id,
            prompt_len=journey.ask.prompt_tokens,
            max_tokens=1,
            ignore_eos=True,
            block_keys=journey.ask.keys,
            hold=True,
        )
        self._add(journey, owner, request)

    def _send_decode(self, journey: Journey) -> None:
        """Go on behind the first token, which the decode side knows as part of the prompt."""
        request = Request(
            request_id=journey.request_id,
            prompt_len=journey.ask.prompt_tokens + 1,
            max_tokens=journey.ask.output_tokens - 1,
            ignore_eos=True,
            pull=True,
            **block_names(journey),
        )
        self._add(journey, known(journey.decode), request)

    def _add(self, journey: Journey, lane: Lane, request: Request) -> None:
        try:
            lane.scheduler.add(request, self.now)
        except OverloadedError:  # others' requests are held there: compute it in one place
            journey.alone = True
            self._forget(journey)
            self._line.append(journey)
            self._at(self.now, self._place_waiting)
        except AdmissionError:  # never fits
            self._forget(journey)
            self._release(journey)
            self._refused += 1
            del self._journeys[journey.request_id]
        else:
            self._wake(lane.group)

    # --- stepping

    def _wake(self, group: Group) -> None:
        """Start an idle instance, behind everything else that arrives at this instant."""
        if group.idle and not group.woken:
            group.woken = True
            self._at(self.now, partial(self._run, group))

    def _run(self, group: Group) -> None:
        group.woken = False
        again = group.run(self.now)
        if again < math.inf:
            group.woken = True
            self._at(again, partial(self._run, group))

    def landed(self, lane: Lane, plan: StepPlan) -> None:
        """The fronts write a step's tokens: those of sequences that decode on equal parts of all of them.

        Decode lanes hear what is ready of prompts.
        """
        for chunk in plan.prefills:
            lease = lane.scheduler.leases.lent.get(chunk.request_id)
            if lease is not None:
                self._pull_early(self._journeys[chunk.request_id], lease.num_tokens)
        decodes = len(plan.decode_ids) / self.fronts
        drawn = [chunk.request_id for chunk in plan.prefills if chunk.samples]
        journeys = [self._journeys[request_id] for request_id in drawn]
        for front in self._fronts:
            here = [journey for journey in journeys if journey.front is front]
            new = sum([math.isnan(journey.first_token_s) for journey in here])
            front.write(self.now, lane, decodes + len(here), new)

    def prompt_computed(self, lane: Lane, request_id: str) -> None:
        """The first token of a stay on a lane is out; on a decode lane, the lease is wanted no more."""
        journey = self._journeys[request_id]
        lane.computed(request_id)
        if math.isnan(journey.first_token_s):
            journey.first_token_s = journey.front.free_at(self.now)
            journey.prefilled_by = lane.name
        if lane is journey.decode:
            self._release(journey)
        if self._line:
            self._place_waiting()

    def ended(self, lane: Lane, event: Finished) -> None:
        """A stay on a lane is over: go on to the decode lane, or be done.

        Who hands over is the process before the engines. A single front is that process and writes what came
        before; several have the main process behind them, which waits for none of their writes. From one
        engine to the other is as far as from a front to an engine and back, through one more process.
        """
        journey = self._journeys[event.request_id]
        written = journey.front.free_at(self.now)
        journey.preemptions += event.preemptions
        if lane.name == journey.prefilled_by:
            journey.cached_tokens = event.cached_tokens
        if lane is journey.owner and journey.ask.output_tokens > 1:
            known(journey.decode).scheduler.pulls.early.drop(early_name(journey.request_id))
            journey.leased = lane.scheduler.leases.get(event.request_id) is not None
            handed_over = written if self.fronts == 1 else self.now
            self._at(handed_over + self.front.hub_s, partial(self._send_decode, journey))
            return
        self._release(journey)
        self._forget(journey)
        del self._journeys[event.request_id]
        self._served[int(event.request_id)] = served(journey, written)
        self._place_waiting()

    # --- handing over

    def _pull_early(self, journey: Journey, num_tokens: int) -> None:
        """So much of a prompt is ready on its owner."""
        lane, name = known(journey.decode), early_name(journey.request_id)
        if journey.lent:
            lane.scheduler.pulls.early.grow(name, num_tokens)
        else:
            journey.lent = True
            request = Request(request_id=name, prompt_len=journey.ask.prompt_tokens, **block_names(journey))
            lane.scheduler.pulls.early.begin(request, num_tokens, self.now)
        self._wake(lane.group)

    def planned(self, lane: Lane, behind_s: float) -> None:
        """Start the transfers that are planned, each behind those before it on either port."""
        if lane.role != "decode" or not lane.scheduler.has_work:
            return
        for transfer in lane.scheduler.pulls.plan():
            owner = self._journeys[transfer.request_id.partition("/")[0]].owner
            ports = [lane] if owner is None else [lane, owner]
            begin = max(behind_s, *[port.link_free_s for port in ports])
            end = begin + self.link.seconds(len(transfer.blocks))
            for port in ports:
                port.link_free_s = end
            early = lane.scheduler.pulls.early.flies(transfer.number)
            awaited = [] if early else [end]
            lane.pulls_end_s += awaited
            self._at(end, partial(self._pulled, lane, transfer, awaited))

    def _pulled(self, lane: Lane, transfer: TransferPlan, awaited: list[float]) -> None:
        for end in awaited:
            lane.pulls_end_s.remove(end)
        lane.scheduler.pulls.commit(transfer)
        self._wake(lane.group)

    def _release(self, journey: Journey) -> None:
        """Let the owner hand on what it holds for this request; once."""
        if journey.owner is None:
            return
        if journey.leased:
            journey.leased = False
            journey.owner.scheduler.leases.release(journey.request_id)
            self._wake(journey.owner.group)
        if journey.owner is not journey.decode:
            journey.owner.forget(journey.request_id)

    def _forget(self, journey: Journey) -> None:
        for lane in (journey.decode, journey.owner):
            if lane is not None:
                lane.forget(journey.request_id)
