"""Reports of plans in headless Chromium: nothing is logged, nothing leaves the file, and they can be used."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "dash"))

from browser import CHROMIUM, browser

from benthic.plan.cost import machine as machines
from benthic.plan.draw_html import draw_html
from benthic.plan.serving.demand import Fixed
from benthic.plan.serving.goodput import Targets
from benthic.plan.serving.options import Question as Serving
from benthic.plan.serving.page import draw_page
from benthic.plan.serving.search import plan_serving
from benthic.plan.training.plan import plan
from benthic.plan.training.report import report
from benthic.plan.training.run import Failures
from benthic.plan.training.space import Question, Space
from benthic.sched.pipeline.schedules import build
from benthic.sched.pipeline.simulate import Costs, simulate
from benthic.spec import presets
from benthic.spec.objectives import Objectives

if TYPE_CHECKING:
    from collections.abc import Iterator

    from browser import Browser

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs headless Chromium"),
]
PLANS = Path(__file__).parents[2] / "docs" / "plans"
MOONLIGHT, H200 = presets.get("moonlight-16b-a3b"), machines.get("h200")


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def show(window: Browser, page: Path, *, dark: bool = False) -> None:
    """Open a page; it asks for itself alone, logs nothing, and nothing of it is cut off at the side."""
    window.session = ""
    window.said.clear()
    window.asked.clear()
    window.open(page.as_uri(), dark=dark)
    window.wait("document.readyState === 'complete' && document.body !== null")
    assert window.said == []
    assert set(window.asked) == {page.as_uri()}
    assert window.run("document.documentElement.scrollWidth <= window.innerWidth")
    assert window.run(
        "[...document.querySelectorAll('svg')].every((s) => s.getBoundingClientRect().width > 99)"
    )


def training_page(folder: Path) -> Path:
    space = Space(pp=(1, 2), tp=(1,), ep=(8,), zero=(1,), precisions=("bf16",))
    found = plan(
        Question(model=MOONLIGHT, machine=H200, gpus=16, rows=32),
        space,
        usd_per_gpu_hour=2,
        failures=Failures(),
    )
    page = folder / "train.html"
    page.write_text(report(found), encoding="utf-8")
    return page


@pytest.mark.parametrize("name", sorted(page.name for page in PLANS.glob("*.html")))
def test_committed_reports_open_quietly(window: Browser, name: str) -> None:
    show(window, PLANS / name)
    assert window.run("document.title").count(" on ") == 1
    assert window.run("document.querySelectorAll('svg').length") >= 4


def test_a_training_report_names_what_the_pointer_meets_in_both_themes(
    window: Browser, tmp_path: Path
) -> None:
    page = training_page(tmp_path)
    backgrounds = set()
    for dark in (False, True):
        show(window, page, dark=dark)
        backgrounds.add(window.run("getComputedStyle(document.body).backgroundColor"))
        assert window.run("document.querySelectorAll('circle title').length") > 0
    assert len(backgrounds) == 2


def test_a_serving_report_opens_its_rejected_deployments(window: Browser, tmp_path: Path) -> None:
    targets = Targets(objectives=Objectives(ttft_s=1.0, tpot_s=0.05))
    lengths = Fixed(prompt_tokens=500, output_tokens=20)
    found = plan_serving(Serving(model=MOONLIGHT, machine=H200, gpus=2, lengths=lengths, targets=targets))
    page = tmp_path / "serve.html"
    page.write_text(draw_page(found), encoding="utf-8")
    show(window, page)
    height = "document.querySelector('details').getBoundingClientRect().height"
    before = window.run(height)
    window.run("document.querySelector('summary').click()")
    assert window.run(height) > before
    assert window.said == []


def test_a_schedule_follows_a_microbatch_zooms_and_shows_all_again(window: Browser, tmp_path: Path) -> None:
    page = tmp_path / "schedule.html"
    page.write_text(draw_html(simulate(build("dualpipe", 4, 8), Costs())), encoding="utf-8")
    show(window, page)
    place = "document.querySelectorAll('.slot')[9].getBoundingClientRect().width"
    before = window.run(place)
    window.run("document.getElementById('closer').click()")
    assert window.run(place) > before
    window.run("document.getElementById('all').click()")
    assert window.run(place) == pytest.approx(before, rel=1e-3)
    window.hover(".slot")
    window.wait("!document.getElementById('tip').hidden")
    assert window.said == []
