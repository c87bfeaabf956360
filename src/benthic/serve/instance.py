"""An engine among others: it keeps prompts for those that read them, and reads what others keep.

The plain engine plans, runs and commits steps; this one also plans, carries out and commits transfers.
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
from benthic.errors import TransferError
from benthic.sched.batching import Started
from benthic.serve.engine import Engine
from benthic.serve.messages import Remote
from benthic.serve.transfer import cuda
from benthic.serve.transfer.desk import Desk
from benthic.serve.transfer.handshake import Region, Terms, Welcome
from benthic.serve.transfer.memory import MemorySource, Source
from benthic.serve.transfer.nixl import NixlPages, NixlSource
from benthic.serve.transfer.reader import Reader

if TYPE_CHECKING:
    from benthic.model.network import DeepSeek
    from benthic.sched.batching import Finished, StepPlan
    from benthic.serve.build import Parts
    from benthic.serve.cache import CacheLayout, LatentCache
    from benthic.serve.engine import Clock
    from benthic.serve.messages import Delta, Generate
    from benthic.serve.options import EngineOptions
    from benthic.serve.sample import Logprobs

IDLE_S = 0.001
"""How long a step without tokens to compute waits for an answer from another instance."""


@dataclass(frozen=True, kw_only=True)
class TransferOptions:
    """How an instance takes part in transfers.

    Attributes:
        address: where its desk listens.
        model: digest of configuration and weights; instances share blocks only when it is equal.
        nixl: move blocks by NIXL, between hosts; otherwise by shared memory or CUDA IPC on this one.
        patience_s: how long another instance may take to answer before its blocks are computed here.
    """

    address: str
    model: str
    nixl: bool = False
    patience_s: float = 2.0


class Instance(Engine):
    """An engine that takes part in prefill/decode disaggregation, on either side.

    Args:
        parts: as for `Engine`; the cache must be shared (`EngineOptions.share_pages`) on a CPU.
        options: settings.
        transfer: how it takes part.
        clock: seconds since some fixed moment.
    """

    def __init__(
        self,
        parts: Parts,
        options: EngineOptions,
        transfer: TransferOptions,
        *,
        clock: Clock = time.monotonic,
    ) -> None:
        super().__init__(parts, options, clock=clock)
        cache = parts.runner.cache
        terms = terms_of(transfer.model, cache.layout)
        pages = NixlPages(cache.pages_LPBW) if transfer.nixl else None
        region = region_of(cache, pages)
        self.instance_id = uuid.uuid4().hex
        self._desk = Desk(transfer.address, terms, Welcome(self.instance_id, region))

        def open_source(region: Region) -> Source:
            return source_of(region, cache, pages)

        self._reader = Reader(
            terms, open_source, lease_s=options.lease_seconds, patience_s=transfer.patience_s
        )

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
        super().add(request)
        if request.pull is not None:
            self._reader.expect(request.request_id, request.pull, self._clock())

    def abort(self, request_id: str) -> None:
        """As `Engine.abort`; also ends a lease of that name, and a pull."""
        super().abort(request_id)
        for transfer in self._reader.forget(request_id):
            self._scheduler.pulls.fail(transfer)
        if self._scheduler.leases.get(request_id) is not None:
            self._desk.revoke(request_id)
            self._scheduler.leases.release(request_id)

    def step(self) -> list[Delta]:
        """As `Engine.step`, between two turns of the transfers."""
        self._serve_readers()
        steps = self._scheduler.totals.steps
        deltas = super().step()
        self._move()
        if self._scheduler.totals.steps == steps and self._reader.waiting:
            self._reader.wait(IDLE_S)
        return deltas

    def shut(self) -> None:
        """Leave the others alone; the engine itself can go on."""
        self._desk.shut()
        self._reader.shut()

    def _observe(self, plan: StepPlan, now: float) -> None:
        super()._observe(plan, now)
        for event in plan.events:
            if isinstance(event, Started) and event.request_id not in self._scheduler.pulls:
                self._reader.forget(event.request_id)  # the prefix cache had everything

    def _move(self) -> None:
        """Start the transfers that are planned and report those that ended."""
        pulls = self._scheduler.pulls
        for plan in self._reader.take(pulls.plan()):
            pulls.fail(plan)
        for plan, brought in self._reader.advance(self._clock()):
            if brought:
                pulls.commit(plan)
            else:
                pulls.fail(plan)

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

    def _delta(
        self, request_id: str, tokens: list[int], end: Finished | None, logprobs: tuple[Logprobs, ...] | None
    ) -> Delta:
        delta = super()._delta(request_id, tokens, end, logprobs)
        lease = None if end is None else self._scheduler.leases.get(request_id)
        if lease is None:
            return delta
        self._desk.open(request_id)
        remote = Remote(
            instance_id=self.instance_id,
            address=self._desk.address,
            lease_id=request_id,
            blocks=lease.blocks,
            num_tokens=lease.num_tokens,
        )
        return msgspec.structs.replace(delta, remote=remote)


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


def region_of(cache: LatentCache, nixl: NixlPages | None) -> Region:
    """How others read this cache.

    Raises:
        TransferError: the pages are this process's alone.
    """
    if nixl is not None:
        return nixl.region()
    if cache.memory is not None:
        return cache.memory.region(cache.num_blocks)
    if cache.pages_LPBW.device.type == "cuda":
        return cuda.region_of(cache.pages_LPBW)
    msg = "the cache is this process's alone. Build the engine with share_pages=True."
    raise TransferError(msg)


def source_of(region: Region, cache: LatentCache, nixl: NixlPages | None) -> Source:
    """Open another instance's pages.

    Raises:
        TransferError: this instance cannot read pages of that kind.
    """
    if region.kind == "nixl" and nixl is not None:
        return NixlSource(region, nixl)
    device = cache.pages_LPBW.device.type
    if region.kind == "memory" and device == "cpu":
        return MemorySource(region, cache.pages_LPBW)
    if region.kind == "cuda" and device == "cuda":
        return cuda.CudaSource(region, cache.pages_LPBW)
    mine = "nixl" if nixl is not None else {"cpu": "memory", "cuda": "cuda"}[device]
    msg = (
        f"the other instance's blocks move by {region.kind!r}, but this one's by {mine!r}. Start both alike."
    )
    raise TransferError(msg)


def digest_of(model: DeepSeek) -> str:
    """A fingerprint of configuration and weights: instances that differ in either must not share blocks.

    Reads a slice of every parameter (at most 64 values), not all of them.
    """
    digest = hashlib.blake2b(repr(model.config).encode(), digest_size=12)
    for name, parameter in sorted(model.named_parameters()):
        some = parameter.detach().reshape(-1)[:64].to(torch.float32).cpu()
        digest.update(name.encode() + some.numpy().tobytes())
    return digest.hexdigest()
