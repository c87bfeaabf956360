"""The op table says what runs and why, loads what it names, and costs next to nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from benthic.errors import BackendError
from benthic.kernels import ops
from benthic.kernels.ops.fp8_fused import SWIGLU_GRADIENT_FP8_BOTH, WEIGHTED_SWIGLU_GRADIENT_FP8_BOTH
from benthic.kernels.ops.fp8_linear import FP8_LINEAR
from benthic.kernels.ops.linear_gradients import GROUPED_INPUT_GRADIENT
from benthic.kernels.ops.moe import GROUPED_LINEAR, GROUPED_SWIGLU
from benthic.kernels.table import (
    Case,
    Implementation,
    Op,
    device_type,
    hopper_refusal,
    no,
    reference,
    yes,
)

pytest.importorskip("triton", reason="the table names Triton modules")


@pytest.mark.parametrize("name", ops.IMPLEMENTATIONS)
def test_every_implementation_names_a_function_that_exists(name):
    for implementation in ops.IMPLEMENTATIONS[name]:
        assert callable(implementation.load())
    assert ops.IMPLEMENTATIONS[name][-1].name == "reference"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_explain_gives_a_choice_and_a_reason_for_every_op(device, dtype):
    choices = ops.explain(device, dtype)
    assert list(dict.fromkeys(choice.op.split()[0] for choice in choices)) == list(ops.IMPLEMENTATIONS)
    assert all(choice.implementation != "none" and choice.reason for choice in choices)
    assert all(reason for choice in choices for _, reason in choice.others)


@pytest.mark.parametrize(
    ("dims", "grad", "chosen"),
    [
        ((192, 128), True, "gluon"),
        ((192, 128), False, "gluon"),
        ((128, 128), True, "gluon"),
        ((64, 64), False, "gluon"),
        ((64, 64), True, "gluon"),
        ((96, 96), True, "cudnn"),
    ],
    ids=str,
)
def test_attention_of_equal_lengths_runs_in_gluon_at_widths_that_it_takes(dims, grad, chosen, monkeypatch):
    monkeypatch.setattr("benthic.kernels.table.hopper_refusal", lambda: None)
    op = next(op for op in ops.OPS if op.name == "attention")
    case = Case("cuda", torch.bfloat16, (*dims, 1), equal=True, grad=grad)
    assert op.select(case)[0].name == chosen


def test_an_op_that_nothing_runs_is_refused_with_every_reason():
    never = Op("example", (Implementation("one", lambda _: no("too cold"), "a:b"),))
    with pytest.raises(BackendError, match=r"example cannot run on cpu in torch.float16.*one: too cold"):
        never.choose(Case("cpu", torch.float16))


def test_the_first_that_runs_is_chosen_and_a_name_overrides_it():
    rms_norm = "benthic.kernels.torch_norm:rms_norm"
    example = Op(
        "example",
        (
            Implementation("refuses", lambda _: no("never"), rms_norm),
            Implementation("runs", lambda _: yes("always"), rms_norm),
            reference("benthic.kernels.reference.norm:rms_norm"),
        ),
    )
    case = Case("cpu", torch.float32)
    assert example.select(case)[0].name == "runs"
    assert example.select(case, "reference")[0].name == "reference"
    with pytest.raises(BackendError, match="never"):
        example.choose(case, "refuses")


def test_a_case_is_judged_once_and_then_looked_up():
    judged = []

    def when(case):
        judged.append(case)
        return yes("always")

    example = Op("example", (Implementation("runs", when, "benthic.kernels.reference.norm:swiglu"),))
    case, training = Case("cpu", torch.float32), Case("cpu", torch.float32, grad=True)
    found = {example.choose(each) for each in (case, training, case, case, training)}
    assert len(found) == 1
    assert judged == [case, training]


def test_the_cheap_device_type_is_the_real_one():
    for device in ("cpu", "meta"):
        assert device_type(torch.empty(1, device=device)) == device


@pytest.mark.skipif(hopper_refusal() is not None, reason="another GPU than Hopper is here")
def test_tiles_of_256_rows_come_first_but_for_few_rows_an_expert():
    plain = Case("cuda", torch.bfloat16, (2048, 1408))
    for op in (GROUPED_LINEAR, GROUPED_INPUT_GRADIENT):
        for grad in (False, True):
            case = plain._replace(grad=grad)
            assert op.select(case)[0].name == "gluon"
            assert op.select(case._replace(dims=(2048, 1416)))[0].name == "grouped_mm_cuda"
    assert GROUPED_LINEAR.select(plain._replace(few=True))[0].name == "few_rows"


@pytest.mark.skipif(hopper_refusal() is not None, reason="another GPU than Hopper is here")
def test_swiglu_goes_with_the_product_where_nothing_is_kept_for_gradients():
    many = Case("cuda", torch.bfloat16, (2048, 1408))
    assert GROUPED_SWIGLU.select(many)[0].name == "gluon"
    for other in (
        many._replace(grad=True),
        many._replace(dims=(2048, 1376)),  # 32 gates more than a multiple of 64: a tile's ups would differ
        many._replace(layout="columns"),
        many._replace(dtype=torch.float16),
        many._replace(device="cpu", dtype=torch.float32),
    ):
        assert GROUPED_SWIGLU.select(other)[0].name == "two_ops"


@pytest.mark.skipif(hopper_refusal() is not None, reason="another GPU than Hopper is here")
def test_swiglu_goes_with_the_product_of_few_rows_where_nothing_is_kept_for_gradients():
    few = Case("cuda", torch.bfloat16, (2048, 1408), few=True)
    for case in (few, few._replace(dtype=torch.float16), few._replace(dims=(2048, 1376))):
        assert GROUPED_SWIGLU.select(case)[0].name == "few_rows"
    for other in (few._replace(grad=True), few._replace(dtype=torch.float64)):
        assert GROUPED_SWIGLU.select(other)[0].name == "two_ops"


@pytest.mark.skipif(hopper_refusal() is not None, reason="another GPU than Hopper is here")
@pytest.mark.parametrize("op", [GROUPED_LINEAR, GROUPED_SWIGLU], ids=lambda op: op.name)
def test_weights_of_experts_with_dozens_of_rows_are_streamed_where_nothing_is_kept_for_gradients(op):
    dozens = Case("cuda", torch.bfloat16, (2048, 1408), fastest="gluon_dozens")
    for few in (False, True):
        assert op.select(dozens._replace(few=few))[0].name == "gluon_dozens"
        for other in (
            dozens._replace(fastest=""),
            dozens._replace(grad=True),
            dozens._replace(dims=(2048, 1376)),
            dozens._replace(dims=(2080, 1408)),
            dozens._replace(layout="columns"),
            dozens._replace(dtype=torch.float16),
            dozens._replace(device="cpu", dtype=torch.float32),
        ):
            assert op.select(other._replace(few=few))[0].name != "gluon_dozens"


@pytest.mark.parametrize(("rows", "dozens"), [(33, ""), (34, "gluon_dozens"), (64, "gluon_dozens"), (65, "")])
def test_rows_are_dozens_from_17_to_32_an_expert(rows, dozens, monkeypatch):
    cases, choose = [], Op.choose
    monkeypatch.setattr(Op, "choose", lambda op, case, impl: (cases.append(case), choose(op, case, impl))[1])
    x, weight = torch.zeros(rows, 64), torch.zeros(2, 128, 64)
    ends = torch.tensor([3, rows], dtype=torch.int32)
    ops.grouped_linear(x, weight, ends)
    ops.grouped_swiglu(x, weight, ends)
    fastest = {case.fastest for case in cases if len(case.dims) == 2}
    assert fastest == {"gluon_dozens" if dozens else ""}
    ops.grouped_linear(x, weight, ends, impl="reference")
    assert cases[-1].fastest == "reference"  # and so any may be asked for


@pytest.mark.skipif(hopper_refusal() is not None, reason="another GPU than Hopper is here")
@pytest.mark.parametrize("op", [SWIGLU_GRADIENT_FP8_BOTH, WEIGHTED_SWIGLU_GRADIENT_FP8_BOTH])
def test_the_gradient_of_swiglu_is_quantised_as_it_is_computed_where_squares_are_gates_or_ups(op):
    case = Case("cuda", torch.bfloat16, (1408,), many=True)
    for one in (case, case._replace(dtype=torch.float16)):
        assert op.select(one)[0].name == "gluon"
    for other in (
        case._replace(many=False),
        case._replace(grad=True),
        case._replace(mixed=True),
        case._replace(dims=(1424,)),  # a square would hold gates and ups
        case._replace(dtype=torch.float32),
        case._replace(dtype=torch.float8_e4m3fn),
        case._replace(device="cpu"),
    ):
        assert op.select(other)[0].name == "two_ops"


@pytest.mark.parametrize(("rows", "few"), [(64, True), (65, False)])
def test_rows_are_few_up_to_32_an_expert(rows, few, monkeypatch):
    cases, choose = [], Op.choose
    monkeypatch.setattr(Op, "choose", lambda op, case, impl: (cases.append(case), choose(op, case, impl))[1])
    x, weight = torch.zeros(rows, 64), torch.zeros(2, 64, 64)
    ops.grouped_linear(x, weight, torch.tensor([3, rows], dtype=torch.int32))
    assert [case.few for case in cases] == [few]


@pytest.mark.skipif(hopper_refusal() is not None, reason="another GPU than Hopper is here")
def test_an_fp8_product_of_some_rows_is_read_in_shares_where_its_result_leaves_by_tma():
    case = Case("cuda", torch.bfloat16, (7168, 2112))
    assert FP8_LINEAR.select(case)[0].name == "gluon_split"
    assert FP8_LINEAR.select(case._replace(few=True))[0].name == "few_rows"
    for other in (case._replace(many=True), case._replace(dtype=torch.float32)):
        assert FP8_LINEAR.select(other)[0].name == "cublas"
    assert FP8_LINEAR.select(case._replace(dims=(7168, 2116)))[0].name == "gluon"
    assert FP8_LINEAR.select(case._replace(dims=(7176, 2112)))[0].name == "triton"


@pytest.mark.parametrize(
    ("rows", "few", "many"), [(16, True, False), (128, False, False), (129, False, True)]
)
def test_rows_of_one_fp8_weight_are_many_from_129(rows, few, many, monkeypatch):
    cases, choose = [], Op.choose
    monkeypatch.setattr(Op, "choose", lambda op, case, impl: (cases.append(case), choose(op, case, impl))[1])
    weight = ops.quantise_fp8_weight(torch.zeros(8, 16), impl="reference")
    x = ops.Fp8(*ops.quantise_fp8_rows(torch.zeros(rows, 16), impl="reference"))
    ops.fp8_linear(x, weight, impl="reference")
    assert [(case.few, case.many) for case in cases[-1:]] == [(few, many)]


def test_ops_of_a_cpu_never_import_triton(monkeypatch):
    code = """
import sys, torch
from benthic.kernels import ops
x, ends = torch.randn(4, 64), torch.tensor([4], dtype=torch.int32)
ops.rms_norm(x, torch.ones(64), 1e-6)
ops.grouped_linear(x, torch.randn(1, 8, 64), ends)
sys.exit("triton" in sys.modules)
"""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
