"""Which kernels are launched before the one ahead of them has ended."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from benthic.kernels import launch


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(launch, "_possible", lambda _device: True)
    token = launch._wanted.set(True)  # whatever the environment says
    yield torch.device("cuda", 0)
    launch._wanted.reset(token)


def test_few_rows_on_a_capable_gpu_are_launched_early(hopper):
    assert launch.early(hopper, 1) == {"PDL": True, "launch_pdl": True}
    assert launch.early(hopper, launch.FEW_ROWS) == {"PDL": True, "launch_pdl": True}
    assert launch.early(hopper, launch.FEW_ROWS + 1) == {"PDL": False}


def test_a_cpu_and_other_gpus_launch_in_turn(hopper, monkeypatch):
    assert launch.early(torch.device("cpu"), 1) == {"PDL": False}
    monkeypatch.setattr(launch, "_possible", lambda _device: False)
    assert launch.early(hopper, 1) == {"PDL": False}


@pytest.mark.parametrize(
    ("capability", "hip", "possible"), [((8, 0), None, False), ((9, 0), None, True), ((9, 4), "6.2", False)]
)
def test_only_nvidia_from_hopper_on_is_capable(monkeypatch, capability, hip, possible):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(launch, "triton_interprets", lambda: False)
    launch._possible.cache_clear()
    assert launch._possible(torch.device("cuda", 0)) is possible
    launch._possible.cache_clear()


def test_within_in_turn_nothing_is_launched_early(hopper):
    with launch.in_turn():
        assert launch.early(hopper, 1) == {"PDL": False}
    assert launch.early(hopper, 1)["PDL"]
