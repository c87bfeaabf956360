"""Side work of a step: on a second stream where a graph of decodes is recorded, at once elsewhere."""

from __future__ import annotations

import pytest
import torch
from small_engine import NANO

from benthic.kernels.ops.moe import DOZENS_FROM
from benthic.model.local import LocalExchange, plain_linear
from benthic.model.sockets import at_once
from benthic.serve.aside import SecondStream, aside_for
from benthic.serve.attend import DecodeRows, PrefillRows, StepLayout
from benthic.serve.cache import CacheLayout, LatentCache
from benthic.serve.plugs import Plugs


def test_a_cpu_works_at_once():
    assert aside_for(torch.device("cpu")) is at_once
    done = []
    taken = at_once(lambda: done.append(1) or "result")
    assert done == [1]
    assert taken() == taken() == "result"
    assert at_once(lambda: 5, at_once.moment(500))() == 5


def test_steps_with_prompts_work_at_once():
    def own(work):
        return at_once(work)

    numbers = torch.zeros(2, dtype=torch.int32)
    cache = LatentCache(CacheLayout.of(NANO, block_size=4, dtype=torch.float32), 1, torch.device("cpu"))
    plugs = Plugs(plain_linear, LocalExchange(NANO.n_routed_experts), aside=own)
    decode = DecodeRows(1, numbers[None], numbers)
    prefill = PrefillRows(numbers, numbers, 1, 1, None)
    assert plugs.sockets(cache, StepLayout(numbers, decode, None)).aside is own
    assert plugs.sockets(cache, StepLayout(numbers, decode, prefill)).aside is at_once


def test_sums_are_left_to_norms_where_all_experts_are_here_and_it_was_asked_for():
    numbers = torch.zeros(2, dtype=torch.int32)
    cache = LatentCache(CacheLayout.of(NANO, block_size=4, dtype=torch.float32), 1, torch.device("cpu"))
    here, layout = LocalExchange(NANO.n_routed_experts), StepLayout(numbers, None, None)

    def late(exchange, *, asked):
        return Plugs(plain_linear, exchange, late=asked).sockets(cache, layout).late

    assert late(here, asked=True) is not None
    assert late(here, asked=False) is None
    assert late(object(), asked=True) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@torch.inference_mode()
def test_a_graph_of_two_streams_gives_the_same_bits_over_two_hundred_inputs():
    """Several pieces of side work a graph, whose memory is used again, as a model's layers do."""
    x = torch.randn(64, 1024, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(1024, 1024, device="cuda", dtype=torch.bfloat16) / 32 for _ in range(4)]
    second = SecondStream(x.device)
    assert second(lambda: 3)() == second(lambda: 3, second.moment(500))() == 3  # outside a capture

    def forward(aside):
        y = x
        for early in (True, False, True) * 2:
            since = aside.moment(DOZENS_FROM if early else DOZENS_FROM - 1)
            before = torch.tanh(y @ weights[2])
            beside = aside(lambda y=y: torch.tanh(y @ weights[0]) @ weights[1], since)
            y = torch.tanh(before @ weights[3] + beside())
        return y

    graphs = []
    for aside in (at_once, second):
        forward(aside)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = forward(aside)
        graphs.append((graph, out))
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(200):
        x.normal_()
        found = []
        for graph, out in graphs:
            graph.replay()
            found.append(out.clone())
        wrong += (found[0] != found[1]).any()
    assert not int(wrong)
