"""The interactive page holds every slot, asks for nothing from the network, and its script works."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from benthic.plan.draw_html import draw_html
from benthic.sched.pipeline.schedules import build
from benthic.sched.pipeline.simulate import Costs, simulate

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


class Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in {"meta", "input"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def timelines():
    return [simulate(build(name, 4, 8), Costs(forward=1, backward=2)) for name in ("1f1b", "dualpipe")]


def test_the_page_holds_every_slot_with_its_times():
    page = Elements(draw_html(*timelines()))
    assert page.open == []
    slots = [attrs for tag, attrs in page.found if attrs.get("class") == "slot"]
    expected = [
        (str(t.slot), str(rank), t.start, t.end)
        for line in timelines()
        for rank, row in enumerate(line.slots)
        for t in row
    ]
    found = [(s["data-name"], s["data-rank"], float(s["data-start"]), float(s["data-end"])) for s in slots]
    assert found == expected


def test_the_page_needs_no_network():
    page = draw_html(*timelines())
    addresses = set(re.findall(r"\w+://[^\s\"')<]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<link|<img|src=|@import|url\(|fetch\(|XMLHttp", page)


PROBE = """
<script>
const bars = () => [...document.querySelectorAll('.slot rect.lit')].length;
const hidden = (group) => group.getAttribute('display') === 'none';
const visible = () => [...document.querySelectorAll('.slot')].filter((g) => !hidden(g)).length;
const svg = document.querySelector('svg.lanes');
const slot = document.querySelector('.slot[data-name="2F3"] rect');
const send = (target, type, more) => target.dispatchEvent(new PointerEvent(type, {bubbles: true, ...more}));
const seen = {all: visible()};
send(slot, 'pointermove', {clientX: 300, clientY: 80});
seen.tip = document.getElementById('tip').textContent;
seen.hovered = bars();
send(svg, 'pointerleave');
seen.left = bars();
send(slot, 'pointerdown'); send(slot, 'pointerup');
seen.pinned = document.getElementById('follow').value;
seen.lit = bars();
seen.path = [...document.querySelectorAll('.path')].map((p) => p.getAttribute('points').split(' ').length);
document.getElementById('closer').click();
seen.closer = visible();
seen.ticks = [...svg.querySelectorAll('.tick')].map((t) => t.textContent);
window.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}));
seen.again = [visible(), bars()];
document.body.innerHTML = '<pre>' + JSON.stringify(seen) + '</pre>';
</script></body>"""


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs headless Chromium")
def test_hovering_follows_a_microbatch_and_zooming_hides_the_rest(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(draw_html(*timelines()).replace("</body>", PROBE))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    done = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=90, check=True
    )
    seen = json.loads(re.search(r"<pre>(.*)</pre>", done.stdout)[1])
    first, second = timelines()
    total = sum(len(row) for line in (first, second) for row in line.slots)
    assert seen["all"] == total
    assert seen["tip"] == "2F3 on rank 2\n11 to 12, takes 1"
    actions = [sum(a.microbatch == 3 for _, a in line.table.actions()) for line in (first, second)]
    assert seen["hovered"] == seen["lit"] == sum(actions)
    assert (seen["left"], seen["pinned"], seen["path"]) == (0, "3", actions)
    until, middle = first.makespan, first.makespan / 2
    inside = [
        t
        for line in (first, second)
        for row in line.slots
        for t in row
        if t.end > middle - until / 4 and t.start < middle + until / 4
    ]
    assert seen["closer"] == len(inside)
    assert [float(tick) for tick in seen["ticks"]] == [8.25, 12.375, 16.5, 20.625, 24.75]
    assert seen["again"] == [total, 0]
