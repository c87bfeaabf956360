"""What is one for a server, however many processes answer: its metrics, its limits, its instances."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from benthic.serve.fleet_routes import Instances
    from benthic.serve.metrics import Metrics
    from benthic.serve.rate_limit import Buckets


class Whole(Protocol):
    """What a process that answers asks of the whole server."""

    @property
    def metrics(self) -> Metrics:
        """What this process counts."""
        ...

    @property
    def instances(self) -> Instances | None:
        """Those of a fleet; None where one engine serves."""
        ...

    async def exposition(self) -> bytes:
        """What `/metrics` says."""
        ...

    async def take(self, who: str) -> float:
        """Use one of a key's requests; 0, or the seconds until it has one."""
        ...


class Alone:
    """One process is the whole server.

    Args:
        metrics: what it counted.
        instances: those of its fleet, if there is one.
        buckets: what keys have left; None sets no limit.
    """

    def __init__(
        self, metrics: Metrics, *, instances: Instances | None = None, buckets: Buckets | None = None
    ) -> None:
        self.metrics = metrics
        self.instances = instances
        self._buckets = buckets

    async def exposition(self) -> bytes:
        """What `/metrics` says."""
        return self.metrics.render()

    async def take(self, who: str) -> float:
        """Use one of a key's requests; 0, or the seconds until it has one."""
        return 0.0 if self._buckets is None else self._buckets.take(who)
