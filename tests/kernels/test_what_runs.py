"""What the table names is what runs: every implementation of every op, with gradients recorded and without.

The others are made to explode, so an implementation that hands a call over, for whatever reason, is found
out. The rule behind it is tested too: implementations do not know each other, nor ask about gradients.
"""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from benthic.errors import BackendError
from benthic.kernels import ops
from benthic.kernels.table import Op, triton_refusal

pytest.importorskip("triton", reason="the table names Triton modules")

TOKENS, WIDTH, EXPERTS = 6, 16, 4
GATE = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "top_k": 2,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
}


def integers(*values):
    return torch.tensor(values, dtype=torch.int32)


def attention(made, impl):
    q, k, v = made(TOKENS, 2, WIDTH), made(TOKENS, 2, WIDTH), made(TOKENS, 2, WIDTH)
    starts = integers(0, 2, TOKENS)
    return ops.attention(q, k, v, starts, starts, max_seqlen_q=4, max_seqlen_k=4, scale=0.2, impl=impl)


def attention_of_parts(made, impl):
    parts = made(TOKENS, 2, WIDTH), made(TOKENS, 2, 4), made(TOKENS, 2, WIDTH), made(TOKENS, 4)
    starts, lengths = integers(0, 2, TOKENS), {"max_seqlen_q": 4, "max_seqlen_k": 4}
    return ops.attention_of_parts(
        *parts, made(TOKENS, 2, WIDTH), starts, starts, **lengths, scale=0.2, impl=impl
    )


def rope(made, impl):
    angle = made(TOKENS, WIDTH // 2).detach()
    return ops.rope(made(TOKENS, 2, WIDTH), angle.cos(), angle.sin(), impl=impl)


def rope_both(made, impl):
    angle = made(TOKENS, WIDTH // 2).detach()
    operands = made(TOKENS, 2, WIDTH), made(TOKENS, WIDTH)
    return torch.cat([x.flatten() for x in ops.rope_both(*operands, angle.cos(), angle.sin(), impl=impl)])


def rope_and_norm(made, impl):
    angle = made(TOKENS, WIDTH // 2).detach()
    operands = made(TOKENS, 2, WIDTH), made(TOKENS, WIDTH), made(TOKENS, 12), made(12)
    return ops.rope_and_norm(*operands, 1e-6, angle.cos(), angle.sin(), impl=impl)[0]


def mla_decode(made, impl):
    operands = made(2, 1, 3, WIDTH), made(2, 1, 3, 4), made(4, 8, WIDTH + 4)
    return ops.mla_decode(*operands, integers([2, 0], [3, 1]), integers(9, 5), scale=0.2, impl=impl)


def store_latent(made, impl):
    cache = torch.zeros(2, 8, WIDTH + 4)
    ops.store_latent(cache, made(TOKENS, WIDTH), made(TOKENS, 4), torch.arange(TOKENS), impl=impl)
    return cache


def rope_norm_store(made, impl):
    angle, cache = made(TOKENS, WIDTH // 2).detach(), torch.zeros(2, 8, 12 + WIDTH)
    operands = made(TOKENS, 2, WIDTH), made(TOKENS, WIDTH), made(TOKENS, 12), made(12)
    into = ops.Slots(cache, torch.arange(TOKENS), alone=True)
    ops.rope_norm_store(*operands, 1e-6, angle.cos(), angle.sin(), into, impl=impl)
    return cache


def copy_blocks(made, impl):
    cache = torch.zeros(2, 3, 8, WIDTH)
    ops.copy_blocks(made(2, 5, 8, WIDTH), torch.tensor([4]), cache, torch.tensor([2]), impl=impl)
    return cache


def permute(made, impl):
    return ops.permute(made(TOKENS, WIDTH), integers(*[[0, 2]] * TOKENS), EXPERTS, impl=impl).rows_RD


def unpermute(made, impl):
    row_TK = torch.arange(TOKENS * 2).view(TOKENS, 2)
    maps = ops.RowMaps(row_TK, row_TK.flatten())
    return ops.unpermute(made(TOKENS * 2, WIDTH), maps, made(TOKENS, 2), impl=impl)


def unpermute_norm(made, impl):
    row_TK = torch.arange(TOKENS * 2).view(TOKENS, 2)
    maps = ops.RowMaps(row_TK, row_TK.flatten())
    rows, weight = made(TOKENS * 2, WIDTH), made(TOKENS, 2)
    return ops.unpermute_norm(rows, maps, weight, (), made(WIDTH), 1e-6, impl=impl)[0]


def grouped_linear(made, impl, *, columns=False):
    weight = made(EXPERTS, 32, WIDTH)
    if columns:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    return ops.grouped_linear(made(TOKENS, WIDTH), weight, integers(1, 1, 4, TOKENS), impl=impl)


def grouped_swiglu(made, impl):
    ends = integers(1, 1, 4, TOKENS)
    return ops.grouped_swiglu(made(TOKENS, WIDTH), made(EXPERTS, 32, WIDTH), ends, impl=impl)


def linear_swiglu(made, impl):
    return ops.linear_swiglu(made(TOKENS, WIDTH), made(32, WIDTH), impl=impl)


def grouped_linear_by_row(made, impl):
    ends = integers(1, 1, 4, TOKENS)
    return ops.grouped_linear_by_row(made(TOKENS, WIDTH), made(EXPERTS, 32, WIDTH), ends, impl=impl)


def mla_by_row(made, impl):
    operands = made(2, 3, WIDTH), made(2, 3, 4), made(4, 8, WIDTH + 4), integers([2, 0], [3, 1])
    return ops.mla_by_row(*operands, integers(1, 0), integers(9, 5), scale=0.2, impl=impl)


def linear_cross_entropy(made, impl):
    return ops.linear_cross_entropy(made(TOKENS, WIDTH), made(9, WIDTH), torch.arange(TOKENS), impl=impl)


CALLS = {
    "rms_norm": lambda made, impl: ops.rms_norm(made(TOKENS, WIDTH), made(WIDTH), 1e-6, impl=impl),
    "add_rms_norm": lambda made, impl: ops.add_rms_norm(
        made(TOKENS, WIDTH), made(TOKENS, WIDTH), made(WIDTH), 1e-6, impl=impl
    )[0],
    "swiglu": lambda made, impl: ops.swiglu(made(TOKENS, WIDTH), impl=impl),
    "rope": rope,
    "join_head_dims": lambda made, impl: ops.join_head_dims(
        made(TOKENS, 3, WIDTH), made(TOKENS, 8), impl=impl
    ),
    "split_head_dims": lambda made, impl: torch.cat(
        ops.split_head_dims(made(TOKENS, 3, WIDTH), 9, impl=impl), dim=-1
    ),
    "heads_linear": lambda made, impl: ops.heads_linear(made(TOKENS, 3, WIDTH), made(3, 9, WIDTH), impl=impl),
    "rope_both": rope_both,
    "rope_and_norm": rope_and_norm,
    "attention": attention,
    "attention_of_parts": attention_of_parts,
    "mla_decode": mla_decode,
    "store_latent": store_latent,
    "rope_norm_store": rope_norm_store,
    "copy_blocks": copy_blocks,
    "route": lambda made, impl: ops.route(made(TOKENS, EXPERTS), None, impl=impl, **GATE).weight_TK,
    "balance_loss": lambda made, impl: ops.balance_loss(made(TOKENS, EXPERTS), top_k=2, rows=2, impl=impl)[0],
    "gate_gradients": lambda made, impl: ops.gate_gradients(
        made(TOKENS, EXPERTS), made(TOKENS, WIDTH), made(EXPERTS, WIDTH), impl=impl
    )[0],
    "gate_logits": lambda made, impl: ops.gate_logits(made(TOKENS, WIDTH), made(EXPERTS, WIDTH), impl=impl),
    "permute": permute,
    "unpermute": unpermute,
    "unpermute_norm": unpermute_norm,
    "grouped_linear": grouped_linear,
    "grouped_linear in columns": lambda made, impl: grouped_linear(made, impl, columns=True),
    "grouped_swiglu": grouped_swiglu,
    "linear_swiglu": linear_swiglu,
    "linear": lambda made, impl: ops.linear(made(TOKENS, WIDTH), made(9, WIDTH), impl=impl),
    "linear_by_row": lambda made, impl: ops.linear_by_row(made(TOKENS, WIDTH), made(9, WIDTH), impl=impl),
    "heads_linear_by_row": lambda made, impl: ops.heads_linear_by_row(
        made(TOKENS, 3, WIDTH), made(3, 9, WIDTH), impl=impl
    ),
    "grouped_linear_by_row": grouped_linear_by_row,
    "mla_by_row": mla_by_row,
    "linear_cross_entropy": linear_cross_entropy,
    "quantise_fp8": lambda made, impl: ops.quantise_fp8_rows(made(TOKENS, WIDTH), impl=impl)[1],
    "dequantise_fp8": lambda made, impl: ops.dequantise_fp8(
        torch.ones(TOKENS, WIDTH).to(torch.float8_e4m3fn), made(1, 1), impl=impl
    ),
    "quantise_fp8_both": lambda made, impl: ops.quantise_fp8_both(made(TOKENS, WIDTH), impl=impl)[1].scale,
    "swiglu_fp8": lambda made, impl: ops.swiglu_fp8(made(TOKENS, WIDTH), impl=impl).scale,
    "swiglu_gradient": lambda made, impl: ops.swiglu_gradient(
        made(TOKENS, 2 * WIDTH), made(TOKENS, WIDTH), impl=impl
    ),
    "weighted_swiglu_gradient": lambda made, impl: ops.weighted_swiglu_gradient(
        made(TOKENS, 2 * WIDTH), made(TOKENS, WIDTH), made(TOKENS), impl=impl
    )[0],
    "weighted_swiglu_gradient_fp8_both": lambda made, impl: ops.weighted_swiglu_gradient_fp8_both(
        made(TOKENS, 2 * WIDTH), made(TOKENS, WIDTH), made(TOKENS), impl=impl
    )[2],
    "swiglu_gradient_fp8_both": lambda made, impl: (
        ops.swiglu_gradient_fp8_both(made(TOKENS, 2 * WIDTH), made(TOKENS, WIDTH), impl=impl)[1].scale
    ),
    "rms_norm_fp8": lambda made, impl: (
        ops.rms_norm_fp8(made(TOKENS, WIDTH), made(WIDTH), 1e-6, impl=impl).scale
    ),
    "add_rms_norm_fp8": lambda made, impl: ops.add_rms_norm_fp8(
        made(TOKENS, WIDTH), made(TOKENS, WIDTH), made(WIDTH), 1e-6, impl=impl
    )[1],
}
BY_NAME = {op.name: op for op in ops.OPS}
EVERY = [
    (call, implementation) for call in CALLS for implementation in BY_NAME[call.split()[0]].implementations
]


class Seen(Exception):  # noqa: N818 (no error: it carries a case out of an op)
    pass


def maker(*, grad):
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator).requires_grad_(grad)


def case_of(call, *, grad):
    """The case that a public op hands to the table."""

    def stop(_op, case, _impl=None):
        raise Seen(case)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Op, "choose", stop)
        with pytest.raises(Seen) as seen:
            CALLS[call](maker(grad=grad), None)
    return seen.value.args[0]


@pytest.fixture
def watch(monkeypatch):
    """Replace the functions of an op's implementations: all note that they ran, and only one may."""
    watched = []

    def replace(op, allowed):
        ran = []
        op._chosen.clear()
        watched.append(op)
        for implementation in op.implementations:
            module, name = implementation.where.split(":")
            loaded = implementation.load()

            def noted(*args, _implementation=implementation, _loaded=loaded, **kwargs):
                ran.append(_implementation.name)
                assert _implementation.name == allowed, f"{_implementation.name} ran, not {allowed}"
                return _loaded(*args, **kwargs)

            monkeypatch.setattr(importlib.import_module(module), name, noted)
        return ran

    yield replace
    for op in watched:
        op._chosen.clear()


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    ("call", "implementation"), EVERY, ids=[f"{call}-{each.name}" for call, each in EVERY]
)
def test_an_implementation_runs_itself_alone_or_says_why_not(call, implementation, grad, watch):
    op, verdict = BY_NAME[call.split()[0]], implementation.when(case_of(call, grad=grad))
    if not verdict.runs:
        with pytest.raises(BackendError, match=re.escape(f"{implementation.name}: {verdict.reason}")):
            CALLS[call](maker(grad=grad), implementation.name)
        return
    ran = watch(op, implementation.name)
    out = CALLS[call](maker(grad=grad), implementation.name)
    assert ran == [implementation.name]
    assert out.requires_grad == grad
    if grad:
        out.square().sum().backward()
        assert ran == [implementation.name]


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("call", CALLS)
def test_what_the_table_selects_is_what_a_plain_call_runs(call, grad, watch):
    op = BY_NAME[call.split()[0]]
    case = case_of(call, grad=grad)
    assert case.grad == grad
    chosen, _ = op.select(case)
    ran = watch(op, chosen.name)
    CALLS[call](maker(grad=grad), None)
    assert ran == [chosen.name]


@pytest.mark.parametrize("call", CALLS)
def test_nothing_counts_as_recorded_under_no_grad(call):
    with torch.no_grad():
        assert not case_of(call, grad=True).grad


def test_native_refuses_every_op_whose_gradients_are_recorded():
    refused = [call for call, each in EVERY if each.name == "native" and case_of(call, grad=True).grad]
    assert len(refused) == 16
    for call in refused:
        with pytest.raises(BackendError, match=r"gradients recorded.* native: "):
            CALLS[call](maker(grad=True), "native")


def implementations_by_module():
    found = defaultdict(set)
    for op in ops.OPS:
        for implementation in op.implementations:
            module, function = implementation.where.split(":")
            found[module].add(function)
    return found


BY_MODULE = implementations_by_module()
# Those of the ops' own package are made of other ops, for each of which the table is asked.
CHOSEN = sorted(module for module in BY_MODULE if ".reference." not in module and ".ops." not in module)


def tree(module):
    return ast.parse(Path(importlib.import_module(module).__file__).read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", CHOSEN)
def test_no_implementation_imports_another_nor_the_table_of_ops(module):
    imported = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    functions = {f"{other}.{name}" for other, names in BY_MODULE.items() for name in names}
    assert not imported & (functions | set(BY_MODULE))
    assert not any(name.startswith("benthic.kernels.ops") for name in imported)


@pytest.mark.parametrize("module", CHOSEN)
def test_no_implementation_asks_whether_gradients_are_recorded(module):
    words = {node.attr for node in ast.walk(tree(module)) if isinstance(node, ast.Attribute)}
    assert not words & {"is_grad_enabled", "requires_grad", "is_inference_mode_enabled"}


def test_the_import_contracts_cover_every_implementation():
    settings = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    kernels = [
        contract
        for contract in settings["tool"]["importlinter"]["contracts"]
        if contract["name"].startswith("kernels: ")
    ]
    listed = {each["type"]: each.get("protected_modules") or each.get("modules") for each in kernels}
    assert listed == {"protected": CHOSEN, "independence": CHOSEN}


@pytest.mark.skipif(triton_refusal("cpu") is None, reason="Triton is interpreted here")
def test_reports_name_training_where_it_runs_something_else():
    choices = {choice.op: choice.implementation for choice in ops.explain("cpu", torch.float32)}
    assert choices["rms_norm (training)"] == "torch_autograd"
    assert choices["rms_norm"] != "torch_autograd"
    assert choices["grouped_linear"] == "grouped_mm"
    assert "grouped_linear (training)" not in choices
    assert "mla_decode (training)" not in choices
    assert "attention (equal lengths)" not in choices
