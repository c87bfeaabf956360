"""What a stage of the model takes for one microbatch, on a compute and on a network lane."""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

from benthic.parallel.parts import parts_of
from benthic.parallel.setup import expanded
from benthic.plan.cost.ops import Attention, Gemm, GroupedGemm
from benthic.plan.cost.price import price
from benthic.plan.cost.priced import Priced, Total, total
from benthic.plan.cost.roofline import peak
from benthic.plan.training import launches
from benthic.plan.training.block import block, embedding, head, projection
from benthic.plan.training.shape import Shape
from benthic.plan.training.travel import hop
from benthic.sched.pipeline import schedules

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from benthic.model.part import Part
    from benthic.plan.cost.machine import Machine
    from benthic.plan.training.block import Step
    from benthic.plan.training.candidate import Candidate
    from benthic.plan.training.launches import Calls
    from benthic.sched.pipeline.table import Slot
    from benthic.spec.model import ModelConfig

EXCHANGE_SMS: Final = 20
"""Streaming multiprocessors that the exchange takes while it is overlapped (DeepSeek-V3, section 3.2.2)."""
OVERLAP_BUSY: Final = 0.916
"""Part of an overlapped pair during which products run (DeepSeek's training trace: EP64, TP1, 4K)."""
EXCHANGE: Final = "exchange"


class Host(NamedTuple):
    """Seconds of the host for one microbatch: launching a forward and its two backwards."""

    forward: float = 0.0
    input: float = 0.0
    weight: float = 0.0

    @classmethod
    def of(cls, calls: Calls, machine: Machine, shape: Shape) -> Host:
        """The seconds of `calls`, by what the machine's profile knows of its host; none in a CUDA graph."""
        if shape.recorded:
            return cls()
        each = machine.overhead("host collective")
        return cls(
            machine.overhead("host operator forward") * calls.forward + each * calls.forward_collectives,
            machine.overhead("host operator input") * calls.input + each * calls.input_collectives,
            machine.overhead("host operator weight") * calls.weight,
        )

    def plus(self, other: Host) -> Host:
        """Both."""
        return Host(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, count: int) -> Host:
        """`count` of them."""
        return Host(*(each * count for each in self))


@dataclass(frozen=True, slots=True)
class Work:
    """A forward, a backward to the input, the weights' part; what of the first two is exchange; the host."""

    forward: Total = Total()  # noqa: RUF009 (frozen)
    input: Total = Total()  # noqa: RUF009
    weight: Total = Total()  # noqa: RUF009
    forward_exchange: Total = Total()  # noqa: RUF009
    input_exchange: Total = Total()  # noqa: RUF009
    host: Host = Host()  # noqa: RUF009

    def __add__(self, other: Work) -> Work:
        """Both."""
        return Work(
            self.forward + other.forward,
            self.input + other.input,
            self.weight + other.weight,
            self.forward_exchange + other.forward_exchange,
            self.input_exchange + other.input_exchange,
            self.host.plus(other.host),
        )

    def times(self, count: int) -> Work:
        """`count` of them."""
        return Work(
            self.forward.times(count),
            self.input.times(count),
            self.weight.times(count),
            self.forward_exchange.times(count),
            self.input_exchange.times(count),
            self.host.times(count),
        )

    def launching(self, host: Host) -> Work:
        """With this for the host on top."""
        return replace(self, host=self.host.plus(host)) if any(host) else self

    @property
    def whole(self) -> Total:
        """Everything, nothing hidden."""
        return self.forward + self.input + self.weight + self.forward_exchange + self.input_exchange


def shape_of(candidate: Candidate, machine: Machine) -> Shape:
    """The sizes of one microbatch on one rank."""
    layout = candidate.layout
    again = expanded(candidate.recompute) | ({"swiglu"} if candidate.precision.fp8_swiglu else frozenset())
    return Shape(
        model=candidate.model,
        rows=candidate.train.local_batch_size,
        seq_len=candidate.train.seq_len,
        tp=layout.tp_degree,
        cp=layout.cp_degree,
        ep=layout.ep_degree,
        gpus_per_node=machine.gpus_per_node,
        products=candidate.precision.products,
        again=again,
        skew=candidate.skew,
        idle=candidate.idle,
        kept_pairs=candidate.train.kept_pairs,
        fp8_swiglu=candidate.precision.fp8_swiglu,
        e5m6_attention=candidate.precision.e5m6_attention,
        recorded=candidate.recorded(machine.gpus_per_node),
        cut=layout.ep_degree > 1 and schedules.BUILDERS[layout.schedule].pairs,
    )


class Kind(NamedTuple):
    """What a stage holds, as far as its work depends on it; stages alike are priced once.

    `messages`: how many of the stages before and behind it are on other pipeline ranks.
    """

    mixed: int
    dense: int
    embeddings: int
    heads: int
    projections: int
    messages: int = 0

    @classmethod
    def of(cls, model: ModelConfig, part: Part, messages: int = 0) -> Kind:
        """Of a part; prediction modules have a block, an embedding, a head and a projection each."""
        layers = [*part.layers, *(model.num_hidden_layers + depth for depth in part.mtp)]
        mixed, depths = sum(model.is_moe(layer) for layer in layers), len(part.mtp)
        embeds = bool(part.embed and part.layers[0] == 0)
        return cls(mixed, len(layers) - mixed, embeds + depths, part.head + depths, depths, messages)


def stages(candidate: Candidate, machine: Machine, route: tuple[int, ...] = (0,)) -> tuple[Work, ...]:
    """The work of each stage, of which a route names the pipeline ranks.

    Raises:
        ConfigError: fewer layers than stages.
    """
    shape = shape_of(candidate, machine)
    kinds = _kinds(candidate.model, parts_of(candidate.model, candidate.layout, len(route)), route)
    return _worked(
        shape, kinds, machine, Host.of(launches.of_zero(candidate.layout.zero_stage), machine, shape)
    )


@functools.lru_cache(maxsize=1 << 12)
def _worked(shape: Shape, kinds: tuple[Kind, ...], machine: Machine, zero: Host) -> tuple[Work, ...]:
    """Stages of these kinds, those alike the same, with what ZeRO adds to the host's work for a block."""
    found = {
        kind: _stage(shape, kind, machine).launching(zero.times(kind.mixed + kind.dense))
        for kind in dict.fromkeys(kinds)
    }
    return tuple(found[kind] for kind in kinds)


@functools.lru_cache(maxsize=256)
def _kinds(model: ModelConfig, parts: tuple[Part, ...], route: tuple[int, ...]) -> tuple[Kind, ...]:
    hops = [0, *(here != there for here, there in pairwise(route)), 0]
    return tuple(Kind.of(model, part, sum(ends)) for part, ends in zip(parts, pairwise(hops), strict=True))


def named(candidate: Candidate, machine: Machine, part: Part) -> dict[str, float]:
    """The seconds of a stage's operations by what they are for."""
    found: dict[str, float] = defaultdict(float)
    for steps, count in _pieces(shape_of(candidate, machine), Kind.of(candidate.model, part)):
        for step in steps:
            found[step.name] += count * _priced(step, machine).seconds
    return dict(found)


@functools.lru_cache(maxsize=1 << 14)
def _stage(shape: Shape, kind: Kind, machine: Machine) -> Work:
    found = _block(shape, machine, moe=True).times(kind.mixed)
    found += _block(shape, machine, moe=False).times(kind.dense)
    ends = {"embedding": kind.embeddings, "head": kind.heads, "projection": kind.projections}
    for name, count in ends.items():
        if count:
            found += _ends(shape, machine, name).times(count)
    return found.launching(Host.of(launches.of_stage(kind.messages), machine, shape))


def _pieces(shape: Shape, kind: Kind) -> Iterator[tuple[Iterable[Step], int]]:
    """The operations of a stage, each group with how often it runs."""
    yield block(shape, moe=True), kind.mixed
    yield block(shape, moe=False), kind.dense
    yield embedding(shape), kind.embeddings
    yield head(shape), kind.heads
    yield projection(shape), kind.projections


@functools.lru_cache(maxsize=1 << 14)
def _block(shape: Shape, machine: Machine, *, moe: bool) -> Work:
    host = Host.of(launches.of_block(shape, moe=moe), machine, shape)
    return _work(block(shape, moe=moe), machine, host=host)


@functools.lru_cache(maxsize=1 << 14)
def _ends(shape: Shape, machine: Machine, name: str) -> Work:
    steps = {"embedding": embedding, "head": head, "projection": projection}[name](shape)
    return _work(steps, machine, host=Host.of(launches.of_end(name), machine, shape))


def _priced(step: Step, machine: Machine) -> Priced:
    """The longest of an operation, its products at a hot GPU's rate, and what it does beside.

    Power follows the rate of products: a kernel that multiplies no faster than the rate that a hot GPU keeps
    up has power to spare, and its clock does not fall.
    """
    alone = price(step.op, machine)
    if machine.sustained < 1.0 and isinstance(step.op, Gemm | GroupedGemm | Attention):
        least = step.op.flops / (machine.sustained * peak(machine.hardware, step.op.dtype))
        seconds, low, high = (max(least, one) for one in (alone.seconds, alone.low, alone.high))
        alone = Priced(seconds, low, high, alone.provenance)
    if step.inside is None:
        return alone
    return max(alone, price(step.inside, machine), key=lambda one: one.seconds)


def _work(steps: Iterable[Step], machine: Machine, *, host: Host) -> Work:
    priced = [(step.part, step.name == EXCHANGE, _priced(step, machine)) for step in steps]

    def of(part: str, *, exchange: bool) -> Total:
        return total(one for its, travels, one in priced if its == part and travels == exchange)

    return Work(
        of("F", exchange=False),
        of("I", exchange=False),
        of("W", exchange=False),
        of("F", exchange=True),
        of("I", exchange=True),
        host,
    )


class Sync(NamedTuple):
    """Seconds of ZeRO's collectives before a forward and around a backward, on links and in memory."""

    forward: float = 0.0
    backward: float = 0.0


class Lanes(NamedTuple):
    """Seconds of one action: products, exchange, the host's launches, ZeRO."""

    products: float
    exchange: float
    launch: float
    sync: float

    def plus(self, other: Lanes) -> Lanes:
        """Both."""
        return Lanes(*(a + b for a, b in zip(self, other, strict=True)))


_NO_SYNC: Final = Sync()


class Prices:
    """Costs of slots for `sched.pipeline.simulate`, from the work of stages.

    An action alone computes and exchanges by turns, all SMs at either. In a pair one action's exchange runs
    beside the other's products, which have the other SMs for as long as the pair lasts: it takes the longer
    of C/(1 - s) and N, of C seconds of products and N of exchange, s being the share of the SMs that the
    exchange holds; and the part of it in which products cannot run on top, as in DeepSeek's trace. Between
    ranks of one host (`near`) kernels and copies on a stream of their own move what travels, and hold SMs
    only while it does: the longer of C + s N and N. Pairs without exchange take what their actions take.
    ZeRO's collectives come on top, and no slot is over before the host has launched it.
    """

    def __init__(
        self,
        work: tuple[Work, ...],
        machine: Machine,
        *,
        transfer: float,
        sync: Sync = _NO_SYNC,
        near: bool = False,
    ) -> None:
        self.work = work
        self._near = near
        self._transfer = transfer
        self._taken = EXCHANGE_SMS / machine.hardware.sms
        alike = {id(one): one for one in work}
        self._actions: dict[str, list[Lanes]] = {}
        self._alone: dict[str, list[float]] = {}
        for kind in ("F", "B", "I", "W"):
            found = {key: _of(one, kind, sync) for key, one in alike.items()}
            self._actions[kind] = [found[id(one)] for one in work]
            alone = {key: _longer(lanes.products + lanes.exchange, lanes) for key, lanes in found.items()}
            self._alone[kind] = [alone[id(one)] for one in work]

    @property
    def transfer(self) -> float:
        """Seconds of a hop from stage to stage."""
        return self._transfer

    def of_slot(self, slot: Slot) -> float:
        """Seconds of one action or of an overlapped pair."""
        if slot.second is None:
            return self._alone[slot.first.kind][slot.first.stage]
        lanes = self.lanes(slot)
        return _longer(self._busy(slot, lanes), lanes)

    def waits(self, slot: Slot) -> float:
        """Seconds of a slot in which the GPU waits for the host."""
        lanes = self.lanes(slot)
        return self.of_slot(slot) - self._busy(slot, lanes) - lanes.sync

    def lanes(self, slot: Slot) -> Lanes:
        """What the actions of a slot take, nothing hidden."""
        first = self._actions[slot.first.kind][slot.first.stage]
        if slot.second is None:
            return first
        return first.plus(self._actions[slot.second.kind][slot.second.stage])

    def _busy(self, slot: Slot, lanes: Lanes) -> float:
        """Seconds of the device without its waiting for the host."""
        if slot.second is None or not lanes.exchange:
            return lanes.products + lanes.exchange
        if self._near:
            return max(lanes.products + self.slowed(lanes), lanes.exchange)
        return max(lanes.products + self.slowed(lanes), lanes.exchange) / OVERLAP_BUSY

    def slowed(self, lanes: Lanes) -> float:
        """Seconds that products take longer in a pair for the SMs which the exchange beside them holds."""
        if self._near:
            return lanes.exchange * self._taken
        return lanes.products * self._taken / (1 - self._taken)


def _longer(busy: float, lanes: Lanes) -> float:
    """Seconds of a slot whose device works for `busy`, or of the host that launches it."""
    return max(busy + lanes.sync, lanes.launch)


def _of(work: Work, kind: str, sync: Sync) -> Lanes:
    """One action."""
    host, inputs, travels = work.host, work.input.seconds, work.input_exchange.seconds
    if kind == "F":
        forward, exchange = work.forward.seconds, work.forward_exchange.seconds
        return Lanes(forward, exchange, host.forward, sync.forward)
    if kind == "W":
        return Lanes(work.weight.seconds, 0.0, host.weight, 0.0)
    if kind == "I":
        return Lanes(inputs, travels, host.input, sync.backward)
    return Lanes(inputs + work.weight.seconds, travels, host.input + host.weight, sync.backward)


def prices_of(work: tuple[Work, ...], candidate: Candidate, machine: Machine, sync: Sync) -> Prices:
    """Of a candidate's slots."""
    near = candidate.layout.ep_degree <= machine.gpus_per_node
    return Prices(work, machine, transfer=transfer(candidate, machine), sync=sync, near=near)


def transfer(candidate: Candidate, machine: Machine) -> float:
    """Seconds of a hop between stages, over the network where a stage fills a node."""
    layout = candidate.layout
    network = layout.ranks_per_stage * layout.pp_degree > machine.gpus_per_node and (
        layout.ranks_per_stage >= machine.gpus_per_node
    )
    return price(hop(shape_of(candidate, machine), network=network), machine).seconds
