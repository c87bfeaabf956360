from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.errors import ConfigError
from benthic.sched.placement import Cluster, in_order, place

PUBLISHED_LOADS = (
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
)
PUBLISHED_PLACES = (
    (5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1),
    (7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1),
)


@pytest.mark.parametrize(("load", "expected"), list(zip(PUBLISHED_LOADS, PUBLISHED_PLACES, strict=True)))
def test_the_published_example_is_placed_as_published(load, expected):
    placement = place(load, Cluster(replicas=16, groups=4, nodes=2, gpus=8))
    assert placement.expert_of == expected


@st.composite
def clusters(draw):
    nodes, gpus_a_node = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    groups = draw(st.integers(1, 6))
    experts = groups * draw(st.integers(1, 5))
    gpus = nodes * gpus_a_node
    least = -(-experts // gpus)
    replicas = gpus * draw(st.integers(least, least + 3))
    load = draw(st.lists(st.integers(0, 1000), min_size=experts, max_size=experts))
    return load, Cluster(replicas=replicas, groups=groups, nodes=nodes, gpus=gpus)


@settings(max_examples=200, deadline=None)
@given(clusters())
def test_every_slot_is_used_and_every_expert_is_somewhere(case):
    load, cluster = case
    placement = place(load, cluster)
    assert len(placement.expert_of) == cluster.replicas
    assert sorted(set(placement.expert_of)) == list(range(len(load)))
    assert sum(placement.counts) == cluster.replicas
    for expert in range(len(load)):
        slots = placement.slots_of(expert)
        assert len(slots) == placement.counts[expert]
        assert {placement.expert_of[slot] for slot in slots} == {expert}
    assert sum(placement.gpu_loads(load)) == pytest.approx(sum(load))
    assert placement.imbalance(load) >= 1 - 1e-9


@settings(max_examples=200, deadline=None)
@given(clusters())
def test_no_replica_carries_more_than_the_busiest_expert_did_and_no_gpu_more_than_its_slots_of_them(case):
    load, cluster = case
    placement = place(load, cluster)
    heaviest = max(share / count for share, count in zip(load, placement.counts, strict=True))
    assert heaviest <= max(load)
    assert max(placement.gpu_loads(load)) <= heaviest * (cluster.replicas // cluster.gpus) * (1 + 1e-9)


@settings(max_examples=200, deadline=None)
@given(clusters())
def test_whole_groups_stay_on_one_node_when_they_divide_over_the_nodes(case):
    load, cluster = case
    placement = place(load, cluster)
    if cluster.groups % cluster.nodes:
        assert placement == place(load, Cluster(replicas=cluster.replicas, gpus=cluster.gpus))
        return
    a_node, a_group = cluster.replicas // cluster.nodes, len(load) // cluster.groups
    nodes_of = {}
    for slot, expert in enumerate(placement.expert_of):
        nodes_of.setdefault(expert // a_group, set()).add(slot // a_node)
    assert all(len(nodes) == 1 for nodes in nodes_of.values())


@pytest.mark.parametrize("seed", range(5))
def test_skewed_load_of_a_v3_layer_becomes_nearly_even(seed):
    generator = random.Random(seed)  # noqa: S311 (a load, not a secret)
    load = [1000 / rank for rank in range(1, 257)]
    generator.shuffle(load)
    before = in_order(256, 32).imbalance(load)
    hierarchical = place(load, Cluster(replicas=288, groups=8, nodes=4, gpus=32)).imbalance(load)
    everywhere = place(load, Cluster(replicas=288, gpus=32)).imbalance(load)
    assert 1 <= everywhere < 1.05 < before
    assert everywhere <= hierarchical < before


def test_an_idle_layer_counts_as_even():
    assert in_order(8, 4).imbalance([0] * 8) == 1


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        (Cluster(replicas=8, gpus=4), "12 experts need at least as many replicas, but replicas=8"),
        (Cluster(replicas=14, gpus=4), "14 replicas do not divide evenly by 4 GPUs"),
        (Cluster(replicas=15, gpus=3, nodes=2), "3 GPUs do not divide evenly by 2 nodes"),
        (Cluster(replicas=16, groups=5, gpus=4), "12 experts do not divide evenly by 5 groups"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_both_numbers(cluster, message):
    with pytest.raises(ConfigError, match=message):
        place([1] * 12, cluster)
