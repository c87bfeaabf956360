"""Attention in Gluon, run by Python: its own functions, on memory and barriers as threads.

Layouts are left out; tiles, what is told of them, loads, barriers, masks and what is written are not.
Products read their operands when they are waited for, so that a place that is loaded too early is found out.
"""

from __future__ import annotations

import importlib.util
import threading
import time

import gluon_threads
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
    of_tensors,
    take_all,
    where,
)

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from benthic.kernels import (
    gluon_attention_blocks,
    gluon_attention_forward,
    gluon_key_gradients,
    gluon_query_gradient,
    gluon_queue,
    gluon_tiles,
)
from benthic.kernels.reference.attention import attention

HEADS, GROUPS, KEYS, VALUE = 4, 2, 32, 64


def heads_of(data, rows, columns):
    return Described(data.detach().flatten(1), rows, columns)


def load(described, corner, bar, tile):
    """Lands some time later."""
    row, column = (int(at) for at in corner)

    def land():
        time.sleep((row * 7 + column * 3 + len(tile.data)) % 11 / 1e4)
        gluon_threads.load(described, (row, column), bar, tile)

    threading.Thread(target=land).start()


class Product:
    """Read and multiplied when it is waited for, after those that it adds to."""

    def __init__(self, left, right, sums, *, is_async, use_acc=True):
        assert is_async
        self.left, self.right, self.sums = left, right, sums if use_acc else sums * 0

    def done(self):
        left = getattr(self.left, "data", self.left) if isinstance(self.left, Tiles) else self.left
        return done(self.sums) + (left @ self.right.data).as_subclass(Values)


def done(found):
    return found.done() if isinstance(found, Product) else found


def wait_for_products(_left, deps):
    found = [done(one) for one in deps]
    return found[0] if len(found) == 1 else found


def number(value):
    return torch.tensor(value).as_subclass(Values)


@pytest.fixture
def language(monkeypatch):
    found = gluon_language(
        load=lambda pointer, **masked: take_all(pointer, **masked).as_subclass(Values),
        minimum=of_tensors(torch.minimum), maximum=of_tensors(torch.maximum), where=where,
        exp2=torch.exp2, log2=torch.log2,
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype).as_subclass(Values),
        DotOperandLayout=lambda **_: None, static_assert=lambda _: None,
    )  # fmt: skip
    modules = (
        gluon_attention_blocks,
        gluon_attention_forward,
        gluon_key_gradients,
        gluon_query_gradient,
        gluon_queue,
        gluon_tiles,
    )
    own = {
        "gl": found, "load": load, "answered": lambda answer: answer,
        "warpgroup_mma": Product, "warpgroup_mma_wait": wait_for_products,
        "_rows_layout": lambda _: None, "_unknown": lambda x: x, "_widened": lambda x: x,
    }  # fmt: skip
    in_python(monkeypatch, modules, **own)
    return found


def listed(lengths):
    """(sequence, tile) of every tile, last first, and two places without one."""
    tiles = [(s, t) for s, rows in enumerate(lengths) for t in reversed(range(-(-rows // 128)))]
    return torch.tensor([*tiles, (-1, 0), (-1, 0)])


@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ((300, 300), None),
        ((1, 300, 64), (70, 301, 65)),
        ((256, 0, 5, 129), (128, 40, 0, 131)),  # queries that see no key, and none at all
        ((20, 130, 7, 31), (20, 130, 7, 31)),  # one block of keys
    ],
    ids=["equal ones", "chunks", "blind", "short"],
)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(
    ("widths", "apart"),
    [((64, 0), False), ((64, 32), True), ((64, 32), False)],
    ids=["whole", "apart", "two parts"],
)
@pytest.mark.parametrize("is_list", [True, False], ids=["listed", "in order"])
def test_every_query_meets_its_keys_once(language, queries, keys, causal, widths, apart, is_list):
    keys = keys or queries
    q, k, v = operands(sum(queries), sum(keys), sum(widths))
    out, lse, exact, exact_lse = run(
        language, q, k, v, queries, keys, widths=widths, causal=causal, apart=apart, is_list=is_list
    )
    torch.testing.assert_close(out, exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.T, exact_lse, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_list", [True, False], ids=["listed", "in order"])
def test_a_program_for_each_tile_takes_no_numbers(language, is_list):
    lengths = 20, 130
    q, k, v = operands(sum(lengths), sum(lengths), 64)
    out, _, exact, _ = run(
        language, q, k, v, lengths, lengths, widths=(64, 0), causal=True, apart=False, is_list=is_list,
        programs=132,
    )  # fmt: skip
    torch.testing.assert_close(out, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_a_sequence_keeps_clear_of_the_numbers_of_the_next(language, causal):
    lengths = 20, 150, 45, 129
    q, k, v = operands(sum(lengths), sum(lengths), 64)
    for x in (q, k, v):
        x[20:170] = torch.nan
    out, _, exact, _ = run(
        language, q, k, v, lengths, lengths, widths=(64, 0), causal=causal, apart=False, is_list=True
    )
    for rows in (slice(20), slice(170, None)):
        torch.testing.assert_close(out[rows], exact[rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ((300, 300), None),
        ((1, 300, 64), (70, 301, 65)),
        ((256, 0, 5, 129), (128, 40, 0, 131)),  # queries that see no key, and none at all
        ((200, 130), (600, 7)),
    ],
    ids=["equal ones", "chunks", "blind", "many keys"],
)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("width", [64, 128])
def test_gradients_are_those_of_the_definition(language, queries, keys, causal, width):
    keys = keys or queries
    leaves = [x.requires_grad_() for x in operands(sum(queries), sum(keys), width)]
    starts = [torch.tensor([0, *lengths]).cumsum(0) for lengths in (queries, keys)]
    out, lse = attention(
        *leaves,
        *starts,
        max_seqlen_q=max(queries),
        max_seqlen_k=max(keys),
        scale=0.1,
        causal=causal,
        lists=None,
    )
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    exact = torch.autograd.grad(out, leaves, dout)
    found = [torch.full_like(x, torch.nan) for x in exact]
    q, k, v = (x.detach() for x in leaves)
    dq, dk, dv = (Pointer(x, written=torch.zeros(x.shape, dtype=torch.int64)) for x in found)
    terms = [Pointer(x.detach().T.contiguous()) for x in (lse, (out * dout).sum(-1))]
    rows, blocks = [heads_of(x, 64, 64) for x in (q, q, dout)], [heads_of(x, 64, 64) for x in (k, k, v)]
    rest = (*terms, *map(Pointer, starts), None, width, VALUE, width, VALUE, sum(queries), 0.1)
    constants = {
        "GROUPS": GROUPS, "D_1": 64, "D_2": width - 64, "V": VALUE, "STAGES": 3, "CAUSAL": causal,
        "TOGETHER": 1, "LISTED": False, "REGISTERS": 0, "FEW_REGISTERS": 0,
    }  # fmt: skip
    for heads, lengths, kernel, outputs, sizes in (
        (HEADS, queries, gluon_query_gradient.query_gradient, (dq,), ("HEADS", 128, 64)),
        (HEADS // GROUPS, keys, gluon_key_gradients.key_gradients, (dk, dv), ("KEY_HEADS", 64, 128)),
    ):
        high = -(-max(lengths) // 128)
        language.num_programs = lambda _axis, high=high: high
        name, block_m, block_n = sizes
        for tile in range(high):
            for z in range(heads * len(lengths)):
                language.program_id = lambda axis, at=(0, tile, z): number(at[axis])
                kernel(
                    *rows,
                    *blocks,
                    *outputs,
                    *rest,
                    BLOCK_M=block_m,
                    BLOCK_N=block_n,
                    **{name: heads},
                    **constants,
                )
    for pointer, ours, theirs in zip((dq, dk, dv), found, exact, strict=True):
        assert (pointer.written == 1).all()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def operands(rows, keys, width):
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, HEADS, width), (keys, HEADS // GROUPS, width), (keys, HEADS // GROUPS, VALUE)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def run(language, q, k, v, queries, keys, *, widths, causal, apart, is_list, programs=3):
    """Output and log-sum-exp [H, T] of the kernel, and those of the definition [T, H]."""
    d_1, d_2 = widths
    starts_q, starts_k = (torch.tensor([0, *lengths]).cumsum(0) for lengths in (queries, keys))
    exact, exact_lse = attention(
        q, k, v, starts_q, starts_k, max_seqlen_q=max(queries), max_seqlen_k=max(keys), scale=0.1,
        causal=causal, lists=None,
    )  # fmt: skip
    out, lse = torch.full_like(exact, torch.nan), torch.full((HEADS, sum(queries)), torch.nan)
    written = torch.zeros(out.shape, dtype=torch.int64), torch.zeros(lse.shape, dtype=torch.int64)
    q_2, k_2 = (x[..., d_1:].contiguous() if apart else x for x in (q, k))
    q_1, k_1 = (x[..., :d_1].contiguous() if apart else x for x in (q, k))
    tiles = listed(queries)
    high = len(tiles) if is_list else -(-max(queries) // 128)
    total = 2 * high * 2 * (1 if is_list else len(queries))
    given, lock = iter(range(total if total > programs else 0)), threading.Lock()
    programs = min(programs, total)

    def asked(_counter):
        with lock:
            return number(next(given))

    gluon_attention_forward.asked = asked
    for _ in each_program(language, programs, number):
        gluon_attention_forward.attention_forward(
            heads_of(q_1, 64, d_1), heads_of(q_2, 64, d_2), heads_of(k_1, KEYS, d_1),
            heads_of(k_2, KEYS, d_2), heads_of(v, KEYS, VALUE), Pointer(out, written=written[0]),
            Pointer(lse, written=written[1]), Pointer(starts_q), Pointer(starts_k), Pointer(tiles), None,
            q_1.shape[2], q_2.shape[2], k_1.shape[2], k_2.shape[2], VALUE, sum(queries), high, total, 0.1,
            HEADS=HEADS, GROUPS=GROUPS, D_1=d_1, D_2=d_2, V=VALUE, BLOCK_M=128, BLOCK_N=KEYS, STAGES=2,
            CAUSAL=causal, APART=apart, TOGETHER=2, LISTED=is_list, REGISTERS=0,
            FEW_REGISTERS=0,
        )  # fmt: skip
    assert all((times == 1).all() for times in written)
    assert next(given, None) is None, "every number is taken once, and one more by each program"
    return out, lse, exact, exact_lse
