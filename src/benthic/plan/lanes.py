"""The rows of a schedule's picture, one a rank with a bar for every action, as pieces of SVG."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from xml.sax.saxutils import escape

from benthic.plan.palette import INK, colour
from benthic.plan.schedule import number

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benthic.sched.pipeline.simulate import Timed, Timeline
    from benthic.sched.pipeline.table import Action

ROW: Final = 30
BAR: Final = 24
CHARACTER: Final = 7.2
STYLE: Final = (
    "text{font:12px ui-sans-serif,system-ui,sans-serif;fill:#1f2937}"
    ".title{font-size:16px;font-weight:600}"
    f".in{{fill:{INK};text-anchor:middle;dominant-baseline:central}}"
    ".rank{text-anchor:end;dominant-baseline:central}"
    ".tick{text-anchor:middle;fill:#6b7280}.idle{fill:#e5e7eb}.page{fill:#ffffff}"
    "@media (prefers-color-scheme:dark){text{fill:#e5e7eb}.in{fill:#fff}"
    ".idle{fill:#374151}.page{fill:#111827}}"
)


@dataclass(frozen=True)
class Frame:
    """Where time is drawn: from `left`, `width` pixels for `until` units of cost.

    `live` bars carry what a script needs to move and follow them; others carry a title to hover over.
    """

    left: float
    width: float
    until: float
    live: bool = False

    def x(self, time: float) -> float:
        """Where `time` is."""
        return self.left + time * self.scale

    @property
    def scale(self) -> float:
        """Pixels per unit of cost."""
        return self.width / (self.until or 1)


def lanes(timeline: Timeline, frame: Frame, top: float) -> Iterator[str]:
    """All rows of `timeline`, the first at `top`."""
    for rank, slots in enumerate(timeline.slots):
        y = top + ROW * rank
        yield f'<text class="rank" x="{frame.left - 10:g}" y="{y + BAR / 2:g}">rank {rank}</text>'
        width = timeline.makespan * frame.scale
        yield f'<rect class="idle" x="{frame.left:g}" y="{y:g}" width="{width:.2f}" height="{BAR}" rx="2"/>'
        for timed in slots:
            yield from _slot(timeline, timed, rank, y, frame)


def axis(frame: Frame, y: float) -> Iterator[str]:
    """Five times below the rows."""
    for tick in range(5):
        time = frame.until * tick / 4
        yield f'<text class="tick" x="{frame.x(time):.2f}" y="{y:g}">{number(time)}</text>'


def _slot(timeline: Timeline, timed: Timed, rank: int, top: float, frame: Frame) -> Iterator[str]:
    """One bar; an overlapped pair shares its height."""
    height = BAR / len(timed.slot.actions)
    if frame.live:
        times = f'data-start="{timed.start:.9g}" data-end="{timed.end:.9g}"'
        yield f'<g class="slot" data-name="{timed.slot}" data-rank="{rank}" {times}>'
    else:
        title = f"{timed.slot} from {number(timed.start)} to {number(timed.end)}"
        yield f"<g><title>{escape(title)}</title>"
    for index, action in enumerate(timed.slot.actions):
        fill = colour(timeline.table, action)
        yield from _bar(action, timed, top + index * height, height, frame, fill)
    yield "</g>"


def _bar(action: Action, timed: Timed, top: float, height: float, frame: Frame, fill: str) -> Iterator[str]:
    left, width = frame.x(timed.start), (timed.end - timed.start) * frame.scale
    size = f'x="{left:.2f}" y="{top:g}" width="{max(width - 0.6, 0):.2f}" height="{height:g}"'
    which = f' data-microbatch="{action.microbatch}"' if frame.live else ""
    yield f'<rect {size} rx="2" fill="{fill}"{which}/>'
    label = str(action.microbatch)
    fits = len(label) * CHARACTER <= width
    if height >= 12 and (fits or frame.live):
        hidden = "" if fits else ' visibility="hidden"'
        place = f'x="{left + width / 2:.2f}" y="{top + height / 2:g}"'
        yield f'<text class="in" {place}{hidden}>{label}</text>'
