"""Launches that are remembered reach the kernel that Triton would have chosen."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from benthic.kernels import relaunch

NAMES = ("x", "count", "rows", "scale", "BLOCK", "LAST")


class Kernel:
    """Compiles nothing, and keeps what was launched through Triton (`slow`) and past it (`quick`)."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.params = [
            SimpleNamespace(
                name=name, default=7, is_constexpr=name.isupper(), do_not_specialize=name == "rows"
            )
            for name in NAMES
        ]
        self.slow, self.quick = [], []

    def run(self, *args, grid, warmup, **options):
        self.slow.append((args, grid, options))
        return (
            None
            if warmup
            else SimpleNamespace(
                run=lambda *given: self.quick.append(given), function="function", packed_metadata="metadata"
            )
        )

    def launch(self, *args, grid=(3,), warmup=False, **options):
        vars(self).get("run", self.run)(*args, grid=grid, warmup=warmup, **options)
        return len(self.slow), len(self.quick)


@pytest.fixture
def device(monkeypatch):
    found = SimpleNamespace(number=0)
    active = SimpleNamespace(
        get_current_device=lambda: found.number, get_current_stream=lambda device: f"stream of {device}"
    )
    monkeypatch.setattr(relaunch, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(relaunch, "triton_interprets", lambda: False)
    monkeypatch.setattr(relaunch, "JITFunction", Kernel)
    return found


def descriptor(x, rows):
    dtype = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[x.dtype]
    layout = gl.NVMMASharedLayout.get_default_for([rows, 64], dtype)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, 64], layout)


def test_a_like_launch_goes_past_triton_with_all_arguments_in_order(device):
    kernel = relaunch.remembered(Kernel())
    x, y = torch.empty(8), torch.empty(9)
    assert kernel.launch(x, 4, 100, 0.5, LAST=True, BLOCK=16, num_warps=4) == (1, 0)
    assert kernel.launch(y, 4, 101, 0.25, LAST=True, BLOCK=16, num_warps=4, grid=(5, 6)) == (1, 1)
    (launched,) = kernel.quick
    head = (5, 6, 1, "stream of 0", "function", "metadata", None, None, None)
    assert launched[:9] == head
    assert launched[9] is y
    assert launched[10:] == (4, 101, 0.25, 16, True)


LIKE = {"x": torch.empty(8), "count": 4, "rows": 100, "scale": 0.5, "BLOCK": 16}


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.zeros(8, dtype=torch.bfloat16)},
        {"x": torch.zeros(9)[1:]},
        {"count": 5},
        {"count": 4.0},
        {"count": None},
        {"rows": 2**31},
        {"rows": True},
        {"scale": 1},
        {"BLOCK": 16.0},
        {"BLOCK": 32},
        {"LAST": 8},
        {"num_warps": 8},
        {"LAST": gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)},
    ],
    ids=lambda other: "x in bfloat16" if other.get("x", LIKE["x"]).dtype == torch.bfloat16 else str(other),
)
def test_what_triton_compiles_anew_for_goes_its_way(device, other):
    kernel = relaunch.remembered(Kernel())
    for launch in (LIKE, LIKE | other):
        args = [launch[name] for name in NAMES[:4]]
        options = {"BLOCK": launch["BLOCK"], "LAST": launch.get("LAST", 7)}
        kernel.launch(*args, **options, num_warps=launch.get("num_warps", 4))
    assert (len(kernel.slow), kernel.quick) == (2, [])


def test_devices_are_told_apart(device):
    kernel = relaunch.remembered(Kernel())
    kernel.launch(*LIKE.values())
    device.number = 1
    assert kernel.launch(*LIKE.values()) == (2, 0)
    assert kernel.launch(*LIKE.values()) == (2, 1)


def test_descriptors_are_told_apart_by_dtype_and_block(device):
    kernel = relaunch.remembered(Kernel())
    bf16, half = (torch.empty(128, 64, dtype=dtype) for dtype in (torch.bfloat16, torch.float16))
    known = ((bf16, 64, (1, 0)), (bf16.clone(), 64, (1, 1)), (bf16, 32, (2, 1)), (half, 64, (3, 1)))
    for x, rows, expected in known:
        assert kernel.launch(descriptor(x, rows)) == expected


def test_a_tensor_among_the_constants_is_refused(device):
    kernel = relaunch.remembered(Kernel())
    with pytest.raises(TypeError, match="not remembered by a Tensor"):
        kernel.launch(torch.empty(8), BLOCK=torch.empty(1))


def test_profilers_and_warm_ups_see_triton_launch(device, monkeypatch):
    kernel = relaunch.remembered(Kernel())
    assert kernel.launch(*LIKE.values(), warmup=True) == (1, 0)
    assert kernel.launch(*LIKE.values()) == (2, 0)
    with monkeypatch.context() as profiled:
        profiled.setattr(relaunch.knobs.runtime.launch_enter_hook, "calls", [print])
        assert kernel.launch(*LIKE.values()) == (3, 0)
    monkeypatch.setattr(Kernel, "run", Mock())
    assert kernel.launch(*LIKE.values()) == (3, 0)


def test_the_interpreter_is_left_alone(monkeypatch):
    monkeypatch.setattr(relaunch, "triton_interprets", lambda: True)
    kernel = Kernel()
    assert relaunch.remembered(kernel) is kernel
    assert "run" not in vars(kernel)
