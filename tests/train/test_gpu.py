"""The same run on a CUDA GPU: near the CPU in float32, near float32 in bfloat16, exact on resuming."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest
import torch

from benthic.cli.settings import apply
from benthic.train.checkpoint import FolderStore
from benthic.train.data.shards import TokenShards, read_meta
from benthic.train.evaluate import ModelScore, evaluate
from benthic.train.hardware import detect
from benthic.train.resolve import resolve
from benthic.train.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benthic.train.config import RunConfig

pytestmark = pytest.mark.gpu


@pytest.fixture
def on_gpu(dataset: Path, nano: RunConfig) -> Callable[..., Trainer]:
    def make(*settings: str) -> Trainer:
        config = apply(dataclasses.replace(nano, device="cuda"), ["train.seq_len=64", *settings])
        meta = read_meta(dataset)
        return Trainer(resolve(config, detect("cuda"), meta).config, TokenShards(dataset, meta, "train"))

    return make


def losses(trainer: Trainer, steps: int) -> list[float]:
    return [trainer.step().loss for _ in range(steps)]


def test_float32_on_a_gpu_follows_the_cpu(
    on_gpu: Callable[..., Trainer], trainer: Callable[[RunConfig], Trainer], nano: RunConfig
) -> None:
    cpu = losses(trainer(apply(nano, ["train.seq_len=64"])), 12)
    assert losses(on_gpu("precision.weights=float32", "precision.matmul=float32"), 12) == pytest.approx(
        cpu, rel=5e-3
    )


def test_bfloat16_weights_follow_float32_with_float32_masters_and_gradients(
    on_gpu: Callable[..., Trainer],
) -> None:
    narrow = on_gpu()
    assert narrow.config.precision.weights == "bfloat16"
    exact = losses(on_gpu("precision.weights=float32", "precision.matmul=float32"), 20)
    assert losses(narrow, 20) == pytest.approx(exact, rel=2e-2)
    assert {p.dtype for p in narrow.model.parameters()} == {torch.bfloat16}
    assert {g.dtype for g in narrow.gradients().values()} == {torch.float32}
    assert {p.master.dtype for bucket in narrow.buckets for p in bucket.pieces()} == {torch.float32}
    assert narrow.model.state_dict()["layers.1.moe.gate.bias"].dtype == torch.float32


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("extra", [(), ("optimizer.store_param_remainders=true",)], ids=["whole", "split"])
def test_resumed_run_on_a_gpu_has_the_same_losses(
    on_gpu: Callable[..., Trainer], tmp_path: Path, extra: tuple[str, ...], *, wait: bool
) -> None:
    straight, broken, store = on_gpu(*extra), on_gpu(*extra), FolderStore(tmp_path)
    expected = losses(straight, 8)
    losses(broken, 4)
    store.save(broken.saved(), wait=wait)
    assert losses(broken, 4) == expected[4:]
    again = on_gpu(*extra)
    again.restore(store.open(4))
    assert losses(again, 4) == expected[4:]


def test_recomputation_and_accumulation_change_little_on_a_gpu(on_gpu: Callable[..., Trainer]) -> None:
    plain = losses(on_gpu(), 4)
    phases = "recompute=attention,dispatch,experts,combine"
    assert losses(on_gpu(phases), 4) == pytest.approx(plain, rel=1e-3)
    assert losses(on_gpu("train.local_batch_size=1"), 4) == pytest.approx(plain, rel=5e-3)


def test_evaluation_on_a_gpu_finds_the_loss_of_the_cpu(on_gpu: Callable[..., Trainer], dataset: Path) -> None:
    run = on_gpu("precision.weights=float32", "precision.matmul=float32")
    shards = TokenShards(dataset, read_meta(dataset), "held_out")

    def score() -> float:
        scorer = ModelScore(run.model, run.executor.linear)
        return evaluate(
            scorer, shards, seq_len=64, rows=4, max_tokens=800, mask_documents=True, mtp_depth=1
        ).loss

    gpu = score()
    run.model.to("cpu")
    assert gpu == pytest.approx(score(), rel=1e-3)


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "fp8"])
def test_a_step_that_is_one_graph_finds_what_its_kernels_do(
    weights: str, on_gpu: Callable[..., Trainer]
) -> None:
    numbers = [f"precision.weights={weights}", f"precision.matmul={weights}", "train.global_batch_size=8"]
    one = on_gpu(*numbers, "train.lr=1e-4")
    other = on_gpu(*numbers, "train.lr=1e-4", "train.cuda_graph=false")
    assert one.recorded
    assert not other.recorded
    pairs = [(one.step(), other.step()) for _ in range(8)]
    for mine, theirs in pairs:
        assert (mine.loss, mine.grad_norm) == pytest.approx((theirs.loss, theirs.grad_norm), rel=1e-2)
        assert mine.mtp == pytest.approx(theirs.mtp, rel=1e-2)
        mine_E, theirs_E = (torch.stack(list(each.counts.values())).sum(1) for each in (mine, theirs))
        assert torch.equal(mine_E, theirs_E)
    one.close()


def test_scoring_between_replays_changes_nothing(on_gpu: Callable[..., Trainer]) -> None:
    run, other = on_gpu("train.lr=1e-4"), on_gpu("train.lr=1e-4")
    assert losses(run, 5) == pytest.approx(losses(other, 5), rel=1e-5)
    run.executor.score(iter(run._read()))
    assert losses(run, 4) == pytest.approx(losses(other, 4), rel=1e-5)
