"""Deployments that GPUs allow: instances of one kind, or prefill and decode apart, in numbers that fit.

Strategies: "together" (every instance does both); "apart" (any two kinds, numbers by what each bears);
"distserve-1" (Algorithm 1: the kind that is best by itself for each phase); "distserve-2" (Algorithm 2: pairs
that share a node, so that blocks move over NVLink).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from benthic.plan.serving.acceptance import Geometric
from benthic.plan.serving.cluster import Cluster, Link
from benthic.plan.serving.demand import drawn
from benthic.plan.serving.group import GroupSpec
from benthic.plan.serving.options import BLOCK_SIZE, BUDGETS, MOST_SEQUENCES
from benthic.plan.serving.priced import Echo
from benthic.plan.serving.queueing import Phases
from benthic.sched.plans import BatchingConfig
from benthic.sched.routing import Policy, shortest_queue

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benthic.plan.serving.options import Estimate, Option, Question
    from benthic.plan.serving.outcome import Outcome
    from benthic.sched.routing import Role

Strategy = Literal["together", "apart", "distserve-1", "distserve-2"]

MOST_LANES: Final = 4
"""Ranks of each phase that are simulated; a larger deployment is simulated as a slice of it."""
_FEWEST_REQUESTS, _MOST_REQUESTS = 160, 2500
_WARM_UP: Final = 0.2
_FRONT_BUSY: Final = 0.5
_LINK_SHARE: Final = 0.8
_LINK_LATENCY: Final = 50e-6


@dataclass(frozen=True, eq=False, kw_only=True)
class Candidate:
    """So many instances of one or two kinds; without `prefill`, those of `decode` do both.

    rate: the estimate of what it bears, requests a second. budget: tokens of a step of the instances that
    decode.
    """

    strategy: Strategy
    decode: Option
    decodes: int
    prefill: Option | None = None
    prefills: int = 0
    rate: float
    budget: int

    @property
    def gpus(self) -> int:
        """GPUs of all instances."""
        return self.decodes * self.decode.gpus + (self.prefills * self.prefill.gpus if self.prefill else 0)

    @property
    def fronts(self) -> int:
        """Processes that answer HTTP: as asked, or as many as this deployment's requests keep half busy."""
        question = self.decode.question
        if question.fronts is not None:
            return question.fronts
        busy = self.rate * question.engine.front.seconds(*question.lengths.mean)
        return max(1, math.ceil(busy / _FRONT_BUSY))

    @property
    def name(self) -> str:
        """Instances and degrees, as `2 x TP2 EP2 -> 1 x DP8 EP8`."""
        own = f"{self.decodes} x {self.decode.name}"
        return own if self.prefill is None else f"{self.prefills} x {self.prefill.name} -> {own}"

    @property
    def key(self) -> tuple[str, int]:
        """Equal for equal deployments, whatever strategy found them."""
        return self.name, self.budget


def candidates(question: Question, choices: Sequence[Option]) -> tuple[Candidate, ...]:
    """Every deployment worth an estimate, best first; each is named by the first strategy that finds it."""
    found = [*_together(question, choices), *_distserve(question, choices), *_apart(question, choices)]
    unique: dict[tuple[str, int], Candidate] = {}
    for each in found:
        if each.rate > 0.0:
            unique.setdefault(each.key, each)
    return tuple(sorted(unique.values(), key=_merit))


def _merit(candidate: Candidate) -> tuple[float, int, float]:
    """Rate in steps of 2 %, then fewer GPUs, then the shorter prompt."""
    return (
        -round(math.log(candidate.rate) / 0.02),
        candidate.gpus,
        (candidate.prefill or candidate.decode).prompt_s,
    )


def _together(question: Question, choices: Sequence[Option]) -> Iterator[Candidate]:
    for each in choices:
        yield _doing_both(question.gpus // each.gpus, each, each.both)


def _doing_both(copies: int, option: Option, estimate: Estimate) -> Candidate:
    return Candidate(
        strategy="together",
        decode=option,
        decodes=copies,
        rate=copies * estimate.rate,
        budget=estimate.budget,
    )


def nearby(candidate: Candidate) -> tuple[Candidate, ...]:
    """Instances that do both with the next smaller and the next larger budget, where they bear anything."""
    if candidate.prefill is not None:
        return ()
    at, option = BUDGETS.index(candidate.budget), candidate.decode
    estimates = [option.doing_both(budget) for budget in (*BUDGETS[:at][-1:], *BUDGETS[at + 1 :][:1])]
    return tuple([_doing_both(candidate.decodes, option, each) for each in estimates if each.rate > 0.0])


def _apart(question: Question, choices: Sequence[Option]) -> Iterator[Candidate]:
    for prefill in choices:
        for decode in choices:
            yield from _pair("apart", question.gpus, prefill, decode)


def _distserve(question: Question, choices: Sequence[Option]) -> Iterator[Candidate]:
    prefill = max(choices, key=lambda each: each.prefill.rate / each.gpus)
    decode = max(choices, key=lambda each: each.decode.rate / each.gpus)
    yield from _pair("distserve-1", question.gpus, prefill, decode)
    node = question.machine.gpus_per_node
    pairs = [(p, d) for p in choices for d in choices if p.gpus + d.gpus <= min(node, question.gpus)]
    if pairs:
        prefill, decode = max(pairs, key=lambda pair: _phases(*pair).per_gpu(1, 1))
        copies = question.gpus // (prefill.gpus + decode.gpus)
        rate = copies * min(prefill.prefill.rate, decode.decode.rate)
        yield _doing_one("distserve-2", (copies, prefill), (copies, decode), rate)


def _pair(strategy: Strategy, gpus: int, prefill: Option, decode: Option) -> Iterator[Candidate]:
    if prefill.gpus + decode.gpus > gpus or not (prefill.prefill.rate and decode.decode.rate):
        return
    phases = _phases(prefill, decode)
    prefills, decodes = phases.best(gpus)
    rate = min(prefills * phases.prefill_rate, decodes * phases.decode_rate)
    yield _doing_one(strategy, (prefills, prefill), (decodes, decode), rate)


def _doing_one(
    strategy: Strategy, prefill: tuple[int, Option], decode: tuple[int, Option], rate: float
) -> Candidate:
    """So many instances that prefill, and so many that decode."""
    return Candidate(
        strategy=strategy,
        prefills=prefill[0],
        prefill=prefill[1],
        decodes=decode[0],
        decode=decode[1],
        rate=rate,
        budget=decode[1].decode.budget,
    )


def _phases(prefill: Option, decode: Option) -> Phases:
    return Phases(prefill.prefill.rate, decode.decode.rate, prefill.gpus, decode.gpus)


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Some ranks of a deployment, in the proportion of the whole, with their share of the requests.

    Requests go to equal ranks in turn, so the share of a slice arrives more steadily: gaps of `1 / share`
    Poisson gaps are gamma distributed with that shape.
    """

    candidate: Candidate
    prefill_lanes: int
    decode_lanes: int
    share: float

    @classmethod
    def of(cls, candidate: Candidate) -> Slice:
        """The slice that is simulated; where ranks do not divide, the phase that gets more is the measure."""
        decode = candidate.decodes * candidate.decode.layout.dp_degree
        if candidate.prefill is None:
            lanes = min(MOST_LANES, candidate.decode.layout.dp_degree)
            return cls(candidate=candidate, prefill_lanes=0, decode_lanes=lanes, share=lanes / decode)
        prefill = candidate.prefills * candidate.prefill.layout.dp_degree
        a, b = _proportion(prefill, decode)
        return cls(candidate=candidate, prefill_lanes=a, decode_lanes=b, share=max(a / prefill, b / decode))

    def play(self, rate: float) -> Outcome:
        """Simulate the whole at `rate` requests a second; requests of the warm-up are left out."""
        question = self.candidate.decode.question
        demand = drawn(
            question.lengths,
            self.requests,
            rate=rate * self.share,
            burstiness=question.burstiness / self.share,
            seed=question.seed,
        )
        share = self.candidate.fronts * self.share
        fronts = max(1, round(share))
        cluster = Cluster(
            self.specs(),
            policy=_POLICY,
            link=self.link(),
            front=question.engine.front.slower(fronts / share),
            fronts=fronts,
        )
        outcome = cluster.play(demand)
        return outcome.without_first(int(_WARM_UP * len(outcome.served)))

    @property
    def requests(self) -> int:
        """Enough to fill the slice's batches a few times, by Little's law."""
        question = self.candidate.decode.question
        gap = question.targets.objectives.tpot_s or self.candidate.decode.decode_s(1)
        in_flight = self.share * self.candidate.rate * question.lengths.mean[1] * gap
        return max(_FEWEST_REQUESTS, min(_MOST_REQUESTS, round(5.0 * in_flight)))

    def specs(self) -> list[GroupSpec]:
        """Instances with the slice's ranks; ranks of one instance step together."""
        candidate = self.candidate
        decodes = _groups("decode", candidate.decode, self.decode_lanes, candidate.budget)
        if candidate.prefill is None:
            return decodes
        budget = candidate.prefill.prefill.budget
        return [*_groups("prefill", candidate.prefill, self.prefill_lanes, budget), *decodes]

    def link(self) -> Link:
        """NVLink where the whole deployment shares a node, else the network; a rank's GPUs pull together."""
        option, machine = self.candidate.decode, self.candidate.decode.question.machine
        hardware = machine.hardware
        inside = self.candidate.strategy == "distserve-2" or self.candidate.gpus <= machine.gpus_per_node
        network = hardware.network_achieved or _LINK_SHARE * hardware.network_bandwidth
        nvlink = hardware.nvlink_achieved or _LINK_SHARE * hardware.nvlink_bandwidth
        return Link(
            block_bytes=BLOCK_SIZE * option.memory.token_bytes,
            bytes_per_second=(nvlink if inside else network) * option.layout.tp_degree,
            latency_s=_LINK_LATENCY,
        )


def _proportion(prefill: int, decode: int) -> tuple[int, int]:
    """Small numbers in nearly the proportion of these; one rank more is worth a misfit of 2 %."""
    pairs = [
        (a, b)
        for a in range(1, min(prefill, MOST_LANES) + 1)
        for b in range(1, min(decode, 2 * MOST_LANES) + 1)
    ]
    return min(pairs, key=lambda pair: abs(math.log(pair[0] * decode / pair[1] / prefill)) + 0.02 * sum(pair))


_POLICY: Final = Policy(prefill=shortest_queue)


def _groups(role: Role, option: Option, lanes: int, budget: int) -> list[GroupSpec]:
    question = option.question
    drafts = question.drafts if role == "decode" else 0
    batching = BatchingConfig(
        num_blocks=option.blocks,
        block_size=BLOCK_SIZE,
        max_model_len=1 << 20,
        max_num_seqs=min(MOST_SEQUENCES, budget),
        max_num_batched_tokens=budget,
        num_speculative_tokens=drafts,
        enable_prefix_caching=False,
        counted=True,
    )
    sizes, ranks = [], option.layout.dp_degree
    while lanes:
        sizes.append(min(lanes, ranks))
        lanes -= sizes[-1]
    return [
        GroupSpec(
            role=role,
            batching=batching,
            step=option.step if size == ranks else Echo(option.step, ranks // size),
            lanes=size,
            prompt_host_s=question.engine.prompt_host_s,
            acceptance=Geometric(alpha=question.alpha, seed=question.seed) if drafts else None,
        )
        for size in sizes
    ]
