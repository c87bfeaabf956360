"""`benthic plan serve` and `benthic plan replay`: goodput, latencies and cost before a GPU is rented."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from benthic.cli.plan_words import (
    EngineWord,
    Hardware,
    Json,
    Model,
    PerNode,
    ProfileFile,
    bound_of,
    config_of,
    dtype_of,
    machine_of,
    refuse_no_folder,
    refuse_rows_beyond,
)
from benthic.errors import ConfigError

if TYPE_CHECKING:
    from benthic.plan.serving.demand import Lengths
    from benthic.spec.model import ModelConfig

Weights = Annotated[str, typer.Option(help="auto, fp8 or bf16.")]
Cache = Annotated[str, typer.Option("--kv-cache-dtype", help="bf16 or fp8.")]
Fronts = Annotated[
    int | None, typer.Option(min=1, help="Processes that answer HTTP.", show_default="as many as are needed")
]
Trace = Annotated[
    Path | None, typer.Option(help="Take requests from a trace: Azure's .csv or Mooncake's .jsonl.")
]


def serve(  # noqa: PLR0913, PLR0917 (one argument per option)
    model: Model,
    gpus: Annotated[int, typer.Option(help="GPUs to plan for.")],
    hardware: Hardware,
    isl: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 4000,
    osl: Annotated[int, typer.Option(help="Tokens of an answer.")] = 500,
    ttft: Annotated[
        float | None, typer.Option(help="Seconds to the first token.", show_default="any")
    ] = None,
    tpot: Annotated[float | None, typer.Option(help="Seconds a token after it.", show_default="any")] = None,
    attainment: Annotated[float, typer.Option(help="Share of requests that must keep both.")] = 0.9,
    rate: Annotated[float | None, typer.Option(help="Also say what so many requests/s need.")] = None,
    trace: Trace = None,
    burstiness: Annotated[
        float, typer.Option(help="Shape of the gaps; 1 is Poisson, less is burstier.")
    ] = 1.0,
    weights: Weights = "auto",
    kv_cache_dtype: Cache = "bf16",
    drafts: Annotated[int, typer.Option(help="Tokens that MTP drafts a step.", min=0)] = 0,
    acceptance: Annotated[float, typer.Option(help="Share of drafts kept if those before were.")] = 0.85,
    engine: EngineWord = "tuned",
    api_server_count: Fronts = None,
    usd: Annotated[float, typer.Option("--usd-per-gpu-hour", help="Price of a GPU.")] = 2.0,
    gpus_per_node: PerNode = 8,
    profile: ProfileFile = None,
    seed: Annotated[int, typer.Option(help="Of arrivals and lengths.")] = 0,
    as_json: Json = False,  # noqa: FBT002
    report: Annotated[Path | None, typer.Option(help="Write a page that needs no network.")] = None,
) -> None:
    """Find the deployment of highest goodput: instances, parallelism, prefill and decode together or apart.

    Example: benthic plan serve deepseek-v3 --gpus 64 --hardware h200 --ttft 2 --tpot 0.03
    """
    from benthic.plan.serving import engines  # noqa: PLC0415 (see cli.plan)
    from benthic.plan.serving.goodput import Targets  # noqa: PLC0415
    from benthic.plan.serving.options import Question  # noqa: PLC0415
    from benthic.plan.serving.search import plan_serving  # noqa: PLC0415
    from benthic.plan.serving.tables import as_dict, tables  # noqa: PLC0415
    from benthic.spec.objectives import Objectives  # noqa: PLC0415

    if rate is not None and not 0.0 < rate < math.inf:
        msg = f"--rate {rate} requests/s cannot be answered. Give a finite rate above 0, or leave it out."
        raise ConfigError(msg)
    refuse_no_folder(report)
    config = config_of(model)
    if trace is None:
        refuse_rows_beyond(config, isl + osl, f"--isl {isl} + --osl {osl}")
    question = Question(
        model=config,
        machine=machine_of(hardware, gpus_per_node, profile),
        gpus=gpus,
        lengths=_lengths(config, trace, isl, osl),
        targets=Targets(
            objectives=Objectives(ttft_s=bound_of("ttft", ttft), tpot_s=bound_of("tpot", tpot)),
            attainment=attainment,
        ),
        weights=dtype_of("weights", weights, auto=True),
        cache=dtype_of("kv-cache-dtype", kv_cache_dtype) or "bf16",
        engine=engines.get(engine),
        burstiness=burstiness,
        drafts=drafts,
        alpha=acceptance,
        dollars=usd,
        fronts=api_server_count,
        seed=seed,
    )
    plan = plan_serving(question, workers=os.cpu_count() or 1)
    if report is not None:
        from benthic.plan.serving.page import draw_page  # noqa: PLC0415

        report.write_text(draw_page(plan), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(_finite(as_dict(plan, rate)), indent=2))
        return
    console = Console(highlight=False)
    for section in tables(plan, rate):
        console.print(section)
    if report is not None:
        console.print(f"wrote {report}", style="dim", markup=False, soft_wrap=True)


def replay(  # noqa: PLR0913, PLR0917 (one argument per option)
    model: Model,
    trace: Annotated[Path, typer.Option(help="Azure's .csv or Mooncake's .jsonl.")],
    hardware: Hardware,
    tp: Annotated[
        int, typer.Option("--tensor-parallel-size", help="GPUs that share a rank's heads.", min=1)
    ] = 1,
    dp: Annotated[
        int, typer.Option("--data-parallel-size", help="Ranks with a cache of their own.", min=1)
    ] = 1,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens of a step.", min=1)] = 8192,
    max_num_seqs: Annotated[int, typer.Option(help="Sequences of a step.", min=1)] = 256,
    speed: Annotated[float, typer.Option(help="Play the trace so many times as fast.")] = 1.0,
    ttft: Annotated[
        float | None, typer.Option(help="Seconds to the first token.", show_default="any")
    ] = None,
    tpot: Annotated[float | None, typer.Option(help="Seconds a token after it.", show_default="any")] = None,
    weights: Weights = "auto",
    kv_cache_dtype: Cache = "bf16",
    engine: EngineWord = "tuned",
    api_server_count: Annotated[int, typer.Option(min=1, help="Processes that answer HTTP.")] = 1,
    late_planning_ms: Annotated[
        float | None, typer.Option(help="As of `benthic serve`.", show_default="at once")
    ] = None,
    gpus_per_node: PerNode = 8,
    profile: ProfileFile = None,
    as_json: Json = False,  # noqa: FBT002
) -> None:
    """Serve a recorded trace on one instance, step by step, with the live scheduler and a clock that jumps.

    Example: benthic plan replay moonlight-16b-a3b --trace AzureLLMInferenceTrace2023_conv.csv --hardware h200
    """
    from benthic.plan.serving import engines  # noqa: PLC0415 (see cli.plan)
    from benthic.plan.serving.recordings import as_lines, play_recording, read_trace  # noqa: PLC0415
    from benthic.spec.objectives import Objectives  # noqa: PLC0415

    found = play_recording(
        config_of(model),
        machine_of(hardware, gpus_per_node, profile),
        read_trace(trace),
        engine=engines.get(engine),
        fronts=api_server_count,
        late_s=None if late_planning_ms is None else late_planning_ms / 1e3,
        tp_degree=tp,
        dp_degree=dp,
        weights=dtype_of("weights", weights, auto=True),
        cache=dtype_of("kv-cache-dtype", kv_cache_dtype) or "bf16",
        speed=speed,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        objectives=Objectives(ttft_s=bound_of("ttft", ttft), tpot_s=bound_of("tpot", tpot)),
    )
    if as_json:
        typer.echo(json.dumps(_finite(found), indent=2))
        return
    for line in as_lines(found):
        typer.echo(line)


def _lengths(config: ModelConfig, trace: Path | None, isl: int, osl: int) -> Lengths:
    """Of requests that the model has positions for: a server refuses the others, and so they cost nothing."""
    from benthic.plan.serving.demand import Fixed, Resampled  # noqa: PLC0415 (see cli.plan)
    from benthic.plan.serving.recordings import read_trace  # noqa: PLC0415

    if trace is None:
        return Fixed(prompt_tokens=isl, output_tokens=osl)
    most, asks = config.max_position_embeddings, read_trace(trace)
    found = [(each.prompt_tokens, each.output_tokens) for each in asks]
    kept = [lengths for lengths in found if sum(lengths) <= most]
    if not kept:
        refuse_rows_beyond(config, min(map(sum, found)), f"the shortest of {len(found)} requests of {trace}")
    if len(kept) < len(found):
        left = f"{len(found) - len(kept)} of {len(found)} requests of {trace}"
        typer.echo(f"left out: {left} have more than the {most} positions of {config.name}", err=True)
    return Resampled(tuple(kept))


def _finite(value: Any) -> Any:
    """JSON knows neither inf nor nan: they become null."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
