"""Every kernel on a GPU, in bfloat16, float16 and float32, against the float64 definition.

The checks are those of `kernel_checks.py`, which see the GPU and take larger sizes; here are also the
properties that only a GPU can show: repeatability, CUDA graphs, what the table chooses.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from benthic.kernels import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def _checks():
    path = Path(__file__).with_name("kernel_checks.py")
    spec = importlib.util.spec_from_file_location("kernel_checks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if torch.cuda.is_available():
    for _name, _value in vars(_checks()).items():
        if _name.startswith("test_"):
            globals()[_name] = pytest.mark.parametrize(
                "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str
            )(_value)
        elif _name in ("_uninitialised_memory_is_nan", "_small_pieces"):
            globals()[_name] = _value


def pack(*lengths):
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return torch.tensor([0, *ends], dtype=torch.int32, device="cuda")


def attend(q, k, v, *lengths, impl):
    cu = pack(*lengths)
    longest = max(lengths)
    return ops.attention(q, k, v, cu, cu, max_seqlen_q=longest, max_seqlen_k=longest, scale=0.07, impl=impl)


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=True)


def test_attention_gradients_are_the_same_bits_over_fifty_repeats():
    q, k, v = random(1500, 7, 192), random(1500, 7, 192), random(1500, 7, 128)
    seen = set()
    for _ in range(50):
        out = attend(q, k, v, 700, 1, 799, impl="triton")
        grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        seen.add(tuple(x.double().sum().item() for x in (out, *grads)))
    assert len(seen) == 1


@pytest.mark.parametrize("tokens", [0, 1, 65])
def test_a_product_of_every_head_lies_row_by_row_in_inference(tokens):
    x, weight = random(tokens, 5, 512), random(5 * 256, 512).unflatten(0, (5, 256))[:, 128:]
    with torch.no_grad():
        out = ops.heads_linear(x, weight)
        exact = ops.heads_linear(x.double(), weight.double(), impl="reference")
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), exact, rtol=1e-2, atol=1e-1)


def test_a_mixture_of_experts_runs_inside_a_cuda_graph():
    tokens, width, experts = 256, 512, 16
    x, gate = random(tokens, width).detach(), random(experts, width, dtype=torch.float32).detach()
    up, down = random(experts, 512, width).detach(), random(experts, width, 256).detach()

    def layer():
        routing = ops.route(
            x.float() @ gate.T,
            None,
            scoring_func="sigmoid",
            topk_method="noaux_tc",
            top_k=4,
            n_group=4,
            topk_group=2,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
        )
        permuted = ops.permute(x, routing.expert_TK, experts)
        hidden = ops.swiglu(ops.grouped_linear(permuted.rows_RD, up, permuted.ends_E))
        return ops.unpermute(
            ops.grouped_linear(hidden, down, permuted.ends_E), permuted.maps, routing.weight_TK
        )

    with torch.no_grad():
        expected = layer()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            layer()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer()
        captured.zero_()
        graph.replay()
        torch.cuda.synchronize()
    assert torch.equal(captured, expected)


def test_a_decode_step_runs_inside_a_cuda_graph_while_contexts_grow():
    sequences, heads, block = 5, 16, 64
    cache = random(40, block, 576).detach()
    table = torch.randperm(40, device="cuda")[: sequences * 8].view(sequences, 8).to(torch.int32)
    context = torch.tensor([1, 64, 65, 0, 300], dtype=torch.int32, device="cuda")
    q_latent, q_rope = random(sequences, 1, heads, 512).detach(), random(sequences, 1, heads, 64).detach()

    def step():
        return ops.mla_decode(q_latent, q_rope, cache, table, context, scale=0.05)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    context += 7
    graph.replay()
    torch.testing.assert_close(captured, step(), rtol=0, atol=0)


def test_weight_gradients_of_experts_run_inside_a_cuda_graph_while_experts_grow():
    x, dy = random(700, 512).detach(), random(700, 256).detach()
    ends = torch.tensor([5, 5, 300, 400, 600], dtype=torch.int32, device="cuda")
    sums, eager = torch.zeros(2, 5, 256, 512, device="cuda")

    ops.add_weight_gradient(eager, dy, x, ends, impl="gluon")
    eager.zero_()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.add_weight_gradient(sums, dy, x, ends, impl="gluon")
    for grown in (0, 64, 36):
        ends += grown
        graph.replay()
        ops.add_weight_gradient(eager, dy, x, ends, impl="gluon")
    assert torch.equal(sums, eager)


def test_the_table_chooses_the_documented_kernels():
    chosen = {choice.op: choice.implementation for choice in ops.explain("cuda", torch.bfloat16)}
    assert chosen["rms_norm"] == "triton"
    assert chosen["mla_decode"] == "gluon_wide"
    assert chosen["mla_decode (few rows)"] == "gluon"
    assert chosen["grouped_linear"] == chosen["grouped_input_gradient"] == "gluon"
    assert chosen["grouped_linear (few rows)"] == "few_rows"
    assert chosen["linear"] == "torch"
    assert chosen["linear (few rows)"] == "few_rows"
    assert (chosen["grouped_swiglu"], chosen["grouped_swiglu (few rows)"]) == ("gluon", "few_rows")
    for op in ("grouped_linear", "grouped_swiglu"):
        assert chosen[f"{op} (dozens of rows)"] == "gluon_dozens"
    assert (chosen["fp8_linear"], chosen["fp8_linear (few rows)"]) == ("gluon_split", "few_rows")
    assert chosen["fp8_linear (many rows)"] == "cublas"
    of_fp8 = {choice.op: choice.implementation for choice in ops.explain("cuda", torch.float8_e4m3fn)}
    assert of_fp8["mla_decode"] == "triton"
    assert of_fp8["mla_decode (few rows)"] == "gluon_fp8"
    assert chosen["attention"] == "gluon"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("columns", [128, 144, 1408, 2048])
@pytest.mark.parametrize("ends", [None, (0, 300, 300, 1733), (128,), (1000, 2000)], ids=str)
def test_squares_by_tma_have_the_bits_of_those_by_triton(dtype, power_of_two, columns, ends):
    x = torch.randn(2000, columns, device="cuda", dtype=dtype) * 3
    x[700:900] = 0
    x[1200, 5] = float("nan")
    ends = None if ends is None else torch.tensor(ends, dtype=torch.int32, device="cuda")
    rows = ops.Fp8(*ops.quantise_fp8_rows(x, power_of_two=power_of_two, by_column=True))
    columns = ops.quantise_fp8_columns(x, ends, power_of_two=power_of_two, impl="triton")
    found = [
        ops.quantise_fp8_columns(x, ends, power_of_two=power_of_two, impl="gluon"),
        *ops.quantise_fp8_both(x, ends, power_of_two=power_of_two, impl="gluon"),
        ops.retile_fp8(rows, ends, power_of_two=power_of_two, impl="gluon"),
    ]
    retiled = ops.retile_fp8(rows, ends, power_of_two=power_of_two, impl="triton")
    for one, other in zip(found, (columns, rows, columns, retiled), strict=True):
        assert torch.equal(one.values.view(torch.uint8), other.values.view(torch.uint8))
        assert torch.equal(one.scale, other.scale)
