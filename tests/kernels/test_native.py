"""The C kernels against their definitions: odd sizes, strided operands, NaN where nothing may be read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from benthic.errors import BackendError, ShapeError
from benthic.kernels import native, native_build, native_ops, ops
from benthic.kernels.ops.moe import GROUPED_LINEAR
from benthic.kernels.table import Case

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

needs_compiler = pytest.mark.skipif(native.build_refusal() is not None, reason=str(native.build_refusal()))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@needs_compiler
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 5), (7, 63), (2, 192), (600, 130)])
def test_row_ops_equal_their_definitions(rows: int, width: int) -> None:
    x, other, weight = random(rows, width), random(rows, width, seed=1), random(width, seed=2)
    wide = random(rows, 2 * width, seed=3)
    for name in ("native", "reference"):
        assert ops.rms_norm(x, weight, 1e-6, impl=name).shape == x.shape
    close(ops.rms_norm(x, weight, 1e-6, impl="native"), ops.rms_norm(x, weight, 1e-6, impl="reference"))
    found, total = ops.add_rms_norm(x, other, weight, 1e-6, impl="native")
    close(total, x + other)
    close(found, ops.add_rms_norm(x, other, weight, 1e-6, impl="reference")[0])
    found, total = ops.add_rms_norm(x, None, weight, 1e-6, impl="native")
    assert total is x
    close(found, ops.rms_norm(x, weight, 1e-6, impl="reference"))
    close(ops.swiglu(wide, impl="native"), ops.swiglu(wide, impl="reference"))
    part = wide[:, :width]  # rows that lie apart, as in a split projection
    close(ops.rms_norm(part, weight, 1e-6, impl="native"), ops.rms_norm(part, weight, 1e-6, impl="reference"))


@needs_compiler
def test_swiglu_keeps_its_limits_far_from_zero() -> None:
    gate = torch.tensor([-1000.0, -90.0, -1.0, 0.0, 1.0, 90.0, 1000.0])
    found = ops.swiglu(torch.cat((gate, torch.ones(7))).unsqueeze(0), impl="native")
    close(found, torch.nn.functional.silu(gate).unsqueeze(0))
    assert ops.swiglu(torch.full((1, 40), torch.nan), impl="native").isnan().all()


@needs_compiler
@pytest.mark.parametrize("heads", [None, 1, 7])
def test_rope_equals_its_definition_on_a_view(heads: int | None) -> None:
    x = random(5, 24) if heads is None else random(5, heads, 24)
    angle = random(5, 4)
    view = x[..., 10:18]
    found = ops.rope(view, angle.cos(), angle.sin(), impl="native")
    close(found, ops.rope(view, angle.cos(), angle.sin(), impl="reference"))


@needs_compiler
@pytest.mark.parametrize("queries", [1, 2, 5])
@pytest.mark.parametrize(
    ("heads", "latent", "rotary"), [(1, 4, 2), (6, 64, 16), (7, 37, 6), (16, 128, 64), (35, 80, 4)]
)
def test_decode_equals_its_definition_and_reads_no_unwritten_slot(
    queries: int, heads: int, latent: int, rotary: int
) -> None:
    contexts = torch.tensor([queries, 13, 64, 1 + queries, 40], dtype=torch.int32)
    cache = torch.full((30, 13, latent + rotary), torch.nan)
    table = torch.full((5, 5), 29, dtype=torch.int32)
    for sequence, context in enumerate(contexts.tolist()):
        for position in range(context):
            page = sequence * 5 + position // 13
            table[sequence, position // 13] = page
            cache[page, position % 13] = random(latent + rotary, seed=1000 * sequence + position)
    q_latent, q_rope = random(5, queries, heads, latent), random(5, queries, heads, rotary, seed=1)
    operands = (q_latent, q_rope, cache, table, contexts)
    found = ops.mla_decode(*operands, scale=0.3, impl="native")
    assert found.isfinite().all()
    close(found, ops.mla_decode(*operands, scale=0.3, impl="reference"), 5e-6)


@needs_compiler
def test_decode_of_an_empty_context_is_zero_and_a_nan_stays_with_its_sequence() -> None:
    cache = random(4, 8, 20)
    cache[1] = torch.nan
    table = torch.tensor([[0], [1], [2]], dtype=torch.int32)
    contexts = torch.tensor([0, 3, 5], dtype=torch.int32)
    found = ops.mla_decode(
        random(3, 1, 2, 16), random(3, 1, 2, 4), cache, table, contexts, scale=1.0, impl="native"
    )
    assert (found[0] == 0).all()
    assert found[1].isnan().all()
    assert found[2].isfinite().all()


@needs_compiler
def test_latents_go_to_their_slots_and_nowhere_else() -> None:
    both = random(4, 30)
    caches = [torch.full((3, 5, 20), 7.0) for _ in range(2)]
    slots = torch.tensor([14, -1, 0, 6])
    for cache, name in zip(caches, ("native", "reference"), strict=True):
        ops.store_latent(cache, both[:, :16], both[:, 20:24], slots, impl=name)
    assert torch.equal(*caches)
    assert (caches[0] == 7.0).sum() == (15 - 3) * 20


@needs_compiler
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize(
    ("scoring", "method", "groups", "kept"),
    [
        ("sigmoid", "noaux_tc", 1, 1),
        ("sigmoid", "noaux_tc", 5, 2),
        ("sigmoid", "noaux_tc", 15, 4),
        ("softmax", "greedy", 1, 1),
        ("softmax", "group_limited_greedy", 3, 2),
    ],
)
def test_the_gate_equals_its_definition(
    scoring: str, method: str, groups: int, kept: int, top_k: int
) -> None:
    logits, bias = random(41, 15), random(15, seed=9) if method == "noaux_tc" else None
    settings = {
        "scoring_func": scoring,
        "topk_method": method,
        "top_k": top_k,
        "n_group": groups,
        "topk_group": kept,
        "norm_topk_prob": top_k > 1,
        "routed_scaling_factor": 2.5,
    }
    found = ops.route(logits, bias, impl="native", **settings)
    expected = ops.route(logits, bias, impl="reference", **settings)
    close(found.scores_TE, expected.scores_TE)
    assert torch.equal(found.expert_TK, expected.expert_TK)
    close(found.weight_TK, expected.weight_TK)


@needs_compiler
def test_a_gate_of_nans_chooses_real_experts_with_nan_weights() -> None:
    found = ops.route(
        torch.full((3, 8), torch.nan),
        torch.zeros(8),
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        top_k=2,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        impl="native",
    )
    assert found.weight_TK.isnan().all()
    assert ((found.expert_TK >= 0) & (found.expert_TK < 8)).all()


@needs_compiler
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "width"), [(1, 1, 1, 1), (63, 3, 5, 7), (16, 4, 16, 192)]
)
def test_rows_go_to_their_experts_and_come_home(tokens: int, top_k: int, experts: int, width: int) -> None:
    x, weight = random(tokens, width), random(tokens, top_k)
    expert = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(1)).topk(top_k).indices.int()
    found = ops.permute(x, expert, experts, impl="native")
    expected = ops.permute(x, expert, experts, impl="reference")
    assert torch.equal(found.rows_RD, expected.rows_RD)
    assert torch.equal(found.ends_E, expected.ends_E)
    assert torch.equal(found.maps.row_TK, expected.maps.row_TK)
    assert torch.equal(found.maps.copy_R, expected.maps.copy_R)
    home = ops.unpermute(found.rows_RD, found.maps, weight, impl="native")
    close(home, ops.unpermute(found.rows_RD, found.maps, weight, impl="reference"))


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("inner", "outer"), [(1, 1), (5, 17), (192, 128), (64, 195), (130, 64)])
@pytest.mark.parametrize("counts", [(0, 0, 7, 0), (1, 2, 3, 4), (6, 12, 5, 63), (0, 0, 0, 0)])
def test_the_grouped_product_equals_its_definition_in_both_layouts(
    inner: int, outer: int, counts: tuple[int, ...], threads: int
) -> None:
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    rows = random(sum(counts) + 2, inner)  # two rows belong to nobody and come out as zeros
    columns = random(4, inner, outer).transpose(1, 2)
    expected = ops.grouped_linear(rows, columns, ends, impl="reference")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        close(ops.grouped_linear(rows, columns, ends, impl="native"), expected, 1e-5)
        close(ops.grouped_linear(rows, columns.contiguous(), ends), expected, 1e-5)
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_calls_whose_gradients_are_recorded_are_refused_and_otherwise_run_elsewhere() -> None:
    x, weight = random(4, 8).requires_grad_(), random(8, seed=1)
    with pytest.raises(BackendError, match=r"gradients recorded.*native: computes no gradients.*no_grad"):
        ops.rms_norm(x, weight, 1e-6, impl="native")
    with torch.no_grad():
        found = ops.rms_norm(x, weight, 1e-6, impl="native")
    close(found, ops.rms_norm(x, weight, 1e-6).detach())
    (found,) = torch.autograd.grad(ops.rms_norm(x, weight, 1e-6).square().sum(), x)
    (expected,) = torch.autograd.grad(ops.rms_norm(x, weight, 1e-6, impl="reference").square().sum(), x)
    close(found, expected, 1e-5)


@needs_compiler
def test_operands_that_are_not_all_float32_are_refused_and_otherwise_run_elsewhere() -> None:
    x, weight = random(4, 8), random(8, seed=1).bfloat16()
    with pytest.raises(
        BackendError, match=r"native: takes operands of one dtype, but some are not .*float32"
    ):
        ops.rms_norm(x, weight, 1e-6, impl="native")
    close(ops.rms_norm(x, weight, 1e-6), ops.rms_norm(x, weight.float(), 1e-6))
    angle = random(4, 4).double()
    close(ops.rope(x, angle.cos(), angle.sin()), ops.rope(x, angle.cos().float(), angle.sin().float()))
    caches = [torch.zeros(2, 3, 8) for _ in range(2)]
    for cache, latent in zip(caches, (x.bfloat16(), x.bfloat16().float()), strict=True):
        ops.store_latent(cache, latent[:, :6], latent[:, 6:], torch.tensor([4, 0, -1, 5]))
    assert torch.equal(*caches)


@needs_compiler
def test_decode_with_wider_queries_or_over_pages_with_gaps_is_refused_and_otherwise_runs_elsewhere() -> None:
    q_latent, q_rope, cache = random(2, 1, 3, 16), random(2, 1, 3, 4), random(4, 8, 24)[..., :20]
    table = torch.tensor([[2, 0], [3, 1]], dtype=torch.int32)
    contexts = torch.tensor([9, 5], dtype=torch.int32)
    with pytest.raises(BackendError, match="native: takes memory laid out in rows, not strided"):
        ops.mla_decode(q_latent, q_rope, cache, table, contexts, scale=0.2, impl="native")
    with pytest.raises(BackendError, match="native: takes operands of one dtype"):
        ops.mla_decode(
            q_latent.double(), q_rope, cache.contiguous(), table, contexts, scale=0.2, impl="native"
        )
    expected = ops.mla_decode(q_latent, q_rope, cache, table, contexts, scale=0.2, impl="reference")
    close(ops.mla_decode(q_latent, q_rope, cache, table, contexts, scale=0.2), expected, 5e-6)
    wide = ops.mla_decode(q_latent.double(), q_rope.double(), cache, table, contexts, scale=0.2)
    close(wide.float(), expected, 5e-6)


def test_a_cache_with_gaps_takes_no_latents() -> None:
    cache = torch.zeros(3, 5, 24)[..., :20]
    with pytest.raises(ShapeError, match=r"strides \(120, 24, 1\); allocate it contiguous"):
        ops.store_latent(cache, random(2, 16), random(2, 4), torch.tensor([0, 1]))


def test_without_a_compiler_the_table_says_so_and_takes_the_next_entry(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    native.build_refusal.cache_clear()
    native.built.cache_clear()
    monkeypatch.setattr(native_build.shutil, "which", lambda _name: None)
    try:
        case = Case("cpu", torch.float32, (64, 64), layout="columns")
        chosen, _ = GROUPED_LINEAR.select(case)
        assert chosen.name == "grouped_mm"
        with pytest.raises(BackendError, match="no C compiler found"):
            GROUPED_LINEAR.select(case, "native")
    finally:
        monkeypatch.undo()
        native.build_refusal.cache_clear()
        native.built.cache_clear()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A configured folder, for one test."""
    before = native_build._FOLDER.get()
    native_build.configure(tmp_path / "kept")
    yield tmp_path / "kept"
    native_build._FOLDER.set(before)


@needs_compiler
def test_a_source_that_does_not_compile_is_refused_with_the_compilers_words(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken.c").write_text("int broken(")
    with pytest.raises(BackendError, match="exit code 1"):
        native_build.built(tmp_path)
    assert list(folder.iterdir()) == []


@needs_compiler
def test_a_compiled_library_is_found_again_until_its_sources_change(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "small.c"
    source.write_text("int answer(void) { return 42; }")
    first = native_build.built(tmp_path)
    made = first.stat().st_mtime_ns
    assert first.parent == folder
    assert native_build.built(tmp_path) == first
    assert first.stat().st_mtime_ns == made
    source.write_text("int answer(void) { return 43; }")
    assert native_build.built(tmp_path) != first


def test_a_configured_folder_that_cannot_be_made_is_passed_over(folder: Path) -> None:
    folder.write_text("a file")
    assert native_build.library_folder() != folder
    assert native_build.library_folder().is_dir()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_refused_by_name(dtype: torch.dtype) -> None:
    with pytest.raises(BackendError, match="float32"):
        GROUPED_LINEAR.select(Case("cpu", dtype, (64, 64)), "native")


@needs_compiler
def test_two_threads_give_what_one_gives_on_work_that_is_worth_sharing() -> None:
    rows, weight = random(700, 192), random(3, 192, 160).transpose(1, 2)
    ends = torch.tensor([100, 450, 690], dtype=torch.int32)
    wide, norm = random(700, 3200), random(3200, seed=1)
    expert = torch.randint(0, 5, (700, 1), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    cache, table = random(64, 64, 160), torch.arange(64, dtype=torch.int32).view(4, 16)
    contexts = torch.tensor([1000, 3, 1024, 700], dtype=torch.int32)
    q_latent, q_rope = random(4, 1, 40, 128), random(4, 1, 40, 32)
    angle = random(700, 800)

    def work() -> list[torch.Tensor]:
        permuted = ops.permute(wide, expert, 5, impl="native")
        return [
            ops.grouped_linear(rows, weight, ends, impl="native"),
            native_ops.linear(rows, weight[0]),
            ops.rms_norm(wide, norm, 1e-6, impl="native"),
            ops.swiglu(wide, impl="native"),
            ops.rope(wide[:, :1600], angle.cos(), angle.sin(), impl="native"),
            ops.mla_decode(q_latent, q_rope, cache, table, contexts, scale=0.1, impl="native"),
            permuted.rows_RD,
            ops.unpermute(permuted.rows_RD, permuted.maps, expert.float(), impl="native"),
        ]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = work()
        torch.set_num_threads(2)
        shared = work()
    finally:
        torch.set_num_threads(before)
    for one, two in zip(alone, shared, strict=True):
        assert torch.equal(one, two)
