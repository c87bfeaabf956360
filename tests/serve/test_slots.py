"""Latents are written before a step attends: in the kernel that norms them, and nothing else reads them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from small_engine import NANO, random_model, serve, small_engine
from test_overlap import mixed_requests

from benthic.kernels.native import build_refusal
from benthic.kernels.ops import store_latent
from benthic.kernels.table import Op
from benthic.model.local import LocalExchange, PackedAttend, plain_linear
from benthic.model.mla import attention_for
from benthic.model.rope import Angles
from benthic.model.sockets import Sockets
from benthic.serve.attend import DecodeRows, PagedAttend, PrefillRows, StepLayout
from benthic.serve.cache import CacheLayout, LatentCache
from benthic.serve.invariant import InvariantAttend
from benthic.serve.speculative import Speculative
from benthic.spec import presets

HOW = [
    {"max_num_batched_tokens": 11, "block_size": 3},
    {"max_num_batched_tokens": 11, "enforce_eager": True},
    {"speculative": Speculative(method="mtp", num_speculative_tokens=2, adaptive=False)},
    {"kv_cache_dtype": "fp8"},
    {"num_blocks": 24},
]
if build_refusal() is None:
    HOW.append({"batch_invariant": True})


def apart(attend):
    """The socket as it would be if the network wrote nothing: it stores all rows, and may read them all."""
    attended = attend.__call__

    def stored_first(self, q_nope, q_rope, latent, key, up, *, layer, scale):
        into = slots(self, layer)
        store_latent(into.cache_PBW, latent, key, into.slot_T)
        return attended(self, q_nope, q_rope, latent, key, up, layer=layer, scale=scale)

    slots = attend.slots
    return {"slots": lambda self, layer: None, "__call__": stored_first}


@pytest.mark.parametrize("how", HOW, ids=str)
def test_an_engine_writes_and_answers_what_it_would_if_the_socket_stored(how, monkeypatch):
    found = []
    for stores in (False, True):
        for attend in (PagedAttend, InvariantAttend) if stores else ():
            for name, method in apart(attend).items():
                monkeypatch.setattr(attend, name, method)
        engine = small_engine(random_model(), **how)
        answers = serve(engine, mixed_requests(9))
        pages = engine._runner.cache.pages_LPBW.view(torch.uint8)
        assert pages.any()
        found.append((pages, {name: answer.tokens for name, answer in answers.items()}))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_only_prompts_read_for_the_first_time_want_latents_beside_the_pages():
    cache = LatentCache(CacheLayout.of(NANO, block_size=4, dtype=torch.float32), 1, torch.device("cpu"))
    numbers, slot = torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    decode = DecodeRows(1, numbers[None], numbers)
    fresh, later = (PrefillRows(numbers, numbers, 1, 1, context) for context in (None, slot))
    for prefill, alone in ((None, True), (later, True), (fresh, False)):
        into = PagedAttend(cache, StepLayout(slot, decode, prefill)).slots(1)
        assert into.cache_PBW.data_ptr() == cache.layer(1).data_ptr()
        assert (into.slot_T, into.alone) == (slot, alone)
    assert InvariantAttend(cache, StepLayout(slot, decode, None)).slots(0).alone
    assert PackedAttend(numbers, 1).slots(0) is None


@pytest.fixture
def launched(monkeypatch):
    """Kernels that would have run on a GPU, of tensors on the meta device, and how often."""
    jit = pytest.importorskip("triton.runtime.jit", reason="Triton is not installed")
    counted: Counter[str] = Counter()

    def run(kernel, *_args, **_options):
        counted[kernel.fn.__name__] += 1

    choose = Op.choose
    monkeypatch.setattr(jit.JITFunction, "run", run)
    monkeypatch.setattr(
        Op, "choose", lambda op, case, impl=None: choose(op, case._replace(device="cuda"), impl)
    )
    return counted


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@torch.no_grad()
def test_a_decode_rotates_norms_and_stores_in_one_launch(launched, kept):
    config, meta = presets.get("moonlight-16b-a3b"), torch.device("meta")
    layout = replace(CacheLayout.of(config, block_size=64, dtype=kept), layers=2)
    with meta:
        attention = attention_for(config, 1).to(torch.bfloat16)
        table, context, slot = torch.zeros(3, 5).int(), torch.zeros(3).int(), torch.zeros(3).long()
        angles = Angles(torch.zeros(3, 32), torch.zeros(3, 32))
        x = torch.zeros(3, config.hidden_size, dtype=torch.bfloat16)
    attend = PagedAttend(LatentCache(layout, 9, meta), StepLayout(slot, DecodeRows(1, table, context), None))
    out = attention(x, angles, Sockets(attend, LocalExchange(config.n_routed_experts), plain_linear))
    assert out.shape == x.shape
    assert launched == {"_rotate_and_norm": 1, "_decode": 1, "combine": 1}
