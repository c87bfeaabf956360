"""What it costs to move a prompt's cache blocks from one instance to another on one host.

Bandwidth: a process owns a cache of Moonlight-16B's shape on one GPU, another pulls the scattered blocks of
a prompt into its own through `serve/transfer`, as an instance does. The time is that of the whole call (lists
of blocks to the device, the kernel, the wait for it), beside a plain contiguous peer copy of as many bytes.

TTFT: the same 4,096-token prompts, one at a time, to one server that does everything and to one prefill and
one decode instance. With two instances the first token comes before the blocks move, so the second token's
time is compared as well: it holds the transfer.

    python benchmarks/transfer.py            # two GPUs
    python benchmarks/transfer.py --ranks 2  # four: each engine has two tensor-parallel ranks
    python benchmarks/transfer.py --small    # shared memory of a CPU and the nano model: a rehearsal
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import tempfile
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from provenance import write_result
from random_checkpoint import DUMMY, NAME, QUIET, make_folder, shape

from benthic.bench.served import serving
from benthic.serve.cache import CacheLayout, LatentCache
from benthic.serve.pages import region_of, source_of
from benthic.serve.transfer.handshake import Region
from benthic.serve.transfer.memory import MappedPages, pull

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from benthic.serve.transfer.memory import Source

LINK = 370e9
"""Bytes a second of a peer copy over the fourth NVLink, one way: what a transfer is held against."""

BLOCK_SIZE = 64
TARGETS = {"share_of_link": 0.70, "ttft_added": 0.05}


@dataclass(frozen=True)
class Sizes:
    """What is measured: tokens of prompts that are pulled, of those that are sent, and how often."""

    pulled: tuple[int, ...] = (512, 4096, 32768)
    sent: int = 4096
    tokens: int = 16
    repeats: int = 30
    requests: int = 24
    warmups: int = 4


SMALL = Sizes(pulled=(512, 4096), sent=512, tokens=4, repeats=10, requests=6, warmups=2)


def main() -> None:
    """Bandwidth, then TTFT; both are printed as they come."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--ranks", type=int, default=1, help="tensor-parallel, of each engine")
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    sizes = SMALL if words.small else Sizes()
    devices = ("cpu", "cpu") if words.small else two_gpus()
    moved = bandwidth(devices, sizes, small=words.small)
    with tempfile.TemporaryDirectory() as folder:
        waited = first_tokens(Path(folder), sizes, small=words.small, ranks=words.ranks)
    rows = {"bandwidth": moved, "first_tokens": waited, "targets": TARGETS}
    settings = {"small": words.small, "devices": devices, "ranks": words.ranks, "sizes": asdict(sizes)}
    print(write_result("transfer", rows, out=words.out, **settings))


def two_gpus() -> tuple[str, str]:
    """Reader and owner. Raises: SystemExit without two GPUs that reach each other's memory."""
    count = torch.cuda.device_count()
    if count < 2 or not torch.cuda.can_device_access_peer(0, 1):
        message = f"two GPUs with peer access are needed, torch sees {count}. Use --small on a CPU."
        raise SystemExit(message)
    return "cuda:0", "cuda:1"


# --- bandwidth


def bandwidth(devices: tuple[str, str], sizes: Sizes, *, small: bool) -> list[dict[str, Any]]:
    """A row for each prompt length; the first pull of each is compared byte for byte."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    blocks = max(sizes.pulled) // BLOCK_SIZE + 16
    owner = context.Process(target=own, args=(devices[1], blocks, small, theirs))
    owner.start()
    try:
        kind, num_blocks, handle = mine.recv()
        cache = make_cache(devices[0], blocks, small=small)
        source = source_of(Region(kind=kind, num_blocks=num_blocks, handle=handle), cache, None)
        rows = [pull_row(source, cache, devices, tokens, sizes) for tokens in sizes.pulled]
    finally:
        mine.send("done")
        owner.join(60)
    return rows


def own(device: str, blocks: int, small: bool, pipe: Connection) -> None:  # noqa: FBT001 (a process's argument)
    """Body of the owner's process: fill a cache, say where it is, keep it until told otherwise."""
    cache = make_cache(device, blocks, small=small)
    cache.pages_LPBW.copy_(contents(cache.pages_LPBW))
    if cache.pages_LPBW.is_cuda:
        torch.cuda.synchronize(device)
    region = region_of(cache, None)
    pipe.send((region.kind, region.num_blocks, region.handle))
    pipe.recv()


def make_cache(device: str, blocks: int, *, small: bool) -> LatentCache:
    """A cache of the model's shape that others on this host can read."""
    if device != "cpu":
        torch.cuda.set_device(device)
    dtype = torch.float32 if small else torch.bfloat16
    layout = CacheLayout.of(shape(small=small), block_size=BLOCK_SIZE, dtype=dtype)
    memory = MappedPages(blocks * layout.block_bytes) if device == "cpu" else None
    return LatentCache(layout, blocks, torch.device(device), memory)


def contents(pages: torch.Tensor) -> torch.Tensor:
    """What the owner's pages hold: small whole numbers that tell layers, blocks and tokens apart."""
    layers, blocks, tokens, width = pages.shape
    device = pages.device
    parts = (
        torch.arange(layers, device=device).view(-1, 1, 1, 1) * 7,
        torch.arange(blocks, device=device).view(1, -1, 1, 1) * 3,
        torch.arange(tokens, device=device).view(1, 1, -1, 1),
        torch.arange(width, device=device).view(1, 1, 1, -1),
    )
    return (sum(parts) % 251).to(pages.dtype)


def pull_row(
    source: Source, cache: LatentCache, devices: tuple[str, str], tokens: int, sizes: Sizes
) -> dict[str, Any]:
    """Pull scattered blocks, check them, time it, and time a plain copy of as many bytes."""
    rng = random.Random(tokens)  # noqa: S311 (an order of blocks)
    count, pages = tokens // BLOCK_SIZE, cache.pages_LPBW
    remote, local = (rng.sample(range(pages.shape[1]), count) for _ in range(2))
    pages.zero_()
    pull(source, remote, local)
    if not torch.equal(pages[:, local], contents(pages)[:, remote]):
        message = f"a pull of {count} blocks brought other contents than their owner has"
        raise RuntimeError(message)
    near, far = (
        torch.zeros(count * cache.layout.block_bytes, dtype=torch.uint8, device=device) for device in devices
    )
    pulled = seconds(lambda: pull(source, remote, local), devices[0], sizes.repeats)
    plain = seconds(lambda: near.copy_(far), devices[0], sizes.repeats)
    speed = near.numel() / pulled
    row = {
        "tokens": tokens,
        "bytes": near.numel(),
        "pull_us": round(pulled * 1e6, 1),
        "plain_copy_us": round(plain * 1e6, 1),
        "pull_gb_per_second": round(speed / 1e9, 2),
        "plain_copy_gb_per_second": round(near.numel() / plain / 1e9, 2),
        "share_of_plain_copy": round(plain / pulled, 3),
        "share_of_link": None if devices[0] == "cpu" else round(speed / LINK, 3),
    }
    print(row, flush=True)
    return row


def seconds(do: Callable[[], object], device: str, repeats: int) -> float:
    """Median seconds of a call until its work is done."""
    found = []
    for _ in range(repeats + 5):
        began = time.perf_counter()
        do()
        if device != "cpu":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
    return statistics.median(found[5:])


# --- time to the first tokens


def first_tokens(folder: Path, sizes: Sizes, *, small: bool, ranks: int = 1) -> dict[str, Any]:
    """Milliseconds to the first and second token of each kind of server, and what two instances add."""
    config = shape(small=small)
    model = make_folder(folder / "model", config)
    words = [str(model), *DUMMY, *QUIET, "--max-num-batched-tokens", "8192", "--block-size", str(BLOCK_SIZE)]
    words += ["--num-blocks", "512"] if small else ["--gpu-memory-utilization", "0.85"]
    words += ["--tensor-parallel-size", str(ranks)]
    kinds = {"one server": [], "1P1D": ["--prefill", "1", "--decode", "1"]}
    found: dict[str, Any] = {}
    for number, (kind, more) in enumerate(kinds.items()):
        with serving([*words, *more], folder / f"{number}.log") as server:
            times = [token_times(server.url, prompt, sizes) for prompt in prompts(config.vocab_size, sizes)]
        found[kind] = {
            "first_ms": spread([each[0] for each in times[sizes.warmups :]]),
            "second_ms": spread([each[1] for each in times[sizes.warmups :]]),
            "last_ms": spread([each[-1] for each in times[sizes.warmups :]]),
        }
        print(kind, json.dumps(found[kind]), flush=True)
    for which in ("first", "second"):
        one, two = (found[kind][f"{which}_ms"]["median"] for kind in kinds)
        found[f"added_until_{which}_token"] = round(two / one - 1, 4)
    print({key: value for key, value in found.items() if key.startswith("added")}, flush=True)
    return found


def prompts(vocab: int, sizes: Sizes) -> list[list[int]]:
    """Random prompts without a common beginning; the same for every server."""
    rng = random.Random(0)  # noqa: S311 (prompts)
    return [
        [rng.randrange(2, vocab) for _ in range(sizes.sent)] for _ in range(sizes.warmups + sizes.requests)
    ]


def token_times(url: str, prompt: list[int], sizes: Sizes) -> list[float]:
    """Milliseconds from sending a request until each of its tokens came."""
    body = {"model": NAME, "prompt": prompt, "max_tokens": sizes.tokens, "stream": True, "temperature": 0.0}
    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    request = urllib.request.Request(  # noqa: S310 (our own server)
        f"{url}/v1/completions",
        json.dumps(body | {"ignore_eos": True}).encode(),
        {"Content-Type": "application/json"},
    )
    began = time.perf_counter()
    with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310
        lines = [(line, (time.perf_counter() - began) * 1e3) for line in answer]
    found: list[float] = []
    for line, at in lines:  # tokens that were ready together come in one piece
        if line.startswith(b"data: {"):
            found += [at] * (json.loads(line[6:])["usage"]["completion_tokens"] - len(found))
    if len(found) != sizes.tokens:
        message = f"{sizes.tokens} tokens were asked and {len(found)} came"
        raise RuntimeError(message)
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}


if __name__ == "__main__":
    main()
