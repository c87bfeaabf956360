"""One instance that serves a recorded trace, and the share of it that keeps its targets."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from benthic import units
from benthic.errors import ConfigError, DataError
from benthic.plan.serving import layout as layouts
from benthic.plan.serving.cluster import Cluster
from benthic.plan.serving.demand import check, recorded
from benthic.plan.serving.group import GroupSpec
from benthic.plan.serving.layout import ServingLayout
from benthic.plan.serving.priced import TUNED, Engine, PricedStep
from benthic.sched.plans import BatchingConfig
from benthic.spec.traces import Trace, at_speed, read_azure, read_mooncake

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from benthic.plan.cost.machine import Machine
    from benthic.plan.serving.layout import WeightDtype
    from benthic.plan.serving.outcome import Measure, Outcome
    from benthic.spec.model import ModelConfig
    from benthic.spec.objectives import Objectives

_BLOCK_SIZE = 64
_MEASURES: tuple[Measure, ...] = ("ttft_s", "tpot_s", "e2e_s")


def read_trace(path: Path) -> Trace:
    """A trace by its file's ending: Azure's `.csv`, Mooncake's `.jsonl`.

    Raises:
        DataError: no such file, another ending, no text, or a line that is no request; its number is named.
    """
    readers = {".csv": read_azure, ".jsonl": read_mooncake}
    if path.suffix not in readers:
        msg = f"{path} ends in {path.suffix!r}, but a trace is Azure's .csv or Mooncake's .jsonl"
        raise DataError(msg)
    if not path.is_file():
        msg = f"there is no trace {path}"
        raise DataError(msg)
    try:
        with path.open(encoding="utf-8") as lines:
            return readers[path.suffix](lines)
    except UnicodeDecodeError as error:
        msg = f"{path} is no text: {error}. A trace is Azure's .csv or Mooncake's .jsonl in UTF-8."
        raise DataError(msg) from error


def play_recording(  # noqa: PLR0913 (one argument per choice)
    model: ModelConfig,
    machine: Machine,
    trace: Trace,
    *,
    tp_degree: int,
    dp_degree: int,
    weights: WeightDtype | None,
    cache: WeightDtype,
    speed: float,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    objectives: Objectives,
    engine: Engine = TUNED,
    fronts: int = 1,
    late_s: float | None = None,
) -> dict[str, Any]:
    """Simulate every step and say what became of the requests, JSON-ready.

    Raises:
        ConfigError: the layout does not divide, the weights do not fit, or the speed is not above 0.
        DataError: the trace cannot be played.
    """
    fp8 = model.num_nextn_predict_layers > 0 and machine.hardware.fp8_flops is not None
    layout = ServingLayout(
        tp_degree=tp_degree,
        dp_degree=dp_degree,
        weights=weights or ("fp8" if fp8 else "bf16"),
        cache=cache,
        overlap=tp_degree * dp_degree > machine.gpus_per_node,
        skew=1.1 if tp_degree * dp_degree > 1 else 1.0,
    )
    layouts.check(model, layout)
    memory = layouts.memory_of(model, layout, machine.hardware)
    blocks = memory.blocks(_BLOCK_SIZE)
    if blocks < 1:
        msg = (
            f"weights and buffers take {(memory.weights + memory.reserve) / 1e9:.1f} GB a GPU, but "
            f"{memory.total / 1e9:.1f} GB of {machine.name} may be used. Spread them over more GPUs."
        )
        raise ConfigError(msg)
    batching = BatchingConfig(
        num_blocks=blocks,
        block_size=_BLOCK_SIZE,
        max_model_len=model.max_position_embeddings,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        counted=True,
    )
    step = PricedStep(model, layout, machine, engine)
    spec = GroupSpec(
        batching=batching,
        step=step,
        lanes=dp_degree,
        late_s=late_s,
        prompt_host_s=engine.prompt_host_s,
    )
    demand = check(recorded(at_speed(trace, speed), _BLOCK_SIZE))
    outcome = Cluster([spec], front=engine.front, fronts=fronts).play(demand)
    return {
        "model": model.name,
        "layout": layout.name,
        "weights": layout.weights,
        **summary(outcome, objectives),
    }


def summary(outcome: Outcome, objectives: Objectives) -> dict[str, Any]:
    """Counts, quantiles in seconds and rates of a run."""
    totals = [totals for group in outcome.groups for totals in group.totals]
    found: dict[str, Any] = {
        "requests": len(outcome.served),
        "refused": outcome.refused,
        "seconds": outcome.end_s,
        "steps": outcome.steps,
        "preemptions": sum([each.preemptions for each in totals]),
        "cached_prompt_tokens": sum([each.prefix_hits for each in totals]),
        "prompt_tokens": sum([each.prompt_tokens for each in totals]),
        "output_tokens_per_second": outcome.output_rate,
        "device_busy": max([group.busy_s for group in outcome.groups]) / outcome.end_s,
        "front_busy": max(outcome.front_busy_s) / outcome.end_s,
        "attainment": outcome.attainment(objectives),
    }
    for measure in _MEASURES:
        for share in (0.5, 0.9, 0.99):
            found[f"{measure[:-2]}_p{100 * share:.0f}_s"] = outcome.quantile(measure, share)
    return found


def as_lines(found: dict[str, Any]) -> Iterator[str]:
    """The summary for a terminal."""
    yield f"{found['model']}, {found['layout']}, {found['weights']}: {found['requests']} requests"
    yield f"  refused              {found['refused']}"
    yield f"  steps                {found['steps']} in {units.seconds(found['seconds'])}"
    yield f"  device busy          {units.percent(found['device_busy'])}"
    yield f"  front busy           {units.percent(found['front_busy'])}"
    yield f"  output tokens/s      {found['output_tokens_per_second']:.0f}"
    hits = found["cached_prompt_tokens"] / max(1, found["prompt_tokens"])
    yield f"  prompt tokens cached {units.percent(hits)}"
    yield f"  preemptions          {found['preemptions']}"
    for name in ("ttft", "tpot", "e2e"):
        times = [f"P{share} {_seconds(found[f'{name}_p{share}_s'])}" for share in (50, 90, 99)]
        yield f"  {name.upper():20} {'  '.join(times)}"
    yield f"  in target            {units.percent(found['attainment'])}"


def _seconds(value: float) -> str:
    """A time; a dash where no request has it, as no answer of one token has a TPOT."""
    return "-" if math.isnan(value) else units.seconds(value)
