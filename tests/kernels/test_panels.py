"""Weights in panels, ops shared by threads: the numbers are those of plain weights and one thread."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
import torch

from benthic.kernels import native, native_ops, ops
from benthic.kernels.constants import Constants, Weight
from benthic.kernels.tape import record

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(native.build_refusal() is not None, reason=str(native.build_refusal()))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


SIZES = [(1, 1, 1), (5, 7, 3), (16, 192, 80), (33, 300, 50), (17, 16, 16), (2, 600, 8)]


@pytest.mark.parametrize(("rows", "inner", "outer"), SIZES)
def test_products_from_panels_equal_those_from_columns_to_the_bit(rows: int, inner: int, outer: int) -> None:
    x, weight = random(rows, inner), random(inner, outer).t()
    plain = native_ops.linear(x, weight)
    torch.testing.assert_close(plain, x @ weight.t(), rtol=1e-4, atol=1e-4)
    constants = Constants([weight])
    tape = record(lambda: native_ops.linear(x, weight), constants)
    assert constants.num_bytes == -(-outer // 16) * 16 * inner * 4
    assert torch.equal(tape.replay(), plain)


@pytest.mark.parametrize(("rows", "inner", "outer"), SIZES)
def test_each_expert_reads_its_own_panels(rows: int, inner: int, outer: int) -> None:
    x, weight = random(3 * rows, inner), random(4, inner, outer).transpose(1, 2)
    ends = torch.tensor([rows, rows, 2 * rows, 3 * rows - 1], dtype=torch.int32)  # the last row is nobody's
    tape = record(lambda: ops.grouped_linear(x, weight, ends, impl="native"), Constants([weight]))
    found = tape.replay()
    assert torch.equal(found, ops.grouped_linear(x, weight, ends, impl="native"))
    expected = ops.grouped_linear(x, weight, ends, impl="reference")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_tapes_share_panels_and_a_weight_over_the_limit_is_read_as_it_lies() -> None:
    weights = [random(64, 32, seed=i).t() for i in range(3)]
    constants = Constants(weights, most_bytes=2 * 64 * 32 * 4)
    x = random(3, 64)
    for _ in range(2):
        for weight in weights:
            tape = record(lambda weight=weight: native_ops.linear(x, weight), constants)
            assert torch.equal(tape.replay(), native_ops.linear(x, weight))
    assert constants.num_bytes == 2 * 64 * 32 * 4


def test_what_is_no_parameter_is_never_copied() -> None:
    other = random(64, 32)
    constants = Constants([random(8, 8)])
    assert constants.panels(Weight(other.data_ptr(), 0, 32, 1, 1, 64, 32)) is None
    assert constants.num_bytes == 0


def test_nan_weights_and_rows_stay_in_their_own_sums() -> None:
    weight = random(20, 40)
    weight[3, 39] = torch.nan
    x = random(7, 20)
    x[6] = torch.nan
    found = record(lambda: native_ops.linear(x, weight.t()), Constants([weight])).replay()
    assert found[:6, :39].isfinite().all()
    assert found[6].isnan().all()
    assert found[:, 39].isnan().all()


@pytest.mark.usefixtures("two_threads")
def test_a_tape_gives_the_same_bits_with_two_threads_as_with_one() -> None:
    x, weight, experts = random(16, 192), random(192, 1024).t(), random(4, 512, 130).transpose(1, 2)
    ends = torch.tensor([3, 3, 9, 16], dtype=torch.int32)

    def forward() -> torch.Tensor:
        return ops.grouped_linear(ops.swiglu(native_ops.linear(x, weight)), experts, ends)

    tape = record(forward, Constants([weight, experts]))
    torch.set_num_threads(1)
    alone = tape.replay().clone()
    torch.set_num_threads(2)
    for _ in range(50):
        assert torch.equal(tape.replay(), alone)


@pytest.mark.usefixtures("two_threads")
def test_helpers_without_work_burn_nothing() -> None:
    x, weight = random(64, 512), random(512, 1024).t()
    for _ in range(5):
        native_ops.linear(x, weight)
    time.sleep(0.05)  # a helper watches for two milliseconds, then sleeps
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.1


FORKING = """
import os, torch
from benthic.kernels import native_ops
torch.set_num_threads(2)
x, weight = torch.randn(64, 512), torch.randn(512, 1024).t()
expected = native_ops.linear(x, weight)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(native_ops.linear(x, weight), expected) else 3)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_starts_helpers_of_its_own() -> None:
    assert subprocess.run([sys.executable, "-c", FORKING], timeout=100, check=False).returncode == 0
