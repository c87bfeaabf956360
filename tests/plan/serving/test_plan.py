"""A serving plan fits its GPUs, keeps its targets, names the nearest when nothing does, needs no torch."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from typer.testing import CliRunner

from benthic.cli import main
from benthic.errors import BenthicError, ConfigError, DataError, UnknownFieldError
from benthic.plan.cost import machine as machines
from benthic.plan.serving.candidates import Slice, candidates
from benthic.plan.serving.demand import Fixed
from benthic.plan.serving.engine_fit import MeasuredStep, fit_engine
from benthic.plan.serving.goodput import Targets
from benthic.plan.serving.layout import ServingLayout, check, memory_of
from benthic.plan.serving.options import Question, most_of, options
from benthic.plan.serving.page import draw_page
from benthic.plan.serving.priced import Echo, Engine, PricedStep
from benthic.plan.serving.search import at_rate, capacity, plan_serving
from benthic.plan.serving.steps import StepLoad
from benthic.plan.serving.tables import as_dict
from benthic.plan.serving.workers import mapped
from benthic.spec import presets
from benthic.spec.objectives import Objectives

RUN = CliRunner(env={"COLUMNS": "100", "TERM": "dumb"})
MOONLIGHT = presets.get("moonlight-16b-a3b")
V3 = presets.get("deepseek-v3")
H200 = machines.get("h200")


def question(**changes) -> Question:
    values = {
        "model": MOONLIGHT,
        "machine": H200,
        "gpus": 2,
        "lengths": Fixed(prompt_tokens=2000, output_tokens=60),
        "targets": Targets(objectives=Objectives(ttft_s=1.0, tpot_s=0.03)),
    }
    return Question(**values | changes)


def decode(batch: int, context: int = 1000) -> StepLoad:
    return StepLoad(batch, batch, batch * context, 0, 0, 0, batch)


def prompt(tokens: int) -> StepLoad:
    return StepLoad(0, 0, 0, tokens, tokens * (tokens + 1) // 2, tokens, 1)


@pytest.fixture(scope="module")
def plan():
    return plan_serving(question())


def test_the_plan_fits_its_gpus_and_keeps_its_targets(plan):
    assert plan.best.rate == max(answer.rate for answer in plan.answers)
    for answer in plan.answers:
        assert answer.candidate.gpus <= 2
        at = answer.goodput.at_best
        if at is not None:
            assert at.attainment >= 0.9
    assert {answer.candidate.strategy for answer in plan.answers} >= {"together"}
    assert any(answer.candidate.prefill is not None for answer in plan.answers)


def test_prompts_of_a_step_are_as_many_on_average_as_come_and_more_on_the_rank_with_the_most():
    for mean, limit in ((0.0, 3), (0.3, 1), (1.5, 4), (4.0, 4)):
        alone, eight = (most_of(mean, ranks, limit) for ranks in (1, 8))
        for shares in (alone, eight):
            assert sum(shares) == pytest.approx(1.0)
            assert min(shares) >= 0.0
        counted = [sum(count * share for count, share in enumerate(shares)) for shares in (alone, eight)]
        assert counted[0] == pytest.approx(mean)
        assert counted[1] >= counted[0]


def test_the_estimate_is_near_what_the_simulation_finds(plan):
    assert plan.best.candidate.rate == pytest.approx(plan.best.rate, rel=0.3)


def test_no_trial_on_the_front_is_beaten_in_both(plan):
    front = plan.pareto
    assert all(b.tpot_p90_s >= a.tpot_p90_s and b.rate > a.rate for a, b in pairwise(front))


def test_capacity_grows_with_the_rate_and_costs_about_the_same_a_token(plan):
    few, many = capacity(plan.best, 10.0), capacity(plan.best, 1000.0)
    assert few.gpus < many.gpus
    assert many.dollars == pytest.approx(plan.best.dollars, rel=0.2)
    with pytest.raises(ConfigError, match="above 0"):
        capacity(plan.best, 0.0)


def test_the_page_is_whole_and_needs_no_network(plan):
    class Balance(HTMLParser):
        def __init__(self, page: str) -> None:
            super().__init__()
            self.open: list[str] = []
            self.feed(page)

        def handle_starttag(self, tag, attrs):
            if tag != "meta":
                self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

        def handle_startendtag(self, tag, attrs):
            pass

    page = draw_page(plan)
    assert Balance(page).open == []
    assert not re.findall(r"\w+://", page)
    assert page.count("<circle") >= sum(len(answer.goodput.trials) for answer in plan.answers)


def test_the_plan_as_json_has_every_answer_with_its_coverage(plan):
    found = json.loads(json.dumps(as_dict(plan, 50.0)))
    assert [each["goodput"] for each in found["answers"]] == [answer.rate for answer in plan.answers]
    assert found["capacity"]["gpus"] >= 1
    for part in found["decode_step"].values():
        assert sum(part["coverage"].values()) == pytest.approx(1.0)


def test_impossible_targets_name_the_nearest_that_can_be_kept():
    tight = Targets(objectives=Objectives(ttft_s=1e-4, tpot_s=1e-5))
    with pytest.raises(ConfigError) as caught:
        plan_serving(question(targets=tight))
    ttft, tpot = (float(x) for x in re.findall(r">= ([\d.e-]+\d)", str(caught.value)))
    assert ttft > 1e-4
    assert tpot > 1e-5
    nearest = Targets(objectives=Objectives(ttft_s=2 * ttft, tpot_s=2 * tpot))
    assert plan_serving(question(targets=nearest)).best.rate > 0.0


def test_a_model_that_does_not_fit_says_what_it_needs():
    with pytest.raises(ConfigError, match=r"needs \d+ GB a GPU"):
        options(question(model=V3, gpus=2))
    with pytest.raises(ConfigError, match="at least 1 GPU"):
        question(gpus=0)
    with pytest.raises(ConfigError, match="0 MTP layers"):
        question(drafts=1)


def test_where_a_steps_share_of_prompts_does_not_fit_requests_are_served_one_by_one():
    def asked(**targets):
        lengths = Fixed(prompt_tokens=7000, output_tokens=1)
        return question(gpus=1, lengths=lengths, targets=Targets(objectives=Objectives(**targets)))

    (option,) = options(asked())
    assert option.doing_both(2048).rate == pytest.approx(1.0 / option.prompt_s)
    (late,) = options(asked(ttft_s=0.5 * option.prompt_s))
    assert late.doing_both(2048).rate == 0.0
    assert plan_serving(asked(ttft_s=5.0)).best.rate > 0.0


@pytest.mark.parametrize(("output", "budget"), [(1, 8192), (10, 8192), (500, 4096)])
def test_without_a_bound_on_tpot_a_batch_still_fits_its_budget_of_tokens(output, budget):
    asked = question(
        gpus=1,
        lengths=Fixed(prompt_tokens=4000, output_tokens=output),
        targets=Targets(objectives=Objectives()),
    )
    (option,) = options(asked)
    assert option.doing_both(budget).rate > 0.0


def test_every_layout_divides_heads_and_experts():
    assert list(ServingLayout(tp_degree=3).problems(V3))
    with pytest.raises(ConfigError, match="experts"):
        check(V3, ServingLayout(dp_degree=3))
    for option in options(question(model=V3, gpus=32)):
        check(V3, option.layout)


def test_weights_of_one_gpu_are_those_of_the_checkpoint():
    memory = memory_of(MOONLIGHT, ServingLayout(), H200.hardware)
    assert memory.weights == pytest.approx(2 * 15_960_110_208, rel=1e-3)
    deployed = ServingLayout(dp_degree=144, weights="fp8", redundant_experts=32)
    assert memory_of(V3, deployed, machines.get("h800").hardware).weights == pytest.approx(24e9, rel=0.02)


@pytest.mark.parametrize("layout", [ServingLayout(), ServingLayout(tp_degree=2, dp_degree=4, weights="fp8")])
def test_a_step_that_holds_more_never_takes_less(layout):
    step = PricedStep(MOONLIGHT, layout, H200)
    batches = [step([decode(batch)]) for batch in (1, 2, 5, 16, 33, 64, 200, 256)]
    contexts = [step([decode(64, context)]) for context in (10, 100, 1000, 5000, 20000)]
    prompts = [step([prompt(tokens)]) for tokens in (2, 64, 500, 4096, 10000)]
    for times in (batches, contexts, prompts):
        assert times == sorted(times)


def test_the_end_of_a_prompt_costs_less_than_the_whole_of_it():
    step = PricedStep(MOONLIGHT, ServingLayout(), H200)
    whole = step([prompt(4096)])
    ends = [step([StepLoad(0, 0, 0, tokens, tokens * 4096, 4096, 1)]) for tokens in (2, 3, 8, 64, 512, 2048)]
    assert ends == sorted(ends)
    assert ends[0] < whole / 2
    assert ends[-1] < whole


def test_faster_hardware_never_slows_a_step():
    import dataclasses

    base = dataclasses.replace(H200, profiles=())
    for name in ("bf16_flops", "hbm_bandwidth", "nvlink_bandwidth", "network_bandwidth"):
        faster = dataclasses.replace(
            base, hardware=dataclasses.replace(base.hardware, **{name: 2 * getattr(base.hardware, name)})
        )
        for layout in (ServingLayout(), ServingLayout(tp_degree=2, dp_degree=8)):
            for load in (decode(64), prompt(4096)):
                slow, fast = (PricedStep(MOONLIGHT, layout, m)([load]) for m in (base, faster))
                assert fast <= slow * (1 + 1e-9)


def test_the_host_sets_the_time_of_a_step_that_is_no_graph():
    step = PricedStep(MOONLIGHT, ServingLayout(), H200, Engine(name="slow host", eager_layer_s=1.0))
    plain, layers = PricedStep(MOONLIGHT, ServingLayout(), H200), MOONLIGHT.num_hidden_layers
    assert step([prompt(100)]) == layers
    assert step([decode(8)]) == plain([decode(8)])
    quick = PricedStep(MOONLIGHT, ServingLayout(), H200, Engine(name="quick host", eager_layer_s=1e-6))
    assert quick([prompt(100)]) == plain([prompt(100)]), "launches go on beside the device"


def test_an_echo_of_equal_ranks_is_the_step_of_all_of_them():
    step = PricedStep(MOONLIGHT, ServingLayout(dp_degree=8), H200)
    echo = Echo(step, 8)
    for _ in range(8):
        last = echo([decode(32)])
    assert last == pytest.approx(step([decode(32)] * 8))
    assert echo([prompt(4096)]) > last
    assert echo([decode(32)]) > last, "another rank's prompt is in this step"


def test_a_fitted_engine_gives_its_own_steps_back():
    truth = PricedStep(
        MOONLIGHT,
        ServingLayout(),
        H200,
        Engine(name="x", graph_layer_s=5e-5, stretch=1.02, eager_layer_s=2e-3, prompt_stretch=1.05),
    )
    loads = [decode(1), decode(64), decode(256), prompt(100), prompt(8000), prompt(16000)]
    fitted = fit_engine("x", truth, [MeasuredStep(load, truth([load])) for load in loads])
    again = PricedStep(MOONLIGHT, ServingLayout(), H200, fitted)
    for load in (decode(16), decode(200), prompt(300), prompt(12000)):
        assert again([load]) == pytest.approx(truth([load]), rel=0.02)


def test_a_fitted_engine_whose_steps_with_prompts_are_graphs_gives_them_back():
    engine = Engine(name="x", graph_layer_s=4e-5, prompt_layer_s=9e-5, prompt_stretch=1.08, graph_rows=2048)
    host = dataclasses.replace(engine, eager_layer_s=2e-3)
    truth, written = (
        PricedStep(MOONLIGHT, ServingLayout(), H200, each)
        for each in (host, dataclasses.replace(host, graph_rows=0))
    )
    loads = [decode(1), decode(64), prompt(100), prompt(700), prompt(2048), prompt(16000)]
    steps = [
        MeasuredStep(load, truth([load]), recorded=0 < load.prefill_tokens <= 2048) for load in loads
    ] + [MeasuredStep(prompt(100), written([prompt(100)]))]
    again = PricedStep(MOONLIGHT, ServingLayout(), H200, fit_engine("x", truth, steps))
    assert again.engine.graph_rows == 2048
    for load in (decode(16), prompt(300), prompt(1500), prompt(2100), prompt(12000)):
        assert again([load]) == pytest.approx(truth([load]), rel=0.03)


def test_a_single_prompt_near_its_price_is_the_kernels_and_a_slow_one_the_hosts():
    plain = PricedStep(MOONLIGHT, ServingLayout(), H200)
    steps = [MeasuredStep(decode(8), plain([decode(8)]))]
    near, far = ([*steps, MeasuredStep(prompt(4096), share * plain([prompt(4096)]))] for share in (1.1, 2.0))
    assert fit_engine("near", plain, near).eager_layer_s == 0.0
    assert fit_engine("near", plain, near).prompt_stretch == pytest.approx(1.1, abs=0.03)
    found = fit_engine("far", plain, far)
    assert found.eager_layer_s * MOONLIGHT.num_hidden_layers == pytest.approx(2 * plain([prompt(4096)]))
    assert found.prompt_stretch == 1.0


def test_two_workers_come_to_the_plan_of_one():
    asked = question(gpus=1, lengths=Fixed(prompt_tokens=300, output_tokens=5))
    one, two = (plan_serving(asked, workers=workers) for workers in (1, 2))
    assert [(a.candidate.name, a.goodput) for a in one.answers] == [
        (a.candidate.name, a.goodput) for a in two.answers
    ]


def test_requests_too_few_to_break_a_target_end_the_search_at_twice_the_estimate():
    answers = plan_serving(question(lengths=Fixed(prompt_tokens=32, output_tokens=2))).answers
    assert 0.0 < answers[0].rate <= 2.0 * answers[0].candidate.rate


def test_a_worker_hands_on_what_went_wrong_and_says_when_it_died():
    def fails(number: int) -> int:
        if number == 2:
            message = "2 is wrong"
            raise ConfigError(message)
        return number * number

    assert list(mapped(lambda number: number * number, [1, 3, 4], 2)) == [1, 9, 16]
    with pytest.raises(ConfigError, match="2 is wrong"):
        list(mapped(fails, [1, 2, 3], 2))
    with pytest.raises(BenthicError, match="ended with code 3 and 0 results"):
        list(mapped(lambda _: os._exit(3), [1, 2], 2))


def test_twice_what_the_phases_bear_is_simulated_long_enough_to_fail():
    lengths = Fixed(prompt_tokens=2000, output_tokens=200)
    targets = Targets(objectives=Objectives(ttft_s=1.0, tpot_s=0.02))
    asked = question(gpus=4, lengths=lengths, targets=targets)
    (apart,) = [c for c in candidates(asked, options(asked)) if c.name == "3 x 1 GPU -> 1 x 1 GPU"][:1]
    assert at_rate(apart, 2.0 * apart.rate).attainment < 0.5


def test_a_slice_holds_both_phases_nearly_in_proportion():
    asked = question(model=V3, gpus=64, lengths=Fixed(prompt_tokens=4000, output_tokens=500))
    for candidate in candidates(asked, options(asked))[:30]:
        part = Slice.of(candidate)
        lanes = sum(spec.lanes for spec in part.specs())
        assert lanes == part.prefill_lanes + part.decode_lanes
        if candidate.prefill is None:
            continue
        whole = candidate.prefills * candidate.prefill.layout.dp_degree
        other = candidate.decodes * candidate.decode.layout.dp_degree
        wanted = part.decode_lanes * whole / other  # in whole lanes
        assert part.prefill_lanes == pytest.approx(wanted, rel=0.35, abs=0.5)


def test_the_command_prints_json_and_refuses_what_makes_no_sense(tmp_path):
    words = "plan serve moonlight-16b-a3b --gpus 1 --hardware h200 --isl 1000 --osl 20 --ttft 1 --tpot 0.05"
    page = tmp_path / "out.html"
    done = RUN.invoke(main.app, [*words.split(), "--json", "--report", str(page)])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["answers"][0]["goodput"] > 0.0
    assert page.read_text().startswith("<!doctype html>")
    for extra in (
        ["--isl", "9000"],
        ["--rate", "-1"],
        ["--rate", "inf"],
        ["--ttft", "inf"],
        ["--usd-per-gpu-hour", "-1"],
        ["--tpot", "-1"],
        ["--kv-cache-dtype", "int4"],
        ["--burstiness", "0"],
    ):
        assert isinstance(RUN.invoke(main.app, [*words.split(), *extra]).exception, ConfigError)
    wrong = words.replace("h200", "h20000").split()
    assert isinstance(RUN.invoke(main.app, wrong).exception, UnknownFieldError)


def test_the_command_replays_a_trace(tmp_path):
    trace = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:15:{second:02d}.000000,{300 + second},{20}" for second in range(30)]
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows))
    words = ["plan", "replay", "moonlight-16b-a3b", "--trace", str(trace), "--hardware", "h200"]
    done = RUN.invoke(main.app, [*words, "--json", "--ttft", "1"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert (found["requests"], found["refused"], found["attainment"]) == (30, 0, 1.0)
    assert "30 requests" in RUN.invoke(main.app, words).output
    assert RUN.invoke(main.app, [*words[:4], "nowhere.csv", *words[5:]]).exception


def test_requests_of_a_trace_that_no_server_takes_are_not_planned_for(tmp_path):
    trace = tmp_path / "trace.csv"
    lines = [f"2023-11-16 18:15:{second:02d}.000000,{tokens},8" for second, tokens in ((0, 300), (1, 8185))]
    words = ["plan", "serve", "moonlight-16b-a3b", "--gpus", "1", "--hardware", "h200", "--trace", str(trace)]
    alone = ["plan", "serve", "moonlight-16b-a3b", "--gpus", "1", "--hardware", "h200"]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]))
    done = RUN.invoke(main.app, [*words, "--json"])
    assert f"left out: 1 of 2 requests of {trace} have more than the 8192 positions" in done.stderr
    kept = json.loads(done.stdout)["answers"][0]
    fixed = json.loads(RUN.invoke(main.app, [*alone, "--isl", "300", "--osl", "8", "--json"]).stdout)[
        "answers"
    ][0]
    assert kept["goodput"] == pytest.approx(fixed["goodput"], rel=0.01)
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", lines[1]]))
    with pytest.raises(ConfigError, match=r"the shortest of 1 requests .* is 8193 tokens, but .* has 8192"):
        RUN.invoke(main.app, words, catch_exceptions=False)


def test_answers_of_one_token_have_no_tpot_and_a_trace_that_is_no_text_is_refused(tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:00.000000,300,1\n")
    words = ["plan", "replay", "moonlight-16b-a3b", "--trace", str(trace), "--hardware", "h200"]
    assert re.search(r"TPOT +P50 -  P90 -  P99 -\n", RUN.invoke(main.app, words).output)
    assert json.loads(RUN.invoke(main.app, [*words, "--json"]).output)["tpot_p50_s"] is None
    trace.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is no text"):
        RUN.invoke(main.app, words, catch_exceptions=False)


def test_the_command_prints_worked_examples_of_serving():
    text = RUN.invoke(main.app, ["plan", "examples"], env={"COLUMNS": "300"}).output
    assert "2.08333 x (+0.2%)" in text
