"""Weld: serving computes what training computes, row by row.

Known texts go through the scheduler, the paged cache and both forms of attention; the logits of every row, of
prefill chunks and of decode rows alike, are compared with one packed training forward of the same texts. What
the server samples is replaced by the texts' own next tokens.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pytest
import torch
from small_models import BASE, VARIANTS, packed, random_model

from benthic.model.local import plain_linear
from benthic.sched.batching import BatchingConfig, Request, Scheduler, StepPlan
from benthic.serve.cache import CacheLayout, LatentCache
from benthic.serve.runner import Runner

if TYPE_CHECKING:
    from benthic.model.network import DeepSeek

TOLERANCE = 1e-5


@dataclass
class Texts:
    """Random texts with the packed forward's logits of every position."""

    texts: list[list[int]]
    logits: list[torch.Tensor]

    @classmethod
    def of(cls, model: DeepSeek, lengths: tuple[int, ...], *, shared: int = 0) -> Texts:
        """`shared` tokens at the beginning are the same in all texts."""
        tokens_T, positions_T, bounds, sockets = packed(model.config, lengths, seed=7)
        starts = bounds.tolist()
        for start in starts[1:-1]:
            tokens_T[start : start + shared] = tokens_T[:shared]
        with torch.no_grad():
            logits_TV = model.logits(model(tokens_T, positions_T, sockets).hidden_TD, plain_linear)
        pairs = list(itertools.pairwise(starts))
        return cls([tokens_T[a:b].tolist() for a, b in pairs], [logits_TV[a:b] for a, b in pairs])


@dataclass
class Served:
    """What the rows of a served run differed by, and how they were computed."""

    worst: float = 0.0
    kinds: Counter = field(default_factory=Counter)
    rows: Counter = field(default_factory=Counter)


@dataclass
class Server:
    """Scheduler and runner over one model, fed with known texts."""

    model: DeepSeek
    known: Texts
    scheduler: Scheduler
    runner: Runner
    served: Served = field(default_factory=Served)

    @classmethod
    def of(
        cls, model: DeepSeek, known: Texts, *, block_size: int = 4, num_blocks: int = 200, **options: int
    ) -> Server:
        longest = max(map(len, known.texts)) + 1
        options = {"max_num_seqs": 8, "max_num_batched_tokens": 32} | options
        config = BatchingConfig(
            num_blocks=num_blocks, block_size=block_size, max_model_len=longest, **options
        )
        layout = CacheLayout.of(model.config, block_size=block_size, dtype=torch.float32)
        cache = LatentCache(layout, num_blocks, torch.device("cpu"))
        cache.pages_LPBW.fill_(torch.nan)  # a read of a slot that was never written shows up in every logit
        runner = Runner(model, cache, max_num_seqs=config.max_num_seqs, max_model_len=longest)
        return cls(model, known, Scheduler(config), runner)

    def run(self, prompt_lengths: dict[int, int], *, salt: str = "") -> Served:
        """Serve text i from its first `prompt_lengths[i]` tokens on, to its end."""
        for i, length in prompt_lengths.items():
            text = self.known.texts[i]
            self.scheduler.add(
                Request(
                    request_id=f"{i}{salt}", prompt=tuple(text[:length]), max_tokens=len(text) - length + 1
                ),
                now=0.0,
            )
        now = 0.0
        while self.scheduler.has_work:
            now += 1.0
            assert now < 3000
            self.step(self.scheduler.plan(now), now)
        assert self.scheduler.num_free_blocks == self.scheduler.config.num_blocks
        return self.served

    def step(self, plan: StepPlan, now: float) -> None:
        result = self.runner.run(plan)
        for event in plan.events:
            self.served.kinds[type(event).__name__] += 1
        places = []
        for chunk, rows in zip(plan.prefills, result.chunk_rows, strict=True):
            logits = self.model.logits(result.hidden_TD[list(rows)], plain_linear)
            self.compare(chunk.request_id, range(chunk.start, chunk.start + chunk.length), logits)
            self.served.kinds["chunk of one" if chunk.length == 1 else "chunk"] += 1
            if chunk.samples:
                places.append((chunk.request_id, chunk.slot, chunk.start + chunk.length - 1))
        decodes = list(zip(plan.decode_ids, plan.decode_slots, plan.decode_positions, strict=True))
        self.served.kinds["decode"] += len(decodes)
        self.served.kinds["mixed step"] += bool(decodes and plan.prefills)
        rows = []
        for row, (request_id, slot, position) in enumerate([*decodes, *places]):
            self.compare(request_id, range(position, position + 1), result.logits_SV[row : row + 1])
            text = self.known.texts[int(request_id.rstrip("abc"))]
            token = text[position + 1] if position + 1 < len(text) else 0
            rows.append((token,))
            self.runner.remember((slot,), torch.tensor([token]))
        self.scheduler.commit(plan, rows, now)

    def compare(self, request_id: str, positions: range, logits: torch.Tensor) -> None:
        index = int(request_id.rstrip("abc"))
        expected = self.known.logits[index][positions.start : positions.stop]
        assert logits.isfinite().all()
        self.served.worst = max(
            self.served.worst, ((logits - expected).abs().max() / expected.abs().max()).item()
        )
        self.served.rows[index] += len(positions)


LENGTHS = (23, 1, 40, 9, 17)


@pytest.fixture(scope="module")
def base() -> tuple[DeepSeek, Texts]:
    model = random_model(BASE)
    return model, Texts.of(model, LENGTHS)


def test_the_logits_compared_are_not_all_alike(base: tuple[DeepSeek, Texts]) -> None:
    logits = torch.cat(base[1].logits)
    assert logits.std(-1).min() > 0.3
    assert len(set(logits.argmax(-1).tolist())) > 10


@pytest.mark.parametrize("name", VARIANTS)
def test_prefill_and_decode_of_ragged_texts_equal_the_packed_forward(name: str) -> None:
    model = random_model(VARIANTS[name])
    known = Texts.of(model, LENGTHS)
    served = Server.of(model, known).run({0: 10, 1: 1, 2: 25, 3: 2, 4: 17})
    assert served.kinds["chunk"]
    assert served.kinds["decode"]
    assert served.kinds["mixed step"]
    assert served.worst < TOLERANCE


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 16, 39, 40])
def test_every_chunk_size_gives_the_same_rows(base: tuple[DeepSeek, Texts], chunk: int) -> None:
    model, known = base
    served = Server.of(model, known, max_num_seqs=1, max_num_batched_tokens=chunk).run({2: 40})
    assert served.kinds["chunk"] + served.kinds["chunk of one"] >= 40 // chunk
    assert served.rows[2] >= 40
    assert served.worst < TOLERANCE


@pytest.mark.parametrize("prompt", [1, 2, 20, 39])
def test_decoding_from_any_prompt_length_equals_the_packed_forward(
    base: tuple[DeepSeek, Texts], prompt: int
) -> None:
    model, known = base
    served = Server.of(model, known).run({2: prompt})
    assert served.kinds["decode"] == 40 - prompt
    assert served.worst < TOLERANCE


@pytest.mark.parametrize("block_size", [1, 3, 64])
def test_any_block_size_gives_the_same_rows(base: tuple[DeepSeek, Texts], block_size: int) -> None:
    model, known = base
    served = Server.of(model, known, block_size=block_size).run(dict.fromkeys(range(5), 1))
    assert served.worst < TOLERANCE


@pytest.mark.parametrize("chunk", [5, 11])
def test_preempted_texts_resume_with_the_same_rows(base: tuple[DeepSeek, Texts], chunk: int) -> None:
    model, known = base
    server = Server.of(model, known, num_blocks=11, max_num_seqs=5, max_num_batched_tokens=chunk)
    served = server.run({0: 3, 1: 1, 2: 5, 3: 4, 4: 6})
    assert served.kinds["Preempted"] >= 1
    assert server.scheduler.totals.recomputed > 0
    assert served.worst < TOLERANCE


def test_prefix_hits_read_rows_that_another_text_wrote() -> None:
    model = random_model(BASE)
    known = Texts.of(model, (30, 26, 22), shared=18)
    server = Server.of(model, known)
    server.run({0: 20})
    served = server.run({1: 24, 2: 19}, salt="b")
    assert server.scheduler.totals.prefix_hits >= 2 * 16
    assert served.worst < TOLERANCE


def test_hits_preemptions_and_chunks_together_give_the_same_rows() -> None:
    model = random_model(replace(BASE, num_hidden_layers=2))
    known = Texts.of(model, (30, 26, 22, 28), shared=9)
    server = Server.of(model, known, num_blocks=12, max_num_seqs=4, max_num_batched_tokens=6)
    server.run({0: 10})
    served = server.run({1: 12, 2: 10, 3: 9, 0: 11}, salt="c")
    totals = server.scheduler.totals
    assert totals.preemptions >= 1
    assert totals.prefix_hits >= 8
    assert served.worst < TOLERANCE
