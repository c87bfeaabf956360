"""Placing requests is a pure function of what the router assigned."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benthic.errors import ConfigError
from benthic.sched.routing import (
    InstanceState,
    Policy,
    PrefixMap,
    Query,
    Route,
    cache_aware,
    choose,
    shortest_queue,
)


def instance(name: str, **fields) -> InstanceState:
    usual = {"open": True, "num_requests": 1, "queued_tokens": 0, "used_blocks": 10, "num_blocks": 100}
    role = "prefill" if name.startswith("p") else "decode"
    return InstanceState(name=name, role=role, block_size=4, **(usual | fields))


def test_the_shortest_prefill_queue_and_the_least_loaded_decode_instance_are_taken() -> None:
    states = [
        instance("p0", queued_tokens=900),
        instance("p1", queued_tokens=20),
        instance("d0", used_blocks=80),
        instance("d1", used_blocks=30),
    ]
    assert choose(Query(40), states, Policy(prefill=shortest_queue)) == Route("d1", "p1")


def test_prefix_affinity_weighs_cached_tokens_against_the_queue() -> None:
    states = [instance("p0", queued_tokens=60), instance("p1"), instance("d0")]
    assert choose(Query(100, cached={"p0": 80}), states, Policy()) == Route("d0", "p0")
    assert choose(Query(100, cached={"p0": 40}), states, Policy()) == Route("d0", "p1")


def test_a_conversation_goes_back_to_its_cache_unless_that_instance_holds_more_by_as_much() -> None:
    policy = Policy(decode=cache_aware)
    for used, chosen in ((0, "d1"), (20, "d1"), (21, "d2"), (40, "d2")):
        states = [instance("d1", used_blocks=used), instance("d2", used_blocks=10)]
        assert choose(Query(100, cached={"d1": 40}), states, policy) == Route(chosen), used


def test_a_short_prompt_is_prefilled_where_it_decodes() -> None:
    states = [instance("p0"), instance("d0")]
    assert choose(Query(16), states, Policy(local_tokens=16)) == Route("d0")
    assert choose(Query(17), states, Policy(local_tokens=16)) == Route("d0", "p0")
    assert choose(Query(170, cached={"d0": 160}), states, Policy(local_tokens=16)) == Route("d0")


def test_a_request_of_one_token_needs_no_decode_instance() -> None:
    states = [instance("p0"), instance("d0")]
    assert choose(Query(64, decodes=False), states, Policy()) == Route("p0")


def test_a_request_waits_while_the_decode_side_or_every_prefill_instance_is_full() -> None:
    room, full = instance("p0"), instance("d0", used_blocks=88)
    assert choose(Query(64), [room, full], Policy()) is None
    assert choose(Query(8), [room, full], Policy()) == Route("d0", "p0")
    assert choose(Query(64), [instance("p0", used_blocks=40), instance("d0")], Policy()) is None


def test_an_idle_instance_takes_whatever_comes() -> None:
    states = [instance("p0", num_requests=0, used_blocks=0), instance("d0", num_requests=0, used_blocks=0)]
    assert choose(Query(4000), states, Policy()) == Route("d0", "p0")


def test_either_side_does_everything_when_the_other_is_gone() -> None:
    p0, d0 = instance("p0"), instance("d0")
    assert choose(Query(40), [replace(p0, open=False), d0], Policy()) == Route("d0")
    assert choose(Query(40), [p0, replace(d0, open=False)], Policy()) == Route("p0")
    assert choose(Query(40), [replace(p0, open=False), replace(d0, open=False)], Policy()) is None


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"local_tokens": -1}, "local_tokens = -1"),
        ({"decode_share": 0.0}, "decode_share = 0.0"),
        ({"prefill_share": 1.5}, "prefill_share = 1.5"),
    ],
)
def test_a_policy_out_of_range_is_refused(setting: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Policy(**setting)


def test_the_prefix_map_finds_the_longest_beginning_of_every_instance() -> None:
    places = PrefixMap(block_size=4)
    prompt = list(range(12))
    places.note("p0", places.keys(prompt))
    places.note("p1", places.keys(prompt[:8]))
    assert places.cached(places.keys([*prompt, 99, 99])) == {"p0": 12, "p1": 8}
    assert places.cached(places.keys([5, *prompt])) == {}
    places.forget("p0")
    assert places.cached(places.keys(prompt)) == {"p1": 8}


def test_the_prefix_map_forgets_the_least_recently_used() -> None:
    places = PrefixMap(block_size=1, most_keys=3)
    places.note("p0", places.keys([1, 2]))
    places.note("p0", places.keys([8, 9]))
    assert places.cached(places.keys([1, 2])) == {}
    assert places.cached(places.keys([8, 9])) == {"p0": 2}
