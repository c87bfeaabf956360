"""Counters and histograms of several processes, added up: as if one of them had counted everything.

The library's own way (`PROMETHEUS_MULTIPROC_DIR`) keeps a file a process, which the environment has to name
before the library is imported, and writes to it at every observation; here a process says now and then what
it has counted, over a pipe that is there anyway.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

CREATED = "_created"
"""Ends the names of samples that say since when is counted; the earliest holds for a sum."""


class Count(msgspec.Struct, frozen=True, array_like=True):
    """One sample of a family."""

    family: str
    name: str
    labels: dict[str, str]
    value: float


Counts = list[Count]


def counts(registry: CollectorRegistry) -> Counts:
    """Every sample of a registry of counters and histograms."""
    return [
        Count(family.name, sample.name, sample.labels, sample.value)
        for family in registry.collect()
        for sample in family.samples
    ]


def added(registry: CollectorRegistry, others: Sequence[Counts]) -> CollectorRegistry:
    """A registry with the same families and the sums of their samples; its own where there are no others."""
    if not others:
        return registry
    whole = CollectorRegistry(auto_describe=False)
    whole.register(_Added(registry, others))
    return whole


class _Added(Collector):
    def __init__(self, registry: CollectorRegistry, others: Sequence[Counts]) -> None:
        self._registry = registry
        self._others = others

    def collect(self) -> Iterator[Metric]:
        """The families of the registry, each with the samples of all."""
        by_family: dict[str, Counts] = {}
        for count in (count for each in self._others for count in each):
            by_family.setdefault(count.family, []).append(count)
        for family in self._registry.collect():
            own = [Count(family.name, s.name, s.labels, s.value) for s in family.samples]
            whole = Metric(family.name, family.documentation, family.type, family.unit)
            for name, labels, value in _sum([*own, *by_family.get(family.name, ())]):
                whole.add_sample(name, labels, value)
            yield whole


def _sum(found: Iterable[Count]) -> Iterator[tuple[str, dict[str, str], float]]:
    """Samples of one family by name and labels, in the order in which they were found."""
    sums: dict[tuple[str, tuple[tuple[str, str], ...]], Count] = {}
    for count in found:
        key = count.name, tuple(count.labels.items())
        before = sums.get(key)
        sums[key] = count if before is None else _two(before, count)
    for count in sums.values():
        yield count.name, count.labels, count.value


def _two(one: Count, other: Count) -> Count:
    value = min(one.value, other.value) if one.name.endswith(CREATED) else one.value + other.value
    return msgspec.structs.replace(one, value=value)
