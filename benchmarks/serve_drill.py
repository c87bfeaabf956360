"""Kill serving instances and cut their links at random moments: every request still gets its own tokens.

    python benchmarks/serve_drill.py [--kills 20] [--seed 0]

Instances are processes of their own behind a router; a request is prefilled in one and its cache blocks are
pulled by another. Random requests are always in flight, and what they answer is compared afterwards, token
for token, with one engine that does everything; draws so close to two tokens that rounding decides are
counted. Drilled are 200 requests through 1P1D and 2P1D, instances that join and drain under load, and for
2P1D twenty times:

    prefill   SIGKILL hits a prefill instance
    decode    SIGKILL hits the decode instance
    link      a connection between the router and some instance is shut down (each way in turn)
    chunks    SIGKILL hits one of the two instances (in turn) between which a prompt's blocks move while it is
              being computed
    silence   SIGSTOP: some instance stays connected and says nothing more (a quarter as often)

and for 1P1D whose instances have two tensor-parallel ranks, after 200 requests, half as often:

    rank      SIGKILL hits rank 1 of some instance, which ends with it

At the end no request, block, lease, process or folder may be left.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import random
import signal
import statistics
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from links import cut
from provenance import write_result

from benthic.model.checkpoint import save_pretrained
from benthic.model.initialise import initialise
from benthic.model.network import DeepSeek
from benthic.serve.ahead import Ahead
from benthic.serve.engine import Engine
from benthic.serve.fleet import Fleet, FleetOptions, start_router
from benthic.serve.journal import Journal
from benthic.serve.messages import Generate, SamplingParams
from benthic.serve.options import EngineOptions
from benthic.spec import presets

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from benthic.serve.members import Member
    from benthic.serve.messages import Remote
    from benthic.serve.router import Router

KINDS = ("prefill", "decode", "link", "chunks", "silence")
ANYWHERE = ("link", "silence", "rank")
STALL_S = 6.0
PATIENCE_S = 120.0
NUDGE = 1e-3
"""Far below what a wrong block changes in a logit of order 1 to 10, and above what float32 loses: 1e-6 of a
sum of probabilities, which is so much for a token of one in a thousand."""
EDGE = 1e-5
"""Above what float32 loses of sums of probabilities: of all tokens before one, where a draw falls between
two, and of those that decide which tokens are among the first `top_p`."""
ENGINE = EngineOptions(
    max_num_seqs=16,
    max_num_batched_tokens=32,
    block_size=4,
    num_blocks=1024,
    enforce_eager=True,
    num_threads=1,
    lease_seconds=5.0,
)


@dataclass(frozen=True)
class Kill:
    """One kill: requests that the victim had, and seconds until as many instances were up as before."""

    kind: str
    victim: str
    requests: int
    seconds: float


@dataclass
class Load:
    """Keeps `width` random requests in flight and remembers what they answered."""

    router: Router
    rng: random.Random
    width: int = 12
    asked: list[Generate] = field(default_factory=list)
    answers: dict[str, list[int]] = field(default_factory=dict)
    stopping: bool = False

    async def run(self, count: int | None = None) -> None:
        """Send until told to stop, or `count` requests; returns when all have ended."""

        async def worker() -> None:
            while not self.stopping and (count is None or len(self.asked) < count):
                request = random_request(f"r{len(self.asked)}", self.rng)
                self.asked.append(request)
                self.answers[request.request_id] = await tokens_of(self.router, request)

        await asyncio.gather(*(worker() for _ in range(self.width)))

    @contextlib.asynccontextmanager
    async def going_on(self) -> AsyncIterator[None]:
        """Requests are in flight for the length of the block, and have ended after it."""
        running = asyncio.create_task(self.run())
        try:
            yield
        finally:
            self.stopping = True
            await asyncio.wait_for(running, PATIENCE_S)


def random_request(name: str, rng: random.Random) -> Generate:
    """A random prompt, length and seed; a third of them greedy."""
    params = SamplingParams(
        temperature=rng.choice((0.0, 1.0, 1.0)),
        seed=rng.randrange(1 << 60),
        max_tokens=rng.randint(1, 100),
        ignore_eos=rng.random() < 0.8,
        **rng.choice(({}, {"top_k": 20}, {"frequency_penalty": 0.3}, {"top_p": 0.9})),
    )
    prompt = tuple(rng.randrange(2, 320) for _ in range(rng.randint(1, 150)))
    return Generate(request_id=name, prompt=prompt, params=params)


async def tokens_of(router: Router, request: Generate) -> list[int]:
    """All tokens of one request."""
    tokens: list[int] = []
    async with router.open([request]) as stream:
        async for delta in stream:
            tokens += delta.tokens
    return tokens


def make_checkpoint(folder: Path) -> Path:
    """The `nano` model with weights large enough that a wrong block gives other tokens."""
    model = DeepSeek(replace(presets.get("nano"), initializer_range=0.15))
    initialise(model, 0)
    save_pretrained(model, folder)
    return folder


@contextlib.asynccontextmanager
async def fleet(checkpoint: Path, prefill: int, decode: int, ranks: int) -> AsyncIterator[Router]:
    """Instances behind a router for the length of the block."""
    options = FleetOptions(prefill=prefill, decode=decode, retries=100, restarts=10_000)
    journal = Journal(time.monotonic)
    engine = replace(ENGINE, tensor_parallel_size=ranks)
    what = Fleet(checkpoint=checkpoint, engine=engine, options=options)
    router = start_router(what, journal=journal, stall_s=STALL_S, log_level=logging.CRITICAL)
    try:
        await router.wait_ready()
        yield router
    finally:
        await router.close()


async def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something. Raises: RuntimeError when it does not come."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            message = f"not within {PATIENCE_S:.0f} s: {what}"
            raise RuntimeError(message)
        await asyncio.sleep(0.005)


async def strike(router: Router, kind: str, rng: random.Random, turn: int) -> Kill:
    """Wait for a random moment with requests there, hit an instance, wait until another is in its place."""
    whole = sum(member.open for member in router.members)
    await asyncio.sleep(rng.uniform(0.0, 1.0))
    await until(lambda: sum(member.open for member in router.members) == whole, "all instances up")
    if kind == "chunks":
        member = await in_the_middle(router, turn)
    else:
        member = rng.choice([m for m in router.members if m.open and kind in (m.role, *ANYWHERE)])
        await until(lambda: bool(member.loads), f"a request at {member.name}")
    requests, began = len(member.loads), time.monotonic()
    if kind == "link":
        cut(member.client, ("requests", "replies")[turn % 2])
    elif kind == "rank":
        os.kill(rng.choice(ranks_of(member)), signal.SIGKILL)
    else:
        os.kill(process_of(member), signal.SIGSTOP if kind == "silence" else signal.SIGKILL)
    await until(lambda: member not in list(router.members), f"{member.name} to be given up")
    await until(lambda: sum(m.open for m in router.members) == whole, "another instance in its place")
    return Kill(kind, member.name, requests, round(time.monotonic() - began, 2))


async def in_the_middle(router: Router, turn: int) -> Member:
    """One of the two that have a prompt of which a chunk is computed and others are not."""
    told: list[str] = []
    tell = Ahead.tell

    def note(self: Ahead, remote: Remote) -> None:
        told.append(remote.lease_id.removesuffix("/early"))
        tell(self, remote)

    def found() -> list[Member]:
        names = [
            (m, name) for m in router.members for name in m.loads if m.role == ("prefill", "decode")[turn % 2]
        ]
        return [m for m, name in names if told and name == told[-1]]

    Ahead.tell = note  # type: ignore[method-assign]
    try:
        await until(lambda: bool(found()), "a prompt whose blocks move")
    finally:
        Ahead.tell = tell  # type: ignore[method-assign]
    return found()[0]


def process_of(member: Member) -> int:
    """Process id of an instance that runs."""
    if member.client.pid is None:
        message = f"{member.name} has no process"
        raise RuntimeError(message)
    return member.client.pid


def ranks_of(member: Member) -> list[int]:
    """Process ids of an instance's ranks other than 0, which a server of its own has forked."""
    return [rank for server in children(process_of(member)) for rank in children(server)]


async def nothing_left(router: Router) -> None:
    """Every block of every instance is free, and nobody knows of a request."""

    def empty() -> bool:
        reports = [member.client.stats for member in router.members]
        return router.in_flight == 0 and all(
            report is not None
            and report.num_free_blocks == report.num_blocks
            and report.num_running == report.num_waiting == report.leased_blocks == 0
            for report in reports
        )

    await until(empty, "all blocks free and no request left")
    if any(member.loads for member in router.members):
        message = f"the router still counts {[m.loads for m in router.members]}"
        raise RuntimeError(message)


def children(process: int) -> set[int]:
    """Processes of one, whatever their state."""
    found: set[int] = set()
    for task in Path(f"/proc/{process}/task").iterdir():
        with contextlib.suppress(OSError):
            found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found


def compare(checkpoint: Path, load: Load) -> int:
    """How many requests have another token than one engine that does everything, by rounding alone.

    Sums in float32 depend on who else is in a step, and a draw that falls between two tokens goes to one or
    the other. Raises: RuntimeError where tokens are others and no draw was as close as that.
    """
    torch.set_num_threads(1)
    options = replace(
        ENGINE,
        max_num_seqs=64,
        max_num_batched_tokens=512,
        num_blocks=8192,
        enable_prefix_caching=False,  # a request that is asked again is computed alone
    )
    engine = Engine.from_pretrained(checkpoint, options)
    expected = all_tokens(engine, load.asked)
    wrong = [each for each in load.asked if load.answers[each.request_id] != expected[each.request_id]]
    for request in wrong:
        name = request.request_id
        if not is_close_call(engine, request, expected[name], load.answers[name]):
            message = (
                f"{len(wrong)} of {len(expected)} requests have other tokens; {name}: {load.answers[name]}, "
                f"but one engine gives {expected[name]}"
            )
            raise RuntimeError(message)
    return len(wrong)


def all_tokens(engine: Engine, requests: list[Generate]) -> dict[str, list[int]]:
    """The tokens of each request."""
    found: dict[str, list[int]] = {}
    for request in requests:
        engine.add(request)
        found[request.request_id] = []
    while engine.has_work:
        for delta in engine.step():
            found[delta.request_id] += delta.tokens
    return found


def is_close_call(engine: Engine, request: Generate, expected: list[int], found: list[int]) -> bool:
    """Whether a request's first other token is drawn here too, computed alone or with another rounding.

    Its logit is `NUDGE` higher, all before it weigh `EDGE` more or less, or the edge of `top_p` is elsewhere.
    """
    pairs = zip(expected, found, strict=False)
    place = next((place for place, (a, b) in enumerate(pairs) if a != b), None)
    if place is None:
        return False
    again = [
        msgspec.structs.replace(
            request,
            request_id=f"{request.request_id} {number}",
            output=tuple(found[:place]),
            params=msgspec.structs.replace(request.params, logit_bias=bias, top_p=top_p),
        )
        for number, (bias, top_p) in enumerate(roundings(request, found[place]))
    ]
    return any(all_tokens(engine, [each])[each.request_id][0] == found[place] for each in again)


def roundings(request: Generate, token: int) -> list[tuple[dict[int, float], float]]:
    """Biases and `top_p` that differ from a request's by less than sums in another order may."""
    edge = request.params.top_p
    edges = (edge, edge - EDGE, edge + EDGE) if edge < 1.0 else (edge,)
    heavier, lighter = (dict.fromkeys(range(token + last), by) for last, by in ((1, EDGE), (0, -EDGE)))
    return [(bias, top_p) for top_p in edges for bias in ({}, {token: NUDGE}, heavier, lighter)]


@dataclass(frozen=True)
class Drill:
    """A fleet, of so many `ranks` an instance, and what is done to it.

    `requests` alone, or `kills` of each of `kinds`, or `moves`.
    """

    prefill: int
    decode: int
    requests: int | None = None
    kinds: tuple[str, ...] = ()
    kills: int = 0
    moves: int = 0
    ranks: int = 1

    @property
    def name(self) -> str:
        """The fleet, as it is written."""
        apart = f"{self.prefill}P{self.decode}D"
        return apart if self.ranks == 1 else f"{apart} of {self.ranks} ranks"

    async def disturb(self, router: Router, rng: random.Random) -> list[Kill]:
        """Do everything that is to be done under load, with a line for each."""
        done: list[Kill] = []
        for kind in self.kinds:
            count = -(-self.kills // 4) if kind == "silence" else self.kills
            for turn in range(count):
                done.append(await strike(router, kind, rng, turn))
                print(f"{self.name} {kind} {turn + 1}/{count}: {done[-1]}", flush=True)
        for turn in range(self.moves):
            await join_and_drain(router, rng)
            print(f"{self.name} joins and drains {turn + 1}/{self.moves}", flush=True)
        return done


async def join_and_drain(router: Router, rng: random.Random) -> None:
    """One instance of each role joins; then a random one of each leaves when its requests are done."""
    joined = [router.members.join("prefill"), router.members.join("decode")]
    await until(lambda: all(router.members[name].open for name in joined), f"{joined} up")
    leaving = [
        rng.choice([m.name for m in router.members if m.role == role]) for role in ("prefill", "decode")
    ]
    await asyncio.gather(*(router.members.drain(name) for name in leaving))


async def carry_out(drill: Drill, checkpoint: Path, seed: int) -> tuple[Load, dict[str, Any]]:
    """The load that was answered, and the row of the result file but for the comparison."""
    # requests of their own draws, so that a run's can be drawn again whenever its kills fell
    asked, rng = (random.Random(f"{seed} {drill} {what}") for what in ("requests", "moments"))  # noqa: S311
    async with fleet(checkpoint, drill.prefill, drill.decode, drill.ranks) as router:
        load, began = Load(router, asked), time.monotonic()
        if drill.requests is not None:
            await load.run(drill.requests)
            kills: list[Kill] = []
        else:
            async with load.going_on():
                kills = await drill.disturb(router, rng)
        seconds = time.monotonic() - began
        await nothing_left(router)
        stats = router.stats
        pulled, early = (0, 0) if stats is None else (stats.pulled_blocks, stats.early_blocks)
    return load, {
        "fleet": drill.name,
        "requests": len(load.asked),
        "tokens": sum(map(len, load.answers.values())),
        "seconds": round(seconds, 1),
        "pulled_blocks": pulled,
        "early_blocks": early,
        "joins_and_drains": drill.moves,
        "requests_moved": router.retried,
        "kills": [summarised(kind, kills) for kind in drill.kinds],
    }


def summarised(kind: str, kills: list[Kill]) -> dict[str, Any]:
    """Kills of one kind in a few numbers."""
    mine = [kill for kill in kills if kill.kind == kind]
    seconds = [kill.seconds for kill in mine]
    return {
        "kind": kind,
        "kills": len(mine),
        "requests_there": sum(kill.requests for kill in mine),
        "median_seconds_until_replaced": statistics.median(seconds),
        "longest_seconds_until_replaced": max(seconds),
    }


def run(drill: Drill, folder: Path, seed: int) -> dict[str, Any]:
    """Carry out one drill with temporary files under `folder`. Raises: RuntimeError at whatever is wrong."""
    checkpoint = folder / "nano"
    if not checkpoint.exists():
        make_checkpoint(checkpoint)
    before = children(os.getpid())
    desks = Path(tempfile.mkdtemp(prefix="b", dir=tempfile.gettempdir()))
    outer, tempfile.tempdir = tempfile.tempdir, str(desks)
    try:
        load, row = asyncio.run(carry_out(drill, checkpoint, seed))
    finally:
        tempfile.tempdir = outer
    left = {"processes": len(alive(children(os.getpid()) - before)), "folders": len(list(desks.iterdir()))}
    if any(left.values()):
        message = f"{drill}: {left} are left"
        raise RuntimeError(message)
    desks.rmdir()
    rounded = compare(checkpoint, load)
    return row | {
        "same_tokens": not rounded,
        "other_by_rounding": rounded,
        "left": left | {"requests": 0, "blocks": 0, "leases": 0},
    }


def alive(pids: set[int]) -> set[int]:
    """Those that compute; the one that tracks shared resources for `multiprocessing` stays to the end."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.add(pid)
    return found


def main() -> None:
    """Everything, a line for every kill, and the result file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of each kind")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--moves", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    drills = [
        Drill(1, 1, requests=words.requests),
        Drill(2, 1, requests=words.requests),
        Drill(2, 1, moves=words.moves),
        Drill(2, 1, kinds=KINDS, kills=words.kills),
        Drill(1, 1, requests=words.requests, ranks=2),
        Drill(1, 1, kinds=("rank",), kills=-(-words.kills // 2), ranks=2),
    ]
    logging.disable(logging.CRITICAL)  # every kill is one
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for drill in drills:
            rows.append(run(drill, Path(folder), words.seed))
            print(json.dumps(rows[-1]), flush=True)
    sizes = {"kills": words.kills, "requests": words.requests, "moves": words.moves, "seed": words.seed}
    engine = dataclasses.asdict(ENGINE)
    print(write_result("serve_drill", rows, out=words.out, **sizes, stall_s=STALL_S, engine=engine))


if __name__ == "__main__":
    main()
