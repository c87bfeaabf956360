"""A serving plan as one HTML page that needs no network."""

from __future__ import annotations

from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Final

from benthic import units
from benthic.plan.serving import charts
from benthic.plan.serving.tables import assumptions, total_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benthic.plan.cost.priced import Total
    from benthic.plan.serving.goodput import Trial
    from benthic.plan.serving.search import Answer, ServingPlan

_STYLE: Final = (
    "table{border-collapse:collapse;margin:8px 0}th,td{padding:3px 12px 3px 0;text-align:right}"
    "th:first-child,td:first-child{text-align:left}thead{border-bottom:1px solid #9ca3af}"
    ".row{display:flex;flex-wrap:wrap;gap:24px}.row>div{flex:1 1 420px;max-width:720px}"
    ".keys{display:flex;flex-wrap:wrap;gap:4px 14px}tr.best{font-weight:600}"
    "details{margin:10px 0}summary{cursor:pointer}svg.chart{width:100%;height:auto}"
)


def draw_page(plan: ServingPlan) -> str:
    """The plan with its deployments, goodput curves, Pareto front and steps; hover for values."""
    question = plan.question
    style = (resources.files("benthic.plan") / "page.css").read_text(encoding="utf-8")
    title = escape(f"{question.model.name} on {question.gpus} {question.machine.name}")
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>{title}</title><style>{style}{charts.STYLE}{_STYLE}</style></head><body>",
            f"<h1>{title}</h1>",
            *_summary(plan),
            *_deployments(plan),
            '<div class="row">',
            *_goodput(plan),
            *_pareto(plan),
            "</div>",
            *_step("A decode step of the best deployment", plan.decode_step),
            *_step("A step of one prompt a rank", plan.prompt_step),
            *_rest(plan),
            "</body></html>",
        ]
    )


def _summary(plan: ServingPlan) -> Iterator[str]:
    best, question = plan.best, plan.question
    prompt, output = question.lengths.mean
    asked = f"{prompt:.0f} tokens in and {output:.0f} out"
    yield (
        f"<p><b>{escape(best.candidate.name)}</b> bears {best.rate:.3g} requests/s of {asked}, "
        f"{escape(str(question.targets.objectives))} (ms) kept by {question.targets.attainment:.0%}: "
        f"{best.output_per_gpu:.0f} output tokens/s a GPU, ${best.dollars:.3g} for a million of them.</p>"
    )


def _deployments(plan: ServingPlan) -> Iterator[str]:
    heads = (
        "deployment",
        "strategy",
        "GPUs",
        "fronts",
        "requests/s",
        "a GPU",
        "tokens/s/GPU",
        "$/M",
        "TTFT P90",
        "TPOT P90",
    )
    yield f"<section><h2>Deployments simulated, of {plan.screened} screened</h2><table><thead><tr>"
    yield "".join([f"<th>{escape(head)}</th>" for head in heads]) + "</tr></thead><tbody>"
    for answer in plan.answers:
        kind = ' class="best"' if answer is plan.best else ""
        cells = "".join([f"<td>{escape(cell)}</td>" for cell in _cells(answer)])
        yield f"<tr{kind}>{cells}</tr>"
    yield "</tbody></table></section>"


def _cells(answer: Answer) -> tuple[str, ...]:
    at, candidate = answer.goodput.at_best, answer.candidate
    times = ("-", "-") if at is None else (units.seconds(at.ttft_p90_s), units.seconds(at.tpot_p90_s))
    counts = str(candidate.gpus), str(candidate.fronts)
    dollars = f"{answer.dollars:.3g}" if answer.rate else "-"
    rates = (f"{answer.rate:.3g}", f"{answer.per_gpu:.3g}", f"{answer.output_per_gpu:.0f}", dollars)
    return (candidate.name, candidate.strategy, *counts, *rates, *times)


def _goodput(plan: ServingPlan) -> Iterator[str]:
    lines = [
        charts.Curve(
            answer.candidate.name,
            tuple([charts.Point(t.rate, 100.0 * t.attainment, _words(t)) for t in answer.goodput.trials]),
        )
        for answer in plan.answers
    ]
    yield "<div><section><h2>Requests that meet every target</h2>"
    yield charts.curves(
        lines, x_name="requests/s", y_name="% in target", mark_y=100.0 * plan.question.targets.attainment
    )
    yield charts.legend([line.name for line in lines]) + "</section></div>"


def _pareto(plan: ServingPlan) -> Iterator[str]:
    points = [
        charts.Point(1.0 / t.tpot_p90_s, t.rate, _words(t))
        for t in reversed(plan.pareto)
        if t.tpot_p90_s > 0.0
    ]
    if not points:
        return
    yield "<div><section><h2>Not beaten in both</h2>"
    front = charts.Curve("front", tuple(points))
    yield charts.curves([front], x_name="tokens/s of a user (1 / TPOT P90)", y_name="requests/s of all")
    yield "</section></div>"


def _words(trial: Trial) -> str:
    return (
        f"{trial.rate:.3g} requests/s, {trial.attainment:.0%} in target, TTFT P50 {trial.ttft_p50_s:.3g} s, "
        f"P90 {trial.ttft_p90_s:.3g} s, TPOT P50 {1e3 * trial.tpot_p50_s:.3g} ms, "
        f"P90 {1e3 * trial.tpot_p90_s:.3g} ms"
    )


def _step(title: str, parts: dict[str, Total]) -> Iterator[str]:
    whole = total_of(parts)
    yield f"<section><h2>{escape(title)}: {units.seconds(whole.seconds)}, operations after each other</h2>"
    yield charts.bar([(name, 1e3 * part.seconds) for name, part in parts.items()], unit="ms")
    yield charts.legend(list(parts))
    yield charts.bar([(name, 100.0 * share) for name, share in whole.coverage.items() if share], unit="%")
    yield charts.legend([name for name, share in whole.coverage.items() if share])
    yield f"<p>between {units.seconds(whole.low)} and {units.seconds(whole.high)}</p></section>"


def _rest(plan: ServingPlan) -> Iterator[str]:
    yield "<section><h2>Assumed</h2>"
    yield "".join([f"<p>{escape(line)}</p>" for line in assumptions(plan)])
    yield f"</section><details><summary>{len(plan.rejected)} deployments left out</summary>"
    yield "".join([f"<p>{escape(each.name)}: {escape(each.reason)}</p>" for each in plan.rejected])
    yield "</details>"
