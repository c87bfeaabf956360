"""Layers of a step share its lists of tiles; launches are counted on the meta device, without a GPU."""

from __future__ import annotations

import importlib.util
from collections import Counter

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from triton.runtime.jit import JITFunction

from benthic.kernels.gluon_attention import attention, attention_of_parts
from benthic.kernels.tile_lists import TileLists

LENGTHS = (1000, 3, 129, 640)
LIST, FORWARD, GRADIENTS = "_list_tiles", "attention_forward", ("query_gradient", "key_gradients")


@pytest.fixture
def launched(monkeypatch):
    """Kernels that would have run on a GPU, and how often."""
    counted: Counter[str] = Counter()

    def run(kernel, *_args, **_options):
        counted[kernel.fn.__name__] += 1

    monkeypatch.setattr(JITFunction, "run", run)
    return counted


def layers(lists, count=3):
    """Each attends to what the one before gave; their gradients."""
    tokens = sum(LENGTHS)
    starts = torch.empty(len(LENGTHS) + 1, dtype=torch.int32, device="meta")
    x = first = torch.empty(tokens, 2, 128, dtype=torch.bfloat16, device="meta", requires_grad=True)
    for _ in range(count):
        x, _lse = attention(
            x, x, x, starts, starts,
            max_seqlen_q=max(LENGTHS), max_seqlen_k=max(LENGTHS), scale=0.1, causal=True,
            lists=TileLists() if lists is None else lists,
        )  # fmt: skip
    torch.autograd.grad(x, first, torch.empty_like(x))


def test_layers_of_a_step_list_queries_and_keys_once(launched):
    layers(TileLists())
    assert launched[FORWARD] == 3
    assert all(launched[kernel] == 3 for kernel in GRADIENTS)
    assert launched[LIST] == 2


def test_a_layer_of_its_own_lists_queries_once_for_both_passes(launched):
    layers(None)
    assert launched[LIST] == 3 * 2


def test_heads_in_parts_are_read_where_they_lie_and_share_the_lists(launched):
    tokens, lists = sum(LENGTHS), TileLists()
    starts = torch.empty(len(LENGTHS) + 1, dtype=torch.int32, device="meta")
    q, kv = (torch.empty(tokens, 16, width, dtype=torch.bfloat16, device="meta") for width in (192, 256))
    latents = torch.empty(tokens, 576, dtype=torch.bfloat16, device="meta")
    for _ in range(2):
        out = attention_of_parts(
            q[..., :128], q[..., 128:], kv[..., :128], latents[:, 512:], kv[..., 128:], starts, starts,
            max_seqlen_q=max(LENGTHS), max_seqlen_k=max(LENGTHS), scale=0.1, lists=lists,
        )  # fmt: skip
        assert out.shape == (tokens, 16, 128)
    assert launched == {FORWARD: 2, LIST: 1}


def test_the_next_step_lists_anew(launched):
    for _ in range(2):
        layers(TileLists())
    assert launched[LIST] == 2 * 2
