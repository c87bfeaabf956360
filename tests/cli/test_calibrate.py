"""A calibration measures what it says, writes a profile that the planner reads, and judges itself."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from spawn import spawn
from typer.testing import CliRunner

from benthic.cli import (
    calibration,
    calibration_host,
    calibration_kernels,
    calibration_ranks,
    main,
    plan_words,
)
from benthic.cli.calibration import ON_CPU, Share, Sizes, _fp8_products, calibrate, errors, machine_of
from benthic.errors import BackendError, ConfigError
from benthic.parallel import start
from benthic.plan.cost import machine as machines
from benthic.plan.cost.machine import Machine, Measured, Profile
from benthic.plan.cost.ops import Gemm, GroupedGemm, MemoryBound
from benthic.plan.cost.price import price
from benthic.plan.training import launches
from benthic.spec import presets

FEW = Sizes(
    rows=(16, 32, 64, 128),
    expert_rows=(3, 64),
    weights=((32, 32), (64, 32)),
    bytes=(2**14, 2**16),
    experts=(2,),
)


def test_a_profile_of_this_cpu_is_read_by_the_planner(tmp_path):
    ticks = itertools.count(step=0.25)
    profile = calibrate("cpu", sizes=FEW, clock=lambda: next(ticks))
    path = tmp_path / "profile.json"
    path.write_text(profile.as_json())
    read = machines.read(path)
    assert read.points == profile.points
    machine = Machine(hardware=machine_of(read), profiles=(read,))
    found = price(Gemm(m=16, n=32, k=32, dtype="fp32"), machine)
    assert (found.provenance, found.seconds) == ("measured", pytest.approx(0.25))
    assert set(read.kinds) == {
        "gemm fp32",
        "grouped gemm fp32",
        "memory accumulate",
        "memory copy",
        "memory rms_norm",
        "memory swiglu",
    }


def test_ranks_share_all_points():
    whole = calibrate("cpu", sizes=FEW).points
    shares = [calibrate("cpu", sizes=FEW, share=Share(rank, 3)).points for rank in range(3)]
    ops = [one.op for share in shares for one in share]
    assert len(ops) == len(set(ops))
    assert set(ops) == {one.op for one in whole}
    kinds = {one.op.kind for one in whole}
    assert {one.op.kind for one in shares[0]} == kinds, "the first has some of every kind"


@pytest.mark.parametrize(("seconds", "each"), [(0.0, 1), (1e9, 2)])
def test_when_time_is_up_every_other_point_of_a_kind_is_left_out(seconds, each):
    told = []
    share = Share(seconds=seconds)
    profile = calibrate("cpu", sizes=FEW, share=share, tell=lambda *words: told.append(words))
    counts = {kind: len(points) for kind, points in profile.kinds.items()}
    assert counts.pop("gemm fp32") == 4 * each
    assert set(counts.values()) == {each}
    assert told[-1] == ("", 9 * each, 18), "who is told learns how many were left out"


def test_left_out_points_of_a_smooth_machine_are_foretold():
    def seconds(op):
        return 1e-5 + (op.flops / 1e11 if isinstance(op, Gemm) else op.bytes / 1e10)

    ops = [Gemm(m=m, n=256, k=256, dtype="fp32") for m in (32, 64, 128, 256, 512)]
    ops += [MemoryBound(bytes=2.0**i) for i in range(18, 26)]
    profile = Profile(hardware="a test", source="", points=tuple(Measured(op, seconds(op)) for op in ops))
    assert max(errors(profile).values()) < 0.15


def test_products_in_fp8_and_their_experts_are_those_that_training_runs():
    for op, call in _fp8_products("cpu", FEW):
        assert op.dtype == "fp8"
        assert call().shape == ((op.rows if isinstance(op, GroupedGemm) else op.m), op.n)


FEW_KERNELS = calibration_kernels.Kernels(
    attention=((2, 64),),
    packed=((2, 64),),
    rows=(128,),
    expert_rows=(128,),
    experts=2,
    weights=((64, 32),),
    decode=((3, 100),),
    heads=(2,),
    columns=((128, 128),),
)


def test_gradients_that_are_timed_are_those_of_their_weights():
    for op, call in calibration_kernels.gradients("cpu", FEW_KERNELS):
        grouped = isinstance(op, GroupedGemm)
        assert op.gradient if grouped else op.name == "gradient"
        total, sums = call.args[0], []
        for _ in range(3):
            call()
            sums.append(total.clone())
        assert total.shape == ((2, 64, 32) if grouped else (64, 32))
        first, second = (after - before for before, after in itertools.pairwise(sums))
        assert first.abs().max() > 0.0, "it adds,"
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3, msg="and the same each time")


def test_decoding_is_timed_over_both_kinds_of_cache():
    found = [(op.cache_dtype, call().shape) for op, call in calibration_kernels.decoding("cpu", FEW_KERNELS)]
    assert found == [("fp32", (3, 1, 2, 512)), ("fp8", (3, 1, 2, 512))]


def test_attention_is_timed_both_ways_for_whole_rows_and_for_documents():
    found = list(calibration_kernels.attention("cpu", FEW_KERNELS))
    assert [(op.packed, op.kept, op.backward) for op, _ in found] == [
        (False, 1.0, False),
        (False, 1.0, True),
        (True, 34 / 64, False),
        (True, 34 / 64, True),
    ]
    assert [len(call()) for _, call in found] == [128, 3, 128, 3]
    assert {op.kind for op, call in calibration_kernels.tiles("cpu", FEW_KERNELS) if call() is not None} == {
        "memory quantise 1x128",
        "memory quantise 128x1",
        "memory retile",
        "memory transpose fp8",
    }


def test_sizes_of_a_cpu_are_measured_in_reasonable_memory():
    assert max(ON_CPU.bytes) <= 2**26


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(BackendError, match="0 CUDA GPUs"):
        calibrate("cuda")


def test_a_profile_of_a_machine_without_known_peaks_plans_no_gpu(tmp_path):
    path = tmp_path / "profile.json"
    for name, refused in (("a host", True), ("nvidia l40s", True), ("h200", False)):
        path.write_text(Profile(hardware=name, source="a test").as_json())
        if refused:
            with pytest.raises(ConfigError, match=f"measured on {name}.* say nothing about h100"):
                plan_words.machine_of("h100", 8, path)
        else:
            assert plan_words.machine_of("h100", 8, path).profiles[0].hardware == name


NANO = dataclasses.replace(
    presets.get("nano"), num_hidden_layers=3, vocab_size=512, bos_token_id=0, eos_token_id=1
)
FEW_STEPS = calibration_host.Sizes(NANO, seq_len=16, microbatches=2, warm=1, steps=2)


def test_the_host_is_timed_by_slots_and_the_planners_count_of_calls():
    ticks = itertools.count()
    found = calibration_host.overheads("cpu", FEW_STEPS, clock=lambda: float(next(ticks)))
    calls = FEW_STEPS.calls
    assert calls.forward > 200
    assert found == {
        "host operator forward": pytest.approx(1.0 / calls.forward),
        "host operator input": pytest.approx(1.0 / (calls.input + calls.weight)),
        "host operator weight": pytest.approx(1.0 / (calls.input + calls.weight)),
    }, "a slot lasts from one mark to the next"


def test_slots_that_are_timed_hold_the_blocks_of_the_model():
    model = calibration_host.ON_GPU.model
    dense, mixed = launches.DENSE, launches.MIXTURE
    ends = launches.STAGE.plus(launches.EMBEDDING).plus(launches.HEAD)
    assert calibration_host.ON_GPU.calls == ends.plus(dense).plus(mixed).plus(mixed)
    assert model.kv_lora_rank == presets.get("moonlight-16b-a3b").kv_lora_rank, "kernels of the full width"


def everyone(rank: int, folder: str) -> None:
    point = Measured(MemoryBound(bytes=1.0 + rank), 1.0)
    own = Profile(hardware="h200", source="alone", points=(point,), overheads={"host operator input": 9.0})
    per_node = 1 if folder.endswith("apart") else 2
    ranks = calibration_ranks.Ranks(calibration.Stopwatch("cpu"), per_node)
    host = {"host operator forward": 1.0 + rank, "host operator input": 2.0 - rank}
    found = calibration_ranks.together(ranks, own, host, sizes=(2**10, 2**12))
    assert (found is None) == (rank > 0)
    if found is not None:
        (Path(folder) / "profile.json").write_text(found.as_json())


@pytest.mark.parametrize("hosts", ["together", "apart"])
def test_ranks_measure_their_links_and_the_slowest_of_them_counts(tmp_path, hosts):
    folder = tmp_path / hosts
    folder.mkdir()
    spawn(everyone, 2, str(folder))
    profile = machines.read(folder / "profile.json")
    tier = {"together": "nvlink", "apart": "network"}[hosts]
    kinds = ("all-to-all", "all-gather", "reduce-scatter", "all-reduce", "send")
    copies = [one.op.bytes for one in profile.kinds["memory copy"]]
    assert copies == [1.0, 2.0], "what each rank has measured"
    assert {kind: len(points) for kind, points in profile.kinds.items()} == {
        "memory copy": 2,
        **{f"{k} {tier}": 2 for k in kinds},
    }
    assert profile.overheads == {"host operator forward": 2.0, "host operator input": 2.0}
    assert all(one.seconds > 1e-9 for one in profile.points)
    machine = machines.get("h200", gpus_per_node=2 if hosts == "together" else 1, profile=profile)
    for one in profile.points:
        assert price(one.op, machine).provenance == "measured"
    whole, sent = (profile.kinds[f"{kind} {tier}"][0].op for kind in ("all-gather", "all-to-all"))
    assert (whole.bytes, sum(sent.traffic)) == (2**10, 2**9), "half of it stays"


def test_what_a_profile_of_ones_own_does_not_know_of_its_host_a_shipped_one_says():
    own = Profile(hardware="h200", source="", overheads={"host operator forward": 1e-6})
    machine, shipped = machines.get("h200", profile=own), machines.get("h200")
    assert machine.overhead("host operator forward") == 1e-6
    assert machine.overhead("host collective") == shipped.overhead("host collective") > 0.0
    assert machines.get("h800").overhead("host collective") == 0.0, "not of other hardware"


def test_the_command_under_a_launcher_asks_every_rank_and_writes_once(tmp_path, monkeypatch):
    asked = []
    own = Profile(hardware="a host", source="a test")
    monkeypatch.setattr(calibration, "calibrate", lambda device, **_: own)
    monkeypatch.setattr(calibration_ranks.Ranks, "meet", lambda self: asked.append(self.per_node))
    monkeypatch.setattr(calibration_ranks, "together", lambda ranks, own, host: asked.append(host) or own)
    monkeypatch.setattr(start, "joined", lambda *_args, **_options: contextlib.nullcontext())
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    words = ["calibrate", "--device", "cpu", "--out", str(tmp_path / "profile.json")]
    done = CliRunner().invoke(main.app, words)
    assert done.exit_code == 0, done.output
    assert asked == [2, {}]
    assert machines.read(tmp_path / "profile.json").source == "a test"
    monkeypatch.setenv("RANK", "3")
    done = CliRunner().invoke(main.app, [*words[:-1], str(tmp_path / "other.json")])
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "other.json").exists()
