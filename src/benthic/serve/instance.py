"""An engine among others: it keeps prompts for those that read them, and reads what others keep.

The engine plans, runs and commits steps, on one rank or several; between two of them the instance plans,
carries out and commits transfers.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import torch

from benthic import __version__
from benthic.sched import pulls
from benthic.sched.batching import Request, Started
from benthic.serve.messages import Delta, Remote
from benthic.serve.pages import Pages
from benthic.serve.process import Shared
from benthic.serve.transfer.desk import Desk
from benthic.serve.transfer.handshake import Terms, Welcome
from benthic.serve.transfer.reader import Reader
from benthic.spec.parameters import parameters
from benthic.spec.shard import always_held

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benthic.model.network import DeepSeek
    from benthic.sched.batching import StepPlan
    from benthic.sched.leases import Lease
    from benthic.serve.cache import CacheLayout
    from benthic.serve.engine import Clock, Engine
    from benthic.serve.messages import Generate, Ready, Stats
    from benthic.serve.pages import Mover
    from benthic.serve.transfer.memory import Opener

IDLE_S = 0.001
"""How long a step without tokens to compute waits for an answer from another instance."""

LOOK_S = 0.00005
"""How long it sleeps between two looks for blocks that are about to come."""


@dataclass(frozen=True, kw_only=True)
class TransferOptions:
    """How an instance takes part in transfers.

    Attributes:
        address: where its desk listens.
        model: digest of configuration and weights; instances share blocks only when it is equal.
        mover: what moves blocks.
        patience_s: how long another instance may take to answer before its blocks are computed here.
    """

    address: str
    model: str
    mover: Mover = "host"
    patience_s: float = 2.0


class Instance:
    """An engine that takes part in prefill/decode disaggregation, on either side.

    Args:
        engine: what computes; it belongs to this instance from now on.
        transfer: how it takes part.
        pages: of all ranks of the engine; None where it has one.
        clock: that of the engine.
    """

    def __init__(
        self,
        engine: Engine,
        transfer: TransferOptions,
        pages: Opener | None = None,
        *,
        clock: Clock = time.monotonic,
    ) -> None:
        self.engine = engine
        self.instance_id = uuid.uuid4().hex
        self._scheduler = engine.parts.scheduler
        self._clock = clock
        cache = engine.parts.runner.cache
        terms = terms_of(transfer.model, cache.layout)
        pages = pages or Pages(cache, transfer.mover)
        self._desk = Desk(transfer.address, terms, Welcome(self.instance_id, pages.regions))
        lease_s = self._scheduler.config.lease_seconds
        self._reader = Reader(terms, pages, lease_s=lease_s, patience_s=transfer.patience_s)
        self._stepped_s = time.monotonic()
        self._told: dict[str, int] = {}  # tokens that are ready of prompts to be lent, as others know it
        engine.observers.append(self._observe)
        engine.movers.append(self._start_pulls)

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting, pulled or running."""
        return self.engine.has_work

    @property
    def patience_s(self) -> float:
        """As `Engine.patience_s`."""
        return self.engine.patience_s

    def ready(self) -> Ready:
        """As `Engine.ready`."""
        return self.engine.ready()

    def stats(self) -> Stats:
        """As `Engine.stats`."""
        return self.engine.stats()

    @property
    def wake_fd(self) -> int:
        """Readable when `wake` should be called, also while there is no work."""
        return self._desk.wake_fd

    def wake(self) -> None:
        """Do what readers asked for, and end leases that are over."""
        self._desk.quiet()
        self._serve_readers()

    def add(self, request: Generate) -> None:
        """As `Engine.add`; where blocks are to be pulled, their lease is kept alive from now on."""
        self.engine.add(request)
        if request.lend:
            self._told[request.request_id] = 0
        if request.pull is not None:
            self._reader.expect(request.request_id, request.pull, self._clock())

    def pull_early(self, request: Generate) -> None:
        """Pull what is ready of a prompt that another instance computes, until an abort of that name."""
        early, now = self._scheduler.pulls.early, self._clock()
        assert request.pull is not None  # noqa: S101 (the router's to keep)
        prompt = Request(
            request_id=request.request_id, prompt=request.prompt + request.output, priority=request.priority
        )
        early.begin(prompt, request.pull.num_tokens, now)
        if request.request_id in early:
            self._reader.expect(request.request_id, request.pull, now, early=True)

    def more_ready(self, request_id: str, num_tokens: int) -> None:
        """So much is ready now of a prompt that is pulled early."""
        self._scheduler.pulls.early.grow(request_id, num_tokens)

    def abort(self, request_id: str) -> None:
        """As `Engine.abort`; also ends a lease of that name, and a pull, whose copies it waits for.

        What is on its way of an early pull comes and counts.
        """
        if request_id in self._scheduler.pulls.early:
            self._scheduler.pulls.early.drop(request_id)
            self._reader.keep_early(self._scheduler.pulls.early)
            return
        self.engine.abort(request_id)
        if not self._told.get(request_id):
            self._told.pop(request_id, None)
        for transfer in self._reader.forget(request_id):
            self._scheduler.pulls.fail(transfer)
        if self._scheduler.leases.get(request_id) is not None:
            self._desk.revoke(request_id)
            self._scheduler.leases.release(request_id)

    def step(self) -> list[Delta]:
        """As `Engine.step`; pulls that have ended count before it, and those that it plans start in it.

        They start before its own step is launched, so that they wait only for the step before and run beside
        its own; when the step before has landed, they are about to come.
        """
        self._serve_readers()
        self._await_pulls()
        steps = self._scheduler.totals.steps
        deltas = [self._with_lease(delta) for delta in self.engine.step()]
        deltas += self._lend()
        self._finish_pulls()
        if self._scheduler.totals.steps == steps and self._reader.waiting:
            self._reader.wait(IDLE_S)
        self._stepped_s = time.monotonic()
        return deltas

    def watch(self, last_words: Callable[[str], None]) -> None:
        """Call `last_words` from a thread when the engine has lost another rank and waits for it."""
        if isinstance(self.engine, Shared):
            self.engine.watch(last_words)

    def leave(self) -> None:
        """Leave the others alone, and let the engine's other ranks go; it can do nothing more. Once."""
        self.shut()
        if isinstance(self.engine, Shared):
            self.engine.leave()

    def shut(self) -> None:
        """Leave the others alone; the engine itself can go on."""
        self._desk.shut()
        self._reader.shut()

    def _observe(self, plan: StepPlan) -> None:
        self._take_back()
        for event in plan.events:
            if isinstance(event, Started) and event.request_id not in self._scheduler.pulls:
                self._reader.forget(event.request_id)  # the prefix cache had everything

    def _start_pulls(self) -> None:
        """Start the transfers that are planned, and report those that ended."""
        for plan in self._reader.take(self._scheduler.pulls.plan()):
            self._scheduler.pulls.fail(plan)
        self._finish_pulls()

    def _await_pulls(self) -> None:
        """Report transfers that ended; wait for others while the device has a step to run.

        That is until `AWAIT_S` after the step before, which has passed where the plan is late anyway. A
        request whose pull is seen in time takes part in the next step, and not in the one behind it.
        """
        self._finish_pulls()
        until = self._stepped_s + pulls.AWAIT_S
        while self.engine.in_flight and self._reader.pulling and time.monotonic() < until:
            time.sleep(LOOK_S)
            self._finish_pulls()

    def _finish_pulls(self) -> None:
        own = self._scheduler.pulls
        for plan, brought in self._reader.advance(self._clock()):
            if brought:
                own.commit(plan)
            else:
                own.fail(plan)
        self._reader.keep_early(own.early)

    def _serve_readers(self) -> None:
        now, leases = self._clock(), self._scheduler.leases
        renewed, done = self._desk.collect()
        for lease_id in renewed:
            leases.renew(lease_id, now)
        for lease_id in done:
            leases.release(lease_id)
        for lease_id in leases.due(now):
            if self._desk.close(lease_id):
                leases.release(lease_id)
        self._take_back()

    def _with_lease(self, delta: Delta) -> Delta:
        """The delta; where it ends a request that is held, it says where the blocks are."""
        if delta.finish_reason is None:
            return delta
        if not self._told.get(delta.request_id):
            self._told.pop(delta.request_id, None)
        lease = self._scheduler.leases.get(delta.request_id)
        if lease is None:
            return delta
        self._desk.open(delta.request_id)
        return msgspec.structs.replace(delta, remote=self._remote(delta.request_id, lease))

    def _lend(self) -> Iterator[Delta]:
        """Say of prompts that are to be lent what has become ready."""
        for request_id, lease in self._scheduler.leases.lent.items():
            told = self._told.get(request_id, lease.num_tokens)
            if told < lease.num_tokens:
                self._told[request_id] = lease.num_tokens
                self._desk.open(early_name(request_id))
                remote = self._remote(early_name(request_id), lease)
                yield Delta(request_id=request_id, tokens=(), remote=remote)

    def _take_back(self) -> None:
        """Lend nothing whose blocks may be given to others: before a plan runs, and writes to them."""
        leases = self._scheduler.leases
        for request_id, told in list(self._told.items()):
            if told and request_id not in leases.lent and leases.get(request_id) is None:
                self._desk.revoke(early_name(request_id))
                del self._told[request_id]

    def _remote(self, lease_id: str, lease: Lease) -> Remote:
        return Remote(
            instance_id=self.instance_id,
            address=self._desk.address,
            lease_id=lease_id,
            blocks=lease.blocks,
            num_tokens=lease.num_tokens,
        )


def early_name(request_id: str) -> str:
    """What the prompt of a request is lent under; its blocks stay the same under that name."""
    return f"{request_id}/early"


def terms_of(model: str, layout: CacheLayout) -> Terms:
    """The terms of an instance that serves the model of that digest from a cache of this layout."""
    return Terms(
        version=__version__,
        model=model,
        layers=layout.layers,
        latent_dim=layout.latent_dim,
        block_size=layout.block_size,
        dtype=str(layout.dtype).removeprefix("torch."),
    )


def digest_of(model: DeepSeek) -> str:
    """A fingerprint of configuration and weights: instances that differ in either must not share blocks.

    Reads a slice of every parameter (at most 64 values), not all of them, and of those that are divided over
    ranks what rank 0 holds however many there are: `model` may be its shard.
    """
    digest = hashlib.blake2b(repr(model.config).encode(), digest_size=12)
    held = dict(model.named_parameters())
    for param in sorted(parameters(model.config), key=lambda param: param.name):
        if param.name in held:
            here = held[param.name].detach()[always_held(param)]
            some = here.reshape(-1)[:64].to(torch.float32).cpu()
            digest.update(param.name.encode() + some.numpy().tobytes())
    return digest.hexdigest()
