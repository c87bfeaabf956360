"""The main job end to end: corpus, tokenizer, training, export, server, concurrent requests, clean stop.

The corpus is the source of the Python standard library on this machine: real text, nothing to download.
Every step is a `benthic` command that is printed before it runs, so that the demo can be repeated by hand.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from openai import AsyncOpenAI
from rich.console import Console
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table

from benthic.bench.served import serving
from benthic.errors import ServeError

BENTHIC = str(Path(sys.executable).parent / "benthic")
PROMPTS = [
    "def __init__(self, ",
    "class ",
    "import os\nimport sys\n",
    "    def close(self):\n        ",
    "for name in ",
    "    if not isinstance(",
    'def main():\n    """',
    "try:\n    ",
]
console = Console()


@dataclass
class Answer:
    """One finished request: text, seconds to the first token, and seconds per token after it."""

    prompt: str
    text: str
    ttft: float
    tpot: float
    tokens: int


def main() -> None:
    """Run the demo; a command that fails ends it with that command's exit code."""
    arguments = parse()
    run = arguments.run
    if run.exists():
        sys.exit(f"{run} exists already. Delete it, or name another folder: make demo RUN=runs/another")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # unwinds, so that no child outlives it
    start = time.perf_counter()
    tokens, tokenizer, trained = run / "tokens", run / "tokenizer", run / "train"
    step("1. Train a tokenizer on the Python standard library's sources")
    benthic("data", "tokenizer", "--python-stdlib", "--out", str(tokenizer), "--vocab-size", "2048")
    step("2. Write the corpus as token shards")
    benthic(
        "data",
        "build",
        "--python-stdlib",
        "--tokenizer",
        str(tokenizer),
        "--out",
        str(tokens),
        "--held-out",
        "0.05",
    )
    step("3. Train the tiny model, evaluate it, export it to Hugging Face format")
    overrides = [word for setting in arguments.set for word in ("--set", setting)]
    benthic("train", "tiny_cpu", "--data", str(tokens), "--run", str(trained), *overrides)
    step("4. Serve it and send concurrent requests through the official openai client")
    serve_and_ask(trained / "hf", arguments.requests)
    pictures = sorted(path for path in trained.rglob("*.png"))
    console.print(Panel("\n".join(map(str, pictures)), title="pictures", expand=False))
    console.print(f"[bold green]done[/] in {time.perf_counter() - start:.0f} s; everything is under {run}")


def parse() -> argparse.Namespace:
    """Command line of the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--set", action="append", default=[], help="override of the training recipe")
    return parser.parse_args()


def step(title: str) -> None:
    """Announce one part of the demo."""
    console.rule(f"[bold]{title}", align="left")


def benthic(*words: str) -> None:
    """Run one `benthic` command in the foreground."""
    console.print(f"[dim]$ benthic {shlex.join(words)}[/]", highlight=False)
    done = subprocess.run([BENTHIC, *words], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def serve_and_ask(checkpoint: Path, requests: int) -> None:
    """Start the server, ask, print, stop it with SIGTERM and check that it ended well."""
    words = [str(checkpoint), "--served-model-name", "tiny"]
    console.print(f"[dim]$ benthic serve {shlex.join(words)}[/]", highlight=False)
    log = checkpoint.parent / "serve.log"
    try:
        with console.status("waiting for the server") as waiting, serving(words, log, start_s=60) as server:
            waiting.stop()
            answers, seconds = asyncio.run(ask_all(server.port, requests))
            show(answers, seconds)
    except ServeError as error:
        sys.exit(str(error))
    console.print("server stopped with exit code 0")


async def ask_all(port: int, requests: int) -> tuple[list[Answer], float]:
    """All requests at once, streamed."""
    async with AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
        start = time.perf_counter()
        prompts = [PROMPTS[index % len(PROMPTS)] for index in range(requests)]
        answers = await asyncio.gather(*(ask(client, prompt, seed) for seed, prompt in enumerate(prompts)))
        return list(answers), time.perf_counter() - start


async def ask(client: AsyncOpenAI, prompt: str, seed: int) -> Answer:
    """One streamed completion."""
    start = time.perf_counter()
    first, text, tokens = 0.0, "", 0
    stream = await client.completions.create(
        model="tiny",
        prompt=prompt,
        max_tokens=96,
        temperature=0.7,
        top_p=0.95,
        seed=seed,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        first = first or time.perf_counter()
        text += "".join(choice.text for choice in chunk.choices)
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    end = time.perf_counter()
    return Answer(prompt, text, first - start, (end - first) / max(tokens - 1, 1), tokens)


def show(answers: list[Answer], seconds: float) -> None:
    """Print the first completions and the latencies of all."""
    for answer in answers[: len(PROMPTS) // 2]:
        code = Syntax(answer.prompt + answer.text, "python", word_wrap=True, background_color="default")
        console.print(Panel(code, title=repr(answer.prompt), title_align="left"))
    table = Table(title=f"{len(answers)} concurrent requests", title_justify="left")
    for column in ("", "median", "worst"):
        table.add_column(column, justify="right")
    for name, values in (("TTFT", [a.ttft for a in answers]), ("TPOT", [a.tpot for a in answers])):
        table.add_row(name, f"{statistics.median(values) * 1e3:.1f} ms", f"{max(values) * 1e3:.1f} ms")
    tokens = sum(answer.tokens for answer in answers)
    table.add_row("throughput", f"{tokens / seconds:.0f} tokens/s", "")
    console.print(table)


if __name__ == "__main__":
    main()
