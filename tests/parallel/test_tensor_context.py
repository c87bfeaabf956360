"""Tensor and context parallelism against one process: one attention, some blocks, whole training steps.

The layouts below run two steps here. They, and ZB-V, ZB-H1, Chimera and interleaved tables with tensor or
context parallelism, and DualPipeV on PP2 x CP2 x TP2 with EP4 and ZeRO-3, were run over 20 steps within the
same tolerances when this was written.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist  # noqa: TID251 (sums what spawned processes found)
from layouts import alone, run_layouts, save, train, trainer_of, with_layout
from small_models import BASE, furthest, packed, random_model
from small_runs import small_run, write_documents
from spawn import spawn

from benthic.model.local import LocalExchange, PackedAttend, plain_linear
from benthic.model.mla import LatentUp
from benthic.model.sockets import Sockets
from benthic.parallel.context import ContextAttend
from benthic.parallel.mesh import Mesh
from benthic.parallel.tensor import divide_products
from benthic.parallel.tokens import TokenShare
from benthic.spec.layout import Layout, box
from benthic.spec.parameters import parameters
from benthic.train.data.shards import TokenShards, read_meta
from benthic.train.evaluate import evaluate

pytestmark = pytest.mark.dist

CPU = torch.device("cpu")
NOPE, ROPE, VALUE, LATENT, HEADS = 6, 4, 5, 7, 3


class Asked(NamedTuple):
    """What attention is given."""

    q_nope: torch.Tensor
    q_rope: torch.Tensor
    latent: torch.Tensor
    k_rope: torch.Tensor
    kv_b: torch.Tensor


def asked(tokens: int) -> Asked:
    generator = torch.Generator().manual_seed(tokens)
    shapes = (tokens, HEADS, NOPE), (tokens, HEADS, ROPE), (tokens, LATENT), (tokens, ROPE)
    drawn = [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in (*shapes, (HEADS * (NOPE + VALUE), LATENT))
    ]
    return Asked(*drawn)


def attended(attend, given: Asked, dout) -> tuple[torch.Tensor, ...]:
    """Output and the gradients of everything given."""
    leaves = Asked(*(each.detach().clone().requires_grad_() for each in given))
    up = LatentUp(leaves.kv_b, NOPE, VALUE, plain_linear)
    out = attend(*leaves[:4], up, layer=0, scale=0.3)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


RAGGED = {
    "sequences that cross the borders of chunks": [0, 3, 4, 17, 29, 32],
    "one sequence": [0, 32],
    "sequences of one token": [*range(33)],
    "a sequence from the first to the last chunk": [0, 2, 31, 32],
}


def context_attention_equals_local(rank: int) -> None:
    layout = Layout(cp_degree=4)
    mesh = Mesh.of(layout, rank)
    for name, row in RAGGED.items():
        for rows in (1, 3):
            cu_seqlens = [0, *(r * 32 + end for r in range(rows) for end in row[1:])]
            given = asked(rows * 32)
            dout = torch.randn(rows * 32, HEADS, VALUE, dtype=torch.float64, generator=torch.Generator())
            local = PackedAttend(torch.tensor(cu_seqlens, dtype=torch.int32), 32)
            exact = attended(local, given, dout)
            share = TokenShare.of(layout, mesh.place, rows=rows, seq_len=32)
            here = share.attention()
            mine = Asked(*(each[here] for each in given[:4]), given.kv_b)
            attend = ContextAttend.of(share, cu_seqlens, mesh.context, CPU)
            *found, dkv_b = attended(attend, mine, dout[here])
            dist.all_reduce(dkv_b)
            for ours, theirs in zip((*found, dkv_b), (*(e[here] for e in exact[:5]), exact[5]), strict=True):
                torch.testing.assert_close(ours, theirs, msg=f"{name}, {rows} rows".format)


def divided_blocks_equal_whole_ones(rank: int) -> None:
    """A dense and a mixture layer with their products divided over 4 ranks, and tokens between them."""
    layout = Layout(tp_degree=4)
    mesh = Mesh.of(layout, rank)
    base = replace(BASE, num_attention_heads=4, num_hidden_layers=2)
    for config in (base, replace(base, q_lora_rank=None)):
        for rows in (1, 2):
            blocks_equal(config, mesh, rows)


def blocks_equal(config, mesh: Mesh, rows: int) -> None:
    lengths = (5, 11) * rows
    _, positions_T, cu_seqlens, _ = packed(config, lengths)
    sockets = Sockets(PackedAttend(cu_seqlens, 11), LocalExchange(config.n_routed_experts), plain_linear)
    generator = torch.Generator().manual_seed(3)
    size = (16 * rows, config.hidden_size)
    x_TD, dout_TD = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2))
    share = TokenShare.of(mesh.layout, mesh.place, rows=rows, seq_len=16)
    whole, mine = (random_model(config, dtype=torch.float64) for _ in range(2))
    boxes = {p.name: box(p, mesh.layout, mesh.place) for p in parameters(config)}
    for name, param in mine.named_parameters():
        param.data = param.data[boxes[name]].clone()
    divide_products(mine, mesh.tensor, row_part=share.row_part)
    here = share.stream()
    exact, dx_TD = through(whole, x_TD, positions_T, sockets, dout_TD)
    ours, dmine_TD = through(mine, x_TD[here], positions_T, sockets, dout_TD[here])
    assert furthest(ours, exact[here]) < 1e-6  # the gate computes in float32
    assert furthest(dmine_TD, dx_TD[here]) < 1e-6
    theirs = {name: param.grad for name, param in whole.named_parameters()}
    for name, param in mine.named_parameters():
        if theirs[name] is None:  # embedding and head, which no block uses
            continue
        if param.shape == theirs[name].shape:
            dist.all_reduce(param.grad)
        assert furthest(param.grad, theirs[name][boxes[name]]) < 1e-5, name


def through(model, x_TD, positions_T, sockets, dout_TD):
    x_TD = x_TD.clone().requires_grad_()
    out_TD = model.run_layers(x_TD, positions_T, sockets).x_TD
    out_TD.backward(dout_TD)
    return out_TD.detach(), x_TD.grad


TWO = [Layout(tp_degree=2), Layout(cp_degree=2)]
FOUR = [
    Layout(tp_degree=2, cp_degree=2),
    Layout(tp_degree=2, dp_degree=2, ep_degree=4),
    Layout(pp_degree=2, tp_degree=2, ep_degree=2),
    Layout(pp_degree=2, cp_degree=2, ep_degree=2, zero_stage=2),
]
DUALPIPE = [Layout(pp_degree=2, tp_degree=2, schedule="dualpipe")]
SPLIT = [Layout(pp_degree=2, cp_degree=2, ep_degree=2, zero_stage=3, schedule="dualpipev")]
LOSS, GRADIENT = 1e-6, 1e-5


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Of a step in two parts, of one that fills DualPipe and of one that fills two stages a rank.

    Of each: config, data, what one process found.
    """
    folder = tmp_path_factory.mktemp("runs")
    data = write_documents(folder / "data")
    found = []
    for plain in (small_run(layers=2, rows=4, microbatches=2), small_run(layers=2), small_run(layers=4)):
        config = replace(plain, recompute=("attention", "experts"))
        serial = train(alone(config, data), config.train.steps, keep=(1, config.train.steps))
        found.append((config, str(data), str(save(serial, folder / f"{len(found)}.pt"))))
    return found


def scored(config, data, mesh=None):
    """Held-out loss of the initial weights; the last microbatch has fewer rows than the others."""
    shards = TokenShards(Path(data), read_meta(Path(data)), "held_out")
    score = trainer_of(config, Path(data), mesh).executor.score
    return evaluate(score, shards, seq_len=32, rows=2, max_tokens=11 * 32, mask_documents=True, mtp_depth=1)


def two_ranks(rank, config, data, serial):
    run_layouts(rank, config, TWO, data, serial, (LOSS, GRADIENT))
    whole = scored(config, data)
    for layout in TWO:
        found = scored(with_layout(config, layout), data, Mesh.of(layout, rank))
        assert (found.tokens, found.documents) == (whole.tokens, whole.documents)
        assert found.loss == pytest.approx(whole.loss, rel=LOSS)
        assert found.mtp_acceptance is None  # a draft is compared with the next token, which another rank has


def four_ranks(rank, *runs):
    context_attention_equals_local(rank)
    divided_blocks_equal_whole_ones(rank)
    for layouts, (config, data, serial) in zip((FOUR, DUALPIPE, SPLIT), runs, strict=True):
        run_layouts(rank, config, layouts, data, serial, (LOSS, GRADIENT))


def test_two_tensor_or_context_ranks_train_and_score_as_one_process(runs):
    spawn(two_ranks, 2, *runs[0])


def test_attention_blocks_and_training_on_four_ranks_equal_those_of_one_process(runs):
    spawn(four_ranks, 4, *runs, seconds=120)
