from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from spawn import spawn

from benthic.errors import BackendError
from benthic.parallel.exchange_choice import (
    Facts,
    Spot,
    assumed_spots,
    choose_exchange,
    facts_among,
    spots_of,
)

BEST = Facts(device="cuda", ranks=8, hosts=1, peers=True, triton=True)


@pytest.mark.parametrize(
    ("facts", "name", "why"),
    [
        (BEST, "nvlink", "8 GPUs of one host"),
        (replace(BEST, ranks=1), "local", "one rank holds all experts"),
        (replace(BEST, hosts=4), "all_to_all", "on 4 hosts"),
        (replace(BEST, peers=False), "all_to_all", "cannot reach"),
        (replace(BEST, triton=False), "all_to_all", "Triton"),
        (replace(BEST, combine_again=True), "all_to_all", "recompute=combine"),
        (Facts(device="cpu", ranks=2), "all_to_all", "the device is cpu"),
    ],
)
def test_the_fastest_exchange_that_runs_is_chosen_and_says_why(facts, name, why):
    chosen, reason = choose_exchange(facts)
    assert chosen == name
    assert why in reason


@pytest.mark.parametrize("asked", ["local", "nvlink", "ring"])
def test_an_exchange_that_cannot_run_is_refused_and_not_swapped(asked):
    with pytest.raises(BackendError, match=r"cannot run here|no exchange 'ring'"):
        choose_exchange(replace(BEST, hosts=2), asked)


def test_the_plain_exchange_may_be_asked_for_anywhere():
    assert choose_exchange(BEST, "all_to_all")[0] == "all_to_all"


def test_groups_inside_hosts_are_joined_by_links_and_groups_across_them_are_not():
    spots = assumed_spots(16)
    inside = facts_among(spots, [range(8), range(8, 16)], "cuda")
    assert (inside.ranks, inside.hosts, inside.peers) == (8, 1, True)
    across = facts_among(spots, [range(4, 12)], "cuda")
    assert (across.hosts, across.peers) == (2, False)


def test_ranks_that_share_a_gpu_or_cannot_reach_one_are_no_peers():
    alone = [Spot("a", 0, frozenset({1})), Spot("a", 1)]
    assert not facts_among(alone, [(0, 1)], "cuda").peers
    same = [Spot("a", 0, frozenset({1}))] * 2
    assert not facts_among(same, [(0, 1)], "cuda").peers


def gathered(rank):
    spots = spots_of(None, torch.device("cpu"))
    facts = facts_among(spots, [(0, 1)], "cpu")
    assert (facts.device, facts.ranks, facts.hosts, facts.peers) == ("cpu", 2, 1, False)


@pytest.mark.dist
def test_ranks_of_one_machine_find_the_same_facts():
    spawn(gathered, 2)
