"""Engines over small random models, and the loops that tests run them with."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from benthic.model.initialise import initialise
from benthic.model.network import DeepSeek
from benthic.serve.engine import Engine
from benthic.serve.messages import Delta, Generate, SamplingParams
from benthic.serve.options import EngineOptions
from benthic.spec import presets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from benthic.sched.plans import StepPlan
    from benthic.serve.drafts import Drafts
    from benthic.serve.runner import StepResult
    from benthic.spec.model import ModelConfig

NANO = replace(presets.get("nano"), initializer_range=0.15)
SHALLOW = replace(NANO, num_hidden_layers=2)
"""With one layer of each kind."""
EOS = 1


def random_model(config: ModelConfig = NANO, seed: int = 0) -> DeepSeek:
    """A model whose logits are of order 1, so that distributions differ from position to position."""
    model = DeepSeek(config)
    initialise(model, seed)
    return model


@dataclass
class TickingClock:
    """Seconds that pass by one a call."""

    now: float = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def small_engine(
    model: DeepSeek | None = None, *, eos: tuple[int, ...] = (EOS,), **options: object
) -> Engine:
    settings = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "block_size": 4, "num_blocks": 256} | options
    return Engine.of(model or random_model(), EngineOptions(**settings), eos=eos, clock=TickingClock())


@dataclass
class Answer:
    """All deltas of one request, joined."""

    tokens: list[int] = field(default_factory=list)
    deltas: list[Delta] = field(default_factory=list)

    @property
    def finish(self) -> str | None:
        return self.deltas[-1].finish_reason

    @property
    def logprobs(self) -> list:
        return [row for delta in self.deltas for row in delta.logprobs or ()]


def request(name: str, prompt: Iterable[int], *, priority: int = 0, **params: object) -> Generate:
    settings = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True} | params
    return Generate(
        request_id=name, prompt=tuple(prompt), params=SamplingParams(**settings), priority=priority
    )


def serve(
    engine: Engine, requests: Iterable[Generate], *, at_step: Callable[[int], None] | None = None
) -> dict[str, Answer]:
    """Run until nothing is left; at most one delta a request and step, none after the last."""
    answers: dict[str, Answer] = {}
    for each in requests:
        engine.add(each)
        answers[each.request_id] = Answer()
    steps = 0
    while engine.has_work:
        steps += 1
        assert steps < 5000, "the engine makes no progress"
        if at_step is not None:
            at_step(steps)
        deltas = engine.step()
        assert len({delta.request_id for delta in deltas}) == len(deltas)
        for delta in deltas:
            answer = answers.setdefault(delta.request_id, Answer())
            assert not answer.deltas or answer.finish is None, "a delta after the end"
            answer.deltas.append(delta)
            answer.tokens.extend(delta.tokens)
    return answers


def prompts(
    count: int, *, seed: int = 0, shortest: int = 1, longest: int = 40, vocab: int = 320
) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(2, vocab, (n,), generator=generator).tolist() for n in lengths]


def poison(engine: Engine, name: str) -> None:
    """From now on the model's logits for one request are NaN."""
    run = engine._runner.run

    def poisoned(plan: StepPlan, drafts: Drafts | None = None) -> StepResult:
        result = run(plan, drafts)
        if name in plan.sampled_ids:
            place = plan.sampled_ids.index(name)
            counts = [0] * len(plan.sampled_ids)
            counts[: len(plan.decode_ids)] = (0,) * len(plan.decode_ids) if drafts is None else drafts.counts
            first = place + sum(counts[:place])
            with torch.inference_mode():
                result.logits_SV[first : first + 1 + counts[place]] = torch.nan
        return result

    engine._runner.run = poisoned  # type: ignore[method-assign]


def is_empty(engine: Engine) -> bool:
    """Nothing runs, waits or holds a block."""
    stats = engine.stats()
    return (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, stats.num_blocks)
