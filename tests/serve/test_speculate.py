"""Speculation: other steps, the same tokens, whoever drafts and whatever else happens."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from small_engine import NANO, is_empty, poison, random_model, request, serve, small_engine
from trained import starts, trained_model

from benthic.errors import ConfigError
from benthic.model.checkpoint import save_pretrained
from benthic.model.local import packed_sockets, plain_linear
from benthic.sched.replay import replay
from benthic.serve.drafts import Drafts, Trial
from benthic.serve.engine import Engine, _wanted
from benthic.serve.lookup import PromptLookup
from benthic.serve.messages import SamplingParams
from benthic.serve.options import EngineOptions
from benthic.serve.sampler import Sampler
from benthic.serve.speculative import Speculative, parse

if TYPE_CHECKING:
    from pathlib import Path

    from benthic.model.network import DeepSeek
    from benthic.serve.messages import Generate

CPU = torch.device("cpu")


def speculative(method: str = "mtp", count: int = 3, *, adaptive: bool = False) -> Speculative:
    return Speculative(method=method, num_speculative_tokens=count, adaptive=adaptive)


def mixed(count: int = 14) -> list[Generate]:
    """Greedy and seeded, filtered, biased and penalised, with log-probabilities and early ends."""
    kinds: list[dict] = [
        {},
        {"temperature": 0.9, "top_p": 0.9},
        {"temperature": 1.1, "top_k": 7, "repetition_penalty": 1.3},
        {"logprobs": 2},
        {"temperature": 0.7, "presence_penalty": 0.8, "frequency_penalty": 0.3, "logprobs": 0},
        {"prompt_logprobs": 1},
        {"min_tokens": 3, "stop_token_ids": tuple(range(2, 20)), "temperature": 1.0},
        {"logit_bias": {9: 3.0}, "temperature": 1.0},
        {"frequency_penalty": 1.5},
    ]
    return [
        request(str(i), prompt, seed=i, max_tokens=4 + 5 * (i % 5), **kinds[i % len(kinds)])
        for i, prompt in enumerate(starts(count, seed=31))
    ]


def ids(answer) -> list[list[int]]:
    return [[entry.token for entry in row] for row in answer.logprobs]


def assert_equal(found, expected) -> None:
    for name, answer in expected.items():
        assert found[name].tokens == answer.tokens, name
        assert (found[name].finish, found[name].deltas[-1].stop_token) == (
            answer.finish,
            answer.deltas[-1].stop_token,
        )
        assert ids(found[name]) == ids(answer)


@pytest.fixture(scope="module")
def plain():
    return serve(small_engine(trained_model()), mixed())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_blocks": 22},
        {"max_num_batched_tokens": 11, "block_size": 3},
        {"enable_prefix_caching": False, "max_num_seqs": 2, "async_scheduling": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["mtp", "ngram"])
def test_every_kind_of_request_gets_the_tokens_it_gets_without_drafts(plain, method, options):
    engine = small_engine(trained_model(), speculative=speculative(method), **options)
    assert_equal(serve(engine, mixed()), plain)
    assert is_empty(engine)
    stats = engine.stats()
    assert 0 < sum(stats.accepted_at) == stats.accepted_tokens <= stats.draft_tokens


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("overlapped", [False, True])
def test_any_number_of_drafts_that_comes_and_goes_with_the_clock_changes_nothing(plain, count, overlapped):
    chosen = speculative(count=count, adaptive=True)
    engine = small_engine(trained_model(), speculative=chosen, async_scheduling=overlapped)
    assert_equal(serve(engine, mixed()), plain)
    assert engine.stats().drafts > 0


def test_two_prediction_modules_draft_and_their_drafts_hold():
    model = trained_model(depth=2)
    asked = [request(str(i), p, max_tokens=20) for i, p in enumerate(starts(6, seed=4))]
    engine = small_engine(model, speculative=speculative(count=3))
    assert_equal(serve(engine, asked), serve(small_engine(model), asked))
    stats = engine.stats()
    assert stats.accepted_at[1] > 0.5 * stats.drafts
    assert stats.accepted_at[2] > 0.3 * stats.drafts


@pytest.mark.parametrize("depth", [1, 2])
def test_drafts_made_behind_a_step_are_those_that_would_be_made_before_the_next(depth):
    def run(*, ahead: bool):
        engine = small_engine(trained_model(depth=depth), speculative=speculative(), block_size=64)
        if not ahead:
            engine._drafter._made = NeverMade()
        late, steps = [], engine._runner.steps
        passes = steps.passes
        steps.passes = lambda *given: late.append(1) or passes(*given)
        tokens = {name: answer.tokens for name, answer in serve(engine, mixed()).items()}
        return tokens, engine.stats(), len(late)

    tokens, stats, late = run(ahead=True)
    other_tokens, other_stats, other_late = run(ahead=False)
    assert (tokens, stats.accepted_at) == (other_tokens, other_stats.accepted_at)
    assert late < stats.steps / 3 < stats.steps / 2 < other_late


class NeverMade(dict):
    """Forgets what lies ready, so that all drafts are made before the step that verifies them."""

    def get(self, _slot, default=None):
        return default


def test_modules_that_read_the_normed_state_draft_the_same_greedy_tokens():
    model = random_model(replace(NANO, mtp_hidden="post_norm"))
    asked = [request(str(i), p, max_tokens=12) for i, p in enumerate(starts(4))]
    engine = small_engine(model, speculative=speculative())
    assert_equal(serve(engine, asked), serve(small_engine(model), asked))


def test_a_model_without_a_clue_costs_steps_but_no_token():
    model = random_model()
    asked = [request(str(i), p, max_tokens=12, temperature=1.0, seed=i) for i, p in enumerate(starts(5))]
    engine = small_engine(model, speculative=speculative())
    assert_equal(serve(engine, asked), serve(small_engine(model), asked))
    assert engine.stats().accepted_tokens < 0.2 * engine.stats().draft_tokens


def test_steps_become_fewer_by_the_drafts_that_hold():
    asked = [request("a", starts(1, seed=9)[0], max_tokens=60)]
    engine = small_engine(trained_model(), speculative=speculative())
    answer = serve(engine, asked)["a"]
    stats = engine.stats()
    assert stats.generation_tokens == len(answer.tokens) == 60
    assert stats.steps <= 60 - stats.accepted_tokens
    assert stats.steps < 35


def packed_drafts(model: DeepSeek, tokens: list[int]) -> list[int]:
    """What the first module says at every position of a text, by one packed forward: token i + 2 at i."""
    bounds = torch.tensor([0, len(tokens)], dtype=torch.int32)
    sockets = packed_sockets(bounds, len(tokens), n_routed_experts=model.config.n_routed_experts)
    positions = torch.arange(len(tokens))
    text = torch.tensor(tokens)
    with torch.no_grad():
        hidden = model(text, positions, sockets)
        ahead = model.predict_ahead(0, model.mtp_input(hidden), text.roll(-1), positions, sockets)
        return model.logits(ahead.hidden_TD, plain_linear).argmax(-1).tolist()


@pytest.mark.parametrize("budget", [64, 15])
@pytest.mark.parametrize("count", [1, 3])
def test_first_drafts_are_those_of_the_packed_forward_after_chunks_and_rejections(budget, count):
    """The module's latent cache follows the sequence, also where it had been fed rejected tokens."""
    model = random_model()  # most drafts are rejected
    engine = small_engine(
        model, speculative=speculative(count=count), max_num_batched_tokens=budget, max_num_seqs=4
    )
    seen: dict[str, dict[int, int]] = {}
    draft = engine._drafter.draft

    def noted(plan, positions):
        drafts = draft(plan, positions)
        if drafts is not None:
            for i, name in enumerate(plan.decode_ids):
                if drafts.counts[i]:
                    seen.setdefault(name, {})[plan.decode_positions[i]] = int(drafts.token_DK[i, 0])
        return drafts

    engine._drafter.draft = noted
    asked = [request(str(i), p, max_tokens=14) for i, p in enumerate(starts(4, seed=5))]
    answers = serve(engine, asked)
    compared = 0
    for each in asked:
        expected = packed_drafts(model, [*each.prompt, *answers[each.request_id].tokens])
        for position, token in seen.get(each.request_id, {}).items():
            assert token == expected[position - 1], (each.request_id, position)
            compared += 1
    assert compared > 20


def test_a_stop_token_among_accepted_drafts_ends_the_request_there():
    prompt = starts(1, seed=2)[0]
    tokens = serve(small_engine(trained_model()), [request("a", prompt, max_tokens=20)])["a"].tokens
    stop = tokens[8]
    engine = small_engine(trained_model(), speculative=speculative(count=5))
    answer = serve(engine, [request("a", prompt, max_tokens=20, stop_token_ids=(stop,), logprobs=0)])["a"]
    assert answer.tokens == tokens[: tokens.index(stop) + 1]
    assert (answer.finish, answer.deltas[-1].stop_token) == ("stop", stop)
    assert len(answer.logprobs) == len(answer.tokens)
    assert is_empty(engine)


def test_a_preempted_request_resumes_with_the_same_tokens_and_goes_on_drafting():
    asked = [request(str(i), p, max_tokens=24) for i, p in enumerate(starts(4, seed=8))]
    engine = small_engine(trained_model(), num_blocks=18, speculative=speculative())
    assert_equal(serve(engine, asked), serve(small_engine(trained_model()), asked))
    assert engine.stats().preemptions > 0
    assert engine.stats().accepted_tokens > 20


def test_cached_prefixes_bring_the_latents_of_the_modules_along():
    prompt = starts(1, seed=9, longest=40)[0] * 2
    engine = small_engine(trained_model(), speculative=speculative())
    cold = serve(engine, [request("a", prompt, max_tokens=20)])["a"]
    before = engine.stats()
    warm = serve(engine, [request("b", prompt, max_tokens=20)])["b"]
    after = engine.stats()
    assert warm.deltas[0].cached_tokens > 0
    assert warm.tokens == cold.tokens
    assert after.accepted_tokens - before.accepted_tokens >= 0.7 * before.accepted_tokens


@pytest.mark.parametrize("method", ["mtp", "ngram"])
def test_a_distribution_that_is_not_finite_ends_one_request(method):
    engine = small_engine(trained_model(), speculative=speculative(method))
    poison(engine, "sick")
    healthy = request("healthy", starts(1, seed=2)[0], max_tokens=20)
    answers = serve(engine, [request("sick", [3, 4, 5]), healthy])
    assert (answers["sick"].finish, answers["sick"].tokens) == ("error", [])
    assert answers["healthy"].tokens == serve(small_engine(trained_model()), [healthy])["healthy"].tokens
    assert is_empty(engine)


@pytest.mark.parametrize("method", ["mtp", "ngram"])
def test_a_recorded_run_with_drafts_replays_to_the_same_plans(method, tmp_path: Path):
    file = tmp_path / "record.jsonl"
    engine = small_engine(
        trained_model(), num_blocks=24, speculative=speculative(method, adaptive=True), record=str(file)
    )
    serve(engine, mixed())
    replayed = replay(file.read_text().splitlines())
    assert replayed.totals == engine._scheduler.totals
    assert replayed.totals.accepted_drafts > 0


# ---- the law of what is put out


def draw_rows(logits_QV: torch.Tensor, drafts: list[int], trials: int, **params) -> list[list[int]]:
    """Many seeded requests verify the same drafts under the same logits: what each puts out."""
    sampler = Sampler(logits_QV.shape[1], CPU)
    names = tuple(map(str, range(trials)))
    for i, name in enumerate(names):
        sampler.admit(name, SamplingParams(**params), (1, 2), seed=i, stop_tokens=())
    token_DK = torch.tensor([drafts] * trials)
    trial = Trial.of(Drafts((len(drafts),) * trials, token_DK), trials)
    spread, positions = trial.spread(names, [0] * trials)
    drawing = sampler.start(logits_QV.repeat(trials, 1), spread, positions, trial)
    sampled = drawing.collect()
    assert sampled.held is not None
    return [
        sampled.tokens[first : first + held + 1]
        for first, held in zip(trial.first, sampled.held, strict=True)
    ]


def target(logits_V: torch.Tensor, seen: list[int], params: SamplingParams) -> torch.Tensor:
    """The distribution asked for, written plainly: penalties, temperature, top-k, top-p."""
    logits_V = logits_V.clone()
    for token in set(seen):
        logits_V[token] -= params.presence_penalty + params.frequency_penalty * seen.count(token)
    probs_V = (logits_V / params.temperature).softmax(-1)
    order = probs_V.argsort(descending=True)
    kept = order[: params.top_k or len(order)]
    mass = probs_V[kept] / probs_V[kept].sum()
    kept = kept[mass.cumsum(0) - mass < params.top_p]
    out = torch.zeros_like(probs_V)
    out[kept] = probs_V[kept] / probs_V[kept].sum()
    return out


def chi_square(counts: list[int], expected: list[float]) -> float:
    """Pearson's test: how likely counts at least so far from the expected ones are."""
    found, wanted = (torch.tensor(values, dtype=torch.float64) for values in (counts, expected))
    statistic = ((found - wanted) ** 2 / wanted).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2.0).double(), statistic / 2))


def p_value(tokens: list[int], probs_V: torch.Tensor) -> float:
    counts = Counter(tokens)
    assert all(probs_V[token] > 0 for token in counts)
    places = [v for v in range(len(probs_V)) if probs_V[v] > 0]
    expected = torch.tensor([float(probs_V[v]) for v in places], dtype=torch.float64)
    expected = expected / expected.sum() * len(tokens)
    return chi_square([counts[v] for v in places], expected.tolist())


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 6},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "presence_penalty": 0.6, "frequency_penalty": 0.9, "top_k": 8},
    ],
    ids=str,
)
def test_what_is_put_out_has_the_law_of_the_target_at_every_place(how):
    logits_QV = torch.randn(3, 10, generator=torch.Generator().manual_seed(3)) * 1.2
    likely, unlikely = int(logits_QV[0].argmax()), int(logits_QV[1].topk(4).indices[3])
    params = SamplingParams(**how)
    rows = draw_rows(logits_QV, [likely, unlikely], 20_000, **how)
    assert len({len(row) for row in rows}) == 3
    assert p_value([row[0] for row in rows], target(logits_QV[0], [], params)) > 1e-3
    second = [row[1] for row in rows if len(row) > 1]
    assert p_value(second, target(logits_QV[1], [likely], params)) > 1e-3
    third = [row[2] for row in rows if len(row) > 2]
    assert p_value(third, target(logits_QV[2], [likely, unlikely], params)) > 1e-3


def test_a_fixed_draft_is_accepted_and_replaced_as_leviathan_and_chen_say():
    """With q = 1 at x: accepted with min(1, p(x) / q(x)) = p(x), else drawn from norm(max(0, p - q))."""
    logits_QV = torch.randn(2, 10, generator=torch.Generator().manual_seed(5))
    draft, probs_V = 4, logits_QV[0].softmax(-1)
    rows = draw_rows(logits_QV, [draft], 20_000, temperature=1.0)
    accepted = sum(len(row) == 2 for row in rows)
    share = float(probs_V[draft])
    counts, expected = [accepted, len(rows) - accepted], [share * len(rows), (1 - share) * len(rows)]
    assert chi_square(counts, expected) > 1e-3
    left_V = (probs_V - torch.eye(10)[draft]).clamp(min=0)
    assert p_value([row[0] for row in rows if len(row) == 1], left_V / left_V.sum()) > 1e-3


def test_a_drafter_that_knows_the_distribution_is_always_accepted_by_shared_random_numbers():
    sampler = Sampler(50, CPU)
    names = tuple(map(str, range(500)))
    for i, name in enumerate(names):
        sampler.admit(name, SamplingParams(temperature=1.2, top_p=0.9), (1,), seed=i, stop_tokens=())
    logits_SV = torch.randn(500, 50, generator=torch.Generator().manual_seed(0))
    drafts = sampler.guess(logits_SV.clone(), names, torch.full((500,), 7))
    assert len(set(drafts.tolist())) > 20
    assert drafts.tolist() == sampler.sample(logits_SV.clone(), names, [7] * 500).tokens


# ---- around it


def test_a_request_with_a_grammar_is_not_drafted_for():
    assert not _wanted(request("a", [1], grammar="x")).speculate
    assert _wanted(request("a", [1])).speculate


def test_a_token_of_the_cache_counts_the_layers_that_draft():
    model = random_model()
    with_mtp = small_engine(model, speculative=speculative())._runner.cache.layout
    without = small_engine(model, speculative=speculative("ngram"))._runner.cache.layout
    assert (with_mtp.layers, without.layers) == (4, 3)
    assert with_mtp.token_bytes * 3 == without.token_bytes * 4


def test_mtp_is_refused_where_there_are_no_modules():
    model = random_model(replace(NANO, num_nextn_predict_layers=0))
    with pytest.raises(ConfigError, match="num_nextn_predict_layers = 0"):
        small_engine(model, speculative=speculative())


def test_a_checkpoint_is_loaded_with_its_modules_only_where_they_draft(tmp_path: Path):
    save_pretrained(trained_model(), tmp_path / "nano", dtype=torch.float32)
    settings = {"max_model_len": 96, "max_num_seqs": 4, "max_num_batched_tokens": 32, "block_size": 16}
    asked = request("a", starts(1, seed=5)[0], max_tokens=24)
    answers = {}
    for chosen in (None, speculative()):
        options = EngineOptions(**settings, speculative=chosen)
        engine = Engine.from_pretrained(tmp_path / "nano", options)
        assert len(engine._runner.model.mtp) == (chosen is not None)
        answers[chosen] = serve(engine, [asked])["a"].tokens
    assert answers[None] == answers[chosen]
    assert engine.stats().accepted_tokens > 0


def test_prompt_lookup_proposes_what_followed_the_longest_known_run_last():
    lookup = PromptLookup([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], least=1, most=3)
    assert lookup.draft(2) == [4, 9], "1 2 3 is longer than 2 3"
    lookup.extend([7, 2, 3])
    assert lookup.draft(3) == [7, 2, 3], "2 3 was last followed by 7"
    lookup.extend([8])
    assert lookup.draft(3) == []
    assert PromptLookup([1], least=2, most=4).draft(3) == []


def test_the_config_is_read_in_the_words_of_vllm():
    assert parse('{"method": "deepseek_mtp", "num_speculative_tokens": 2}') == Speculative(
        method="mtp", num_speculative_tokens=2
    )
    text = '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 3}'
    assert parse(text).prompt_lookup_max == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "is a list"),
        ('{"method": "mtp"}', "lacks 'num_speculative_tokens'"),
        ('{"method": "eagle", "num_speculative_tokens": 1}', "method = 'eagle', but only mtp"),
        ('{"method": "eagle", "model": "a"}', "method = 'eagle', but only mtp"),
        ('{"method": "mtp", "num_speculative_token": 1}', "Did you mean num_speculative_tokens"),
        ('{"method": "mtp", "num_speculative_tokens": "2"}', "'2' is not int"),
        ('{"method": "mtp", "num_speculative_tokens": 0}', "num_speculative_tokens = 0"),
        (
            '{"method": "ngram", "num_speculative_tokens": 1, "prompt_lookup_max": 1}',
            "prompt_lookup_max = 1 is below",
        ),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_with_its_field(text, words):
    with pytest.raises(ConfigError, match=words):
        parse(text)
