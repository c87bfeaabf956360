"""One optimizer step: the pipeline table simulated with priced slots, then the update."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benthic.parallel.parts import parts_of, stages_of
from benthic.plan.cost.priced import Total
from benthic.plan.training.stage import EXCHANGE, Prices, named, prices_of, stages
from benthic.plan.training.tables import forwards_of
from benthic.plan.training.update import sync_of, update
from benthic.sched.pipeline.simulate import Order

if TYPE_CHECKING:
    from benthic.plan.cost.machine import Machine
    from benthic.plan.training.candidate import Candidate
    from benthic.plan.training.stage import Work
    from benthic.plan.training.update import Update
    from benthic.sched.pipeline.simulate import Timeline
    from benthic.sched.pipeline.table import Table


@dataclass(frozen=True)
class Step:
    """One step of a candidate on a machine.

    price: the whole step with its interval and coverage. timeline: of the pipeline. busiest: the rank that
    idles least.
    """

    candidate: Candidate
    machine: Machine
    price: Total
    timeline: Timeline
    prices: Prices
    update: Update

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.price.seconds

    @property
    def busiest(self) -> int:
        """The pipeline rank that computes longest."""
        return max(range(self.timeline.table.ranks), key=self.timeline.busy)

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs together."""
        return self.candidate.step_tokens / self.seconds


def step(candidate: Candidate, machine: Machine, order: Order | None = None) -> Step:
    """Simulate one step; `order` is that of the candidate's table, where it is known.

    Raises:
        ConfigError: no such schedule, or fewer layers than stages.
    """
    order = Order.of(candidate.table()) if order is None else order
    table = order.table
    work = stages(candidate, machine, table.routes[0])
    ending = update(candidate, machine, table.routes)
    sync = sync_of(ending, candidate, forwards_of(table))
    prices = prices_of(work, candidate, machine, sync)
    timeline = order.run(prices)
    seconds = timeline.makespan + ending.end.seconds
    spent = _spent(table, work) + ending.end + ending.each_microbatch.times(candidate.microbatches)
    price = spent.times(seconds / spent.seconds) if spent.seconds else spent
    return Step(candidate, machine, price, timeline, prices, ending)


def _spent(table: Table, work: tuple[Work, ...]) -> Total:
    """Everything that the first rank's stages take for all of their microbatches, nothing hidden."""
    found = Total()
    forwards = Counter(
        action.stage for slot in table.slots[0] for action in slot.actions if action.kind == "F"
    )
    for stage, count in forwards.items():
        found += work[stage].whole.times(count)
    return found


def waterfall(found: Step) -> dict[str, float]:
    """Where the busiest rank's step goes, in seconds that add up to the step.

    Products by what they are for, exchange that nothing hides, what the exchange takes from the products
    beside it, the host, waiting in the pipeline, and the update.
    """
    table, prices, rank = found.timeline.table, found.prices, found.busiest
    parts = parts_of(found.candidate.model, found.candidate.layout, table.stages)
    times: dict[str, float] = defaultdict(float)
    for stage in stages_of(table, rank):
        count = sum(
            timed.slot.first.stage == stage and timed.slot.first.kind == "F"
            for timed in found.timeline.slots[rank]
        )
        for name, seconds in named(found.candidate, found.machine, parts[stage]).items():
            times[name] += seconds * count
    times.pop(EXCHANGE, None)
    products = exposed = slowed = host = sync = 0.0
    for timed in found.timeline.slots[rank]:
        lanes, waited = prices.lanes(timed.slot), prices.waits(timed.slot)
        computed, travelled = lanes.products, lanes.exchange
        products += computed
        host += waited
        sync += lanes.sync
        took = timed.end - timed.start - waited - lanes.sync
        if timed.slot.second is None:
            exposed += travelled
        else:
            slow = min(took - computed, prices.slowed(lanes)) if travelled else 0.0
            slowed += slow
            exposed += took - computed - slow
    times |= {"exchange, not hidden": exposed, "exchange, SMs taken": slowed, "host": host}
    times["bubble"] = found.timeline.bubble(rank)
    times["gradients and weights over links"] = found.update.collectives.seconds + sync
    times["optimizer"] = found.update.optimizer.seconds
    return {name: seconds for name, seconds in times.items() if seconds > 0}
