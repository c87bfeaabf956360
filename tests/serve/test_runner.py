"""The runner: tensors of a step, rows that are sampled, tapes beside the plain loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_engine import NANO, prompts, random_model, request, serve, small_engine

from benthic.kernels import native, ops
from benthic.model.local import plain_linear
from benthic.sched.plans import Prefill, StepPlan, TableWrite
from benthic.serve.columns import ColumnLinear, fastest_linear
from benthic.serve.steps import StepBuilder
from benthic.serve.table_linear import TableLinear
from benthic.serve.tapes import SEEN_BEFORE, DecodeTapes

needs_compiler = pytest.mark.skipif(native.build_refusal() is not None, reason=str(native.build_refusal()))


def plan(decodes: dict[int, int], prefills: list[Prefill]) -> StepPlan:
    """Decodes as {slot: position}."""
    return StepPlan(
        number=0,
        num_tokens=len(decodes) + sum(chunk.length for chunk in prefills),
        decode_ids=tuple(f"d{slot}" for slot in decodes),
        decode_slots=tuple(decodes),
        decode_positions=tuple(decodes.values()),
        decode_drafts=(0,) * len(decodes),
        prefills=tuple(prefills),
        tables=(),
        events=(),
    )


def chunk(name: str, slot: int, start: int, ids: tuple[int, ...] | None, *, samples: bool = True) -> Prefill:
    return Prefill(name, slot, start, 1 if ids is None else len(ids), ids, samples)


def builder() -> StepBuilder:
    steps = StepBuilder(max_num_seqs=4, max_model_len=32, block_size=4, device=torch.device("cpu"))
    steps.write([TableWrite(0, 0, (10, 11, 12)), TableWrite(1, 0, (20, 21)), TableWrite(2, 0, (30, 31, 32))])
    steps.write([TableWrite(1, 2, (22,))])
    steps.remember((0, 1, 2), torch.tensor([100, 101, 102]))
    return steps


def test_decode_rows_feed_the_newest_token_at_its_place_in_the_pages() -> None:
    step = builder().build(plan({0: 6, 1: 9}, []))
    assert step.tokens_T.tolist() == [100, 101]
    assert step.positions_T.tolist() == [6, 9]
    assert step.layout.slot_T.tolist() == [11 * 4 + 2, 22 * 4 + 1]
    assert step.layout.prefill is None
    assert step.sampled_S is None
    decode = step.layout.decode
    assert decode is not None
    assert decode.block_table_SP.tolist() == [[10, 11, 12], [20, 21, 22]]
    assert decode.context_S.tolist() == [7, 10]


def test_chunks_follow_the_decodes_and_chunks_of_one_token_join_them() -> None:
    chunks = [
        chunk("long", 1, 4, (7, 8, 9)),
        chunk("single", 2, 8, (5,)),
        chunk("part", 3, 0, (1, 2), samples=False),
    ]
    step = builder().build(plan({0: 6}, chunks))
    assert step.tokens_T.tolist() == [100, 5, 7, 8, 9, 1, 2]
    assert step.positions_T.tolist() == [6, 8, 4, 5, 6, 0, 1]
    assert step.chunk_rows == (range(2, 5), range(1, 2), range(5, 7))
    assert step.sampled_S is not None
    assert step.sampled_S.tolist() == [
        0,
        4,
        1,
    ]  # the decode, the end of "long", "single"; "part" draws nothing
    prefill = step.layout.prefill
    assert prefill is not None
    assert prefill.cu_seqlens_q.tolist() == [0, 3, 5]
    assert prefill.cu_seqlens_k.tolist() == [0, 7, 9]
    assert (prefill.max_seqlen_q, prefill.max_seqlen_k) == (3, 7)
    assert prefill.context_slot_M is not None
    assert prefill.context_slot_M.tolist() == [80, 81, 82, 83, 84, 85, 86, 0, 1]


def test_prompts_without_cached_context_are_not_read_back() -> None:
    step = builder().build(plan({}, [chunk("a", 0, 0, (1, 2, 3)), chunk("b", 1, 0, (4, 5))]))
    assert step.layout.decode is None
    assert step.layout.prefill is not None
    assert step.layout.prefill.context_slot_M is None


def test_counted_requests_cannot_be_run() -> None:
    with pytest.raises(ValueError, match="no token ids"):
        builder().build(plan({}, [chunk("a", 0, 0, None)]))


@needs_compiler
def test_columns_change_strides_but_no_value() -> None:
    model, twin = random_model(), random_model()
    assert isinstance(fastest_linear(model), ColumnLinear)
    moved = 0
    for (name, laid), kept in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(laid, kept), name
        moved += laid.stride() != kept.stride()
    assert moved > 20


@needs_compiler
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_the_column_socket_multiplies_as_the_plain_one(rows: int) -> None:
    weight = torch.randn(40, 24)
    x = torch.randn(rows, 24)
    columns = weight.t().contiguous().t()
    for each in (weight, columns):
        torch.testing.assert_close(ColumnLinear()(x, each), x @ weight.t(), rtol=1e-5, atol=1e-5)


def test_bfloat16_models_keep_the_plain_socket() -> None:
    assert not isinstance(fastest_linear(random_model().to(torch.bfloat16)), ColumnLinear)


@pytest.mark.parametrize("rows", [1, 8, 9])
def test_products_of_few_rows_ask_the_table_and_others_do_not(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, linear = [], ops.linear
    monkeypatch.setattr(ops, "linear", lambda x, weight: (asked.append(len(x)), linear(x, weight))[1])
    x, weight = torch.randn(rows, 24), torch.randn(40, 24)
    torch.testing.assert_close(TableLinear()(x, weight), x @ weight.t())
    torch.testing.assert_close(TableLinear()(x[None], weight), (x @ weight.t())[None])
    assert asked == ([rows] if rows <= 8 else [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_swiglu_goes_with_their_product_where_the_socket_has_both_and_to_the_same_bits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model().to(dtype)
    experts = model.blocks[-1].get_submodule("moe").get_submodule("experts")
    rows_RD = torch.randn(30, NANO.hidden_size, dtype=dtype)
    counts = torch.full((NANO.n_routed_experts,), 30 // NANO.n_routed_experts)
    ends_E = counts.cumsum(0).to(torch.int32)
    asked, grouped_swiglu = [], ops.grouped_swiglu

    def noting(*operands: torch.Tensor) -> torch.Tensor:
        asked.append(operands[1].shape)
        return grouped_swiglu(*operands)

    monkeypatch.setattr(ops, "grouped_swiglu", noting)
    with torch.inference_mode():
        expected = experts(rows_RD, ends_E, plain_linear)
        assert not asked
        assert torch.equal(experts(rows_RD, ends_E, TableLinear()), expected)
        width = NANO.moe_intermediate_size
        assert asked == [(NANO.n_routed_experts, 2 * width, NANO.hidden_size)]


def tokens(*, enforce_eager: bool, **options: object) -> tuple[dict[str, list[int]], DecodeTapes | None]:
    engine = small_engine(random_model(), enforce_eager=enforce_eager, **options)
    asked = [
        request(str(i), p, max_tokens=10 + 3 * (i % 4), temperature=0.8 * (i % 2), seed=i, logprobs=1)
        for i, p in enumerate(prompts(9, seed=21))
    ]
    answers = serve(engine, asked)
    return {name: answer.tokens for name, answer in answers.items()}, engine._runner.tapes


@needs_compiler
def test_taped_decoding_equals_the_plain_loop_token_for_token() -> None:
    plain, none = tokens(enforce_eager=True)
    taped, tapes = tokens(enforce_eager=False)
    assert none is None
    assert tapes is not None
    assert tapes.refusal is None
    assert len(tapes) >= 3
    assert taped == plain


@needs_compiler
def test_tapes_survive_preemption_and_changing_batches() -> None:
    plain, _ = tokens(enforce_eager=True, num_blocks=16)
    taped, _ = tokens(enforce_eager=False, num_blocks=16)
    assert taped == plain


@needs_compiler
def test_a_batch_size_is_recorded_only_when_it_comes_back() -> None:
    engine = small_engine(random_model())
    tapes = engine._runner.tapes
    assert tapes is not None
    assert len(tapes) == 1  # the warm-up
    serve(engine, [request(name, [3, 4, 5], max_tokens=SEEN_BEFORE) for name in "ab"])
    assert len(tapes) == 1
    serve(engine, [request(name, [3, 4, 5], max_tokens=SEEN_BEFORE + 2) for name in "ab"])
    assert len(tapes) == 2


@needs_compiler
def test_tapes_that_take_too_much_memory_are_forgotten() -> None:
    engine = small_engine(random_model())
    tapes = engine._runner.tapes
    assert tapes is not None
    tapes._most_bytes = 3 * next(iter(tapes._tapes.values()))[1].num_bytes
    for count in (2, 1, 3, 2):
        asked = [request(str(i), [3 + i, 4, 5], max_tokens=12) for i in range(count)]
        for answer in serve(engine, asked).values():
            assert answer.finish == "length"
    kept = sum(tape.num_bytes for _, tape in tapes._tapes.values())
    assert kept <= tapes._most_bytes


@needs_compiler
def test_a_model_that_cannot_be_taped_says_why_and_is_served_plainly(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benthic.kernels import tape

    monkeypatch.delitem(tape.HANDLERS, torch.ops.aten.cos.default)
    with caplog.at_level("INFO", logger="benthic.serve.engine"):
        engine = small_engine(random_model(replace(NANO, num_hidden_layers=2)))
    assert "decode steps run plainly: a tape cannot repeat aten.cos" in caplog.text
    assert engine._runner.tapes is not None
    assert serve(engine, [request("a", [3, 4])])["a"].finish == "length"
    assert len(engine._runner.tapes) == 0
