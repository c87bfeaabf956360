"""The answer to a question about training: the best layouts, why the first of them, what else there was."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from benthic import units
from benthic.errors import ConfigError
from benthic.plan.training.memory import usable
from benthic.plan.training.run import Failures, Run, run
from benthic.plan.training.search import Evaluated, Found, front, search
from benthic.plan.training.step import step, waterfall
from benthic.spec import flops

if TYPE_CHECKING:
    from benthic.plan.cost.machine import Machine
    from benthic.plan.training.candidate import Candidate
    from benthic.plan.training.space import Question, Space

TIE: Final = 0.01
"""Steps apart by less are as good: those of our own that were measured are foretold within 4 % (median)."""
_RATES: Final = ("network_bandwidth", "nvlink_bandwidth", "hbm_bandwidth", "bf16_flops", "fp8_flops")


@dataclass(frozen=True)
class Plan:
    """What was asked, and what was found in `seconds`. `run` is the best layout's."""

    question: Question
    found: Found
    run: Run
    usd_per_gpu_hour: float
    seconds: float
    flips: tuple[str, ...]

    @property
    def best(self) -> Evaluated:
        """The fastest layout that fits."""
        return self.found.best[0]

    @property
    def front(self) -> list[Evaluated]:
        """What nothing simulated beats in both time and memory."""
        return front(self.found.evaluated)

    @property
    def runner_up(self) -> str | None:
        """How far the second layout is behind the best, and what would put it first."""
        if len(self.found.best) < 2:
            return None
        first, second = (one.step.seconds for one in self.found.best[:2])
        words = f"{units.percent(second / first - 1, 2)} slower"
        if _tied(self.found):
            return f"{words}, which is a tie"
        return f"{words}; it would be first with {', or '.join(self.flips)}" if self.flips else words

    @property
    def mfu(self) -> float:
        """Causal training FLOPs without recomputation, MTP and masked pairs, over the BF16 peak."""
        question, kept = self.question, self.best.candidate.train.kept_pairs
        each = flops.training(question.model, question.seq_len, kept_pairs=kept or 1.0).value
        peak = question.machine.hardware.bf16_flops * question.gpus
        return each * self.best.step.tokens_per_second / peak


def plan(
    question: Question, space: Space, *, usd_per_gpu_hour: float, failures: Failures, keep: int = 5
) -> Plan:
    """Search, and say what the best layout comes to.

    Raises:
        ConfigError: nothing runs, or nothing fits, for which the message names the nearest that does; or the
            price is none.
    """
    if not 0.0 <= usd_per_gpu_hour < math.inf:
        message = f"usd_per_gpu_hour = {usd_per_gpu_hour}, but a price is finite and not below 0."
        raise ConfigError(message)
    began = time.perf_counter()
    found = search(question, space, keep=keep)
    if not found.best:
        raise ConfigError(_nothing(question, space, found))
    best = found.best[0]
    whole = run(
        best.step.seconds,
        step_tokens=best.candidate.step_tokens,
        tokens=question.tokens,
        gpus=question.gpus,
        usd=usd_per_gpu_hour,
        failures=failures,
    )
    return Plan(question, found, whole, usd_per_gpu_hour, time.perf_counter() - began, flips(question, found))


def flips(question: Question, found: Found) -> tuple[str, ...]:
    """Which part of the hardware, twice or half as fast, would put a runner-up first that is no tie."""
    if len(found.best) < 2 or _tied(found):
        return ()
    first, second = (one.candidate for one in found.best[:2])
    words = []
    for name in _RATES:
        rate = getattr(question.machine.hardware, name)
        if rate is None:
            continue
        for factor, how in ((2.0, "twice"), (0.5, "half")):
            hardware = replace(question.machine.hardware, **{name: rate * factor})
            machine = replace(question.machine, hardware=hardware)
            if _slower(first, second, machine):
                words.append(f"{how} the {name.replace('_', ' ')}")
    return tuple(words)


def _tied(found: Found) -> bool:
    first, second = (one.step.seconds for one in found.best[:2])
    return second < first * (1 + TIE)


def _slower(first: Candidate, second: Candidate, machine: Machine) -> bool:
    return step(first, machine).seconds > step(second, machine).seconds * (1 + 1e-6)


def _nothing(question: Question, space: Space, found: Found) -> str:
    """Why there is no answer, and the nearest question that has one."""
    what = f"{question.model.name} on {question.gpus} {question.machine.name}"
    if not found.screened:
        return (
            f"no layout of {what} divides: {question.gpus} GPUs, {question.rows} rows a step, "
            f"{question.model.n_routed_experts} experts. Choose GPUs and rows with more divisors, "
            "or free a degree."
        )
    assert found.smallest is not None, "what was screened has a size"  # noqa: S101
    room, needs = usable(question.machine.hardware), found.smallest.bytes
    wrong = f"no layout of {what} fits: the smallest of {found.screened:,} needs {units.size(needs)} a GPU"
    gpus = question.gpus
    for _ in range(8):
        gpus *= 2
        more = search(replace(question, gpus=gpus, rows=max(question.rows, gpus)), space, keep=1)
        if more.best:
            return f"{wrong}, which has {units.size(room)}. {gpus} of these GPUs are enough: {_words(more)}."
    return f"{wrong}, which has {units.size(room)}. Take GPUs with more memory."


def _words(found: Found) -> str:
    return f"{found.best[0].candidate.words()} needs {units.size(found.best[0].memory.total)}"


def as_dict(plan: Plan) -> dict[str, Any]:
    """Everything as JSON takes it, in SI units."""
    question, found, best = plan.question, plan.found, plan.best
    return {
        "model": question.model.name,
        "hardware": question.machine.name,
        "gpus": question.gpus,
        "tokens": question.tokens,
        "rows": question.rows,
        "seq_len": question.seq_len,
        "best": [evaluated_dict(one) for one in found.best],
        "front": [evaluated_dict(one) for one in plan.front],
        "waterfall_seconds": waterfall(best.step),
        "coverage": best.step.price.coverage,
        "mfu_bf16_causal": plan.mfu,
        "run": {
            "steps": plan.run.steps,
            "seconds": plan.run.seconds,
            "gpu_hours": plan.run.gpu_hours,
            "usd": plan.run.usd,
            "usd_per_gpu_hour": plan.usd_per_gpu_hour,
            "goodput": plan.run.goodput,
        },
        "search": {
            "screened": found.screened,
            "bounded_closely": found.looked_at,
            "simulated": len(found.evaluated),
            "do_not_fit": found.too_large,
            "seconds": plan.seconds,
        },
        "flips": list(plan.flips),
    }


def evaluated_dict(one: Evaluated) -> dict[str, Any]:
    """One layout as JSON takes it."""
    layout, price = one.candidate.layout, one.step.price
    return {
        "words": one.candidate.words(),
        "settings": one.candidate.settings(),
        "pp": layout.pp_degree,
        "dp": layout.dp_degree,
        "ep": layout.ep_degree,
        "tp": layout.tp_degree,
        "cp": layout.cp_degree,
        "zero": layout.zero_stage,
        "schedule": layout.schedule,
        "virtual_stages": layout.virtual_stages,
        "local_batch_size": one.candidate.train.local_batch_size,
        "recompute": list(one.candidate.recompute),
        "precision": one.candidate.precision.products,
        "step_seconds": price.seconds,
        "step_seconds_low": price.low,
        "step_seconds_high": price.high,
        "tokens_per_second": one.step.tokens_per_second,
        "memory": one.memory.terms,
        "memory_bytes": one.memory.total,
        "bubble_fraction": one.step.timeline.bubble_fraction,
    }
