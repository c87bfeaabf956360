"""What the dry run says a microbatch keeps between forward and backward is what stays alive."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist  # noqa: TID251 (adds up what the ranks keep)
from layouts import trainer_of, with_layout
from live_memory import LiveMemory
from small_runs import small_run, write_documents
from spawn import spawn

from benthic.parallel.activations import block_bytes, peak_bytes, stage_bytes
from benthic.parallel.chunk import Chunk
from benthic.parallel.mesh import Mesh
from benthic.parallel.pipeline import Flow
from benthic.sched.pipeline import schedules
from benthic.spec.layout import Layout
from benthic.train.losses import Weights

if TYPE_CHECKING:
    from benthic.train.config import RunConfig
    from benthic.train.trainer import Trainer

HOST_COPIES = "aten.empty.memory_format"  # what is offloaded goes into an empty tensor, and what C computes
SEGMENTS = "aten._scaled_dot_product_flash_attention_for_cpu.default"  # kept beside all of them together
PHASES = ("attention", "dispatch", "experts", "combine")
V3 = ("deepseek-v3",)
ALONE = (
    "norms",
    "up_projections",
    "swiglu",
    "expert_inputs",
    "expert_outputs",
    "attention",
    "dispatch",
    "experts",
    "combine",
)


def config(
    dtype: str,
    recompute: tuple[str, ...] = (),
    *,
    narrow: bool = False,
    q_lora_rank: int | None = 96,
    offload: tuple[str, ...] = (),
) -> RunConfig:
    """Widths that tell terms apart; keys as wide as values, so that attention on a CPU pads neither."""
    small = small_run(layers=2, rows=4, microbatches=2)
    model = dataclasses.replace(
        small.model,
        hidden_size=256,
        qk_nope_head_dim=48,
        qk_rope_head_dim=16,
        v_head_dim=64,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=64,
        moe_intermediate_size=160,
        intermediate_size=320,
    )
    precision = dataclasses.replace(
        small.precision, weights=dtype, matmul=dtype, fp8_swiglu=narrow, e5m6_attention=narrow
    )
    return dataclasses.replace(
        small,
        model=model,
        precision=precision,
        data=dataclasses.replace(small.data, mask_documents=False),
        recompute=recompute,
        offload=offload,
    )


def kept_by_a_chunk(trainer: Trainer) -> int:
    """Bytes that the second microbatch in flight adds; the first has made the FP8 weights of the step."""
    without = (HOST_COPIES,) if trainer.config.offload else ()
    without += (SEGMENTS,) if trainer.mesh.context.size > 1 else ()
    executor, batch, memory = trainer.executor, trainer._read(), LiveMemory(without)
    weights = Weights(main=1.0, mtp=(1.0,), balance=1.0)
    executor._take(
        [executor._task(executor.place(each), executor._objective(each, weights)) for each in batch]
    )
    chunks, sizes = [], [0]
    with memory:
        for microbatch in range(2):
            chunk = Chunk(executor._stages[0].phases(microbatch), Flow(None))
            chunks.append(chunk)
            while chunk.next_forward is not None:
                chunk.forward()
            chunk.take_output()
            sizes.append(memory.bytes)
    while chunks:  # every rank of an exchange must take part in its backward
        chunks.pop()
    return sizes[2] - sizes[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("documents") / "data")


def check(own: RunConfig, data: Path) -> None:
    trainer = trainer_of(own, data)
    said = stage_bytes(own, trainer.stages.models[0].part)
    assert said == pytest.approx(kept_by_a_chunk(trainer), rel=0.01)


@pytest.mark.parametrize("recompute", [(), *((one,) for one in ALONE), V3, (*V3, "experts")], ids=str)
def test_estimate_is_what_stays_alive(recompute: tuple[str, ...], data: Path) -> None:
    check(config("fp8", recompute), data)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", [(), ("attention", "experts"), V3], ids=str)
def test_estimate_knows_every_dtype(dtype: str, recompute: tuple[str, ...], data: Path) -> None:
    check(config(dtype, recompute), data)


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
@pytest.mark.parametrize("recompute", [(), V3], ids=str)
def test_estimate_knows_narrow_formats_and_queries_without_a_latent(
    dtype: str, recompute: tuple[str, ...], data: Path
) -> None:
    check(config(dtype, recompute, narrow=True), data)
    check(config(dtype, recompute, q_lora_rank=None), data)


def on_two_ranks(rank: int, data: str) -> None:
    """Routing decides which of two ranks keeps more, and the mean is estimated; of context ranks the most."""
    cases = (("float32", (), 96), ("bfloat16", ("experts",), None), ("fp8", (*V3, "expert_inputs"), 96))
    for layout in (Layout(dp_degree=2, ep_degree=2), Layout(tp_degree=2), Layout(cp_degree=2)):
        for dtype, recompute, rank_of_queries in cases:
            own = with_layout(config(dtype, recompute, q_lora_rank=rank_of_queries), layout)
            own = dataclasses.replace(
                own, train=dataclasses.replace(own.train, global_batch_size=8 * layout.dp_degree)
            )
            trainer = trainer_of(own, Path(data), Mesh.of(layout, rank))
            found = torch.tensor(float(kept_by_a_chunk(trainer)))
            shared = layout.cp_degree == 1
            dist.all_reduce(found, dist.ReduceOp.SUM if shared else dist.ReduceOp.MAX)
            said = stage_bytes(own, trainer.stages.models[0].part)
            expected = float(found) / (2 if shared else 1)
            assert said == pytest.approx(expected, rel=0.02), (layout, dtype, recompute)


@pytest.mark.dist
def test_estimate_is_what_stays_alive_where_two_ranks_share_experts_heads_or_rows(data: Path) -> None:
    spawn(on_two_ranks, 2, str(data))


def test_recomputing_the_pieces_of_the_report_halves_what_a_block_keeps() -> None:
    plain, pieces = config("fp8"), config("fp8", V3, narrow=True)
    assert block_bytes(pieces, 1) < 0.5 * block_bytes(plain, 1)


@pytest.mark.parametrize("offload", [("attention",), ("experts",), ("attention", "experts"), PHASES], ids=str)
@pytest.mark.parametrize("recompute", [(), V3], ids=str)
def test_what_is_offloaded_is_not_counted_and_not_alive(
    recompute: tuple[str, ...], offload: tuple[str, ...], data: Path
) -> None:
    check(config("bfloat16", recompute, offload=offload), data)


def test_peak_counts_each_stage_by_its_own_size() -> None:
    """The last of two ranks holds one microbatch of the stage with the head, the first two of the other."""
    own = with_layout(config("bfloat16"), Layout(pp_degree=2))
    own = dataclasses.replace(own, model=dataclasses.replace(own.model, num_hidden_layers=3))
    table = schedules.build("1f1b", 2, 4)
    sizes = [peak_bytes(own, table, pp) for pp in range(2)]
    layers = [block_bytes(own, layer) for layer in range(4)]
    tokens = 4 * 32
    assert sizes[0] == pytest.approx(2 * tokens * sum(layers[:2]), rel=0.02)
    assert sizes[1] == pytest.approx(tokens * sum(layers[2:]), rel=0.25)
