"""DistServe's two placements and its published latency fit of OPT models on A100-80G.

Algorithms 1 and 2 of the paper (arXiv 2401.09670, section 4) search parallelism of prefill and of decode. The
fit is the one that its simulator ships with (LLMServe/DistServe, Apache-2.0): milliseconds

    prefill  (a + b t + c t2) / pp + pp,  t and t2 the sums of prompt lengths and of their squares
    decode   (a + b context + c batch) / pp,  other coefficients from `SPLIT` sequences on

on each stage, and on the first 2 + 0.0001 t for its scheduler.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, NamedTuple

from benthic.errors import ConfigError, UnknownFieldError
from benthic.plan.serving.cluster import Cluster
from benthic.plan.serving.demand import drawn
from benthic.plan.serving.goodput import Goodput, Targets, find_goodput
from benthic.plan.serving.group import GroupSpec
from benthic.sched.plans import BatchingConfig
from benthic.sched.routing import Policy, least_loaded, shortest_queue
from benthic.spec.objectives import Objectives

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from benthic.plan.serving.demand import Demand, Lengths
    from benthic.plan.serving.outcome import Outcome
    from benthic.plan.serving.steps import StepLoad, StepTime
    from benthic.sched.routing import Role

Coefficients = tuple[float, float, float]
SPLIT: Final = 95
"""Sequences from which a decode step takes the coefficients of large batches."""

_MOST_SEQUENCES: Final = 4096
_BLOCK: Final = 16


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Coefficients of one model under one degree of tensor parallelism, and tokens its cache holds."""

    prefill: Coefficients
    small: Coefficients
    large: Coefficients
    cache_tokens: int


FITS: Final[dict[str, dict[int, Fit]]] = {
    "opt-13b": {
        1: Fit(
            prefill=(18.1025, 0.101912, 7.1223e-6),
            small=(19.9347, 6.2694e-4, 0.038507),
            large=(7.1662, 5.7980e-4, 0.158311),
            cache_tokens=66144,
        ),
        2: Fit(
            prefill=(14.7430, 0.068577, 2.4496e-6),
            small=(13.2948, 3.4109e-4, 0.062963),
            large=(10.6387, 3.1183e-4, 0.085629),
            cache_tokens=163008,
        ),
        4: Fit(
            prefill=(12.0623, 0.038081, 5.2262e-7),
            small=(10.2562, 1.8787e-4, 0.032693),
            large=(10.4835, 1.7121e-4, 0.045666),
            cache_tokens=356736,
        ),
    },
    "opt-66b": {
        2: Fit(
            prefill=(43.0588, 0.274229, 2.2478e-5),
            small=(48.2880, 9.4243e-4, 0.127550),
            large=(28.7277, 4.7448e-4, 0.296178),
            cache_tokens=11600,
        ),
        4: Fit(
            prefill=(29.4416, 0.151352, 8.3175e-6),
            small=(30.7603, 4.5195e-4, 0.063284),
            large=(27.4708, 4.0468e-4, 0.124807),
            cache_tokens=78496,
        ),
        8: Fit(
            prefill=(25.4907, 0.106592, 3.3911e-6),
            small=(23.1551, 2.2691e-4, 0.048006),
            large=(21.7177, 3.7581e-4, 0.089786),
            cache_tokens=212304,
        ),
    },
}


class Degrees(NamedTuple):
    """Tensor (intra-op) and pipeline (inter-op) parallelism of an instance."""

    tp: int
    pp: int

    @property
    def gpus(self) -> int:
        """GPUs of the instance."""
        return self.tp * self.pp


@dataclass(frozen=True, kw_only=True)
class FittedStep:
    """Seconds of a step by the fit, through all `pp` stages; decodes are as many batches that take turns."""

    fit: Fit
    pp: int = 1

    def __call__(self, loads: Sequence[StepLoad]) -> float:
        """Seconds of prompts, or else of decodes, as their engines never mix them."""
        load = loads[0]
        if load.prefill_tokens:
            a, b, c = self.fit.prefill
            squares = 2 * load.prefill_pairs - load.prefill_tokens
            stage = (a + b * load.prefill_tokens + c * squares) / self.pp + self.pp
            return (self.pp * stage + _scheduling(load.prefill_tokens)) / 1e3
        batch = load.decodes / self.pp
        a, b, c = self.fit.small if load.decodes < SPLIT else self.fit.large
        context = load.decode_context / self.pp
        return (a + b * context + c * batch + _scheduling(context)) / 1e3


@dataclass(frozen=True, kw_only=True)
class DecodeAlone:
    """As if prompts came computed: what a decode instance does once its blocks are there."""

    step: StepTime

    def __call__(self, loads: Sequence[StepLoad]) -> float:
        """Seconds of the decodes in the step."""
        return self.step([load._replace(prefill_tokens=0, prefill_pairs=0) for load in loads])


def _scheduling(tokens: float) -> float:
    return 2.0 + 1e-4 * tokens


def fit_of(model: str, tp: int) -> Fit:
    """The fit of `model` under `tp`.

    Raises:
        UnknownFieldError: no such model, or it was not fitted under that degree.
    """
    if model not in FITS:
        kind = "fitted model"
        raise UnknownFieldError(kind, model, FITS)
    if tp not in FITS[model]:
        kind = f"tensor-parallel degree of {model}"
        raise UnknownFieldError(kind, str(tp), map(str, FITS[model]))
    return FITS[model][tp]


def instance(model: str, role: Role, degrees: Degrees) -> GroupSpec:
    """One instance: prompts go whole and all together, pipeline stages hold a share of the weights each."""
    fit = fit_of(model, degrees.tp)
    blocks = fit.cache_tokens * degrees.pp // _BLOCK
    batching = BatchingConfig(
        num_blocks=blocks,
        block_size=_BLOCK,
        max_model_len=1 << 16,
        max_num_seqs=_MOST_SEQUENCES,
        max_num_batched_tokens=max(_MOST_SEQUENCES, blocks * _BLOCK),
        enable_prefix_caching=False,
        counted=True,
        lease_share=1.0,
    )
    step = FittedStep(fit=fit, pp=degrees.pp)
    pipelined = role == "prefill"
    stages = degrees.pp if pipelined else 1
    return GroupSpec(role=role, batching=batching, step=step, depth=stages, stages=stages)


POLICY: Final = Policy(prefill=shortest_queue, decode=least_loaded, prefill_share=1.0, decode_share=0.9)
"""Shortest queue, then least loaded, and the back-pressure of its simulator."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is placed: a model, lengths of requests, targets, and how finely rates are searched."""

    model: str
    lengths: Lengths
    targets: Targets
    requests: int = 300
    seed: int = 0
    precision: float = 0.03

    def prefill_goodput(self, degrees: Degrees) -> Goodput:
        """Highest rate at which one prefill instance alone keeps TTFT."""
        spec = instance(self.model, "prefill", degrees)
        objectives = Objectives(ttft_s=self.targets.objectives.ttft_s)
        return self._search(objectives, lambda rate: Cluster([spec]).play(_prompts(self._demand(rate))))

    def decode_goodput(self, degrees: Degrees) -> Goodput:
        """Highest rate at which one decode instance alone, given computed prompts, keeps TPOT."""
        spec = instance(self.model, "decode", degrees)
        alone = replace(spec, step=DecodeAlone(step=spec.step))
        objectives = Objectives(tpot_s=self.targets.objectives.tpot_s)
        return self._search(objectives, lambda rate: from_arrival(Cluster([alone]).play(self._demand(rate))))

    def joint_goodput(self, prefill: Degrees, decode: Degrees) -> Goodput:
        """Highest rate at which a pair of instances keeps both targets; blocks move at once."""
        pair = [instance(self.model, "prefill", prefill), instance(self.model, "decode", decode)]
        return self._search(
            self.targets.objectives, lambda rate: Cluster(pair, policy=POLICY).play(self._demand(rate))
        )

    def _demand(self, rate: float) -> Demand:
        return drawn(self.lengths, self.requests, rate=rate, seed=self.seed)

    def _search(self, objectives: Objectives, run: Callable[[float], Outcome]) -> Goodput:
        targets = Targets(objectives=objectives, attainment=self.targets.attainment)
        return find_goodput(run, targets, start=2.0, precision=self.precision, most=1024.0)


def from_arrival(outcome: Outcome) -> Outcome:
    """TPOT counted from the arrival of a computed prompt: waiting for blocks counts (DistServe's)."""
    served = [
        each._replace(
            ttft_s=0.0,
            tpot_s=None if each.tpot_s is None else each.e2e_s / (each.output_tokens - 1),
        )
        for each in outcome.served
    ]
    return replace(outcome, served=tuple(served))


def _prompts(demand: Demand) -> Demand:
    return tuple([ask._replace(output_tokens=1) for ask in demand])


class Placement(NamedTuple):
    """Instances of both phases, how many of each, and the goodput a GPU of the pattern that is replicated."""

    prefill: Degrees
    decode: Degrees
    prefills: int
    decodes: int
    per_gpu: float

    @property
    def gpus(self) -> int:
        """GPUs of all instances."""
        return self.prefills * self.prefill.gpus + self.decodes * self.decode.gpus


def algorithm_1(study: Study, *, rate: float, nodes: int, gpus_per_node: int) -> Placement:
    """High node affinity: the best instance of each phase by itself, then as many of each as `rate` needs.

    Raises:
        ConfigError: the model fits no instance, or nothing keeps the targets.
    """
    choices = list(_degrees(study.model, nodes * gpus_per_node, nodes * gpus_per_node))
    prefill, prefill_rate = _best(choices, lambda d: study.prefill_goodput(d).rate)
    decode, decode_rate = _best(choices, lambda d: study.decode_goodput(d).rate)
    n, m = math.ceil(rate / prefill_rate), math.ceil(rate / decode_rate)
    per_gpu = 1.0 / (prefill.gpus / prefill_rate + decode.gpus / decode_rate)
    return Placement(prefill, decode, n, m, per_gpu)


def algorithm_2(study: Study, *, rate: float, nodes: int, gpus_per_node: int) -> Placement:
    """Low node affinity: prefill and decode of the same stages share a node, simulated together.

    Raises:
        ConfigError: no pair fits into a node, or nothing keeps the targets.
    """
    best: tuple[float, float, Degrees, Degrees] | None = None
    for across in range(1, nodes + 1):
        for prefill, decode in _pairs(study.model, gpus_per_node):
            p, d = (Degrees(each.tp, each.pp * across) for each in (prefill, decode))
            found = study.joint_goodput(p, d).rate
            per_gpu = found / (p.gpus + d.gpus)
            if found and (best is None or per_gpu > best[0]):
                best = (per_gpu, found, p, d)
    if best is None:
        msg = (
            f"no pair of {study.model} instances on {gpus_per_node} GPUs a node keeps the targets. "
            "Relax them or give more GPUs."
        )
        raise ConfigError(msg)
    per_gpu, found, prefill, decode = best
    copies = math.ceil(rate / found)
    return Placement(prefill, decode, copies, copies, per_gpu)


def _degrees(model: str, most_tp: int, most_gpus: int) -> Iterator[Degrees]:
    fit_of(model, next(iter(FITS.get(model, {0: 0}))))
    for tp in FITS[model]:
        for pp in (1, 2, 4):
            if tp <= most_tp and tp * pp <= most_gpus:
                yield Degrees(tp, pp)


def _pairs(model: str, gpus: int) -> Iterator[tuple[Degrees, Degrees]]:
    fitting = list(_degrees(model, gpus, gpus - 1))
    for prefill in fitting:
        for decode in fitting:
            if prefill.gpus + decode.gpus <= gpus:
                yield prefill, decode


def _best(choices: list[Degrees], goodput: Callable[[Degrees], float]) -> tuple[Degrees, float]:
    scored = [(goodput(each), each) for each in choices]
    rate, best = max(scored, key=lambda one: one[0] / one[1].gpus, default=(0.0, Degrees(1, 1)))
    if not rate:
        msg = f"none of {len(choices)} instances keeps the targets at any rate. Relax them or give more GPUs."
        raise ConfigError(msg)
    return best, rate
