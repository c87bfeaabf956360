"""The serving plan: estimate every deployment, simulate the best, say what each bears and what it costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from benthic.errors import ConfigError
from benthic.plan.serving.candidates import Candidate, Slice, candidates, nearby
from benthic.plan.serving.goodput import Goodput, Trial, find_goodput, trial_of
from benthic.plan.serving.options import Option, Question, options
from benthic.plan.serving.steps import StepLoad
from benthic.plan.serving.workers import mapped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from benthic.plan.cost.priced import Total

_TOGETHER, _APART = 2, 2
_PRECISION: Final = 0.04
_MOST: Final = 2.0
"""Times the estimate: above, the requests of a simulation are too few to break a target."""


class Rejected(NamedTuple):
    """A deployment that was not simulated, and why."""

    name: str
    reason: str


@dataclass(frozen=True, eq=False, kw_only=True)
class Answer:
    """One simulated deployment."""

    candidate: Candidate
    goodput: Goodput

    @property
    def rate(self) -> float:
        """Requests a second that it bears."""
        return self.goodput.rate

    @property
    def per_gpu(self) -> float:
        """Of every GPU that it uses."""
        return self.rate / self.candidate.gpus

    @property
    def output_per_gpu(self) -> float:
        """Output tokens a second and GPU at its goodput."""
        return self.per_gpu * self.candidate.decode.question.lengths.mean[1]

    @property
    def dollars(self) -> float:
        """For a million output tokens at its goodput; inf when it bears nothing."""
        question = self.candidate.decode.question
        return math.inf if not self.rate else question.dollars / 3600.0 / self.output_per_gpu * 1e6


@dataclass(frozen=True, eq=False, kw_only=True)
class ServingPlan:
    """Answers, best first, with what was screened and what was left out.

    `decode_step` and `prompt_step` say where a step of the best deployment goes, part by part.
    """

    question: Question
    answers: tuple[Answer, ...]
    rejected: tuple[Rejected, ...]
    screened: int
    decode_step: dict[str, Total]
    prompt_step: dict[str, Total]

    @property
    def best(self) -> Answer:
        """What bears most on the GPUs that there are."""
        return self.answers[0]

    @property
    def pareto(self) -> tuple[Trial, ...]:
        """Trials of all answers that none beats in both TPOT (P90) and output rate, fastest first."""
        trials = sorted(
            [t for answer in self.answers for t in answer.goodput.trials if t.tpot_p90_s == t.tpot_p90_s],
            key=lambda t: (t.tpot_p90_s, -t.rate),
        )
        front: list[Trial] = []
        for each in trials:
            if not front or each.rate > front[-1].rate:
                front.append(each)
        return tuple(front)


def plan_serving(
    question: Question, on_answer: Callable[[Answer], None] = lambda _: None, *, workers: int = 1
) -> ServingPlan:
    """Find the deployment of highest goodput, simulating up to `workers` of them at once.

    Raises:
        ConfigError: the model does not fit, or nothing keeps the targets; the nearest that can be kept is
            named.
    """
    choices = options(question)
    found = candidates(question, choices)
    if not found:
        raise ConfigError(_nearest(question, choices))
    chosen = _choose(found)

    def simulated(several: Sequence[Candidate]) -> Iterator[Answer]:
        goodputs = mapped(partial(_simulated, question=question), several, workers)
        for each, goodput in zip(several, goodputs, strict=True):
            answer = Answer(candidate=each, goodput=goodput)
            on_answer(answer)
            yield answer

    answers = sorted(simulated(chosen), key=_order)
    answers = _apart_by_name(sorted([*answers, *simulated(nearby(answers[0].candidate))], key=_order))
    if not answers[0].rate:
        raise ConfigError(_nearest(question, choices))
    left = [
        Rejected(each.name, f"estimated at {each.rate:.3g} requests/s")
        for each in found
        if each not in chosen
    ]
    best = answers[0].candidate
    return ServingPlan(
        question=question,
        answers=tuple(answers),
        rejected=tuple(left),
        screened=len(found),
        decode_step=_decode_step(best, question, answers[0]),
        prompt_step=_prompt_step(best, question),
    )


def _order(answer: Answer) -> tuple[float, int]:
    """What bears most, then fewer GPUs."""
    return -answer.rate, answer.candidate.gpus


def _apart_by_name(answers: Sequence[Answer]) -> list[Answer]:
    """The first of each name: a deployment with the budget that suits it best."""
    first: dict[str, Answer] = {}
    for each in answers:
        first.setdefault(each.candidate.name, each)
    return list(first.values())


def _choose(found: Sequence[Candidate]) -> list[Candidate]:
    """The most promising of each kind, and what DistServe's algorithms chose."""
    together = [each for each in found if each.strategy == "together"][:_TOGETHER]
    apart: dict[str, Candidate] = {}
    for each in found:
        if each.prefill is not None:
            apart.setdefault(each.decode.name, each)
    best = list(apart.values())[:_APART]
    named = [each for each in found if each.strategy.startswith("distserve") and each not in best]
    return [*together, *best, *named]


def _simulated(candidate: Candidate, question: Question) -> Goodput:
    part = Slice.of(candidate)
    return find_goodput(
        part.play,
        question.targets,
        start=0.9 * candidate.rate,
        precision=_PRECISION,
        least=candidate.rate / 64.0,
        most=_MOST * candidate.rate,
    )


def at_rate(candidate: Candidate, rate: float) -> Trial:
    """One simulated rate of a deployment."""
    return trial_of(rate, Slice.of(candidate).play(rate), candidate.decode.question.targets)


class Capacity(NamedTuple):
    """What a rate of requests needs: instances, GPUs, and dollars for a million output tokens."""

    rate: float
    prefills: int
    decodes: int
    gpus: int
    dollars: float


def capacity(answer: Answer, rate: float) -> Capacity:
    """Instances of the answer's kinds for `rate` requests a second.

    Each phase is taken to bear the part of its estimate that the simulation of the whole confirmed.

    Raises:
        ConfigError: the rate is not above 0.
    """
    if not 0.0 < rate < math.inf:
        msg = f"capacity is asked for {rate} requests/s, but a rate is finite and above 0"
        raise ConfigError(msg)
    candidate, question = answer.candidate, answer.candidate.decode.question
    kept = answer.rate / candidate.rate
    if candidate.prefill is None:
        decodes, prefills = math.ceil(rate / (kept * candidate.rate / candidate.decodes)), 0
    else:
        decodes = math.ceil(rate / (kept * candidate.decode.decode.rate))
        prefills = math.ceil(rate / (kept * candidate.prefill.prefill.rate))
    gpus = decodes * candidate.decode.gpus + (prefills * candidate.prefill.gpus if candidate.prefill else 0)
    hourly = rate * question.lengths.mean[1] * 3600.0
    return Capacity(rate, prefills, decodes, gpus, gpus * question.dollars / hourly * 1e6)


def _nearest(question: Question, choices: Sequence[Option]) -> str:
    """What a request gets at best, where the targets ask for more; else what there is too little of."""
    objectives = question.targets.objectives
    tpot, fastest = min([(each.decode_s(1) / question.tokens_per_step, each.name) for each in choices])
    ttft, first = min([(each.prompt_s, each.name) for each in choices])
    missed = [
        f"{name} = {bound:g} s, but alone on its instance a request gets {best:.3g} s at best ({where}). "
        f"Ask for {name} >= {1.1 * best:.3g}."
        for name, bound, best, where in (
            ("ttft", objectives.ttft_s, ttft, first),
            ("tpot", objectives.tpot_s, tpot, fastest),
        )
        if bound is not None and bound < best
    ]
    if missed:
        return " ".join(missed)
    sizes = f"{question.gpus} {question.machine.name}"
    return (
        f"no deployment on {sizes} keeps {str(objectives) or 'any time'} for "
        f"{question.targets.attainment:.0%} of the requests at any rate; "
        f"a request alone gets ttft {ttft:.3g} s ({first}) and tpot {tpot:.3g} s ({fastest}). "
        "Relax the tighter target or give more GPUs."
    )


def _decode_step(candidate: Candidate, question: Question, answer: Answer) -> dict[str, Total]:
    option = candidate.decode
    prompt, output = question.lengths.mean
    busy = answer.goodput.at_best
    step_s = busy.tpot_p50_s if busy is not None and busy.tpot_p50_s == busy.tpot_p50_s else 0.0
    lanes = candidate.decodes * option.layout.dp_degree
    batch = max(1, round(answer.rate * output * step_s / lanes))
    rows = batch * (1 + question.drafts)
    return option.step.breakdown(StepLoad(batch, rows, round(batch * (prompt + output / 2)), 0, 0, 0, rows))


def _prompt_step(candidate: Candidate, question: Question) -> dict[str, Total]:
    option = candidate.prefill or candidate.decode
    tokens = max(2, round(question.lengths.mean[0]))
    return option.step.breakdown(StepLoad(0, 0, 0, tokens, tokens * (tokens + 1) // 2, tokens, 1))
