"""What is asked of a serving plan, and the instances that it could be made of, each with an estimate.

An estimate is a steady state: closed forms over the step's price. It orders candidates and says where a
simulated search should begin; what is reported comes from the simulation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final, NamedTuple

from benthic.errors import ConfigError
from benthic.plan.serving import layout as layouts
from benthic.plan.serving.acceptance import expected_tokens
from benthic.plan.serving.layout import GpuMemory, ServingLayout
from benthic.plan.serving.priced import TUNED, Engine, PricedStep
from benthic.plan.serving.queueing import load_for_wait
from benthic.plan.serving.steps import StepLoad

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benthic.plan.cost.machine import Machine
    from benthic.plan.serving.demand import Lengths
    from benthic.plan.serving.goodput import Targets
    from benthic.plan.serving.layout import WeightDtype
    from benthic.spec.model import ModelConfig

BLOCK_SIZE: Final = 64
PREFILL_BUDGET: Final = 16384
"""Tokens of a step on an instance that only prefills."""
BUDGETS: Final = (512, 1024, 2048, 4096, 8192)
"""Tokens of a step on an instance that does both: less keeps TPOT, more keeps TTFT."""
MOST_SEQUENCES: Final = 512
_SLACK: Final = 0.97


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a serving plan answers.

    Attributes:
        model: what is served.
        machine: on which GPUs.
        gpus: how many there are.
        lengths: of the requests.
        targets: what must be kept.
        weights: dtype of matrices; None takes FP8 where the checkpoint and the GPU have it.
        cache: dtype of latents.
        engine: what the engine adds to its kernels.
        burstiness: of arrivals; 1 is Poisson.
        drafts: tokens that MTP drafts each step, `alpha` of which hold if those before them did.
        alpha: see `drafts`.
        skew: what the busiest GPU's experts get over the mean, where experts are spread.
        dollars: of a GPU hour.
        fronts: processes that answer HTTP; None starts as many as keep them half idle.
        seed: of arrivals and lengths.
    """

    model: ModelConfig
    machine: Machine
    gpus: int
    lengths: Lengths
    targets: Targets
    weights: WeightDtype | None = None
    cache: WeightDtype = "bf16"
    engine: Engine = TUNED
    burstiness: float = 1.0
    drafts: int = 0
    alpha: float = 0.85
    skew: float = 1.1
    dollars: float = 2.0
    fronts: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.fronts is not None and self.fronts < 1:
            msg = f"fronts = {self.fronts}, but at least 1 process must answer HTTP"
            raise ConfigError(msg)
        if self.gpus < 1:
            msg = f"gpus = {self.gpus}, but at least 1 GPU is needed to serve anything"
            raise ConfigError(msg)
        if not 0.0 <= self.dollars < math.inf:
            msg = f"dollars = {self.dollars} of a GPU hour, but a price is finite and not below 0"
            raise ConfigError(msg)
        if self.drafts > 0 and not self.model.num_nextn_predict_layers:
            msg = f"drafts = {self.drafts}, but {self.model.name} has 0 MTP layers. Set drafts to 0."
            raise ConfigError(msg)

    @property
    def dtype(self) -> WeightDtype:
        """The weights' dtype."""
        if self.weights is not None:
            return self.weights
        native = self.model.num_nextn_predict_layers > 0 or self.model.n_routed_experts > 128
        return "fp8" if native and self.machine.hardware.fp8_flops else "bf16"

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a decode row yields."""
        return expected_tokens(self.alpha, self.drafts)


class Estimate(NamedTuple):
    """Requests a second that one instance bears, and the tokens of its steps."""

    rate: float
    budget: int


@dataclass(frozen=True, eq=False)
class Option:
    """One way to lay an instance out, and what it can do."""

    question: Question
    layout: ServingLayout
    step: PricedStep
    memory: GpuMemory

    @property
    def gpus(self) -> int:
        """GPUs of the instance."""
        return self.layout.gpus

    @cached_property
    def blocks(self) -> int:
        """Cache blocks of a rank."""
        return self.memory.blocks(BLOCK_SIZE)

    @property
    def name(self) -> str:
        """Its degrees."""
        return self.layout.name

    @cached_property
    def sequences(self) -> int:
        """Sequences of mean length that a rank's cache holds at once."""
        prompt, output = self.question.lengths.mean
        per_sequence = (prompt + output) / BLOCK_SIZE + 1.0
        return min(MOST_SEQUENCES, int(0.95 * self.blocks / per_sequence))

    @cached_property
    def prompt_s(self) -> float:
        """Seconds to compute one mean prompt on every rank at once."""
        return self.step([self._prefill_load(self.question.lengths.mean[0])])

    def decode_s(self, batch: float) -> float:
        """Seconds of a step that decodes `batch` sequences a rank, half way through their answers."""
        prompt, output = self.question.lengths.mean
        rows = batch * (1 + self.question.drafts)
        load = StepLoad(
            round(batch), round(rows), round(batch * (prompt + output / 2.0)), 0, 0, 0, round(rows)
        )
        return self.step([load])

    @cached_property
    def prefill(self) -> Estimate:
        """What it bears when it only prefills: the load at which enough prompts wait short enough."""
        bound = self.question.targets.objectives.ttft_s
        share = self.question.targets.attainment
        wait = math.inf if bound is None else bound - self.prompt_s
        load = 0.98 if wait == math.inf else min(0.98, load_for_wait(self.prompt_s, wait, share))
        return Estimate(load * self.layout.dp_degree / self.prompt_s, PREFILL_BUDGET)

    @cached_property
    def decode(self) -> Estimate:
        """What it bears when it only decodes: the largest batch that keeps TPOT and fits the cache."""
        batch = self._largest_batch(self.decode_s)
        rate = 0.0 if batch < 1 else self._decoded(batch, self.decode_s(batch))
        return Estimate(rate, max(MOST_SEQUENCES * (1 + self.question.drafts), 2048))

    @cached_property
    def both(self) -> Estimate:
        """What it bears when it does both, with the best token budget."""
        return max([self.doing_both(budget) for budget in BUDGETS])

    def doing_both(self, budget: int) -> Estimate:
        """Each step decodes a batch and computes the prompts of as many new requests as it ends, on average.

        Prompts come at random. The first of a step is cheaper than others, for its rows ride where the
        weights are read anyway, so what counts is how many the rank with the most has. Where the share of a
        single sequence does not fit into a step, requests are served one by one.
        """
        prompt, output = self.question.lengths.mean
        bound = self.question.targets.objectives.ttft_s

        def mixed_s(batch: float) -> float:
            fresh = batch * self.question.tokens_per_step * prompt / output
            rows = batch * (1 + self.question.drafts)
            if fresh + rows > 0.95 * budget:
                return math.inf
            decoding = StepLoad(
                round(batch), round(rows), round(batch * (prompt + output / 2.0)), 0, 0, 0, round(rows)
            )
            chunk = min(float(budget - rows), prompt)
            most = max(1, int((budget - rows) / chunk))

            def beside(prompts: int) -> float:
                tokens = prompts * chunk
                pairs, context = round(tokens * prompt / 2.0), round(prompts * prompt)
                mixed = decoding._replace(
                    prefill_tokens=round(tokens), prefill_pairs=pairs, prefill_context=context
                )
                return self.step([mixed if prompts else decoding])

            chunks = math.ceil(prompt / max(1.0, budget - rows))
            if bound is not None and (chunks + 1.0) * beside(1) > bound:
                return math.inf
            shares = most_of(fresh / chunk, self.layout.dp_degree, most)
            return sum([share * beside(prompts) for prompts, share in enumerate(shares) if share > 1e-3])

        batch = self._largest_batch(mixed_s)
        return Estimate(self._one_by_one() if batch < 1 else self._decoded(batch, mixed_s(batch)), budget)

    def _one_by_one(self) -> float:
        """Requests a second of ranks that prefill one, then decode it; 0 where it misses a target alone."""
        objectives, each = self.question.targets.objectives, self.question.tokens_per_step
        token = self.decode_s(1) / each
        late = objectives.ttft_s is not None and self.prompt_s > objectives.ttft_s
        if late or (objectives.tpot_s is not None and token > _SLACK * objectives.tpot_s):
            return 0.0
        output = self.question.lengths.mean[1]
        return self.layout.dp_degree / (self.prompt_s + max(0.0, output - 1.0) * token)

    def _decoded(self, batch: float, step_s: float) -> float:
        output = self.question.lengths.mean[1]
        return (
            self.layout.dp_degree * batch * self.question.tokens_per_step / (max(1.0, output - 1.0) * step_s)
        )

    def _largest_batch(self, seconds: Callable[[float], float]) -> int:
        """That keeps TPOT, if there is a bound; `seconds` are infinite for batches that cannot run."""
        bound = self.question.targets.objectives.tpot_s
        within = math.inf if bound is None else _SLACK * bound * self.question.tokens_per_step
        low, high = 0, self.sequences + 1
        while high - low > 1:
            middle = (low + high) // 2
            took = seconds(middle)
            low, high = (middle, high) if took <= within and took < math.inf else (low, middle)
        return low

    def _prefill_load(self, prompt: float) -> StepLoad:
        tokens = max(2, round(prompt))
        return StepLoad(0, 0, 0, tokens, tokens * (tokens + 1) // 2, tokens, 1)


def most_of(mean: float, ranks: int, limit: int) -> list[float]:
    """Probabilities that the rank with the most prompts in a step has 0, 1, ... `limit` of them.

    Each has `mean` on average and no more than `limit`: binomial, which is Poisson's where the limit is far.
    """
    part = min(1.0, mean / limit)
    below, total = 0.0, 0.0
    shares: list[float] = []
    for count in range(limit + 1):
        total += math.comb(limit, count) * part**count * (1.0 - part) ** (limit - count)
        shares.append(total**ranks - below)
        below = total**ranks
    return shares


def options(question: Question) -> tuple[Option, ...]:
    """Every layout whose weights and one sequence fit, smallest first.

    Raises:
        ConfigError: none does; names the least memory that one of them would need a GPU.
    """
    found, least = [], math.inf
    prompt, output = question.lengths.mean
    for layout in _layouts(question):
        memory = layouts.memory_of(question.model, layout, question.machine.hardware, mtp=question.drafts > 0)
        need = memory.weights + memory.reserve + (prompt + output + BLOCK_SIZE) * memory.token_bytes
        if need > memory.total:
            least = min(least, need)
            continue
        step = PricedStep(question.model, layout, question.machine, question.engine)
        found.append(Option(question, layout, step, memory))
    if not found:
        hardware = question.machine.hardware
        msg = (
            f"{question.model.name} in {question.dtype} needs {least / 1e9:.0f} GB a GPU spread over "
            f"{question.gpus} {hardware.name} or fewer, but {0.9 * hardware.hbm_bytes / 1e9:.0f} of "
            f"{hardware.hbm_bytes / 1e9:.0f} GB may be used. Give more GPUs."
        )
        raise ConfigError(msg)
    return tuple(found)


def _layouts(question: Question) -> Iterator[ServingLayout]:
    """Tensor parallelism inside a node, data-parallel attention in powers of two, experts over all."""
    node = question.machine.gpus_per_node
    gpus = 1
    while gpus <= question.gpus:
        tp = 1
        while tp <= min(node, gpus):
            layout = ServingLayout(
                tp_degree=tp,
                dp_degree=gpus // tp,
                weights=question.dtype,
                cache=question.cache,
                overlap=gpus > node,
                skew=question.skew if gpus > 1 else 1.0,
            )
            if not any(layout.problems(question.model)):
                yield layout
            tp *= 2
        gpus *= 2
