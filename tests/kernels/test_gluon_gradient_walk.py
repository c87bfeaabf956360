"""Weight gradients of experts in Gluon, run by Python: both kernels, on memory and barriers as threads.

Layouts are left out; loads, barriers, which rows are multiplied and how tiles leave are not. Products are
computed when they are waited for, and TMA reads what leaves when that is waited for: as late as either may.
"""

from __future__ import annotations

import importlib.util
import math
import re
import threading
from types import SimpleNamespace

import pytest
import torch
from gluon_threads import (
    Described,
    Pointer,
    Tiles,
    Values,
    each_program,
    gluon_language,
    in_python,
    load,
    of_tensors,
    places,
    where,
)

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from benthic.kernels import (
    gluon_expert_gradient,
    gluon_fp8_three_gradient,
    gluon_fp8_tiles,
    gluon_sums,
    gluon_tiles,
    ops,
)
from benthic.kernels.reference import fp8_linear, moe


class Slot(Tiles):
    """Shared memory of sums that leave."""

    def __init__(self, data, tma):
        super().__init__(data)
        self.tma = tma

    def permute(self, order):
        return Slot(self.data.permute(order), self.tma)

    def store(self, values):
        self.tma.note("s")
        super().store(values)


class Product:
    """A sum and the products that are still to be added."""

    def __init__(self, sums, *, use_acc):
        self.sums = sums.sums if isinstance(sums, Product) else sums if use_acc else torch.zeros_like(sums)
        self.left = sums.left if isinstance(sums, Product) else []


class Leaving:
    """TMA of each group: what it has been told to write or add, and in which order that came to pass."""

    def __init__(self, into):
        self.into, self.written, self.own = into, torch.zeros(into.shape, dtype=torch.int64), {}
        self.fetched = torch.zeros(into.numel(), dtype=torch.int64)
        self.beside = []

    def of_thread(self):
        return self.own.setdefault(threading.current_thread(), SimpleNamespace(on_their_way=[], order=""))

    def note(self, what):
        self.of_thread().order += what

    def begin(self, corner, slot, *, adds):
        self.note("L")
        self.of_thread().on_their_way.append((corner, slot, adds))

    def wait(self, most):
        self.note("w")
        waiting = self.of_thread().on_their_way
        while len(waiting) > most:
            corner, slot, adds = waiting.pop(0)
            place = places(corner, slot.data.shape)
            before = self.into[place]
            part = slot.data[places((0, 0, 0), before.shape)]
            self.into[place] = before + part if adds else part
            self.written[place] += 1
            slot.data.fill_(torch.nan)

    def fetch(self, _code, _registers, operands, **_settings):
        at, size = operands
        for first, some in zip(at.at.tolist(), size.tolist(), strict=True):
            if some > 0:
                assert first % 4 == some % 16 == 0
                self.fetched[first : first + some // 4] += 1


def multiply(left, right, sums, *, is_async, use_acc=True):
    assert is_async
    product = Product(sums, use_acc=use_acc)
    product.left.append((left.data, right.data))
    return product


def wait_for(most, deps):
    (product,) = deps
    if isinstance(product, Product):
        while len(product.left) > most:
            left, right = product.left.pop(0)
            product.sums = product.sums + left.float() @ right.float()
    return product.sums if isinstance(product, Product) and not most else product


def numbers(*bounds):
    """A range whose numbers are tensors, as a kernel's are."""
    return (torch.tensor(number).as_subclass(Values) for number in range(*bounds))


BOXES = [gluon_sums.box(turned) for turned in (False, True)]
MODULES = (gluon_expert_gradient, gluon_fp8_three_gradient, gluon_fp8_tiles, gluon_sums, gluon_tiles)


@pytest.fixture
def language(monkeypatch):
    found = gluon_language(where=where, minimum=of_tensors(torch.minimum), maximum=of_tensors(torch.maximum))
    in_python(monkeypatch, MODULES, gl=found, load=load, warpgroup_mma=multiply)
    for module in MODULES[:2]:
        monkeypatch.setattr(module, "range", numbers, raising=False)
        monkeypatch.setattr(module, "warpgroup_mma_wait", wait_for)
    return found


@pytest.fixture
def leaving(language, monkeypatch):
    """What leaves into a tensor is watched from here on."""

    def watch(into, slots):
        tma = Leaving(into)

        def product(*operands, **settings):
            own = tma.of_thread()
            if "L" in own.order:
                tma.beside.append(len(own.on_their_way) == slots)
            return multiply(*operands, **settings)

        language.inline_asm_elementwise = tma.fetch
        shared = SimpleNamespace(store_wait=tma.wait)
        for module in MODULES[:2]:
            monkeypatch.setattr(module, "tma", shared)
            monkeypatch.setattr(module, "warpgroup_mma", product)
        monkeypatch.setattr(gluon_sums, "tma", shared)
        monkeypatch.setattr(gluon_sums, "view", lambda slot, _t, shape, _l: Slot(slot.data.view(shape), tma))
        monkeypatch.setattr(gluon_sums, "meet", lambda: tma.note("m"))
        monkeypatch.setattr(gluon_sums, "fence_async_shared", lambda: tma.note("f"))
        for name, adds in (("add", True), ("unload", False)):
            leave = lambda _, corner, slot, adds=adds: tma.begin(corner, slot, adds=adds)  # noqa: E731
            monkeypatch.setattr(gluon_sums, name, leave)
        return tma

    return watch


SIZES = [(1, 0, 63, 64, 65), (127, 128, 129), (0, 0), (0, 300, 0), (200, 3), (300,)]
WIDTHS = [(208, 144), (192, 128), (16, 272), (400, 48)]


def sums(shape, generator, *, add):
    return torch.randn(shape, generator=generator) if add else torch.full(shape, torch.nan)


def check(tma, exact, before, ends, *, add, fetch):
    """Every sum left once, in order, while products were multiplied; old sums that are met were fetched."""
    torch.testing.assert_close(tma.into, before + exact if add else exact, rtol=1e-4, atol=1e-4)
    full = torch.diff(ends, prepend=ends.new_zeros(1)) > 0
    times = (full | torch.tensor(not add)).long()[:, None, None].expand(exact.shape)
    assert torch.equal(tma.written, times)
    assert torch.equal(tma.fetched.view(exact.shape), times * fetch)
    for own in tma.own.values():
        assert not own.on_their_way
        assert re.fullmatch("(wmsfmL)*w", own.order)  # free and met, stored, made visible and met, left
    assert all(tma.beside)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize(("add", "fetch"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize(("stages", "slots"), [(4, 2), (3, 4)])
def test_fp8_gradients_are_summed_by_chunks_and_leave_beside_the_next_product(
    language, leaving, monkeypatch, sizes, widths, add, fetch, stages, slots
):
    module, generator = gluon_fp8_three_gradient, torch.Generator().manual_seed(0)
    monkeypatch.setattr(module, "STAGES", stages)
    monkeypatch.setattr(module, "SLOTS", slots)
    ends, (o_dim, i_dim) = torch.tensor(sizes).cumsum(0).int(), widths
    rows = [torch.randn(sum(sizes), width, generator=generator) for width in widths]
    dy, x = (ops.quantise_fp8_columns(part, ends, impl="reference") for part in rows)
    exact = fp8_linear.weight_gradient(dy, x, ends, dtype=torch.float32)
    o_tiles, i_tiles = math.ceil(o_dim / 192), math.ceil(i_dim / 128)
    tiles = len(sizes) * o_tiles * i_tiles
    lines = [Described(part.scale.t().reshape(-1), block) for part, block in ((dy, 64), (x, 128))]
    known = Pointer(ends) if len(sizes) > 1 else None  # a single one has all rows
    for programs in (1, 3):
        before = sums(exact.shape, generator, add=add)
        tma, squares = leaving(before.clone(), slots), torch.full((3 * tiles,), torch.nan)
        for _ in each_program(language, programs if tiles else 0):
            module._column_tiles(
                Described(dy.values.float(), 64, 128), Described(x.values.float(), 128, 128), *lines,
                Described(tma.into, *BOXES[False]), Pointer(tma.into), Pointer(squares), known,
                dy.values.shape[1] if known is None else 0, o_dim, i_dim, tiles, o_tiles, i_tiles,
                ADD=add, FETCH=fetch, SQUARES=not add, REGISTERS=0, FEW_REGISTERS=0,
            )  # fmt: skip
        check(tma, exact, before, ends, add=add, fetch=fetch)
        if not add:
            torch.testing.assert_close(squares.sum(), exact.square().sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize(("add", "squares"), [(True, False), (False, True)])
@pytest.mark.parametrize("turned", [False, True])
def test_gradients_are_summed_by_rows_and_leave_beside_the_next_product(
    language, leaving, sizes, widths, add, squares, turned
):
    module, generator = gluon_expert_gradient, torch.Generator().manual_seed(0)
    ends = torch.tensor(sizes).cumsum(0).int()
    dy, x = (torch.randn(sum(sizes) + 5, width, generator=generator) for width in widths)
    exact = moe.grouped_weight_gradient(dy[: sum(sizes)], x[: sum(sizes)], ends, dtype=torch.float32)
    dy[sum(sizes) :] = x[sum(sizes) :] = torch.nan  # they belong to nobody
    left, right = (x, dy) if turned else (dy, x)
    left_tiles, right_tiles = math.ceil(left.shape[1] / 128), math.ceil(right.shape[1] / 256)
    tiles = len(sizes) * left_tiles * right_tiles
    for programs in (1, 3):
        before = sums(exact.shape, generator, add=add)
        tma, parts = leaving(before.clone(), module.SLOTS), torch.full((2 * tiles,), torch.nan)
        for _ in each_program(language, programs if tiles else 0):
            module._expert_gradient(
                Described(left, 64, 64), Described(right, 64, 256), Described(tma.into, *BOXES[turned]),
                Pointer(tma.into), Pointer(parts), Pointer(ends), left.shape[1] // 8, right.shape[1] // 8,
                tiles, left_tiles, right_tiles,
                ADD=add, FETCH=add, TURNED=turned, SQUARES=squares, REGISTERS=0, FEW_REGISTERS=0,
            )  # fmt: skip
        check(tma, exact, before, ends, add=add, fetch=add)
        if squares:
            torch.testing.assert_close(parts.sum(), exact.square().sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("apart", [0, 1])
@pytest.mark.parametrize("rows", [0, 300])
@pytest.mark.parametrize("fresh", [False, True])
def test_sums_that_begin_at_no_16_bytes_are_copied_for_tma_and_back(monkeypatch, apart, rows, fresh):
    module, launched = gluon_fp8_three_gradient, []

    def launch(*operands, **constants):
        into = operands[5]
        assert into.data_ptr() % 16 == 0
        assert (into.shape, operands[4].block_shape) == ((2, 48, 32), [1, 64, 32])
        into += 1
        launched.append(constants)

    monkeypatch.setattr(module, "_column_tiles", {(2,): launch})
    monkeypatch.setattr(module, "multiprocessors", lambda _device: 132)
    ends = torch.tensor([0, rows], dtype=torch.int32)
    dy, x = (ops.quantise_fp8_columns(torch.randn(rows, width), ends) for width in (48, 32))
    into = torch.zeros(2 * 48 * 32 + 4)[apart:][: 2 * 48 * 32].view(2, 48, 32)
    module.add_weight_gradient(into, dy, x, ends, fresh=fresh)
    assert (into == 1).all()
    assert [(call["ADD"], call["FETCH"]) for call in launched] == [(not fresh, not fresh)]


@pytest.mark.parametrize("squares", [False, True])
def test_a_single_gradient_is_described_as_that_of_one_expert(monkeypatch, squares):
    module, launched = gluon_fp8_three_gradient, []
    monkeypatch.setattr(module, "_column_tiles", {(1,): lambda *operands, **_: launched.append(operands)})
    monkeypatch.setattr(module, "multiprocessors", lambda _device: 132)
    dy, x = (ops.quantise_fp8_columns(torch.randn(300, width)) for width in (48, 32))
    into = torch.zeros(48, 64)[:, :32]
    parts = module.add_weight_gradient(into, dy, x, None, fresh=True, squares=squares)
    ((_, _, dy_scale, x_scale, described, sums, given, ends, padded, *dims),) = launched
    assert sums is into
    assert (described.shape, described.strides) == ([1, 48, 32], [48 * 64, 64, 1])
    assert (ends, padded, dims) == (None, 384, [48, 32, 1, 1, 1])
    for scale, own, block in ((dy_scale, dy, 64), (x_scale, x, 128)):
        assert (scale.shape, scale.block_shape) == ([own.scale.numel()], [block])
        line = scale.base.as_strided(scale.shape, scale.strides)
        assert torch.equal(line, own.scale.t().reshape(-1))
    assert parts is given
    assert (parts is None) != squares
