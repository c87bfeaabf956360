"""Training plans: steps that add up, bounds that hold, searches that miss nothing, bad questions."""

from __future__ import annotations

import dataclasses
import json
import re
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from benthic.cli import plan as command
from benthic.cli.dry_run import assumed, nothing
from benthic.cli.settings import apply, typed
from benthic.errors import BenthicError, ConfigError, UnknownFieldError
from benthic.parallel.footprint import footprints
from benthic.plan.cost import machine as machines
from benthic.plan.training.candidate import PRECISIONS, RECOMPUTES, Candidate, Rows
from benthic.plan.training.memory import memory, timeline
from benthic.plan.training.plan import Plan, as_dict, plan
from benthic.plan.training.report import report
from benthic.plan.training.run import Failures
from benthic.plan.training.search import front, fullest, search
from benthic.plan.training.space import Question, Space, candidate, walk
from benthic.plan.training.step import step, waterfall
from benthic.plan.training.tables import digest
from benthic.spec import presets
from benthic.spec.layout import Layout
from benthic.train import recipes
from benthic.train.resolve import resolve
from benthic.train.rows import rows_at

RUN = CliRunner()
V3 = Candidate(
    model=presets.get("deepseek-v3"),
    layout=Layout(pp_degree=16, dp_degree=128, ep_degree=64, schedule="dualpipe"),
    train=Rows(),
    rows=15360,
    precision=PRECISIONS["fp8"],
    recompute=("deepseek-v3",),
)
MOONLIGHT = presets.get("moonlight-16b-a3b")
SMALL = Space(zero=(1, 3), recomputes=("none", "experts"), local_batch_sizes=(1, 2), tp=(1, 2), ep=(1, 4, 8))


def question(gpus=8, rows=32, hardware="h200", **more):
    return Question(model=MOONLIGHT, machine=machines.get(hardware), gpus=gpus, rows=rows, **more)


def test_v3_on_2048_h800_takes_what_deepseek_published_within_ten_percent():
    found = step(V3, machines.get("h800"))
    assert found.seconds == pytest.approx(19.926, rel=0.1)
    hours = found.seconds * 14.8e12 / V3.step_tokens * 2048 / 3600
    assert hours == pytest.approx(2664e3, rel=0.1)
    pairs = [
        sum(t.end - t.start for t in slots if t.slot.second is not None) for slots in found.timeline.slots
    ]
    assert sorted(pairs)[8] == pytest.approx(13.95, rel=0.1)


def test_the_waterfall_adds_up_to_the_step():
    found = step(V3, machines.get("h800"))
    assert sum(waterfall(found).values()) == pytest.approx(found.seconds, rel=1e-6)


def test_an_exchange_within_a_host_holds_multiprocessors_only_while_it_runs():
    layout = Layout(pp_degree=2, dp_degree=2, ep_degree=2, schedule="dualpipev")
    one = Candidate(model=MOONLIGHT, layout=layout, train=Rows(local_batch_size=4), rows=64)
    machine = machines.get("h200")
    machine = dataclasses.replace(  # whose host launches nothing
        machine, profiles=(dataclasses.replace(machine.profiles[0], overheads={}), *machine.profiles[1:])
    )
    near = step(one, machine)
    far = step(one, dataclasses.replace(machine, gpus_per_node=1))
    assert sum(waterfall(near).values()) == pytest.approx(near.seconds, rel=1e-6)
    for found in (near, far):
        pair = next(t.slot for slots in found.timeline.slots for t in slots if t.slot.second is not None)
        lanes, took = found.prices.lanes(pair), found.prices.of_slot(pair)
        share = 20 / 132  # of the multiprocessors
        held = share * lanes.exchange if found is near else lanes.products * share / (1 - share)
        assert found.prices.slowed(lanes) == pytest.approx(held)
        least = max(lanes.products + held, lanes.exchange)
        assert took == pytest.approx(least if found is near else least / 0.916)


@pytest.mark.parametrize(
    "schedule", ["1f1b", "zb-h1", "zb-v", "dualpipe", "dualpipev", "interleaved", "chimera"]
)
def test_what_a_digest_foretells_is_what_the_table_does(schedule):
    one = Candidate(
        model=MOONLIGHT,
        layout=Layout(pp_degree=4, dp_degree=2, ep_degree=2, schedule=schedule),
        train=Rows(),
        rows=32,
        recompute=("experts",),
    )
    h200, table = machines.get("h200"), digest(schedule, 4, 16, None)
    found = step(one, h200, table.order)
    assert found.seconds == step(one, h200).seconds
    assert table.least(found.prices, found.prices.work) <= found.timeline.makespan * (1 + 1e-9)
    every = memory(one, one.table())
    assert fullest(one, table).total == pytest.approx(max(rank.total for rank in every))
    for rank, kept in zip(every, footprints(one, one.table()), strict=True):
        assert {name: rank.terms[name] for name in kept.bytes} == kept.bytes
        curve = timeline(found, rank.rank)
        assert max(size for _, size in curve) <= kept.bytes["activations"] * (1 + 1e-9)
        assert curve[-1][1] == 0


@settings(max_examples=25, deadline=None)
@given(
    factor=st.floats(1, 8),
    rate=st.sampled_from(["nvlink_bandwidth", "network_bandwidth", "hbm_bandwidth", "bf16_flops"]),
    schedule=st.sampled_from(["1f1b", "zb-h1", "dualpipe", "dualpipev"]),
    zero=st.sampled_from([1, 2, 3]),
)
def test_faster_hardware_never_slows_a_plan(factor, rate, schedule, zero):
    layout = Layout(pp_degree=2, dp_degree=8, ep_degree=8, schedule=schedule, zero_stage=zero)
    one = Candidate(model=MOONLIGHT, layout=layout, train=Rows(), rows=64)
    slow = machines.get("h200", gpus_per_node=4)
    hardware = dataclasses.replace(slow.hardware, **{rate: getattr(slow.hardware, rate) * factor})
    assert step(one, dataclasses.replace(slow, hardware=hardware)).seconds <= step(one, slow).seconds * (
        1 + 1e-9
    )


@given(
    schedule=st.sampled_from(["1f1b", "zb-h1", "dualpipe"]),
    recompute=st.sampled_from(sorted(RECOMPUTES)),
    zero=st.sampled_from([1, 2, 3]),
    tp=st.sampled_from([1, 2]),
)
def test_a_larger_microbatch_never_needs_less_memory(schedule, recompute, zero, tp):
    layout = Layout(pp_degree=2, dp_degree=4, tp_degree=tp, ep_degree=2, schedule=schedule, zero_stage=zero)
    sizes = []
    for rows in (1, 2, 4):
        train = Rows(local_batch_size=rows)
        one = Candidate(model=MOONLIGHT, layout=layout, train=train, rows=64, recompute=RECOMPUTES[recompute])
        sizes.append(fullest(one, digest(schedule, 2, one.microbatches, None)).total)
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("capacity", [200e9, 80e9, 60e9])
def test_pruning_never_drops_the_optimum(capacity):
    asked = question(hardware="h100")
    every = []
    for bounded in walk(asked, SMALL):
        one = candidate(asked, bounded.choice)
        assert one.problems(gpus=8) == ()
        table = digest(
            bounded.choice.schedule, bounded.choice.pp, one.microbatches, bounded.choice.virtual_stages
        )
        size = fullest(one, table).total
        seconds = step(one, asked.machine, table.order).seconds
        assert bounded.seconds <= seconds
        assert bounded.bytes <= size
        if size <= capacity:
            every.append(seconds)
    found = search(asked, SMALL, keep=3, capacity=capacity)
    assert [one.step.seconds for one in found.best] == pytest.approx(sorted(every)[:3])
    assert len(found.evaluated) < found.screened / 10


def test_a_front_only_trades_time_for_memory():
    found = front(search(question(), SMALL, keep=8).evaluated)
    times, sizes = [one.step.seconds for one in found], [one.memory.total for one in found]
    assert times == sorted(times)
    assert sizes == sorted(sizes, reverse=True)


def test_failures_take_what_young_and_daly_say():
    failures = Failures(gpu_mtbf_hours=1000, checkpoint_seconds=50, restart_seconds=0)
    assert failures.interval(1000) == pytest.approx((2 * 50 * 3600) ** 0.5)
    assert failures.goodput(1000) == pytest.approx(1 / (1 + 50 / 600 + 300 / 3600))
    assert failures.goodput(10) > failures.goodput(1000)
    with pytest.raises(ConfigError, match="gpu_mtbf_hours = 0"):
        Failures(gpu_mtbf_hours=0)


def test_a_plan_prints_as_text_as_json_and_as_a_page_without_network(tmp_path):
    page = tmp_path / "plan.html"
    words = ["train", "moonlight-16b-a3b", "--gpus", "8", "--hardware", "h200", "--global-batch-size", "64"]
    words += ["--tokens", "10B", "--zero", "1", "--precision", "bf16", "--tp", "1", "--report", str(page)]
    output = RUN.invoke(command.app, words).output
    assert "where the step goes" in output
    assert "measured" in output
    assert set(re.findall(r"\w+://[^\s\"')<]+", page.read_text())) == set()
    found = json.loads(RUN.invoke(command.app, [*words, "--json"]).output)
    assert found["best"][0]["step_seconds_low"] <= found["best"][0]["step_seconds"]
    assert sum(found["waterfall_seconds"].values()) == pytest.approx(found["best"][0]["step_seconds"])
    assert sum(found["coverage"].values()) == pytest.approx(1)
    assert found["run"]["gpu_hours"] == pytest.approx(found["run"]["seconds"] * 8 / 3600)


def test_rows_a_microbatch_and_remainders_may_be_asked_for():
    words = ["train", "moonlight-16b-a3b", "--gpus", "2", "--hardware", "h200", "--global-batch-size", "64"]
    words += ["--zero", "1", "--precision", "bf16", "--tp", "1", "--cp", "1", "--local-batch-size", "4"]
    whole, split = (
        json.loads(RUN.invoke(command.app, [*words, *more, "--json"]).output)["best"][0]
        for more in ([], ["--store-param-remainders"])
    )
    assert whole["settings"]["train.local_batch_size"] == split["settings"]["train.local_batch_size"] == 4
    assert split["settings"]["optimizer.store_param_remainders"]
    assert split["step_seconds"] < whole["step_seconds"]  # less is computed again


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0"], "0 GPUs train nothing"),
        (["--gpus", "8", "--hardware", "h2000"], "Did you mean 'h200'"),
        (["--gpus", "7", "--pp", "2"], "pp = 2 is no divisor of 7 GPUs. Take some of 1, 7."),
        (["--gpus", "8", "--pp", "2", "--pp", "3"], "pp = 3 is no divisor of 8 GPUs"),
        (["--gpus", "8", "--ep", "5"], "ep = 5 is no divisor of 64 experts and 8 GPUs"),
        (["--gpus", "8", "--tp", "32"], "tp = 32 is no divisor of 16 heads and 8 GPUs"),
        (["--gpus", "8", "--precision", "fp9"], "Did you mean 'fp8'"),
        (["--gpus", "8", "--schedule", "dualpip"], "Did you mean 'dualpipe'"),
        (["--gpus", "8", "--tokens", "many"], "no number of tokens"),
        (["--gpus", "8", "--tokens", "1e400"], "tokens = inf, but it must be finite"),
        (["--gpus", "8", "--skew", "inf"], "skew = inf, but it must be finite"),
        (["--gpus", "8", "--usd-per-gpu-hour", "inf"], "usd_per_gpu_hour = inf"),
        (["--gpus", "8", "--gpu-mtbf-hours", "nan"], "all must be finite"),
        (["--gpus", "8", "--gpu-mtbf-hours", "inf"], "all must be finite"),
        (["--gpus", "8", "--checkpoint-seconds", "inf"], "all must be finite"),
        (["--gpus", "8", "--restart-seconds", "nan"], "all must be finite"),
        (["--gpus", "8", "--measured", "spans.jsonl"], "1 files of --measured, but 0 of --perfetto"),
    ],
)
def test_impossible_questions_are_refused_with_the_reason(words, message):
    hardware = [] if "--hardware" in words else ["--hardware", "h200"]
    result = RUN.invoke(command.app, ["train", "moonlight-16b-a3b", *words, *hardware])
    assert isinstance(result.exception, BenthicError)
    assert message in str(result.exception)


def test_what_does_not_fit_is_answered_with_how_many_gpus_would_do():
    narrow = Space(pp=(1,), tp=(1,), ep=(1, 2, 4, 8), zero=(1,), recomputes=("attention and experts",))
    narrow = dataclasses.replace(narrow, precisions=("bf16",), schedules=("1f1b",), local_batch_sizes=(1,))
    with pytest.raises(ConfigError, match=r"no layout .* on 1 h100 fits: .* of these GPUs are enough"):
        plan(question(gpus=1, hardware="h100"), narrow, usd_per_gpu_hour=2, failures=Failures())


def test_the_report_and_the_dictionary_hold_the_same_winner():
    narrow = Space(pp=(1, 2), tp=(1,), ep=(8,), zero=(1,), precisions=("bf16",))
    found = plan(question(gpus=16), narrow, usd_per_gpu_hour=2, failures=Failures())
    words = as_dict(found)["best"][0]["words"]
    assert words in report(found)
    assert found.run.usd == pytest.approx(2 * found.run.gpu_hours)


@pytest.mark.parametrize(
    ("steps", "flips", "said"),
    [
        ((10.0,), (), None),
        ((10.0, 10.02), ("twice the bf16 flops",), "0.20% slower, which is a tie"),
        (
            (10.0, 11.0),
            ("twice the bf16 flops",),
            "10.00% slower; it would be first with twice the bf16 flops",
        ),
        ((10.0, 11.0), (), "10.00% slower"),
    ],
)
def test_a_runner_up_that_is_no_slower_than_a_step_is_foretold_is_a_tie(steps, flips, said):
    best = [SimpleNamespace(step=SimpleNamespace(seconds=seconds)) for seconds in steps]
    assert Plan(None, SimpleNamespace(best=best), None, 2.0, 1.0, flips).runner_up == said


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_a_plan_says_to_set_makes_the_trainer_run_the_plan(precision):
    asked = question(gpus=8, rows=64)
    found = search(
        asked, Space(schedules=("interleaved",), pp=(2,), ep=(4,), precisions=(precision,)), keep=1
    )
    best = found.best[0].candidate
    recipe = dataclasses.replace(recipes.get("deepseek_v3_2048_h800"), model=MOONLIGHT)
    config = apply(recipe, [f"{name}={typed(value)}" for name, value in best.settings().items()])
    ready = resolve(config, assumed(config), nothing(config), ranks=8).config
    assert ready.layout == best.layout
    assert ready.recompute == best.recompute
    assert rows_at(ready, 10**12) == best.rows
    assert vars(best.precision).items() <= vars(ready.precision).items()
    assert Candidate.of(ready, best.rows) == best
    assert footprints(ready, best.table()) == footprints(best, best.table())


@pytest.mark.parametrize(("precision", "zero_stage"), [("bf16", 1), ("bf16", 3), ("fp8", 1)])
def test_remainders_save_two_bytes_of_a_bfloat16_weights_master(precision, zero_stage):
    ours = machines.get("h200")
    layout = Layout(dp_degree=8, ep_degree=8, zero_stage=zero_stage)
    numbers = PRECISIONS[precision]
    plain = Candidate(model=MOONLIGHT, layout=layout, train=Rows(), rows=64, precision=numbers)
    split = dataclasses.replace(
        plain, optimizer=dataclasses.replace(plain.optimizer, store_param_remainders=True)
    )
    assert Candidate.of(split, split.rows) == split
    whole, less = (memory(one, one.table())[0].terms for one in (plain, split))
    changed = {name: (whole[name], less[name]) for name in whole if whole[name] != less[name]}
    assert list(changed) == ["masters"]
    before, after = changed["masters"]
    assert after == before / 2 if precision == "bf16" else before / 2 < after < before
    assert step(split, ours).seconds < step(plain, ours).seconds


def test_rows_longer_than_the_model_has_positions_are_refused_as_by_the_trainer():
    words = "train moonlight-16b-a3b --gpus 8 --hardware h100 --seq-len 9000"
    with pytest.raises(ConfigError, match="but moonlight-16b-a3b has 8192 positions"):
        RUN.invoke(command.app, words.split(), catch_exceptions=False)


def test_unknown_precisions_are_refused():
    from benthic.plan.training.candidate import precision

    with pytest.raises(UnknownFieldError, match="Did you mean 'bf16'"):
        precision("bf61")
