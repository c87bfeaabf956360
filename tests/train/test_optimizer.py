from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from benthic.kernels import ops
from benthic.model.products import PlainProducts, WeightGradients
from benthic.model.split_linear import SplitLinear
from benthic.parallel.buckets import Bucket, global_norm
from benthic.parallel.mesh import Group
from benthic.train.config import OptimizerConfig
from benthic.train.optimizer import AdamW


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(7, 5))
        self.norm = nn.Parameter(torch.ones(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x * self.norm) @ self.matrix.T).square().mean()


ALONE = Group((0,), 0, None)


def bucket_of(model: Toy) -> Bucket:
    return Bucket(dict(model.named_parameters()), ALONE, ALONE, zero_stage=1)


def fill(bucket: Bucket, value: float) -> None:
    for piece in bucket.pieces():
        piece.gradient.fill_(value)


def run(model: Toy, steps: int, config: OptimizerConfig) -> AdamW:
    bucket = bucket_of(model)
    optimizer = AdamW([bucket.pieces()], config)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        bucket.zero()
        x = torch.randn(3, 5, generator=generator).to(model.matrix.dtype)
        model(x).backward()
        bucket.settle()
        optimizer.step(lr=1e-2)
        bucket.publish()
    return optimizer


def test_float32_update_is_torchs_adamw_with_decay_on_matrices_only() -> None:
    ours, theirs = Toy(), Toy()
    run(ours, 20, OptimizerConfig())
    groups = [
        {"params": [theirs.matrix], "weight_decay": 0.1},
        {"params": [theirs.norm], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        reference.zero_grad()
        theirs(torch.randn(3, 5, generator=generator)).backward()
        reference.step()
    assert torch.allclose(ours.matrix, theirs.matrix, atol=1e-6)
    assert torch.allclose(ours.norm, theirs.norm, atol=1e-6)


def test_bfloat16_moments_take_half_the_bytes_and_stay_close() -> None:
    full, half = Toy(), Toy()
    wide, narrow = run(full, 20, OptimizerConfig()), run(half, 20, OptimizerConfig(moment_dtype="bfloat16"))
    sizes = [sum(t.nbytes for n in ("matrix", "norm") for t in o.moments(n).values()) for o in (wide, narrow)]
    assert sizes[0] == 2 * sizes[1]
    assert not torch.equal(full.matrix, half.matrix)
    assert torch.allclose(full.matrix, half.matrix, atol=2e-3)


def test_bfloat16_weights_follow_float32_masters() -> None:
    model = Toy().to(torch.bfloat16)
    before = model.matrix.detach().clone()
    bucket = bucket_of(model)
    optimizer = AdamW([bucket.pieces()], OptimizerConfig(weight_decay=0.0))
    fill(bucket, 1.0)
    for _ in range(3):
        optimizer.step(lr=1e-5)
        bucket.publish()
    master = next(piece.master for piece in bucket.pieces() if piece.name == "matrix").view(7, 5)
    assert torch.allclose(master, before.float() - 3e-5, atol=1e-6)
    assert torch.equal(model.matrix, master.to(torch.bfloat16))
    assert {piece.name for piece in bucket.pieces()} == {"matrix", "norm"}


def bits(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64).to(torch.int32).view(torch.float32)


def halves(master: Tensor) -> tuple[Tensor, Tensor]:
    weight, remainder = (torch.empty_like(master, dtype=dtype) for dtype in (torch.bfloat16, torch.int16))
    ops.split_master(master, weight, remainder)
    return weight, remainder


def test_halves_of_a_master_are_all_of_it_and_its_weight_is_rounded_to_nearest() -> None:
    generator = torch.Generator().manual_seed(3)
    every = torch.randint(-(2**31), 2**31, (2**20,), generator=generator).to(torch.int32).view(torch.float32)
    master = torch.cat(
        [every[~every.isnan()], bits(0, 1 << 31, 1, 0x7FFF, 0x7F7FFFFF, 0x7F800000, 0xFF800000)]
    )
    weight, remainder = halves(master)
    assert torch.equal(ops.join_master(weight, remainder).view(torch.int32), master.view(torch.int32))
    between = (master.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(weight[~between], master[~between].bfloat16())
    assert not torch.equal(weight[between], master[between].bfloat16())
    assert (weight[between].abs() > master[between].abs()).all()


def test_a_master_beyond_bfloat16_comes_back_finite_and_nan_as_nan() -> None:
    weight, remainder = halves(bits(0x7F7F8000, 0xFF7F8000, 0x7F7F7FFF))
    assert weight.tolist() == [torch.inf, -torch.inf, torch.finfo(torch.bfloat16).max]
    assert ops.join_master(weight, remainder).isfinite().all()
    nans = bits(0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7F808000, 0x7FFF8000)
    weight, remainder = halves(nans)
    assert nans.isnan().all()
    assert weight.isnan().all()
    assert ops.join_master(weight, remainder).isnan().all()


def test_updates_of_split_masters_are_those_of_whole_ones() -> None:
    torch.manual_seed(2)
    first = {"matrix": torch.randn(40, 50).bfloat16(), "norm": torch.ones(50).bfloat16()}
    found = []
    for split in (False, True):
        named = {name: nn.Parameter(value.clone()) for name, value in first.items()}
        bucket = Bucket(named, ALONE, ALONE, zero_stage=1, split=split)
        optimizer = AdamW([bucket.pieces()], OptimizerConfig(moment_dtype="bfloat16"))
        for step in range(5):
            for piece in bucket.pieces():
                piece.gradient.normal_(generator=torch.Generator().manual_seed(step))
            optimizer.step(lr=1e-3)
            bucket.publish(rounded=True)
        found.append({piece.name: piece for piece in bucket.pieces()})
    for whole, split in zip(*(each.values() for each in found), strict=True):
        assert split.kept.dtype == torch.int16
        assert torch.equal(split.master, whole.master)
        assert torch.equal(split.running, halves(whole.master)[0])


def test_neighbours_that_decay_alike_are_updated_together(monkeypatch) -> None:
    torch.manual_seed(0)
    shapes = {"a": (3, 4), "b": (2, 7), "c": (6, 2), "norm": (5,), "bias": (4,)}
    named = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    bucket = Bucket(named, ALONE, ALONE, zero_stage=1)
    pieces = list(bucket.pieces())
    alone = [piece.master.clone() for piece in pieces]
    together = AdamW([[pieces[0], *pieces[2:]]], OptimizerConfig())
    sizes, adamw = [], ops.adamw
    monkeypatch.setattr(
        ops, "adamw", lambda master, *rest, **more: (sizes.append(len(master)), adamw(master, *rest, **more))
    )
    for piece in pieces:
        piece.gradient.normal_()
    together.step(lr=0.1)
    assert sizes == [12, 12, 9]  # a; c behind a hole; norm and bias
    for piece, before in zip(pieces, alone, strict=True):
        if piece is pieces[1]:
            assert torch.equal(piece.master, before)
            continue
        one = AdamW([[replace(piece, kept=before)]], OptimizerConfig())
        one.step(lr=0.1)
        assert torch.equal(piece.master, before)
        assert torch.equal(together.moments(piece.name)["first"], one.moments(piece.name)["first"])


def test_gradients_of_bfloat16_weights_add_up_in_float32() -> None:
    model = Toy().to(torch.bfloat16)
    bucket = bucket_of(model)
    torch.manual_seed(4)
    inputs = [torch.randn(3, 5, dtype=torch.bfloat16) for _ in range(9)]
    expected = torch.zeros(7, 5)
    for x in inputs:
        alone = Toy().to(torch.bfloat16)
        alone(x).backward()
        expected += alone.matrix.grad.float()
        model(x).backward()
    assert model.matrix.grad is None
    bucket.settle()
    gradient = next(piece.gradient for piece in bucket.pieces() if piece.name == "matrix")
    assert gradient.dtype == torch.float32
    assert torch.allclose(gradient.view(7, 5), expected, rtol=1e-6)
    bucket.zero()
    bucket.settle()
    assert float(global_norm([bucket], ALONE)) == 0.0


TWO = Group((0, 1), 0, None)


def squares_after(bucket: Bucket, experts: nn.Parameter, *, gradients: int) -> tuple[Tensor, Tensor]:
    """The bucket's squares, and those that lie in memory, after so many gradients of its experts."""
    sink = WeightGradients()
    socket = SplitLinear(PlainProducts(), sink)
    bucket.collect(sink)
    x = torch.randn(9, 5, dtype=experts.dtype)
    ends = torch.tensor([4, 4, 8], dtype=torch.int32)  # the second has no rows
    for _ in range(gradients):
        socket.grouped(x, experts.flatten(1, 2), ends).square().sum().backward()
    return bucket.square_sum(), bucket.prepare().double().square().sum()


def test_squares_of_a_gradient_are_kept_until_something_is_added_to_it() -> None:
    torch.manual_seed(5)
    experts, other = (nn.Parameter(torch.randn(3, *s, 5).bfloat16()) for s in ((2, 4), (6,)))
    bucket = Bucket({"experts": experts, "other": other}, ALONE, ALONE, zero_stage=1)
    for _ in range(2):
        into, _, _ = bucket.accumulator("other")
        into.normal_()
        found, read = squares_after(bucket, experts, gradients=1)
        torch.testing.assert_close(found.double(), read, rtol=1e-6, atol=0)
        with torch.no_grad():
            bucket.prepare()[: experts.numel()].zero_()  # past the bucket: it cannot know
        assert torch.equal(bucket.square_sum(), found)
        other.square().sum().backward()  # through autograd
        assert bucket.square_sum() > found
        bucket.accumulator("experts")
        torch.testing.assert_close(bucket.square_sum().double(), bucket.prepare().double().square().sum())
        bucket.zero()


@pytest.mark.parametrize(
    ("group", "partners", "zero_stage", "dtype", "gradients"),
    [
        (TWO, ALONE, 1, torch.bfloat16, 1),
        (ALONE, TWO, 1, torch.bfloat16, 1),
        (ALONE, ALONE, 2, torch.bfloat16, 1),
        (ALONE, ALONE, 1, torch.float32, 1),
        (ALONE, ALONE, 1, torch.bfloat16, 2),
    ],
    ids=["reduced", "partners", "ZeRO-2", "autograd may add", "a second was added"],
)
def test_no_squares_are_kept_where_a_gradient_is_not_final(
    group: Group, partners: Group, zero_stage: int, dtype: torch.dtype, gradients: int
) -> None:
    experts = nn.Parameter(torch.randn(3, 2, 4, 5).to(dtype))
    bucket = Bucket({"experts": experts}, group, partners, zero_stage=zero_stage)
    squares_after(bucket, experts, gradients=gradients)
    assert not bucket._squares
