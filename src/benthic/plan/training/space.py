"""Every layout worth a look, with bounds on its time and memory that cost microseconds."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from benthic.errors import ConfigError
from benthic.parallel.activations import block_bytes
from benthic.parallel.parts import kind_of, parts_of
from benthic.plan.training.candidate import PRECISIONS, RECOMPUTES, Candidate, Rows, Updates
from benthic.plan.training.stage import stages
from benthic.sched.pipeline.schedules import unit
from benthic.spec.layout import Layout
from benthic.spec.parameters import parameters

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benthic.plan.cost.machine import Machine
    from benthic.spec.model import ModelConfig

OVERLAPPED: Final = frozenset({"dualpipe", "dualpipev"})
TWO_WAY: Final = frozenset({"dualpipe", "chimera"})
_TWO_A_RANK: Final = frozenset({"dualpipev", "zb-v"})
_EVEN: Final = frozenset({"dualpipe", "chimera"})


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be trained on what.

    rows: of one optimizer step. tokens: of the whole run. kept_pairs: as `candidate.Rows`.
    """

    model: ModelConfig
    machine: Machine
    gpus: int
    rows: int
    seq_len: int = 4096
    tokens: float = 1e12
    optimizer: Updates = Updates()  # noqa: RUF009 (frozen)
    skew: float = 1.0
    kept_pairs: float | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("skew", self.skew, 1.0), ("tokens", self.tokens, 0.0)):
            if not least <= value < math.inf:
                message = f"{name} = {value}, but it must be finite and not below {least:g}."
                raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class Space:
    """What a search may choose from; empty tuples: every divisor that makes sense."""

    pp: tuple[int, ...] = ()
    ep: tuple[int, ...] = ()
    tp: tuple[int, ...] = ()
    cp: tuple[int, ...] = ()
    zero: tuple[int, ...] = (1, 2, 3)
    schedules: tuple[str, ...] = (
        "1f1b",
        "interleaved",
        "zb-h1",
        "zb-v",
        "chimera",
        "dualpipe",
        "dualpipev",
    )
    virtual_stages: tuple[int, ...] = (2,)
    local_batch_sizes: tuple[int, ...] = (1, 2, 4, 8)
    recomputes: tuple[str, ...] = tuple(RECOMPUTES)
    precisions: tuple[str, ...] = tuple(PRECISIONS)


class Choice(NamedTuple):
    """One candidate by its numbers; `recompute` and `precision` are names in `training.candidate`."""

    schedule: str
    virtual_stages: int | None
    pp: int
    ep: int
    tp: int
    cp: int
    zero: int
    local_batch_size: int
    recompute: str
    precision: str


class Bounded(NamedTuple):
    """A choice, with seconds and bytes that no evaluation undercuts."""

    seconds: float
    bytes: float
    choice: Choice


def candidate(question: Question, choice: Choice) -> Candidate:
    """The candidate that `choice` stands for."""
    dp = question.gpus // (choice.pp * choice.tp * choice.cp)
    return Candidate(
        model=question.model,
        layout=Layout(
            pp_degree=choice.pp,
            dp_degree=dp,
            cp_degree=choice.cp,
            tp_degree=choice.tp,
            ep_degree=choice.ep,
            zero_stage=choice.zero,
            schedule=choice.schedule,
            virtual_stages=choice.virtual_stages,
        ),
        train=Rows(
            seq_len=question.seq_len,
            local_batch_size=choice.local_batch_size,
            kept_pairs=question.kept_pairs,
        ),
        rows=question.rows,
        precision=PRECISIONS[choice.precision],
        optimizer=question.optimizer,
        recompute=RECOMPUTES[choice.recompute],
        skew=question.skew,
    )


def walk(question: Question, space: Space) -> Iterator[Bounded]:
    """Every choice that can run, whatever its memory, with its bounds."""
    for precision in space.precisions:
        for recompute in space.recomputes:
            for rows in space.local_batch_sizes:
                for tp, cp, ep in _inner(question, space):
                    first = Choice("1f1b", None, 1, ep, tp, cp, 1, rows, recompute, precision)
                    yield from _Part(question, space, first).choices()


def refuse_degrees(question: Question, space: Space) -> None:
    """Refuse named degrees that no layout can have.

    Raises:
        ConfigError: one that does not divide what it divides; what does is named.
    """
    model, gpus = question.model, question.gpus
    heads, experts = model.num_attention_heads, model.n_routed_experts
    for name, degrees, whole, what in (
        ("pp", space.pp, gpus, f"{gpus} GPUs"),
        ("cp", space.cp, gpus, f"{gpus} GPUs"),
        ("tp", space.tp, math.gcd(heads, gpus), f"{heads} heads and {gpus} GPUs"),
        ("ep", space.ep, math.gcd(experts, gpus) or 1, f"{experts} experts and {gpus} GPUs"),
    ):
        for degree in degrees:
            if whole >= 1 and whole % degree:
                message = (
                    f"no layout divides: {name} = {degree} is no divisor of {what}. "
                    f"Take some of {', '.join(map(str, divisors(whole)))}."
                )
                raise ConfigError(message)


def divisors(number: int) -> tuple[int, ...]:
    """Every divisor, in order."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return tuple(sorted({*small, *(number // d for d in small)}))


def _inner(question: Question, space: Space) -> Iterator[tuple[int, int, int]]:
    """Tensor, context and expert degrees that divide what they divide."""
    model, node = question.model, question.machine.gpus_per_node
    long = max(1, question.seq_len // 8192)
    experts = divisors(model.n_routed_experts) if model.n_routed_experts else (1,)
    for tp in space.tp or tuple(d for d in divisors(model.num_attention_heads) if d <= node):
        for cp in space.cp or tuple(d for d in divisors(question.gpus) if d <= long):
            for ep in space.ep or experts:
                layout = Layout(dp_degree=ep, tp_degree=tp, cp_degree=cp, ep_degree=ep)
                if not list(layout.problems(model, ranks=layout.ranks, seq_len=question.seq_len)):
                    yield tp, cp, ep


class _Part:
    """The choices that share everything but the pipeline and ZeRO."""

    def __init__(self, question: Question, space: Space, choice: Choice) -> None:
        self.question, self.space, self.choice = question, space, choice
        one = candidate(question, choice)
        (self.work,) = stages(one, question.machine)
        layers = question.model.num_hidden_layers
        tokens = choice.local_batch_size * question.seq_len / (choice.tp * choice.cp)
        self.block = tokens * min(block_bytes(one, layer) for layer in (0, layers - 1))
        self.counts = _counts(question.model)

    def choices(self) -> Iterator[Bounded]:
        """With their bounds."""
        question, inner = self.question, self.choice.tp * self.choice.cp
        for pp in self.space.pp or divisors(question.gpus):
            if question.gpus % (pp * inner) or (question.gpus // pp) % self.choice.ep:
                continue
            share = question.gpus // (pp * inner) * self.choice.local_batch_size
            if question.rows % share:
                continue
            microbatches = question.rows // share
            for schedule, virtual in self._schedules(pp, microbatches):
                seconds = self._seconds(pp, microbatches, schedule)
                held = self._activations(pp, microbatches, schedule, virtual)
                for zero in self.space.zero:
                    choice = self.choice._replace(schedule=schedule, virtual_stages=virtual, pp=pp, zero=zero)
                    yield Bounded(seconds, held + self._static(choice), choice)

    def _schedules(self, pp: int, microbatches: int) -> Iterator[tuple[str, int | None]]:
        """Schedules that exist for these numbers, as their builders demand."""
        layers = self.question.model.num_hidden_layers
        for schedule in self.space.schedules:
            if pp == 1 and schedule not in {"1f1b", *_TWO_A_RANK}:
                continue
            least = 2 * pp if schedule in OVERLAPPED else 1
            wrong = microbatches % unit(schedule, pp) or microbatches < least
            if wrong or (schedule in _EVEN and pp % 2):
                continue
            for virtual in self.space.virtual_stages if schedule == "interleaved" else (None,):
                stages_here = pp * (virtual or (2 if schedule in _TWO_A_RANK else 1))
                if stages_here <= layers:
                    yield schedule, virtual

    def _seconds(self, pp: int, microbatches: int, schedule: str) -> float:
        """What the ranks compute, or their hosts launch, on average: without what can hide."""
        work, host = self.work, self.work.host
        each = work.forward.seconds + work.input.seconds + work.weight.seconds
        if schedule not in OVERLAPPED:
            each += work.forward_exchange.seconds + work.input_exchange.seconds
        return max(each, host.forward + host.input + host.weight) * microbatches / pp * (1 - 1e-9)

    def _activations(self, pp: int, microbatches: int, schedule: str, virtual: int | None) -> float:
        """The fewest blocks in flight on the rank that holds most."""
        count = pp * (virtual or (2 if schedule in _TWO_A_RANK else 1))
        blocks = _least_blocks(self.question.model, count)
        flying = {"dualpipe": pp + 1, "dualpipev": 2 * pp + 1, "chimera": pp // 2 + 1}.get(schedule, pp)
        return min(flying, microbatches) * blocks * self.block

    def _static(self, choice: Choice) -> float:
        """Weights to moments, the mean over the ranks."""
        ranks = self.question.gpus // choice.pp
        total = 0.0
        for kind, fp8, count in self.counts:
            cut = {"expert": choice.ep, "sharded": choice.tp}.get(kind, 1)
            total += count / cut * _bytes(choice, ranks // cut, fp8=fp8, updates=self.question.optimizer)
        return total / choice.pp * (2 if choice.schedule in TWO_WAY else 1)


def _bytes(choice: Choice, replicas: int, *, fp8: bool, updates: Updates) -> float:
    """Of one element on one of `replicas` ranks that hold it."""
    narrow = not (choice.precision == "fp8" and fp8)
    weight = 2.0 if narrow else 1.0
    master = 2.0 if updates.store_param_remainders and narrow else 4.0
    each_moment = 2.0 if updates.moment_dtype == "bfloat16" else 4.0
    kept = weight / replicas if choice.zero == 3 and narrow else weight
    gradients = 4.0 if choice.zero == 1 else 4.0 / replicas
    number = 1 if updates.name == "muon" else 2
    return kept + gradients + (master + number * each_moment) / replicas


@functools.lru_cache(maxsize=64)
def _counts(model: ModelConfig) -> tuple[tuple[str, bool, float], ...]:
    """Trainable elements by kind and by whether their products are in FP8."""
    found: dict[tuple[str, bool], float] = {}
    for param in parameters(model):
        if param.trainable:
            key = kind_of(param), param.fp8
            found[key] = found.get(key, 0.0) + param.numel
    return tuple((kind, fp8, count) for (kind, fp8), count in found.items())


@functools.lru_cache(maxsize=1 << 10)
def _least_blocks(model: ModelConfig, count: int) -> int:
    """Blocks of the stage that has fewest."""
    return min(len(part.layers) for part in parts_of(model, Layout(), count))
