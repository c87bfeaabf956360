"""`benthic train --dry-run`: what a run would be, rank by rank, without data, GPUs or training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table as Grid

from benthic import units
from benthic.parallel.footprint import ACTIVATIONS_RULE, TERMS, footprints
from benthic.parallel.parts import parts_of, stages_of
from benthic.parallel.setup import number
from benthic.plan.draw_text import draw_text
from benthic.plan.training.candidate import Candidate
from benthic.plan.training.step import step
from benthic.sched.pipeline.simulate import Costs, simulate
from benthic.spec.parameters import parameters
from benthic.train.data.shards import Meta
from benthic.train.hardware import HardwareFacts
from benthic.train.resolve import resolve
from benthic.train.rows import planned_tokens, rows_at, table_of

if TYPE_CHECKING:
    from rich.console import Console

    from benthic.model.part import Part
    from benthic.parallel.footprint import Footprint
    from benthic.plan.cost.machine import Machine
    from benthic.sched.pipeline.table import Table
    from benthic.train.config import RunConfig
    from benthic.train.resolve import Choice


@dataclass(frozen=True)
class Outlook:
    """A resolved run and its first step's schedule."""

    config: RunConfig
    choices: tuple[Choice, ...]
    rows: int
    table: Table

    @classmethod
    def of(cls, config: RunConfig, ranks: int | None) -> Outlook:
        """What `ranks` ranks would run (None: as many as the layout has).

        Raises:
            ConfigError: settings contradict each other or the ranks.
        """
        ranks = config.layout.ranks if ranks is None else ranks
        resolved = resolve(config, assumed(config), nothing(config), ranks=ranks)
        rows = rows_at(resolved.config, 0)
        return cls(resolved.config, resolved.choices, rows, table_of(resolved.config, rows))


def assumed(config: RunConfig) -> HardwareFacts:
    """A machine as the config wants it; `auto` is taken for GPUs."""
    return HardwareFacts(
        device="cuda" if config.device == "auto" else config.device,
        name="no machine, --dry-run assumes one",
        total_memory=0,
        threads=1,
        peak_flops={},
        peak_source="not looked at",
    )


def nothing(config: RunConfig) -> Meta:
    """A dataset without tokens, whose tokenizer is the model's."""
    model = config.model
    return Meta(
        vocab_size=model.vocab_size,
        dtype="<u4",
        bos_token_id=model.bos_token_id,
        eos_token_id=model.eos_token_id,
        tokenizer_sha256="",
        splits={},
        source={},
    )


def show(config: RunConfig, ranks: int | None, machine: Machine | None, console: Console) -> None:
    """Print layout, memory, batch and schedule of a run that is not started, and its speed on a machine.

    Raises:
        ConfigError: settings contradict each other or the ranks, or need what the machine does not have.
    """
    outlook = Outlook.of(config, ranks)
    for choice in outlook.choices:
        say(console, f"{choice.field} = {choice.value}: {choice.reason}")
    found = footprints(outlook.config, outlook.table)
    say(console, _batch(outlook))
    console.print(_layers(outlook, found))
    console.print(_memory(outlook, found))
    worst = max(found, key=lambda one: one.total)
    say(console, f"most memory: rank {worst.rank} and its neighbours, {units.binary_bytes(worst.total)}")
    say(console, ACTIVATIONS_RULE)
    if machine is not None:
        say(console, _speed(outlook, machine))
    say(console, "a step, if a backward takes twice as long as a forward and transfers take no time:")
    console.print(
        draw_text(
            simulate(outlook.table, Costs()), width=console.width, colours=console.color_system is not None
        ),
        soft_wrap=True,
    )


def say(console: Console, text: str) -> None:
    """Print a line as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _batch(outlook: Outlook) -> str:
    config, layout = outlook.config, outlook.config.layout
    seq_len, total = number(config.train.seq_len), sum(p.numel for p in parameters(config.model))
    degrees = f"pp {layout.pp_degree} x dp {layout.dp_degree} x cp {layout.cp_degree} x tp {layout.tp_degree}"
    later = "" if config.train.batch_curve is None else f" at first, by {config.train.batch_curve}"
    ranks, copies = units.plural(layout.ranks, "rank"), units.plural(layout.expert_dp_degree, "copy")
    rows, each = units.plural(outlook.rows, "row"), units.plural(number(config.train.local_batch_size), "row")
    microbatches = units.plural(outlook.table.microbatches, "microbatch")
    return (
        f"{config.model.name}: {total:,} parameters on {ranks} = {degrees}; experts over "
        f"{layout.ep_degree}, {copies} a pipeline rank; ZeRO-{layout.zero_stage}\n"
        f"a step: {rows} of {seq_len:,} = {outlook.rows * seq_len:,} tokens{later}; "
        f"{microbatches} of {each} a data rank\n"
        f"{config.train.steps:,} steps = {planned_tokens(config):,} tokens"
    )


def _speed(outlook: Outlook, machine: Machine) -> str:
    """Seconds of the first step as `benthic plan train` prices them, and of all steps at that rate."""
    config, price = outlook.config, step(Candidate.of(outlook.config, outlook.rows), machine)
    low, high = units.seconds(price.price.low), units.seconds(price.price.high)
    whole = units.seconds(planned_tokens(config) / price.tokens_per_second)
    free = [*(["Muon's products"] if config.optimizer.name == "muon" else []), *config.offload]
    unpriced = f"; without {', '.join(free)}" if free else ""
    return (
        f"on {machine.name}, as `benthic plan` prices it{unpriced}: "
        f"a step takes {units.seconds(price.seconds)} ({low} to {high}), "
        f"{price.tokens_per_second:,.0f} tokens/s, {price.tokens_per_second / config.layout.ranks:,.0f} "
        f"a GPU; all steps at this rate {whole}"
    )


def _memory(outlook: Outlook, found: tuple[Footprint, ...]) -> Grid:
    """What the ranks of each pipeline rank keep, in 80 columns."""
    grid = _columns("ranks", "parameters", *TERMS, "total", title="kept by each rank")
    for one in found:
        sizes = [units.binary_bytes(size, 3) for size in (*(one.bytes[term] for term in TERMS), one.total)]
        grid.add_row(_ranks(outlook, one), units.count(one.parameters), *sizes)
    return grid


def _layers(outlook: Outlook, found: tuple[Footprint, ...]) -> Grid:
    grid = _columns("ranks", "stages: layers")
    for pp, one in enumerate(found):
        grid.add_row(_ranks(outlook, one), _holds(outlook, pp))
    return grid


def _columns(*names: str, title: str | None = None) -> Grid:
    return Grid(*names, title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))


def _ranks(outlook: Outlook, one: Footprint) -> str:
    """The ranks that keep as much as the first of them."""
    last = one.rank + outlook.config.layout.ranks_per_stage - 1
    return str(one.rank) if last == one.rank else f"{one.rank}-{last}"


def _holds(outlook: Outlook, pp: int) -> str:
    """The stages of a pipeline rank with their layers, and what else the first and the last have."""
    config = outlook.config
    parts = parts_of(config.model, config.layout, outlook.table.stages)
    return "; ".join(_stage(stage, parts[stage]) for stage in stages_of(outlook.table, pp))


def _stage(stage: int, part: Part) -> str:
    layers = part.layers
    span = f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else f"{layers[0]}"
    also = [word for word in ("embed", "head", "mtp") if getattr(part, word)]
    return f"{stage}: {', '.join([span, *also])}"
