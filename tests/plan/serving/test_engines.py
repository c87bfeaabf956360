"""Engines by name and from files, fitted to measured steps: they round-trip, and wrong ones are refused."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benthic.cli import plan as command
from benthic.errors import BenthicError, ConfigError, DataError, UnknownFieldError
from benthic.plan.cost import machine as machines
from benthic.plan.cost.ops import GroupedGemm
from benthic.plan.serving import engines
from benthic.plan.serving.engine_fit import MeasuredStep, fit_engine, left_out, replace_engine
from benthic.plan.serving.fronts import FREE, FrontCost
from benthic.plan.serving.layout import ServingLayout
from benthic.plan.serving.measured import read_host, read_measured
from benthic.plan.serving.priced import TUNED, Engine, PricedStep
from benthic.plan.serving.steps import StepLoad
from benthic.spec import presets

RUN = CliRunner(env={"COLUMNS": "100", "TERM": "dumb"})
RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
MEASURED, BEFORE = RESULTS / "serve_gpu_bf16.json", RESULTS / "serve_gpu.json"
PLAIN = PricedStep(presets.get("moonlight-16b-a3b"), ServingLayout(), machines.get("h200"))


def decode(batch: int) -> StepLoad:
    return StepLoad(batch, batch, batch * 1000, 0, 0, 0, batch)


def test_engines_are_found_by_name_and_by_file(tmp_path):
    assert engines.get("tuned") is TUNED
    own = engines.get("benthic")
    assert own.name == "benthic"
    assert [rows for rows, _ in own.mixed_curve] == [576.0, 2112.0], "512 and 2,048 tokens beside 64 decodes"
    assert own.graph_rows == 4096
    assert own.front.write_s > own.front.token_s >= 0.0
    assert own.front.way_s > own.front.hub_s > 0.0
    assert 0.0 < own.prompt_host_s < 5e-3
    file = tmp_path / "own.json"
    engine = Engine(
        name="own",
        eager_layer_s=1e-3,
        graph_layer_s=5e-5,
        stretch=1.25,
        curve=((1.0, 1.1), (8.0, 0.9)),
        prompt_host_s=1e-3,
        front=FrontCost(write_s=1e-4, way_s=2e-3),
    )
    file.write_text(engines.as_json(engine, "a test"))
    assert engines.get(str(file)) == engine
    with pytest.raises(UnknownFieldError, match="Did you mean 'benthic'"):
        engines.get("bentic")
    with pytest.raises(ConfigError, match=r"no engine nowhere\.json.*benthic plan engine"):
        engines.get("nowhere.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stretch": 0}, "stretch is 0, but it must be a finite number of 0.1 or more"),
        ({"prompt_stretch": "1"}, "prompt_stretch is '1'"),
        ({"prompt_layer_s": -1e-6}, "prompt_layer_s is -1e-06"),
        ({"graph_layer_s": -0.1}, "graph_layer_s is -0.1, but it must be a finite number of -0.001 or more"),
        ({"eager_layer_s": "1"}, "eager_layer_s is '1'"),
        ({"prompt_host_s": -1e-3}, "prompt_host_s is -0.001"),
        ({"more": 1}, "14 of the 14 fields .* missing or unknown: more"),
        ({"front": {"write_s": 1e-4}}, "1 of the 6 fields of an engine's front; .*request_s"),
        ({"front": dict(vars(FREE), token_s=-1)}, "token_s is -1"),
        ({"curve": [[1, 1.0], [2]]}, r"curve has \[2\], but it is a list of pairs"),
        ({"curve": {}}, "curve has {}, but it is a list of pairs"),
        ({"curve": [[0, 1.0]]}, "rows is 0, but it must be a finite number of 1 or more"),
        (
            {"prompt_curve": [[64, 1.0], [64, 1.1]]},
            r"prompt_curve has rows \[64.0, 64.0\], but they must rise",
        ),
        ({"format": 1}, "an engine of format 1, but 7 is read"),
    ],
)
def test_a_file_that_is_no_engine_says_which_number_is_wrong(change, message):
    good = json.loads(engines.as_json(TUNED, "a test"))
    with pytest.raises(ConfigError, match=message):
        engines.parse(json.dumps(good | change), where="x.json")
    with pytest.raises(ConfigError, match=r"x\.json is no JSON"):
        engines.parse("{", where="x.json")


def test_kernels_for_few_rows_may_be_faster_than_prices_measured_with_many():
    fast = [MeasuredStep(decode(b), 0.9 * PLAIN([decode(b)]) + 3e-3) for b in (1, 16, 64)]
    found = fit_engine("x", PLAIN, fast)
    assert 0.9 < found.stretch < 0.95, "prices are worth something too"
    for each in fast:
        assert replace_engine(PLAIN, found)([each.load]) == pytest.approx(each.seconds, rel=0.03)
    prompt = StepLoad(0, 0, 0, 4096, 4096 * 2048, 0, 1)
    assert replace_engine(PLAIN, found)([prompt]) == PLAIN([prompt]), "nothing was measured of it"
    single = fit_engine("x", PLAIN, fast[:1])
    assert replace_engine(PLAIN, single)([fast[0].load]) == pytest.approx(fast[0].seconds)
    with pytest.raises(DataError, match="0 of 0 measured steps decode"):
        fit_engine("x", PLAIN, [])
    with pytest.raises(DataError, match=r"takes 0\.0 s"):
        fit_engine("x", PLAIN, [MeasuredStep(decode(1), 0.0)])


def test_kernels_that_overlap_take_less_together_but_never_less_than_half():
    few = [MeasuredStep(decode(b), PLAIN([decode(b)]) - 2e-4) for b in (1, 16, 64, 128)]
    found = fit_engine("x", PLAIN, few)
    assert found.graph_layer_s == pytest.approx(-2e-4 / 27, rel=0.1)
    assert fit_engine("x", PLAIN, few[:2]).graph_layer_s == 0.0, "as well prices that are too high"
    short = replace_engine(PLAIN, replace(found, graph_layer_s=-1e-3))
    assert short([decode(1)]) == pytest.approx(found.stretch * PLAIN([decode(1)]) / 2)


def test_most_of_what_lines_leave_is_a_curve_over_rows():
    bent = [1.0, 1.0, 1.3, 1.0]
    steps = [
        MeasuredStep(decode(b), share * PLAIN([decode(b)]))
        for b, share in zip((1, 16, 64, 256), bent, strict=True)
    ]
    found = fit_engine("x", PLAIN, steps)
    fitted, lines = (replace_engine(PLAIN, each) for each in (found, replace(found, curve=())))
    for each in steps:
        took, foretold = fitted([each.load]), lines([each.load])
        assert took / foretold == pytest.approx((each.seconds / foretold) ** 0.8), "most of the way"
    assert [rows for rows, _ in found.curve] == [1.0, 16.0, 64.0, 256.0]
    shares = dict(found.curve)
    assert found.share(32.0, decodes=True, prompts=False) == pytest.approx((shares[16.0] + shares[64.0]) / 2)
    assert found.share(1000.0, decodes=True, prompts=False) == shares[256.0]
    assert found.share(32.0, decodes=False, prompts=True) == 1.0, "another curve, unmeasured"


def test_steps_with_prompts_are_padded_to_the_sizes_that_are_recorded():
    engine = replace(TUNED, graph_rows=4096)
    assert [engine.recorded_rows(rows) for rows in (1, 64, 65, 2048, 2112, 4096, 4097)] == [
        *(64, 64, 128, 2048, 2560, 4096, 4097)
    ]
    assert [engine.recorded_rows(rows, 64) for rows in (60, 70, 2112, 2113, 4096)] == [
        64,
        128,
        2112,
        2624,
        4096,
    ]
    assert engine.recorded_rows(2112, 65) == 2560, "where more decode, sizes are those of prompts alone"
    step = replace_engine(PLAIN, engine)

    def took(tokens: int) -> float:
        return step([StepLoad(0, 0, 0, tokens, tokens * 100, 0, 1)])

    assert took(2112) > 1.1 * took(2048)
    assert took(2560) < 1.02 * took(2112)


def test_experts_that_nobody_chose_are_not_read():
    experts = [op for op in PLAIN.operations.experts(8.0) if isinstance(op, GroupedGemm)]
    assert {op.rows for op in experts} == {48.0}
    assert experts[0].experts == pytest.approx(64 * (1 - (58 / 64) ** 8))
    assert PLAIN.operations.experts(1000.0)[0].experts == pytest.approx(64.0)


def test_decode_steps_of_a_program_before_are_foretold_from_the_others_within_five_percent():
    steps = [each for each in read_measured(BEFORE, "bf16") if not each.load.prefill_tokens]
    assert [each.load.decodes for each in steps] == [1, 8, 32, 64, 256, 512]
    errors = [abs(error) for error in left_out("benthic", PLAIN, steps)]
    assert statistics.median(errors) <= 0.05
    assert max(errors) <= 0.1


def test_todays_decode_steps_are_foretold_from_those_around_them_within_five_percent():
    """And the first and the last, which have others on one side alone, within 15."""
    steps = [each for each in read_measured(MEASURED, "bf16") if not each.load.prefill_tokens]
    assert [each.load.decodes for each in steps] == [1, 8, 32, 64, 256, 512]
    first, *between, last = (abs(error) for error in left_out("benthic", PLAIN, steps))
    assert max(between) <= 0.05
    assert max(first, last) <= 0.15


def test_recorded_steps_with_prompts_are_foretold_from_the_others_within_a_tenth():
    steps = read_measured(MEASURED, "bf16", graph_rows=4096)
    recorded = [(each.load.prefill_tokens, each.load.decodes) for each in steps if each.recorded]
    assert recorded == [(512, 64), (2048, 64), (128, 0), (512, 0), (2048, 0), (4096, 0)]
    errors = left_out("benthic", PLAIN, steps)
    off = [abs(error) for step, error in zip(steps, errors, strict=True) if step.recorded]
    assert statistics.median(off) < 0.05
    assert max(off) < 0.1
    assert not any(each.recorded for each in read_measured(MEASURED, "bf16"))


def test_a_prompt_measured_step_after_step_stands_for_the_one_that_was_alone(tmp_path):
    alone = {"what": "prefill", "weights": "bf16", "prompts": "1 x 512", "tokens_per_second": 512 / 0.016}
    chained = {
        "what": "a prompt beside decodes",
        "weights": "bf16",
        "prompt": 512,
        "batch": 0,
        "context": 1024,
        "step_ms": 15.0,
        "as_written_ms": 40.0,
    }
    other = alone | {"prompts": "1 x 128"}
    file = tmp_path / "steps.json"
    file.write_text(json.dumps({"rows": [alone, other, chained]}))
    steps = read_measured(file, "bf16", graph_rows=4096)
    assert [(each.load.tokens, each.load.samples, each.recorded) for each in steps] == [
        *((128, 1, False), (512, 1, True), (512, 1, False))
    ]
    assert [each.seconds for each in steps] == [128 * 0.016 / 512, 0.015, 0.04]
    assert read_host(file, "bf16") == pytest.approx(0.001), "what alone it waited for"
    longer = [{**alone, "prompts": "1 x 4096"}, {**chained, "prompt": 4096}]
    file.write_text(json.dumps({"rows": [*longer, alone, chained]}))
    assert read_host(file, "bf16") == pytest.approx(0.001), "of the shortest"
    file.write_text(json.dumps({"rows": [alone, {**chained, "batch": 64}]}))
    assert read_host(file, "bf16") == 0.0, "nothing was measured both ways"


def test_files_without_measured_steps_are_refused(tmp_path):
    with pytest.raises(DataError, match="no file"):
        read_measured(tmp_path / "none.json", "bf16")
    file = tmp_path / "x.json"
    file.write_text('{"lines": []}')
    with pytest.raises(DataError, match="no rows"):
        read_measured(file, "bf16")
    file.write_text('{"rows": [{"what": "decode", "weights": "bf16", "batch": 1}]}')
    with pytest.raises(DataError, match=r"row 1 of .*context"):
        read_measured(file, "bf16")


def test_the_command_fits_an_engine_that_plan_serve_and_replay_take(tmp_path):
    out = tmp_path / "engine.json"
    words = ["engine", str(MEASURED), "--model", "moonlight-16b-a3b", "--hardware", "h200", "--out", str(out)]
    done = RUN.invoke(command.app, words)
    assert "median error left out" in done.output, done.output
    question = "serve moonlight-16b-a3b --gpus 1 --hardware h200 --isl 1000 --osl 20 --ttft 1 --tpot 0.05"
    answers = {
        engine: json.loads(RUN.invoke(command.app, [*question.split(), "--engine", engine, "--json"]).output)
        for engine in ("tuned", str(out))
    }
    tuned, own = (answers[engine]["answers"][0]["goodput"] for engine in ("tuned", str(out)))
    assert 0.0 < own < tuned
    assert "engine 'own'" in answers[str(out)]["assumptions"][0]
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 500, "output_length": 20}\n')
    replay = ["replay", "moonlight-16b-a3b", "--trace", str(trace), "--hardware", "h200", "--json"]
    slow = tmp_path / "slow.json"
    slow.write_text(engines.as_json(Engine(name="slow", graph_layer_s=5e-5), "a test"))
    first, second = (
        json.loads(RUN.invoke(command.app, [*replay, "--engine", word]).output)["tpot_p50_s"]
        for word in ("tuned", str(slow))
    )
    assert second == pytest.approx(first + 27 * 5e-5)
    wrong = RUN.invoke(command.app, [*question.split(), "--engine", "tunde"])
    assert isinstance(wrong.exception, BenthicError)


def test_help_of_plan_starts_no_planner():
    script = (
        "import sys; from benthic.cli import plan; "
        "print([m for m in sys.modules if m.startswith(('benthic.plan.', 'torch', 'benthic.sched'))])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
