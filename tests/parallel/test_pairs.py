"""A slot of a forward and a backward: each transfer has a computation of the other chunk to hide behind."""

from __future__ import annotations

import torch

from benthic.parallel.chunk import Step, joined
from benthic.parallel.pipeline import Flow, TableExecutor
from benthic.sched.pipeline.dualpipe_v import dualpipe_v

BLOCK = ("attention", "dispatch", "experts", "combine")
COMPUTES = {"attention", "experts"}
FORWARD = {"dispatch": "experts", "experts": "combine"}
"""What starts a transfer, and what finishes it."""
BACKWARD = {finish: start for start, finish in FORWARD.items()}


class Noted(torch.autograd.Function):
    """The same values; what ran, and in which direction, is noted."""

    @staticmethod
    def forward(ctx, x, log, chunk, name):
        ctx.noted = log, chunk, name
        log.append((chunk, name, "forward"))
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        log, chunk, name = ctx.noted
        log.append((chunk, name, "backward"))
        return dx, None, None, None


class Stage:
    """Blocks of four steps, behind an embedding or before a loss."""

    def __init__(self, number, blocks, log, pairs):
        self.number, self.blocks, self.log, self.pairs = number, blocks, log, pairs

    def phases(self, microbatch):
        weight = torch.ones(2, requires_grad=True)
        found = [Step("embed", lambda _: Flow(weight * 1))] if self.number == 0 else []
        for _ in range(self.blocks):
            for name in BLOCK:
                run = self.noted((self.number, microbatch), name)
                found.append(Step(name, run, sends=name in FORWARD))
        if self.number == 1:
            found.append(Step("head", lambda flow: Flow(None, flow.value.sum())))
        return joined(found, apart=True)

    def noted(self, chunk, name):
        return lambda flow: Flow(Noted.apply(flow.value, self.log, chunk, name), flow.loss)

    def boundary(self, _microbatch):
        return (2,), torch.float32

    def finished(self, microbatch):
        """Nothing to do."""


class Watched(TableExecutor):
    """Keeps what each pair ran."""

    def _pair(self, forward, backward):
        log, pairs = self.stages[0].log, self.stages[0].pairs
        before = len(log)
        start = super()._pair(forward, backward)
        pairs.append(log[before:])
        return start


def test_between_the_two_ends_of_a_transfer_the_other_chunk_computes():
    log, pairs = [], []
    Watched(dualpipe_v(1, 4), 0, {number: Stage(number, 3, log, pairs) for number in range(2)}).run()
    assert len(pairs) == 5
    for pair in pairs:
        computed = [chunk for chunk, name, _ in pair if name in COMPUTES]
        assert len(computed) == 12
        for at, (chunk, name, direction) in enumerate(pair):
            finish = (FORWARD if direction == "forward" else BACKWARD).get(name)
            left = [c for c, n, _ in pair[at + 1 :] if c != chunk and n in COMPUTES]
            if finish is None or not left:
                continue
            end = pair.index((chunk, finish, direction), at)
            between = [c for c, n, _ in pair[at + 1 : end] if c != chunk and n in COMPUTES]
            assert between, (chunk, name, direction, pair)
