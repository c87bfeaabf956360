"""What `/metrics` adds when several instances serve: each of them by name, and what the router did.

The plain names (`benthic:num_requests_running`, …) stay the sums over all instances.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from benthic.serve.metrics import kv_usage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benthic.sched.routing import Role
    from benthic.serve.members import Member
    from benthic.serve.messages import Stats
    from benthic.serve.replanning import Replanning
    from benthic.serve.router import Router

LABELS: Final = ("model_name", "instance", "role")
ROLES: Final[tuple[Role, ...]] = ("prefill", "decode")

# name, documentation, how it is read
ASSIGNED: Final[tuple[tuple[str, str, Callable[[Member], float]], ...]] = (
    ("instance_up", "1 when the instance takes new requests.", lambda m: float(m.open)),
    ("instance_requests", "Requests that the router has assigned to it.", lambda m: len(m.loads)),
    (
        "instance_queued_tokens",
        "Prompt tokens assigned to it that are not computed yet.",
        lambda m: sum(load.queued_tokens for load in m.loads.values()),
    ),
)
REPORTED: Final[tuple[tuple[str, str, Callable[[Stats], float]], ...]] = (
    ("instance_num_requests_running", "Sequences in its current batch.", lambda s: s.num_running),
    ("instance_num_requests_waiting", "Sequences waiting in it.", lambda s: s.num_waiting),
    ("instance_kv_cache_usage_perc", "Share of its KV cache blocks in use, 0 to 1.", kv_usage),
    ("instance_kv_blocks_leased", "Blocks that it keeps for others.", lambda s: s.leased_blocks),
)
TOTALS: Final[tuple[tuple[str, str, Callable[[Stats], float]], ...]] = (
    ("instance_prompt_tokens", "Prompt tokens that it computed.", lambda s: s.prompt_tokens),
    ("instance_generation_tokens", "Tokens that it generated.", lambda s: s.generation_tokens),
    ("instance_kv_blocks_pulled", "Blocks that it read from others.", lambda s: s.pulled_blocks),
    (
        "instance_kv_blocks_pulled_early",
        "Those that came while their prompt was still being computed.",
        lambda s: s.early_blocks,
    ),
)


class FleetCollector(Collector):
    """Reads the router and its instances at scrape time.

    Args:
        model_name: value of the `model_name` label.
        router: whose instances.
    """

    def __init__(self, model_name: str, router: Router) -> None:
        self._model_name = model_name
        self._router = router

    def collect(self) -> Iterator[Metric]:
        """One family a gauge or counter, one sample an instance."""
        retried = CounterMetricFamily(
            "benthic:router_retries", "Times a request went on in another instance.", labels=["model_name"]
        )
        retried.add_metric([self._model_name], self._router.retried)
        yield retried
        members = list(self._router.members)
        for name, text, assigned in ASSIGNED:
            gauge = GaugeMetricFamily(f"benthic:{name}", text, labels=LABELS)
            for member in members:
                gauge.add_metric(self._labels(member), assigned(member))
            yield gauge
        reporting = [(member, member.client.stats) for member in members]
        for family, rows in ((GaugeMetricFamily, REPORTED), (CounterMetricFamily, TOTALS)):
            for name, text, read in rows:
                found = family(f"benthic:{name}", text, labels=LABELS)
                for member, stats in reporting:
                    if stats is not None:
                        found.add_metric(self._labels(member), read(stats))
                yield found
        if self._router.replanning is not None:
            yield from self._replanned(self._router.replanning, members)

    def _replanned(self, replanning: Replanning, members: list[Member]) -> Iterator[Metric]:
        """Families with one sample a role."""
        labels = ("model_name", "role")
        count = GaugeMetricFamily("benthic:role_instances", "Instances that have the role.", labels=labels)
        needed = GaugeMetricFamily(
            "benthic:role_instances_needed", "Instances that the load would keep busy in it.", labels=labels
        )
        busy = GaugeMetricFamily(
            "benthic:role_utilisation", "Instances needed over those there are.", labels=labels
        )
        changes = CounterMetricFamily(
            "benthic:role_changes", "Times an instance got the role from the other one.", labels=labels
        )
        needs = replanning.needs
        for role in ROLES:
            at = [self._model_name, role]
            there = sum([member.role == role for member in members])
            count.add_metric(at, there)
            changes.add_metric(at, replanning.changes[role])
            if needs is not None and there:
                need = needs.prefill if role == "prefill" else needs.decode
                needed.add_metric(at, need)
                busy.add_metric(at, need / there)
        yield from (count, needed, busy, changes)

    def _labels(self, member: Member) -> list[str]:
        return [self._model_name, member.name, member.role]
