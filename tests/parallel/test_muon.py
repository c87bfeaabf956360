"""Muon on several ranks takes the steps that one process takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist  # noqa: TID251 (sums over the test's ranks)
from layouts import trainer_of, with_layout
from spawn import spawn

from benthic.cli.settings import apply
from benthic.parallel.mesh import Group, Mesh
from benthic.parallel.whole_matrices import Matrix, WholeMatrices
from benthic.spec.layout import Layout, box
from benthic.spec.parameters import parameters
from benthic.train import recipes
from benthic.train.data import build, tokenizer
from benthic.train.data.documents import Corpus

LAYOUTS = [
    Layout(dp_degree=4, zero_stage=1, ep_degree=2),
    Layout(dp_degree=4, zero_stage=2),
    Layout(pp_degree=2, dp_degree=2, zero_stage=3, ep_degree=2),
]
STEPS = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A config and a dataset of a few made-up lines."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(12):
        lines = "".join(f"line {k * number} says {k + number} and {k * k}\n" for k in range(20))
        (folder / f"{number}.txt").write_text(lines)
    rules = tokenizer.train((p.read_text() for p in sorted(folder.iterdir())), 264)
    words = tokenizer.save(rules, tmp_path_factory.mktemp("tokenizer"), model_max_length=256)
    data = tmp_path_factory.mktemp("data") / "set"
    build.build(Corpus(sources=(folder,)), words, data, build.BuildOptions(held_out=0.1))
    settings = [
        "optimizer.name=muon",
        "optimizer.newton_schulz_dtype=float32",
        "precision.weights=float32",
        "precision.matmul=float32",
        "train.seq_len=24",
        "train.local_batch_size=1",
        "train.global_batch_size=4",
        "train.lr=0.01",
        "train.warmup_steps=0",
    ]
    return apply(recipes.nano_test(), settings), data


def follow(rank: int, config, data: str, serial: str) -> None:
    whole = torch.load(serial)
    params = {p.name: p for p in parameters(config.model)}
    for layout in LAYOUTS:
        trainer = trainer_of(with_layout(config, layout), Path(data), Mesh.of(layout, rank))
        for step in range(STEPS):
            loss = trainer.step().loss
            assert abs(loss - whole["losses"][step]) < 1e-5, (layout, step)
        for bucket in trainer.buckets:
            for piece in bucket.pieces():
                local = whole[piece.name][box(params[piece.name], layout, trainer.mesh.place)].flatten()
                error = (piece.master - local[piece.start : piece.stop]).abs().max()
                assert float(error) < 1e-5, f"{layout}: {piece.name} is off by {float(error):.3g}"


@pytest.mark.dist
def test_data_expert_and_pipeline_ranks_follow_one_process(run, tmp_path):
    config, data = run
    trainer = trainer_of(config, data)
    found = {"losses": [trainer.step().loss for _ in range(STEPS)]}
    found |= {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    torch.save(found, tmp_path / "serial.pt")
    spawn(follow, 4, config, str(data), str(tmp_path / "serial.pt"))


def cut(rank: int) -> None:
    """Matrices of odd sizes over four shards: each comes back as the function of the whole."""
    shapes = [(3, 5), (7, 2), (1, 4), (6, 6), (2, 2)]
    starts, at = [], 1
    for rows, columns in shapes:
        starts.append(at)
        at += rows * columns + 1
    matrices = [Matrix(s, *shape) for s, shape in zip(starts, shapes, strict=True)]
    length = -(-at // 4)
    flat = torch.randn(4 * length, generator=torch.Generator().manual_seed(2))
    expected = flat.clone()
    for m in matrices:
        expected[m.start : m.stop] = (
            flat[m.start : m.stop].view(m.rows, m.columns).cumsum(0) + m.rows
        ).flatten()
    group = Mesh.of(Layout(dp_degree=4), rank).dense
    calls = []

    def function(found):
        calls.extend(found)
        return [matrix.cumsum(0) + matrix.shape[0] for matrix in found]

    shard = flat[rank * length : (rank + 1) * length].clone()
    WholeMatrices.of(matrices, length, group).apply(function, shard)
    assert torch.equal(shard, expected[rank * length : (rank + 1) * length])
    count = torch.tensor([len(calls)])
    dist.all_reduce(count)
    assert int(count) == len(matrices)


@pytest.mark.dist
def test_every_matrix_is_computed_once_and_whole():
    spawn(cut, 4)


def test_one_rank_computes_in_place():
    shard = torch.arange(6.0)
    WholeMatrices.of([Matrix(0, 2, 3)], 6, Group((0,), 0, None)).apply(lambda ms: [m + 1 for m in ms], shard)
    assert shard.tolist() == [1, 2, 3, 4, 5, 6]
