from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from spawn import spawn

from benthic.errors import BackendError
from benthic.parallel.exchange_choice import Facts, choose_exchange, facts_of

BEST = Facts(device="cuda", ranks=8, hosts=1, peers=True, triton=True)


@pytest.mark.parametrize(
    ("facts", "name", "why"),
    [
        (BEST, "nvlink", "8 GPUs of one host"),
        (replace(BEST, ranks=1), "local", "one rank holds all experts"),
        (replace(BEST, hosts=4), "all_to_all", "on 4 hosts"),
        (replace(BEST, peers=False), "all_to_all", "cannot reach"),
        (replace(BEST, triton=False), "all_to_all", "Triton"),
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


def gathered(rank):
    facts = facts_of(None, torch.device("cpu"))
    assert (facts.device, facts.ranks, facts.hosts, facts.peers) == ("cpu", 2, 1, False)


@pytest.mark.dist
def test_ranks_of_one_machine_find_the_same_facts():
    spawn(gathered, 2)
