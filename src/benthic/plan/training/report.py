"""A training plan as one HTML page that needs no network."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Final

from benthic import units
from benthic.plan.cost.priced import PROVENANCES
from benthic.plan.training.memory import TERMS, memory, timeline, usable
from benthic.plan.training.step import waterfall

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benthic.plan.training.plan import Plan
    from benthic.plan.training.search import Evaluated

_STYLE: Final = (
    "body{margin:16px auto;max-width:1100px;padding:0 16px;font:14px/1.5 ui-sans-serif,system-ui,sans-serif;"
    "color:#1f2937;background:#fff}h1{font-size:20px}h2{font-size:16px;margin:26px 0 6px}"
    "table{border-collapse:collapse;width:100%}td,th{padding:3px 10px 3px 0;text-align:right;"
    "border-bottom:1px solid #e5e7eb}td:first-child,th:first-child{text-align:left}"
    "svg{width:100%;height:auto}"
    "text{font:12px ui-sans-serif,system-ui,sans-serif;fill:#1f2937}.axis{stroke:#9ca3af}"
    "@media(prefers-color-scheme:dark){body{color:#e5e7eb;background:#111827}text{fill:#e5e7eb}"
    "td,th{border-color:#374151}}"
)
_COLOURS: Final = (
    "#2563eb", "#059669", "#d97706", "#dc2626", "#7c3aed", "#0891b2", "#65a30d", "#db2777", "#6b7280",
)  # fmt: skip
_WIDTH: Final = 1060
_LEFT: Final = 250


def report(plan: Plan) -> str:
    """The whole page. Pointing at a bar or a dot names it."""
    question, best = plan.question, plan.best
    title = f"{question.model.name} on {question.gpus:,} {question.machine.name}"
    parts = sorted(waterfall(best.step).items(), key=lambda part: -part[1])
    coverage = best.step.price.coverage
    body = [
        f"<h1>{escape(title)}</h1><p>{escape(best.candidate.words())}</p>",
        *_numbers(plan),
        f"<h2>Where the step of pipeline rank {best.step.busiest} goes</h2>",
        _bars([(name, seconds, units.seconds(seconds)) for name, seconds in parts]),
        "<h2>Where these seconds come from</h2>",
        _bars([(name, coverage[name], units.percent(coverage[name])) for name in PROVENANCES]),
        "<h2>Memory of every pipeline rank, by term</h2>",
        _stacks(plan),
        f"<h2>Activations of pipeline rank {best.memory.rank} over a step</h2>",
        _curve(timeline(best.step, best.memory.rank)),
        "<h2>Fastest layouts that fit</h2>",
        _layouts(plan.found.best),
        "<h2>Time and memory of everything simulated</h2>",
        _dots(plan.found.evaluated, plan.front),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}'
    start = f'<!doctype html><html lang="en"><head>{head}</title><style>{_STYLE}</style></head>'
    return "\n".join([start, "<body>", *body, "</body></html>", ""])


def _numbers(plan: Plan) -> Iterator[str]:
    price, run, found = plan.best.step.price, plan.run, plan.found
    rows = [
        (
            "step",
            f"{units.seconds(price.seconds)} ({units.seconds(price.low)} to {units.seconds(price.high)})",
        ),
        ("tokens a second", f"{plan.best.step.tokens_per_second:,.0f}"),
        ("of the BF16 peak, causal", units.percent(plan.mfu)),
        (f"{units.count(plan.question.tokens)} tokens", units.seconds(run.seconds)),
        ("GPU hours", f"{run.gpu_hours:,.0f}"),
        (f"cost at ${plan.usd_per_gpu_hour:g} an hour", f"${run.usd:,.0f}"),
        ("goodput under failures", units.percent(run.goodput)),
        ("layouts screened, simulated", f"{found.screened:,}, {len(found.evaluated):,}"),
    ]
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    yield f"<table>{cells}</table>"
    if plan.runner_up is not None:
        yield f"<p>The runner-up is {escape(plan.runner_up)}.</p>"


def _bars(rows: Sequence[tuple[str, float, str]]) -> str:
    longest = max(value for _, value, _ in rows) or 1.0
    room = _WIDTH - _LEFT - 90
    drawn = []
    for index, (name, value, words) in enumerate(rows):
        y, wide = 22 * index, room * value / longest
        drawn.append(
            f'<text x="0" y="{y + 14}">{escape(name)}</text><rect x="{_LEFT}" y="{y + 2}" width="{wide:.1f}" '
            f'height="16" fill="{_COLOURS[index % len(_COLOURS)]}"/><text x="{_LEFT + wide + 6:.1f}" '
            f'y="{y + 14}">{escape(words)}</text>'
        )
    return _svg(22 * len(rows), drawn)


def _stacks(plan: Plan) -> str:
    best, room = plan.best, usable(plan.question.machine.hardware)
    found = memory(best.candidate, best.step.timeline.table)
    scale = (_WIDTH - 80) / max(room, *(one.total for one in found))
    drawn = []
    for row, one in enumerate(found):
        x = 70.0
        drawn.append(f'<text x="0" y="{20 * row + 14}">rank {one.rank}</text>')
        for index, name in enumerate(TERMS):
            wide = one.terms.get(name, 0.0) * scale
            drawn.append(
                f'<rect x="{x:.1f}" y="{20 * row + 2}" width="{wide:.1f}" height="16" '
                f'fill="{_COLOURS[index]}">'
                f"<title>{name} {units.size(one.terms.get(name, 0.0))}</title></rect>"
            )
            x += wide
    bottom = 20 * len(found)
    edge = 70 + room * scale
    drawn.append(f'<line class="axis" x1="{edge:.1f}" x2="{edge:.1f}" y1="0" y2="{bottom}"/>')
    for index, name in enumerate(TERMS):
        x = 70 + 130 * index
        drawn.append(f'<rect x="{x}" y="{bottom + 10}" width="12" height="12" fill="{_COLOURS[index]}"/>')
        drawn.append(f'<text x="{x + 16}" y="{bottom + 20}">{name}</text>')
    return _svg(bottom + 28, drawn)


def _curve(points: Sequence[tuple[float, float]]) -> str:
    until, most = points[-1][0] or 1.0, max(size for _, size in points) or 1.0
    path, before = [], 0.0
    for at, size in points:
        x = 70 + (_WIDTH - 80) * at / until
        path.append(f"{x:.1f},{150 - 140 * before / most:.1f} {x:.1f},{150 - 140 * size / most:.1f}")
        before = size
    line = f'<polyline fill="none" stroke="{_COLOURS[0]}" points="{" ".join(path)}"/>'
    words = f'<text x="0" y="16">{units.size(most, 3)}</text><text x="0" y="150">0</text>'
    return _svg(156, [line, words])


def _layouts(found: Sequence[Evaluated]) -> str:
    rows = "".join(
        f"<tr><td>{escape(one.candidate.words())}</td><td>{units.seconds(one.step.seconds, 4)}</td>"
        f"<td>{units.size(one.memory.total, 3)}</td>"
        f"<td>{units.percent(one.step.timeline.bubble_fraction)}</td></tr>"
        for one in found
    )
    return f"<table><tr><th>layout</th><th>step</th><th>memory</th><th>bubble</th></tr>{rows}</table>"


def _dots(found: Sequence[Evaluated], front: Sequence[Evaluated]) -> str:
    slow = max(one.step.seconds for one in found) * 1.02
    fast = min(one.step.seconds for one in found) * 0.98
    most = max(one.memory.total for one in found) * 1.05
    drawn = ['<line class="axis" x1="70" x2="1050" y1="240" y2="240"/>']
    for one in found:
        x = 70 + (_WIDTH - 100) * (one.step.seconds - fast) / (slow - fast)
        y = 240 - 230 * one.memory.total / most
        fill = _COLOURS[3] if one in front else _COLOURS[8]
        took, size = units.seconds(one.step.seconds, 4), units.size(one.memory.total, 3)
        words = escape(f"{one.candidate.words()}: {took}, {size}")
        drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}"><title>{words}</title></circle>')
    drawn.append(f'<text x="70" y="256">{units.seconds(fast, 3)} a step</text>')
    drawn.append(f'<text x="{_WIDTH - 60}" y="256">{units.seconds(slow, 3)}</text>')
    drawn.append(f'<text x="0" y="16">{units.size(most, 3)}</text>')
    return _svg(262, drawn)


def _svg(height: float, drawn: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img">{"".join(drawn)}</svg>'
