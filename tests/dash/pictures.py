"""Writes docs/pictures/dash_*.png: `python tests/dash/pictures.py CHECKPOINT`, with that of `make demo`.

A prefill and a decode instance serve the checkpoint on this machine's CPU while clients send pieces of this
repository's sources at random moments; the pictures show what the page then shows.
"""

from __future__ import annotations

import random
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))

import httpx
import running as servers
from browser import Browser, browser

ROOT = Path(__file__).parents[2]
FLAGS = (
    "--served-model-name", "demo", "--prefill", "1", "--decode", "1", "--goodput", "ttft:400 tpot:40",
    "--max-num-seqs", "16", "--num-blocks", "160", "--block-size", "16", "--disable-log-requests",
)  # fmt: skip
LOAD_S = 75.0
RATE = 1.6
PROMPT = "def read_lines(path: str) -> list[str]:\n"


def send(url: str, rng: random.Random, stop: threading.Event) -> None:
    """Poisson arrivals of prompts and answers of mixed lengths, until told to stop."""
    sources = [file.read_text() for file in sorted((ROOT / "src").rglob("*.py"))[:40]]

    def one(prompt: str, tokens: int) -> None:
        body = {"model": "demo", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
        httpx.post(f"{url}/v1/completions", json=body, timeout=120)

    while not stop.wait(rng.expovariate(RATE)):
        source = rng.choice(sources)
        prompt, tokens = source[: rng.choice((120, 400, 1200))], rng.choice((24, 80, 200))
        threading.Thread(target=one, args=(prompt, tokens), daemon=True).start()


def ask(page: Browser) -> None:
    """One answer in the playground, and its tenth token's alternatives."""
    page.run("location.hash = '#chat'")
    page.run("document.getElementById('set-temperature').value = 0.6")
    page.run("document.getElementById('set-max_tokens').value = 140")
    page.run("document.getElementById('set-seed').value = 7")
    page.run("document.getElementById('say').focus()")
    page.type(PROMPT)
    page.run("document.querySelector('.go').click()")
    page.wait("document.querySelectorAll('.token').length > 20")
    page.wait("document.querySelector('.go').textContent === 'Send'")
    page.hover(".token[data-index='10']")


def main() -> None:
    """Serve, load, look."""
    pictures, stop = ROOT / "docs" / "pictures", threading.Event()
    servers.START_S = 240
    rng = random.Random(0)  # noqa: S311 (not a secret)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with (
            servers.benthic_server(Path(sys.argv[1]), folder / "log", *FLAGS) as running,
            browser(folder / "profile") as page,
        ):
            load = threading.Thread(target=send, args=(running.url, rng, stop))
            load.start()
            time.sleep(LOAD_S)
            page.open(f"{running.url}/dash", height=960)
            page.wait("document.getElementById('link')?.dataset.state === 'up'")
            page.wait("document.querySelectorAll('.line').length > 8")
            page.picture(pictures / "dash_live.png")
            page.theme(dark=True)
            page.run("location.hash = '#requests'")
            page.wait("document.querySelectorAll('.row').length > 8")
            page.hover(".row[data-index='6'] rect.phase")
            page.picture(pictures / "dash_requests.png")
            stop.set()
            load.join()
            page.theme(dark=False)
            ask(page)
            page.picture(pictures / "dash_chat.png")
            assert page.said == [], page.said


if __name__ == "__main__":
    main()
