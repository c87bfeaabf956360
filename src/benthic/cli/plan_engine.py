"""`benthic plan engine`: what a serving engine adds to its kernels, fitted to measured steps of it."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from benthic import units
from benthic.cli.plan_words import Hardware, Json, ProfileFile, config_of, dtype_of, machine_of

if TYPE_CHECKING:
    from benthic.plan.serving.engine_fit import MeasuredStep

Out = Annotated[Path, typer.Option(help="Where the engine is written, for `benthic plan serve --engine`.")]


def engine(  # noqa: PLR0913, PLR0917 (one option each)
    measured: Annotated[Path, typer.Argument(help="A result of benchmarks/serve_gpu.py, on one GPU.")],
    model: Annotated[str, typer.Option(help="A preset, a config.json or the folder of one.")],
    hardware: Hardware,
    weights: Annotated[str, typer.Option(help="Whose steps: bf16 or fp8.")] = "bf16",
    name: Annotated[str, typer.Option(help="What the engine is called.")] = "own",
    graph_rows: Annotated[
        int, typer.Option(min=0, help="Most rows of a step with prompts that was a CUDA graph.")
    ] = 4096,
    front: Annotated[
        list[Path],
        typer.Option(help="Results of benchmarks/front.py: what HTTP takes.", show_default="nothing"),
    ] = [],  # noqa: B006 (typer copies it)
    out: Out = Path("engine.json"),
    profile: ProfileFile = None,
    as_json: Json = False,  # noqa: FBT002
) -> None:
    """Fit an engine to measured steps, and say how well the others foretell each of them.

    Example: benthic plan engine serve_gpu.json --model moonlight-16b-a3b --hardware h200 --out engine.json
    """
    from benthic.plan.serving.engine_fit import fit_engine, left_out  # noqa: PLC0415 (see cli.plan)
    from benthic.plan.serving.engines import as_json as text  # noqa: PLC0415
    from benthic.plan.serving.layout import ServingLayout  # noqa: PLC0415
    from benthic.plan.serving.measured import read_front, read_host, read_measured  # noqa: PLC0415
    from benthic.plan.serving.priced import PricedStep  # noqa: PLC0415

    dtype = dtype_of("weights", weights) or "bf16"
    layout = ServingLayout(weights=dtype, cache=dtype)
    step = PricedStep(config_of(model), layout, machine_of(hardware, 1, profile))
    steps = read_measured(measured, dtype, graph_rows=graph_rows)
    found, source = fit_engine(name, step, steps), f"{measured.name}, {len(steps)} steps in {dtype}"
    found = replace(found, prompt_host_s=read_host(measured, dtype))
    if front:
        found = replace(found, front=read_front(front))
        source = "; ".join([source, *(each.name for each in front)])
    record = text(found, source)
    out.write_text(record, encoding="utf-8")
    if as_json:
        typer.echo(record)
        return
    errors = left_out(name, step, steps) if len(steps) > 1 else []
    for each, error in zip(steps, errors, strict=False):
        typer.echo(f"{_words(each):<44} {units.seconds(each.seconds):>9}, left out: {100 * error:+.1f} %")
    if errors:
        typer.echo(f"median error left out: {units.percent(statistics.median(map(abs, errors)))}")
    typer.echo(
        f"wrote {out}: {units.seconds(found.graph_layer_s)} a layer between kernels, kernels "
        f"{found.stretch:.3f} x their prices; with prompts {found.prompt_stretch:.3f} x, host "
        f"{units.seconds(found.eager_layer_s)} a layer, and {units.seconds(found.prompt_host_s)} of a step "
        "that nothing hides"
    )
    if front:
        cost = found.front
        typer.echo(
            f"a front takes {units.seconds(cost.request_s)} for a request and "
            f"{units.seconds(1e3 * cost.prompt_token_s)} for 1,000 tokens of its prompt, "
            f"{units.seconds(cost.write_s)} to write and {units.seconds(cost.token_s)} a token; to an engine "
            f"and back are {units.seconds(cost.way_s)}, {units.seconds(cost.hub_s)} more by the main process"
        )


def _words(step: MeasuredStep) -> str:
    load = step.load
    decodes, prompts = f"{load.decodes} decodes", f"prompts of {load.prefill_tokens} tokens"
    if not load.prefill_tokens:
        return decodes
    what = f"{prompts}, {decodes}" if load.decodes else prompts
    return what if step.recorded else f"{what}, as written"
