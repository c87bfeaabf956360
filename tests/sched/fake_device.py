"""A device for the scheduler's tests: its cache holds tokens, its model hashes what it reads there.

Whatever a plan gets wrong (a table that misses a block, a block shared with a writer, a stale prefix, a lost
token) changes the context that some row reads, so its tokens stop being those of the request alone in the
world.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benthic.sched.request import Phase

if TYPE_CHECKING:
    import random

    from benthic.sched.batching import BatchingConfig, Request, Scheduler, StepPlan

VOCAB = 50
EOS = 0


def next_token(context: tuple[int, ...]) -> int:
    """The model: any change of any token of the context changes the answer."""
    return hash(context) % VOCAB


def alone(request: Request, config: BatchingConfig) -> tuple[tuple[int, ...], str]:
    """Output and finish reason of a request that has the instance to itself."""
    tokens = list(request.prompt or ())
    stops = set(request.stop_token_ids) | (set() if request.ignore_eos else set(config.eos_token_ids))
    output: list[int] = []
    while len(output) < request.max_tokens and len(tokens) < config.max_model_len:
        output.append(next_token(tuple(tokens)))
        tokens.append(output[-1])
        if output[-1] in stops and len(output) > request.min_tokens:
            return tuple(output), "stop"
    return tuple(output), "length"


class FakeDevice:
    """Runs plans in the order they come; `guesses` decides which drafts are right."""

    def __init__(self, config: BatchingConfig, guesses: random.Random) -> None:
        self.config = config
        self.guesses = guesses
        self.pages: list[list[int | None]] = [[None] * config.block_size for _ in range(config.num_blocks)]
        self.host: list[list[int | None]] = [[None] * config.block_size for _ in range(config.host_blocks)]
        self.table: dict[int, list[int]] = {}
        self.newest: dict[int, int] = {}

    def move(self, plan: StepPlan) -> None:
        """Make the copies of a plan, also of one that is idle or fails."""
        for block, host in plan.to_host:
            assert None not in self.pages[block], "a block is kept that was never full"
            self.host[host] = list(self.pages[block])
        for block, host in plan.from_host:
            self.pages[block] = list(self.host[host])

    def run(self, plan: StepPlan) -> list[tuple[int, ...]]:
        """One row of tokens for each of `plan.sampled_ids`."""
        self.move(plan)
        for slot, first, blocks in plan.tables:
            row = self.table.setdefault(slot, [])
            assert first <= len(row), "a table has no gaps"
            row[first:] = blocks
        self.written: set[tuple[int, int]] = set()
        rows = []
        for slot, position, drafts in zip(
            plan.decode_slots, plan.decode_positions, plan.decode_drafts, strict=True
        ):
            rows.append(self._decode(slot, position, drafts))
        for chunk in plan.prefills:
            for offset, token in enumerate(chunk.tokens or ()):
                self._write(chunk.slot, chunk.start + offset, token)
            if chunk.samples:
                rows.append((next_token(self._read(chunk.slot, chunk.start + chunk.length)),))
                self.newest[chunk.slot] = rows[-1][-1]
        return rows

    def _decode(self, slot: int, position: int, drafts: int) -> tuple[int, ...]:
        self._write(slot, position, self.newest[slot])
        row = [next_token(self._read(slot, position + 1))]
        holding = True
        for i in range(1, drafts + 1):
            draft = row[-1] if holding and self.guesses.random() < 0.7 else VOCAB + 1
            holding = holding and draft == row[-1]
            self._write(slot, position + i, draft)
            if holding:
                row.append(next_token(self._read(slot, position + i + 1)))
        self.newest[slot] = row[-1]
        return tuple(row)

    def _write(self, slot: int, position: int, token: int) -> None:
        column, offset = divmod(position, self.config.block_size)
        place = (self.table[slot][column], offset)
        assert place not in self.written, "two rows of one step write the same place"
        self.written.add(place)
        self.pages[place[0]][place[1]] = token

    def _read(self, slot: int, length: int) -> tuple[int, ...]:
        size = self.config.block_size
        context = [self.pages[self.table[slot][p // size]][p % size] for p in range(length)]
        assert None not in context, "a position was read that nobody wrote"
        return tuple(token for token in context if token is not None)


def check_plan(scheduler: Scheduler, plan: StepPlan) -> None:
    """What every plan promises, and that the blocks add up."""
    config, pool = scheduler.config, scheduler._residency.pool
    slots = [*plan.decode_slots, *(chunk.slot for chunk in plan.prefills)]
    names = [*plan.decode_ids, *(chunk.request_id for chunk in plan.prefills)]
    prefilled = sum(chunk.length for chunk in plan.prefills)
    assert plan.num_tokens == len(plan.decode_ids) + sum(plan.decode_drafts) + prefilled
    assert plan.num_tokens <= config.max_num_batched_tokens
    assert len(set(slots)) == len(slots) <= config.max_num_seqs
    assert len(set(names)) == len(names)
    assert {write.slot for write in plan.tables} <= set(slots), "a table is written for nobody"
    kinds = {type(event) for event in plan.events}
    assert len(kinds) <= 1, "a plan that preempts starts nobody"
    assert all(0 <= slot < config.max_num_seqs for slot in slots)
    assert all(chunk.length > 0 for chunk in plan.prefills)
    assert all(0 <= d <= config.num_speculative_tokens for d in plan.decode_drafts)
    assert (plan.number == -1) == (plan.num_tokens == 0)
    check_copies(scheduler, plan)
    resident = [
        seq
        for seq in scheduler._requests.values()
        if seq.phase in (Phase.PULLING, Phase.PREFILLING, Phase.DECODING, Phase.DRAINING)
    ]
    assert len(resident) == scheduler.num_running
    users = [0] * config.num_blocks
    elsewhere = scheduler.leases.tables + scheduler.pulls.tables
    for table in scheduler._residency.holdings(resident) + elsewhere:
        assert len(set(table)) == len(table)
        for block in table:
            users[block] += 1
    assert users == [pool.users(block) for block in range(config.num_blocks)]
    assert pool.num_free == users.count(0)
    by_name = {seq.request.request_id: seq for seq in resident}
    for name, slot, position, drafts in zip(
        plan.decode_ids, plan.decode_slots, plan.decode_positions, plan.decode_drafts, strict=True
    ):
        seq = by_name[name]
        assert seq.slot == slot
        assert position + drafts <= seq.limit - 2, "a token past the limit would be computed"
        assert scheduler._residency.covered(seq) > position + drafts
        writing = seq.table[position // config.block_size :]
        assert all(pool.users(block) == 1 for block in writing), "a decode writes to a shared block"
    for chunk in plan.prefills:
        assert scheduler._residency.covered(by_name[chunk.request_id]) >= chunk.start + chunk.length


def check_copies(scheduler: Scheduler, plan: StepPlan) -> None:
    """No block of either side is written twice, what comes back is used, and host blocks are conserved."""
    config, home = scheduler.config, scheduler._residency
    leaving, coming = [copy.host for copy in plan.to_host], [copy.device for copy in plan.from_host]
    assert len(set(leaving)) == len(leaving)
    assert len({copy.device for copy in plan.to_host}) == len(leaving)
    assert len(set(coming)) == len({copy.host for copy in plan.from_host}) == len(coming)
    assert all(0 <= host < config.host_blocks for _, host in (*plan.to_host, *plan.from_host))
    assert all(home.pool.users(block) for block in coming), "a block comes back for nobody"
    places = [*home.host._blank, *home.host._held.values()]
    assert sorted(places) == list(range(config.host_blocks)), "host blocks are lost or held twice"


def check_empty(scheduler: Scheduler) -> None:
    """Nothing is left: no request, slot, block or note."""
    home = scheduler._residency
    assert not scheduler.has_work
    assert scheduler.num_running == scheduler.num_waiting == scheduler.num_in_flight == 0
    assert scheduler.num_free_blocks == scheduler.config.num_blocks
    assert len(home._free_slots) == scheduler.config.max_num_seqs
    assert not home._leaving
    assert not home.prefix._computing
    assert not home.prefix._parked
    assert not scheduler._prefills.running
    assert len(scheduler._prefills._queue) == 0
    assert not scheduler.pulls._pulls
    assert not scheduler.pulls._flying
    assert not scheduler.leases._promised
    assert not len(scheduler.leases)
