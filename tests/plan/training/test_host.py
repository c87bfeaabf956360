"""The host in a step: launches bound small microbatches, drains come on top, documents change kernels."""

from __future__ import annotations

import dataclasses
import json

import pytest
from typer.testing import CliRunner

from benthic.cli import plan as command
from benthic.errors import ConfigError, ScheduleError
from benthic.plan.cost import machine as machines
from benthic.plan.cost.machine import Measured
from benthic.plan.cost.ops import Attention, Gemm
from benthic.plan.cost.price import price
from benthic.plan.training.block import block
from benthic.plan.training.candidate import Candidate, Rows
from benthic.plan.training.launches import DENSE, EMBEDDING, HEAD, MIXTURE, STAGE, Calls
from benthic.plan.training.overlay import overlay
from benthic.plan.training.stage import shape_of
from benthic.plan.training.step import step, waterfall
from benthic.sched.pipeline.schedules import build
from benthic.sched.pipeline.spans import Span, write_spans
from benthic.spec import presets
from benthic.spec.layout import Layout

RUN = CliRunner()
H200 = machines.get("h200")
SLICE = dataclasses.replace(presets.get("moonlight-16b-a3b"), num_hidden_layers=4)


def one(**changes) -> Candidate:
    values = {"model": SLICE, "layout": Layout(), "train": Rows(cuda_graph=False), "rows": 8}
    return Candidate(**values | changes)


def with_host(**seconds: float):
    known = {f"host {name.replace('_', ' ')}": value for name, value in seconds.items()}
    first = dataclasses.replace(H200.profiles[0], overheads=known)
    return dataclasses.replace(H200, profiles=(first, *H200.profiles[1:]))


def test_a_slow_host_sets_the_time_of_a_step_and_a_fast_one_none_of_it():
    free = step(one(), with_host())
    slow = step(one(), with_host(operator_forward=1.0, operator_input=2.0, operator_weight=3.0))
    fast = step(one(), with_host(operator_forward=1e-9, operator_input=1e-9, operator_weight=1e-9))
    calls = Calls()
    for each in (STAGE, EMBEDDING, DENSE, MIXTURE, MIXTURE, MIXTURE, HEAD):
        calls = calls.plus(each)
    assert fast.seconds == free.seconds
    assert slow.timeline.makespan == pytest.approx(8 * (calls.forward + 2 * calls.input + 3 * calls.weight))
    assert waterfall(slow)["host"] == pytest.approx(slow.seconds - free.seconds, rel=1e-6)
    assert "host" not in waterfall(free)


def test_no_host_sets_the_time_of_a_step_that_is_one_graph():
    machine = with_host(operator_forward=1.0, operator_input=1.0, operator_weight=1.0, collective=1.0)
    free = step(one(), with_host())
    assert step(one(train=Rows()), machine).seconds == free.seconds
    spread = one(train=Rows(), layout=Layout(dp_degree=2, ep_degree=2))
    assert step(spread, machine).seconds < 1.0
    assert step(spread, dataclasses.replace(machine, gpus_per_node=1)).seconds > 1.0
    assert step(one(train=Rows(), layout=Layout(cp_degree=2)), machine).seconds > 1.0


def test_a_division_by_tensor_ranks_leaves_the_host_its_launches():
    machine = with_host(collective=1.0)
    divided = step(one(layout=Layout(tp_degree=2)), machine)
    assert divided.timeline.makespan == pytest.approx(8 * (4 * 10 + 3)), "the balance's sum"


def test_zero_adds_its_collectives_to_every_slot_and_a_slow_host_hides_them():
    sharded = one(layout=Layout(dp_degree=2, zero_stage=3))
    free, whole = step(sharded, with_host()), step(one(layout=Layout(dp_degree=2)), with_host())
    each = free.update.each_microbatch.seconds
    assert each > 0.0
    assert free.timeline.makespan == pytest.approx(whole.timeline.makespan + 4 * each)
    slow = {"operator_forward": 1.0, "operator_input": 1.0, "operator_weight": 1.0}
    later = step(sharded, with_host(**slow)).timeline.makespan
    assert later == pytest.approx(
        step(one(layout=Layout(dp_degree=2)), with_host(**slow)).timeline.makespan + 4 * 4 * (42 + 2 + 8 + 3)
    ), "only the operators that it adds"
    assert waterfall(free)["gradients and weights over links"] == pytest.approx(
        free.update.collectives.seconds + 4 * each
    )


def test_sums_ride_inside_the_products_that_make_them():
    shape = shape_of(one(), H200)
    inside = [each for each in block(shape, moe=True) if each.inside is not None]
    assert {each.part for each in inside} == {"W"}
    experts = next(each for each in inside if each.name == "routed experts")
    assert experts.inside.bytes == 8.0 * 64 * 2 * 1408 * 2048


def test_documents_take_the_kernel_of_packs_and_fewer_pairs_less_time():
    whole = Attention(rows=4, heads=16, seq_len=4096, qk_dim=192, v_dim=128, backward=True)
    packed = dataclasses.replace(whole, packed=True)
    half = dataclasses.replace(packed, kept=0.5)
    assert half.flops == packed.flops / 2
    alike = price(whole, H200).seconds
    assert price(packed, H200).seconds == pytest.approx(alike, rel=0.1), "Gluon runs both"
    assert price(half, H200).seconds < price(packed, H200).seconds
    masked, every = (step(one(train=Rows(kept_pairs=kept)), H200).seconds for kept in (0.8, 1.0))
    assert 0.9 * every < masked < every
    assert every == pytest.approx(step(one(), H200).seconds, rel=0.03)
    for share in (0.0, -1.0, 1.5):
        with pytest.raises(ConfigError, match=rf"kept_pairs = {share}"):
            Rows(kept_pairs=share)


def test_a_foretold_step_lies_beside_the_run_of_the_same_table():
    found = step(one(layout=Layout(pp_degree=2)), H200)
    table = found.timeline.table
    spans = [
        Span(rank, timed.slot, 7.0 + timed.start, 7.0 + timed.end)
        for rank, slots in enumerate(found.timeline.slots)
        for timed in slots
    ]
    events = json.loads(overlay(found, write_spans(spans)))["traceEvents"]
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert names == [f"{table.name}, predicted", f"{table.name}, measured"]
    times = [
        [(e["tid"], e["name"], e["ts"]) for e in events if e["ph"] == "X" and e["pid"] == p] for p in (0, 1)
    ]
    assert len(times[0]) == 32
    for foretold, seen in zip(*times, strict=True):
        assert foretold[:2] == seen[:2]
        assert foretold[2] == pytest.approx(seen[2], abs=1.0)
    other = [Span(0, slot, 0.0, 1.0) for slot in build("gpipe", 2, 8).slots[0]]
    with pytest.raises(ScheduleError, match="rank 0"):
        overlay(found, write_spans(other))


def test_the_command_writes_the_foretold_step_and_refuses_a_run_with_nowhere_to_put_it(tmp_path):
    trace, spans = tmp_path / "trace.json", tmp_path / "spans.jsonl"
    spans.write_text("")
    words = ["train", "moonlight-16b-a3b", "--gpus", "8", "--hardware", "h200", "--global-batch-size", "32"]
    words += [
        "--pp",
        "2",
        "--ep",
        "4",
        "--tp",
        "1",
        "--zero",
        "1",
        "--precision",
        "bf16",
        "--schedule",
        "1f1b",
    ]
    done = RUN.invoke(command.app, [*words, "--perfetto", str(trace)])
    assert f"wrote {trace}" in done.output, done.output
    slots = [e for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"]
    assert {event["tid"] for event in slots} == {0, 1}
    nowhere = RUN.invoke(command.app, [*words, "--report", str(tmp_path / "none" / "page.html")])
    assert f"there is no folder {tmp_path / 'none'}" in str(nowhere.exception)
    refused = RUN.invoke(command.app, [*words, "--measured", str(spans)])
    assert "1 files of --measured, but 0 of --perfetto" in str(refused.exception)
    assert "ZeRO has stages 1 to 3" in str(RUN.invoke(command.app, [*words, "--zero", "4"]).exception)
    assert "kept_pairs = 1.5" in str(RUN.invoke(command.app, [*words, "--kept-pairs", "1.5"]).exception)


def test_products_go_no_faster_than_a_hot_gpu_keeps_up():
    peak = H200.hardware.bf16_flops

    def waits(share: float) -> dict[str, float]:
        square = Gemm(m=8192, n=8192, k=8192, name="sustained")
        long = Measured(square, square.flops / (share * peak))
        profile = dataclasses.replace(
            H200.profiles[0],
            points=(*(one for one in H200.profiles[0].points if one.op.kind != long.op.kind), long),
            overheads={},
        )
        return waterfall(step(one(), dataclasses.replace(H200, profiles=(profile, *H200.profiles[1:]))))

    cool, warm, hot, hotter = (waits(share) for share in (1.0, 0.65, 0.2, 0.1))  # of the peak
    assert warm["attention products"] > cool["attention products"]
    assert warm["attention core"] == cool["attention core"], "it multiplies slower than that anyway"
    for name in ("attention products", "attention core"):
        assert hotter[name] == pytest.approx(2.0 * hot[name])
    assert hot["norms"] == cool["norms"]
