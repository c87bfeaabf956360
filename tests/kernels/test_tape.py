"""Tapes: what was recorded happens again on new inputs, and what cannot happen again is refused."""

from __future__ import annotations

import pytest
import torch

from benthic.errors import BackendError
from benthic.kernels import native, ops
from benthic.kernels.constants import Constants
from benthic.kernels.tape import _Capture, record

pytestmark = pytest.mark.skipif(native.build_refusal() is not None, reason=str(native.build_refusal()))


def test_a_replay_computes_on_what_the_inputs_hold_now() -> None:
    weight, scale = torch.randn(7, 12), torch.rand(12)
    x = torch.randn(5, 12)

    def forward() -> torch.Tensor:
        return torch.nn.functional.linear(ops.rms_norm(x, scale, 1e-6) + x, weight)

    tape = record(forward, Constants([weight, scale]))
    for seed in range(3):
        x.copy_(torch.randn(5, 12, generator=torch.Generator().manual_seed(seed)))
        torch.testing.assert_close(tape.replay(), forward(), rtol=1e-5, atol=1e-5)


def test_intermediate_results_are_kept_so_that_nothing_else_takes_their_memory() -> None:
    x = torch.randn(4, 64)
    tape = record(lambda: ops.swiglu(ops.swiglu(x + x)), Constants([]))
    filler = [torch.full((4, 64), torch.nan) for _ in range(50)]
    torch.testing.assert_close(tape.replay(), ops.swiglu(ops.swiglu(x + x)))
    assert len(tape) == 3
    assert tape.num_bytes == 4 * (4 * 64 + 4 * 32 + 4 * 16)
    assert len(filler) == 50


def test_batched_products_take_heads_from_the_middle_and_turn_constants_once() -> None:
    weight = torch.randn(3, 10, 6)
    x = torch.randn(4, 3, 8)

    def forward() -> torch.Tensor:
        inside = (x.transpose(0, 1) @ weight[:, :8]).transpose(0, 1)
        return (inside.transpose(0, 1) @ weight[:, 2:].transpose(1, 2)).transpose(0, 1).flatten(1)

    constants = Constants([weight])
    tape = record(forward, constants)
    x.normal_()
    torch.testing.assert_close(tape.replay(), forward(), rtol=1e-5, atol=1e-5)
    assert len(tape) == 2


def test_angles_equal_those_of_torch() -> None:
    positions, frequency = torch.tensor([0, 1, 500, 163839]), torch.tensor([1.0, 0.01, 1e-4])

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        angle = positions[:, None] * frequency
        return angle.cos() * 1.5, angle.sin()

    tape = record(forward, Constants([]))
    for found, expected in zip(tape.replay(), forward(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (lambda x: x.exp(), "exp"),
        (lambda x: x.t().contiguous(), "clone"),
        (lambda x: x.copy_(x + x), "copy_"),
        (lambda x: x + x[0], "broadcasts"),
        (lambda x: x @ x.t(), "neither a parameter nor columns"),
        (lambda x: x * x, "other than positions times frequencies"),
        (lambda x: x.double() + 1, "_to_copy"),
        (lambda x: x[x > 0], "gt"),
        (lambda x: torch.nn.functional.linear(x, x, x[0]), "bias"),
    ],
)
def test_what_a_replay_would_not_repeat_is_refused_by_name(what, words: str) -> None:
    x = torch.randn(4, 4)
    with pytest.raises(BackendError, match="a tape cannot repeat") as refusal:
        record(lambda: what(x), Constants([]))
    assert words in str(refusal.value)


def test_after_a_refusal_ops_run_as_before() -> None:
    x = torch.randn(2, 8)
    with pytest.raises(BackendError):
        record(x.exp, Constants([]))
    torch.testing.assert_close(ops.swiglu(x, impl="native"), ops.swiglu(x, impl="reference"))
    assert native.RECORDER.get() is None


def test_recording_does_not_load_the_compiler():
    """Two seconds of every start of a CPU engine; torch wraps the method of a mode that it hides from it."""
    assert not hasattr(_Capture.__torch_dispatch__, "__wrapped__")
