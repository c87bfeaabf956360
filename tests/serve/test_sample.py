"""Sampling: settings row by row, seeds that ignore the batch, log-probabilities of the raw distribution."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.kernels.reference.sampling import (
    NO_TOKEN,
    Filters,
    draw,
    keep_probable,
    splitmix64,
    uniform,
)
from benthic.serve.admission import MOST
from benthic.serve.messages import LEAST_TEMPERATURE, SamplingParams
from benthic.serve.sample import logprobs_of, to_int64
from benthic.serve.sampler import Sampler

VOCAB = 50
CPU = torch.device("cpu")
MASK = (1 << 64) - 1


def splitmix64_in_python(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def sampler_with(
    *params: SamplingParams, prompt: tuple[int, ...] = (1, 2), stops: tuple[int, ...] = (0,)
) -> Sampler:
    sampler = Sampler(VOCAB, CPU)
    for i, each in enumerate(params):
        sampler.admit(
            str(i), each, prompt, seed=100 + i if each.seed is None else each.seed, stop_tokens=stops
        )
    return sampler


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def ids(rows: int) -> tuple[str, ...]:
    return tuple(str(i) for i in range(rows))


def one(logits_V: torch.Tensor, params: SamplingParams, *, position: int = 0, **more: tuple[int, ...]) -> int:
    return sampler_with(params, **more).sample(logits_V.clone().unsqueeze(0), ("0",), [position]).tokens[0]


def allowed(logits_V: torch.Tensor, params: SamplingParams, draws: int = 400) -> set[int]:
    """The tokens that come out over many positions."""
    sampler = sampler_with(params)
    return {sampler.sample(logits_V.clone().unsqueeze(0), ("0",), [i]).tokens[0] for i in range(draws)}


@given(st.lists(st.integers(0, MASK), min_size=1, max_size=20))
def test_the_hash_is_splitmix64_bit_for_bit(words: list[int]) -> None:
    found = splitmix64(torch.tensor([to_int64(word) for word in words])).tolist()
    assert [word & MASK for word in found] == [splitmix64_in_python(word) for word in words]


def test_the_hash_gives_the_published_first_outputs_of_seed_1234567() -> None:
    # Reference outputs of splitmix64 seeded with 1234567 (Vigna's C code; also Rosetta Code's test vector).
    golden = 0x9E3779B97F4A7C15
    states = torch.tensor([to_int64(1234567 + i * golden) for i in range(3)])
    assert [word & MASK for word in splitmix64(states).tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_uniform_numbers_are_uniform_over_seeds_and_over_positions() -> None:
    for seed_S, position_S in (
        (torch.arange(20000), torch.zeros(20000, dtype=torch.int64)),
        (torch.full((20000,), 7), torch.arange(20000)),
    ):
        u = uniform(seed_S, position_S)
        counts = torch.histc(u, bins=20, min=0.0, max=1.0)
        chi_square = ((counts - 1000) ** 2 / 1000).sum().item()
        assert chi_square < 43.8  # 99.9 % point of 19 degrees of freedom
        assert 0.0 <= u.min().item() < u.max().item() < 1.0


def test_draws_follow_the_distribution() -> None:
    probs_V = torch.tensor([0.0, 0.5, 0.25, 0.0, 0.15, 0.1, 0.0])
    n = 20000
    u = uniform(torch.arange(n), torch.zeros(n, dtype=torch.int64))
    counts = torch.bincount(draw(probs_V.expand(n, -1), u), minlength=7).double()
    assert counts[probs_V == 0].sum() == 0
    expected = probs_V[probs_V > 0].double() * n
    assert (
        (counts[probs_V > 0] - expected) ** 2 / expected
    ).sum().item() < 16.3  # 99.9 % of 3 degrees of freedom


def test_the_ends_of_the_unit_interval_never_draw_a_token_of_probability_zero() -> None:
    probs_V = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0])
    u = torch.tensor([0.0, 1 - 2.0**-24])
    assert draw(probs_V.expand(2, -1), u).tolist() == [1, 3]


@pytest.mark.parametrize("position", [0, 1, 17])
def test_a_seed_gives_the_same_token_alone_and_in_any_batch(position: int) -> None:
    row = logits(1, seed=3)[0]
    params = SamplingParams(temperature=0.9, top_p=0.8, seed=42)
    alone = one(row, params, position=position)
    crowd = [
        SamplingParams(temperature=0.0),
        SamplingParams(top_k=3, seed=1),
        params,
        SamplingParams(min_p=0.1, seed=42),
    ]
    batch = torch.stack([logits(1, seed=9)[0], logits(1, seed=8)[0], row, logits(1, seed=7)[0]])
    found = sampler_with(*crowd).sample(batch, ids(4), [5, 2, position, 9]).tokens
    assert found[2] == alone


def test_different_seeds_and_positions_give_different_draws() -> None:
    flat = torch.zeros(VOCAB)
    by_seed = {one(flat, SamplingParams(seed=seed)) for seed in range(200)}
    by_position = allowed(flat, SamplingParams(seed=5), draws=200)
    assert len(by_seed) > 40
    assert len(by_position) > 40


def test_temperature_zero_is_argmax_also_beside_random_rows() -> None:
    batch = logits(3)
    params = [SamplingParams(temperature=0.0), SamplingParams(seed=1), SamplingParams(temperature=0.0)]
    found = sampler_with(*params).sample(batch.clone(), ids(3), [0, 0, 0]).tokens
    best = batch.argmax(-1).tolist()
    assert (found[0], found[2]) == (best[0], best[2])


@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-30, 9.9e-6])
def test_a_minute_temperature_is_argmax_also_beside_random_rows(temperature: float) -> None:
    batch = logits(2)
    minute, other = SamplingParams(temperature=temperature, seed=0), SamplingParams(seed=1)
    assert allowed(batch[0] * 1000, minute, draws=20) == {int(batch[0].argmax())}
    found = sampler_with(minute, other).sample(batch.clone(), ids(2), [0, 0]).tokens
    assert found == [int(batch[0].argmax()), one(batch[1], other)]


def test_the_least_temperature_is_where_greedy_ends() -> None:
    flat = torch.zeros(VOCAB)
    assert len(allowed(flat, SamplingParams(temperature=LEAST_TEMPERATURE, seed=0), draws=50)) > 10
    assert len(allowed(flat, SamplingParams(temperature=LEAST_TEMPERATURE * 0.999, seed=0), draws=50)) == 1


def test_the_greatest_temperature_keeps_forbidden_tokens_out() -> None:
    params = SamplingParams(temperature=MOST, min_tokens=10_000, seed=0)
    found = allowed(logits(1)[0], params, draws=2000)
    assert len(found) > VOCAB // 2
    assert 0 not in found  # a stop token, masked with -inf
    assert found <= set(range(VOCAB))


def test_temperature_sharpens_as_softmax_of_the_divided_logits() -> None:
    row = torch.full((VOCAB,), -torch.inf)
    row[:2] = torch.tensor([0.0, 1.0])
    sampler = sampler_with(SamplingParams(temperature=0.5, seed=1))
    n = 4000
    ones = sum(sampler.sample(row.clone().unsqueeze(0), ("0",), [i]).tokens[0] for i in range(n))
    p = 1 / (1 + math.exp(-2.0))
    assert abs(ones / n - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_top_k_keeps_exactly_k_and_breaks_ties_by_token_id() -> None:
    row = torch.zeros(VOCAB)
    row[[30, 10, 20]] = 1.0
    assert allowed(row, SamplingParams(top_k=2, seed=1)) == {10, 20}
    assert allowed(row, SamplingParams(top_k=1, seed=1)) == {10}
    assert allowed(row, SamplingParams(top_k=10_000, temperature=5.0, seed=1), draws=2000) == set(
        range(VOCAB)
    )


def test_top_p_keeps_the_least_set_that_reaches_p() -> None:
    probs = torch.full((VOCAB,), 1e-30)
    probs[:4] = torch.tensor([0.4, 0.3, 0.2, 0.1])
    assert allowed(probs.log(), SamplingParams(top_p=0.39, seed=1)) == {0}
    assert allowed(probs.log(), SamplingParams(top_p=0.69, seed=1)) == {0, 1}
    assert allowed(probs.log(), SamplingParams(top_p=0.71, seed=1)) == {0, 1, 2}
    assert allowed(probs.log(), SamplingParams(top_p=1e-9, seed=1)) == {0}


def test_top_p_counts_the_mass_that_top_k_left() -> None:
    probs = torch.full((VOCAB,), 1e-30)
    probs[:4] = torch.tensor([0.4, 0.3, 0.2, 0.1])
    # Of {0.4, 0.3}, the first holds 0.571 of the mass.
    assert allowed(probs.log(), SamplingParams(top_k=2, top_p=0.55, seed=1)) == {0}
    assert allowed(probs.log(), SamplingParams(top_k=2, top_p=0.6, seed=1)) == {0, 1}


def test_min_p_is_relative_to_the_best_token() -> None:
    probs = torch.full((VOCAB,), 1e-30)
    probs[:4] = torch.tensor([0.4, 0.3, 0.2, 0.1])
    assert allowed(probs.log(), SamplingParams(min_p=0.6, seed=1)) == {0, 1}
    assert allowed(probs.log(), SamplingParams(min_p=0.2, seed=1)) == {0, 1, 2, 3}


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 1000),
    st.integers(1, VOCAB),
    st.floats(0.01, 1.0),
    st.floats(0.0, 1.0),
    st.sampled_from([1.0, 1e-3]),
)
def test_filters_equal_a_literal_sort_and_cut(
    seed: int, top_k: int, top_p: float, min_p: float, coarse: float
) -> None:
    row = logits(1, seed)[0]
    probs = ((row / coarse).round() * coarse).softmax(-1)
    filters = Filters(torch.tensor([min_p]), torch.tensor([top_k]), torch.tensor([top_p]), most_k=top_k)
    found = keep_probable(probs.unsqueeze(0), filters)[0]
    order = sorted(range(VOCAB), key=lambda token: (-probs[token].item(), token))
    kept = [token for token in order[:top_k] if probs[token] >= torch.tensor(min_p) * probs[order[0]]]
    mass = sum(probs[token].item() for token in kept)
    least, reached = [], 0.0
    for token in kept:
        if top_p < 1.0 and reached > top_p * mass + 1e-5:
            break
        least.append(token)
        reached += probs[token].item()
    found_set = set(found.nonzero().flatten().tolist())
    if top_p < 1.0 and abs(sum(probs[t].item() for t in found_set) - top_p * mass) < 2e-5:
        return  # the cut falls on a rounding error: both answers are right
    slack = 1 if top_p < 1.0 and abs(reached - probs[least[-1]].item() - top_p * mass) < 2e-5 else 0
    assert len(least) - slack <= len(found_set) <= len(least)
    assert found_set == set(order[: len(found_set)])


def test_logit_bias_can_force_and_forbid_a_token() -> None:
    row = logits(1)[0]
    best = int(row.argmax())
    assert one(row, SamplingParams(temperature=0.0, logit_bias={7: 100.0})) == 7
    assert one(row, SamplingParams(temperature=0.0, logit_bias={best: -100.0})) != best


def test_penalties_follow_their_formulas() -> None:
    table_prompt, generated = (3,), [5, 5, 3]
    row = logits(1)[0]
    params = SamplingParams(
        temperature=0.0, repetition_penalty=1.5, frequency_penalty=0.3, presence_penalty=0.2, logprobs=0
    )
    sampler = sampler_with(params, prompt=table_prompt)
    for position, token in enumerate(generated):
        forced = torch.full((1, VOCAB), -1e9)
        forced[0, token] = 1e9
        assert sampler.sample(forced, ("0",), [position]).tokens == [token]
    expected = row.clone()
    for token, count in ((3, 1), (5, 2)):
        value = expected[token]
        value = value / 1.5 if value > 0 else value * 1.5
        expected[token] = value - 0.3 * count - 0.2
    # A token is chosen over the penalised one exactly when its logit is greater than the formula's.
    for token in (3, 5):
        for margin, winner in ((1e-3, 9), (-1e-3, token)):
            probe = torch.full((VOCAB,), -1e9)
            probe[token] = row[token]
            probe[9] = expected[token] + margin
            fresh = sampler_with(params, prompt=table_prompt)
            for position, made in enumerate(generated):
                forced = torch.full((1, VOCAB), -1e9)
                forced[0, made] = 1e9
                fresh.sample(forced, ("0",), [position])
            assert fresh.sample(probe.unsqueeze(0), ("0",), [3]).tokens == [winner]


def test_repetition_penalty_counts_the_prompt_and_the_others_do_not() -> None:
    row = torch.full((VOCAB,), -10.0)
    row[1], row[9] = 1.0, 0.9
    assert (
        one(row, SamplingParams(temperature=0.0, frequency_penalty=2.0, presence_penalty=2.0), prompt=(1,))
        == 1
    )
    assert one(row, SamplingParams(temperature=0.0, repetition_penalty=2.0), prompt=(1,)) == 9


def test_penalties_of_one_row_leave_the_others_alone() -> None:
    batch = torch.zeros(2, VOCAB)
    batch[:, 1], batch[:, 9] = 1.0, 0.9
    params = [SamplingParams(temperature=0.0), SamplingParams(temperature=0.0, repetition_penalty=2.0)]
    assert sampler_with(*params, prompt=(1,)).sample(batch, ids(2), [0, 0]).tokens == [1, 9]


def test_released_penalty_slots_start_clean_for_the_next_request() -> None:
    sampler = Sampler(VOCAB, CPU)
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0)
    row = torch.full((VOCAB,), -10.0)
    row[1], row[9] = 1.0, 0.9
    for turn in range(20):
        sampler.admit("a", params, (1,) if turn % 2 else (2,), seed=0, stop_tokens=())
        assert sampler.sample(row.clone().unsqueeze(0), ("a",), [0]).tokens == [9 if turn % 2 else 1]
        sampler.release("a")


def test_min_tokens_forbids_stop_tokens_until_enough_came_out() -> None:
    row = logits(1)[0]
    row[4] = 50.0
    params = SamplingParams(temperature=0.0, min_tokens=3)
    assert one(row, params, position=2, stops=(4,)) != 4
    assert one(row, params, position=3, stops=(4,)) == 4


def test_rows_without_a_finite_distribution_draw_no_token_and_spoil_no_other() -> None:
    batch = logits(4)
    batch[0] = torch.nan
    batch[1] = -torch.inf
    batch[2, 5] = torch.inf
    for params in (
        SamplingParams(temperature=0.0),
        SamplingParams(seed=1),
        SamplingParams(seed=1, top_p=0.5),
    ):
        tokens = sampler_with(*[params] * 4).sample(batch.clone(), ids(4), [0] * 4).tokens
        assert tokens[:3] == [NO_TOKEN] * 3
        assert 0 <= tokens[3] < VOCAB


def test_logprobs_are_of_the_raw_distribution_with_ranks() -> None:
    row = logits(1)[0]
    raw = row.log_softmax(-1)
    order = raw.argsort(descending=True).tolist()
    params = SamplingParams(temperature=0.0, logprobs=3, logit_bias={order[10]: 100.0})
    sampled = sampler_with(params).sample(row.clone().unsqueeze(0), ("0",), [0])
    entry = sampled.logprobs[0]
    assert sampled.tokens == [order[10]]
    assert [(t.token, t.rank) for t in entry] == [(order[10], 11), *((order[i], i + 1) for i in range(3))]
    assert [t.logprob for t in entry] == pytest.approx([raw[t.token].item() for t in entry], abs=1e-6)


def test_rows_get_as_many_logprobs_as_they_asked_for() -> None:
    params = [SamplingParams(seed=1), SamplingParams(seed=1, logprobs=0), SamplingParams(seed=1, logprobs=5)]
    found = sampler_with(*params).sample(logits(3), ids(3), [0, 0, 0]).logprobs
    assert {row: len(entry) for row, entry in found.items()} == {1: 1, 2: 6}


def test_an_equal_logit_does_not_worsen_the_rank() -> None:
    entry = logprobs_of(torch.zeros(1, VOCAB), [30], [1])[0]
    assert entry[0].rank == 1
    assert entry[0].logprob == pytest.approx(-math.log(VOCAB))


def test_bfloat16_logits_are_sampled_in_float32() -> None:
    row = logits(1).to(torch.bfloat16)
    assert sampler_with(SamplingParams(temperature=0.0)).sample(row, ("0",), [0]).tokens == [
        int(row[0].float().argmax())
    ]
