"""The page in headless Chromium: charts move, requests appear, chat streams, nothing is logged or leaked."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
from browser import CHROMIUM, browser
from running import fake_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from browser import Browser
    from running import Running

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs headless Chromium"),
]

LIVE = "document.getElementById('link').dataset.state === 'up'"
DONE = "document.querySelector('.go').textContent === 'Send'"


@pytest.fixture(scope="module")
def served(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("served") / "log"
    with fake_server(tokenizer_folder, log, step_seconds=0.01, api_keys=["s3cret"]) as running:
        yield running


@pytest.fixture
def page(served: Running, tmp_path: Path) -> Iterator[Browser]:
    """The page, connected with its key; in the end nothing was logged and no request went elsewhere."""
    with browser(tmp_path / "profile") as opened:
        opened.open(f"{served.url}/dash#chat")
        opened.wait("document.getElementById('key')?.hidden === false")
        assert [line for line in opened.said if "401" not in line] == []
        opened.said.clear()
        opened.run("document.getElementById('key-value').focus()")
        opened.type("s3cret")
        opened.press("Enter", "\r")
        opened.wait(LIVE)
        yield opened
        assert opened.said == []
        assert {urlsplit(url).netloc for url in opened.asked} == {urlsplit(served.url).netloc}


def say(page: Browser, text: str) -> None:
    page.run("document.getElementById('say').focus()")
    page.type(text)
    page.press("Enter", "\r")


def test_an_answer_streams_and_every_token_shows_its_alternatives(page: Browser) -> None:
    page.run("document.getElementById('set-max_tokens').value = 12")
    say(page, "hi")
    page.wait("document.querySelectorAll('.token').length > 2")
    page.wait(DONE)
    assert page.run("document.querySelectorAll('.token').length") == 12
    assert page.run("document.querySelector('.user').textContent") == "hi"
    facts = page.run("document.querySelector('.facts').textContent")
    assert facts.startswith("12 tokens · first after ")
    assert facts.endswith("cut at the limit")
    page.hover(".token[data-index='3']")
    page.wait("!document.getElementById('tip').hidden")
    rows = page.run("[...document.querySelectorAll('#tip tr')].map((row) => row.innerText)")
    assert len(rows) == 6
    assert "90 %" in rows[0]
    page.run("document.querySelector('.tokens').focus()")
    page.press("ArrowRight")
    page.press("ArrowRight")
    assert page.run("document.querySelector('.token.chosen').dataset.index") == "5"
    assert "token 6 of 12" in page.run("document.querySelector('.tokens').getAttribute('aria-label')")
    page.press("Escape")
    assert page.run("document.getElementById('tip').hidden")


def test_a_second_turn_carries_the_first_and_escape_stops_it(page: Browser, served: Running) -> None:
    page.run("document.getElementById('set-max_tokens').value = 3")
    say(page, "one")
    page.wait(DONE)
    page.run("document.getElementById('set-max_tokens').value = 200")
    say(page, "two")
    page.wait("document.querySelectorAll('.answer:last-child .token').length > 4")
    page.press("Escape")
    page.wait(DONE)
    assert page.run("document.querySelector('.answer:last-child .facts').textContent").endswith("stopped")
    served.wait_idle()
    page.run("document.getElementById('set-temperature').value = 9")
    say(page, "three")
    assert page.run("document.querySelectorAll('.user').length") == 2


def test_charts_and_the_timeline_show_what_was_asked(page: Browser, served: Running) -> None:
    client = served.client(api_key="s3cret")
    for tokens in (4, 30):
        client.completions.create(
            model="fake", prompt=[5, 6], max_tokens=tokens, extra_body={"ignore_eos": True}
        )
    page.run("document.getElementById('tab-requests').click()")
    page.wait("document.querySelector('.row .state')?.textContent === '30 tokens'")
    states = page.run("[...document.querySelectorAll('.row .state')].map((each) => each.textContent)")
    assert states[:2] == ["30 tokens", "4 tokens"]
    page.run("document.querySelector('.timeline').focus()")
    page.press("ArrowDown")
    told = page.run("document.getElementById('tip').innerText")
    assert "length after 30 tokens" in told
    assert "prefill" in told
    page.press("Escape")
    page.run("document.getElementById('tab-requests').focus()")
    page.press("ArrowLeft")
    page.wait("document.querySelector('[aria-selected=true]').id === 'tab-live'")
    page.wait("document.querySelector('.chart b').textContent.includes('ms')")
    assert page.run("document.querySelectorAll('.chart').length") == 8
    blanks = page.run("[...document.querySelectorAll('.blank')].map((each) => each.textContent)")
    assert any("--goodput" in text for text in blanks)
    page.hover(".chart svg")
    page.wait("document.querySelectorAll('.cross').length === 8")


def test_colours_follow_the_system_until_one_is_chosen(page: Browser) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.run(ground)
    page.theme(dark=True)
    dark = page.run(ground)
    assert light != dark
    page.run("document.getElementById('theme').click()")
    assert page.run(ground) == light
    page.run("document.getElementById('theme').click()")
    page.theme(dark=False)
    assert page.run(ground) == dark
