"""Soak a server with requests of every kind, some cancelled at random: no 5xx, no lost block, flat memory.

    python benchmarks/soak.py --checkpoint DIR [--requests 10000] [--width 48] [--seed 0]

Starts `benthic serve` on the checkpoint and sends completions and chats, streamed and whole, with sampling
settings, several choices, log-probabilities, stop strings, structured output and requests that are wrong. A
fifth of the streams are left after a random number of chunks, a tenth of the whole answers while they are
waited for. The memory of both processes is read after half of the requests and at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import random
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from provenance import write_result

from benthic.bench.served import serving

GROWTH_MIB = 64.0
"""What a process may grow by in the second half: allocators and tables of known size settle late."""


@dataclass
class Tally:
    """What became of the requests."""

    statuses: collections.Counter[int] = field(default_factory=collections.Counter)
    left: int = 0
    broken: list[str] = field(default_factory=list)


def make_body(chance: random.Random) -> tuple[str, dict[str, Any]]:
    """A random request; one in twelve is wrong."""
    body: dict[str, Any] = {
        "model": "soak",
        "max_tokens": chance.randrange(1, 48),
        "seed": chance.randrange(1 << 30),
    }
    extras = [
        {}, {"temperature": 0.0}, {"top_k": 5, "top_p": 0.9}, {"n": 3}, {"stop": ["a", "the"]},
        {"repetition_penalty": 1.2, "presence_penalty": 0.5}, {"logit_bias": {"70": 5}}, {"min_tokens": 1},
        {"structured_outputs": {"regex": "[a-z]{1,20}"}},
        {"guided_json": {"enum": ["a", "b"]}}, {"response_format": {"type": "json_object"}},
        {"timeout_s": 30.0}, {"priority": 3},
    ]  # fmt: skip
    body |= chance.choice(extras)
    if chance.random() < 1 / 12:
        body |= chance.choice(
            [{"temperature": 9}, {"max_tokens": 10**6}, {"guided_regex": "("}, {"model": "no"}]
        )
    if chance.random() < 0.5:
        prompt = [chance.randrange(4, 300) for _ in range(chance.randrange(1, 120))]
        return "/v1/completions", body | {"prompt": prompt, "logprobs": chance.choice([None, 2])}
    words = " ".join(chance.choice(["the", "quick", "brown", "fox"]) for _ in range(chance.randrange(1, 12)))
    return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": words}]}


async def one(session: aiohttp.ClientSession, chance: random.Random, tally: Tally) -> None:
    """Send one request, perhaps leave it, and note what came."""
    path, body = make_body(chance)
    if chance.random() < 0.5:
        await stream(session, path, body | {"stream": True}, chance, tally)
        return
    patience = chance.uniform(0.0, 0.1) if chance.random() < 0.1 else None
    try:
        async with asyncio.timeout(patience), session.post(path, json=body) as answer:
            await answer.read()
            tally.statuses[answer.status] += 1
    except TimeoutError:
        tally.left += 1


async def stream(
    session: aiohttp.ClientSession, path: str, body: dict[str, Any], chance: random.Random, tally: Tally
) -> None:
    """Read a stream to its end, or leave after a random number of chunks."""
    patience = chance.randrange(1, 20) if chance.random() < 0.2 else None
    async with session.post(path, json=body) as answer:
        tally.statuses[answer.status] += 1
        if answer.status != 200:
            await answer.read()
            return
        chunks, last = 0, b""
        async for line in answer.content:
            chunks += line.startswith(b"data:")
            last = line.strip() or last
            if line.startswith(b'data: {"error"'):
                tally.broken.append(line.decode()[:200])
            if chunks == patience:
                tally.left += 1
                answer.close()
                return
        if last != b"data: [DONE]":
            tally.broken.append(f"a stream ended with {last[:80]!r}")


async def soak(url: str, pids: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """Send everything; returns what the result file holds."""
    tally, memory = Tally(), []
    jobs = iter(range(args.requests))

    async def worker(session: aiohttp.ClientSession) -> None:
        for job in jobs:
            if job == args.requests // 2:
                memory.append([resident_mib(pid) for pid in pids])
            chance = random.Random(f"{args.seed} {job}")  # noqa: S311
            await one(session, chance, tally)

    began = time.perf_counter()
    async with aiohttp.ClientSession(base_url=url, connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(worker(session) for _ in range(args.width)))
        free, blocks = await idle_blocks(session)
    memory.append([resident_mib(pid) for pid in pids])
    return {
        "requests": args.requests,
        "seconds": round(time.perf_counter() - began, 1),
        "statuses": {str(status): count for status, count in sorted(tally.statuses.items())},
        "left_by_the_client": tally.left,
        "broken_streams": tally.broken,
        "blocks": blocks,
        "blocks_free_at_the_end": free,
        "resident_mib_after_half": memory[0],
        "resident_mib_at_the_end": memory[1],
    }


async def idle_blocks(session: aiohttp.ClientSession, patience_s: float = 30.0) -> tuple[int, int]:
    """Free blocks and all blocks, once nothing runs (or patience is over)."""
    deadline = time.perf_counter() + patience_s
    while True:
        async with session.get("/metrics") as answer:
            text = await answer.text()
        busy = sample(text, "num_requests_running") + sample(text, "num_requests_waiting")
        free, blocks = int(sample(text, "kv_blocks_free")), int(sample(text, "kv_blocks"))
        if (not busy and free == blocks) or time.perf_counter() > deadline:
            return free, blocks
        await asyncio.sleep(0.2)


def sample(text: str, name: str) -> float:
    """One gauge of a scrape."""
    found = re.search(rf"^benthic:{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE)
    if found is None:
        msg = f"/metrics has no benthic:{name}"
        raise SystemExit(msg)
    return float(found[1])


def resident_mib(pid: int) -> float:
    """Resident memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return round(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024, 1)


def family(pid: int) -> list[int]:
    """A process and its children that compute (the other child tracks shared resources)."""
    listing = subprocess.run(
        ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True, check=True
    )
    return [pid, *(int(line.split()[0]) for line in listing.stdout.splitlines() if "spawn_main" in line)]


def verdict(row: dict[str, Any]) -> list[str]:
    """What is wrong; empty when nothing is."""
    wrong = [
        f"{count} answers of status {status}" for status, count in row["statuses"].items() if status >= "5"
    ]
    wrong += row["broken_streams"][:5]
    if row["blocks_free_at_the_end"] != row["blocks"]:
        wrong.append(f"{row['blocks_free_at_the_end']} of {row['blocks']} blocks are free")
    pairs = zip(row["resident_mib_after_half"], row["resident_mib_at_the_end"], strict=True)
    wrong += [f"a process grew from {a} to {b} MiB" for a, b in pairs if b - a > GROWTH_MIB]
    return wrong


def main() -> None:
    """Read the command line, soak, print, write; exit status 1 when something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=48, help="requests in flight")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=Path("soak.log.tmp"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    words = [str(args.checkpoint), "--served-model-name", "soak", "--num-threads", "1", "--block-size", "16"]
    words += ["--num-blocks", "1024"]  # so few are all in memory before it is read for the first time
    quiet = ["--disable-log-requests", "--disable-uvicorn-access-log"]
    with serving([*words, *quiet], args.log) as server:
        row = asyncio.run(soak(server.url, family(server.process.pid), args))
    wrong = verdict(row)
    path = write_result("soak", [row], out=args.out, width=args.width, seed=args.seed, wrong=wrong)
    print(f"{row}\nwritten to {path}\n{'; '.join(wrong) or 'nothing is wrong'}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
