"""A serving plan for the terminal: deployments, goodput curves, what is not beaten, where time goes."""

from __future__ import annotations

import math
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from benthic import units
from benthic.plan.cost.priced import Total, coverage_bar
from benthic.plan.serving.fronts import FREE
from benthic.plan.serving.search import capacity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from benthic.plan.serving.goodput import Trial
    from benthic.plan.serving.options import Question
    from benthic.plan.serving.search import Answer, ServingPlan

_BAR = 10


def tables(plan: ServingPlan, rate: float | None = None) -> Iterator[RenderableType]:
    """The sections of a plan, in the order of reading; `rate` asks what that many requests a second need."""
    yield _heading(plan)
    yield _answers(plan)
    yield _curves(plan)
    yield _pareto(plan)
    yield _steps(plan)
    if rate is not None:
        yield _capacity(plan, rate)
    yield _assumptions(plan)


def as_dict(plan: ServingPlan, rate: float | None = None) -> dict[str, Any]:
    """The plan as JSON-ready values; times in seconds, rates a second."""
    question = plan.question
    prompt, output = question.lengths.mean
    found: dict[str, Any] = {
        "model": question.model.name,
        "hardware": question.machine.name,
        "gpus": question.gpus,
        "workload": {"prompt_tokens": prompt, "output_tokens": output, "burstiness": question.burstiness},
        "targets": {
            "ttft_s": question.targets.objectives.ttft_s,
            "tpot_s": question.targets.objectives.tpot_s,
            "attainment": question.targets.attainment,
        },
        "weights": question.dtype,
        "cache": question.cache,
        "drafts": question.drafts,
        "screened": plan.screened,
        "answers": [_answer_dict(answer) for answer in plan.answers],
        "pareto": [each._asdict() for each in plan.pareto],
        "decode_step": {name: _total_dict(part) for name, part in plan.decode_step.items()},
        "prompt_step": {name: _total_dict(part) for name, part in plan.prompt_step.items()},
        "rejected": [each._asdict() for each in plan.rejected],
        "assumptions": list(assumptions(plan)),
    }
    if rate is not None:
        found["capacity"] = capacity(plan.best, rate)._asdict()
    return found


def assumptions(plan: ServingPlan) -> Iterator[str]:
    """What the numbers rest on."""
    question = plan.question
    yield f"kernels as priced for {question.machine.name}, engine {question.engine.name!r}"
    yield f"HTTP is answered by the processes under fronts (--api-server-count), {_front_words(question)}"
    yield f"weights in {question.dtype}, latents in {question.cache}, 90% of memory less 3.5 GB a GPU"
    yield f"busiest GPU's experts get {question.skew:g} x the mean; no prefix is shared"
    if question.drafts:
        yield f"{question.drafts} MTP drafts a step, each kept with probability {question.alpha:g}"
    yield "instances of more than a node hide exchanges behind a second half batch where that is faster"
    yield "large deployments are simulated as a slice of equal ranks"


def _front_words(question: Question) -> str:
    front = question.engine.front
    if front == FREE:
        return "which take no time"
    return f"each of which writes {1.0 / (front.write_s + front.token_s):.0f} tokens/s one by one"


def total_of(parts: dict[str, Total]) -> Total:
    """All parts of a step after each other."""
    return sum(parts.values(), start=Total())


def _answer_dict(answer: Answer) -> dict[str, Any]:
    candidate = answer.candidate
    return {
        "strategy": candidate.strategy,
        "name": candidate.name,
        "gpus": candidate.gpus,
        "prefill": None if candidate.prefill is None else _option_dict(candidate.prefills, candidate.prefill),
        "decode": _option_dict(candidate.decodes, candidate.decode),
        "max_num_batched_tokens": candidate.budget,
        "api_server_count": candidate.fronts,
        "estimate": candidate.rate,
        "goodput": answer.rate,
        "goodput_per_gpu": answer.per_gpu,
        "output_tokens_per_gpu": answer.output_per_gpu,
        "dollars_per_million_output_tokens": answer.dollars if answer.rate else None,
        "trials": [each._asdict() for each in answer.goodput.trials],
    }


def _option_dict(count: int, option: Any) -> dict[str, Any]:
    layout = option.layout
    return {
        "instances": count,
        "tp_degree": layout.tp_degree,
        "dp_degree": layout.dp_degree,
        "ep_degree": layout.gpus,
        "cache_blocks_a_rank": option.blocks,
    }


def _total_dict(part: Total) -> dict[str, Any]:
    return {"seconds": part.seconds, "low": part.low, "high": part.high, "coverage": part.coverage}


def _heading(plan: ServingPlan) -> Text:
    best, question = plan.best, plan.question
    prompt, output = question.lengths.mean
    targets, objectives = question.targets, question.targets.objectives
    bounds = [
        f"{name} {units.seconds(bound)}"
        for name, bound in (("TTFT", objectives.ttft_s), ("TPOT", objectives.tpot_s))
        if bound is not None
    ]
    return Text.assemble(
        (f"{question.model.name} on {question.gpus} {question.machine.name}", "bold"),
        f": {prompt:.0f} tokens in, {output:.0f} out; {' and '.join(bounds) or 'no bound'} for "
        f"{units.percent(targets.attainment, 0)} of the requests\n",
        (best.candidate.name, "bold green"),
        f" bears {best.rate:.3g} requests/s: {best.output_per_gpu:.0f} output tokens/s a GPU, "
        f"${best.dollars:.3g} for a million (${question.dollars:g} a GPU hour)",
    )


def _grid(title: str, left: str, *right: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, title=f"\n{title}", title_justify="left")
    table.title_style = "bold"
    table.add_column(left)
    for column in right:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _answers(plan: ServingPlan) -> Table:
    title = f"Deployments simulated, of {plan.screened} screened"
    heads = ("GPUs", "fronts", "requests/s", "tokens/s/GPU", "$/M out", "TTFT P90", "TPOT P90")
    table = _grid(title, "", *heads)
    for letter, answer in zip(ascii_uppercase, plan.answers, strict=False):
        at = answer.goodput.at_best
        times = ("-", "-") if at is None else (_seconds(at.ttft_p90_s), _seconds(at.tpot_p90_s))
        rates = (f"{answer.rate:.3g}", f"{answer.output_per_gpu:.0f}")
        dollars = f"{answer.dollars:.3g}" if answer.rate else "-"
        counts = (str(answer.candidate.gpus), str(answer.candidate.fronts))
        table.add_row(letter, *counts, *rates, dollars, *times)
    named = zip(ascii_uppercase, plan.answers, strict=False)
    table.caption = "\n".join(
        [f"{letter}  {a.candidate.name} ({a.candidate.strategy})" for letter, a in named]
    )
    table.caption_justify = "left"
    return table


def _curves(plan: ServingPlan) -> Table:
    table = _grid("Requests that meet every target", "rate", "share", "TTFT P50", "P90", "TPOT P50", "P90")
    for answer in plan.answers[:2]:
        table.add_row(Text(answer.candidate.name, style="dim"))
        for trial in answer.goodput.trials:
            table.add_row(*_trial_cells(trial, plan.question.targets.attainment))
    return table


def _trial_cells(trial: Trial, wanted: float) -> tuple[str, ...]:
    full = round(_BAR * trial.attainment)
    style = "green" if trial.attainment >= wanted else "red"
    bar = f"[{style}]{'█' * full}[/][dim]{'░' * (_BAR - full)}[/]"
    times = (trial.ttft_p50_s, trial.ttft_p90_s, trial.tpot_p50_s, trial.tpot_p90_s)
    return (
        f"{trial.rate:>8.3g}/s {bar}",
        units.percent(trial.attainment, 0),
        *[_seconds(each) for each in times],
    )


def _pareto(plan: ServingPlan) -> Table:
    title = "Not beaten in both: tokens a second of a user, requests a second of all"
    table = _grid(title, "TPOT P90", "tokens/s a user", "requests/s", "share in target")
    for trial in plan.pareto[-8:]:
        user = 1.0 / trial.tpot_p90_s if trial.tpot_p90_s else math.inf
        share = units.percent(trial.attainment, 0)
        table.add_row(_seconds(trial.tpot_p90_s), f"{user:.0f}", f"{trial.rate:.3g}", share)
    return table


def _steps(plan: ServingPlan) -> Table:
    table = _grid(
        "Where a step goes, operations after each other", "part", "decode", "share", "a prompt", "share "
    )
    decode, prompt = total_of(plan.decode_step), total_of(plan.prompt_step)
    for name in {**plan.decode_step, **plan.prompt_step}:
        cells = []
        for parts, whole in ((plan.decode_step, decode), (plan.prompt_step, prompt)):
            part = parts.get(name)
            cells += ["-", "-"] if part is None else _part(part, whole)
        table.add_row(name, *cells)
    table.add_row("all", *_part(decode, decode), *_part(prompt, prompt), style="bold")
    table.caption = f"decode {coverage_bar(decode.coverage)}\nprompt {coverage_bar(prompt.coverage)}"
    table.caption_justify = "left"
    return table


def _part(part: Total, whole: Total) -> list[str]:
    return [units.seconds(part.seconds), units.percent(part.seconds / whole.seconds, 0)]


def _capacity(plan: ServingPlan, rate: float) -> Text:
    found = capacity(plan.best, rate)
    phases = (
        f"{found.prefills} to prefill, {found.decodes} to decode" if found.prefills else str(found.decodes)
    )
    return Text.assemble(
        (f"\n{rate:g} requests/s need {found.gpus} GPUs", "bold"),
        f": {phases} instances as in {plan.best.candidate.name}; "
        f"${found.dollars:.3g} for a million output tokens",
    )


def _assumptions(plan: ServingPlan) -> Text:
    return Text("\nassumed: " + "; ".join(assumptions(plan)), style="dim")


def _seconds(value: float) -> str:
    return "-" if math.isnan(value) else units.seconds(value)
