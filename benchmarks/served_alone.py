"""One server or fleet under load: latencies and goodput that the planner was fitted to none of.

The servers, the workloads, the targets and the client of `disaggregate.py`: a single `benthic serve` with
nothing in front of it, or with `--fleet` one of the fleets. Each workload is offered about half of what the
same bore in `disaggregate.json`, then a little less than that, and from there rates a tenth apart, upwards
while targets are met or downwards until they are: so goodput lies between two rates a tenth apart, after
three or four runs. `plan_alone.py` walks the same way by simulation and compares; with an engine that was
fitted to single steps of the same machine nothing else than the planner is compared.

    python benchmarks/served_alone.py                       # one GPU, four minutes
    python benchmarks/served_alone.py --fleet 1P1D --out b.json    # two GPUs, five minutes
    python benchmarks/served_alone.py --small               # tiny, on a CPU: a rehearsal
    python benchmarks/served_alone.py --until 238 --out a.json   # no run that would end later; every run is
    python benchmarks/served_alone.py --until 238 --out a.json   # kept, and none repeated on the same commit
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from disaggregate import (
    ATTAINMENT,
    SEQUENCES,
    SMALL,
    WORKLOADS,
    Found,
    Workload,
    attained,
    fleet_words,
    goodput,
    loaded,
    server_words,
)
from random_checkpoint import make_folder, shape

from benthic.bench.served import serving

if TYPE_CHECKING:
    from collections.abc import Callable

FLEET: Final = "1 colocated"
STARTS: Final = {
    FLEET: {"prefill-heavy": 16.0, "balanced": 32.0, "decode-heavy": 50.0},
    "1P1D": {"prefill-heavy": 23.0, "balanced": 47.0, "decode-heavy": 89.0},
    "2 colocated": {"prefill-heavy": 32.0, "balanced": 63.0, "decode-heavy": 99.0},
}
"""Requests a second at which the search for goodput begins: 97 % of what the same, or one of two, bore."""
STEP: Final = 1.1
MOST: Final = 4
"""Rates of a workload at most."""
AROUND_S: Final = 10.0
"""A run takes about so much longer than its arrivals: client, warm-up, last answers."""

Row = dict[str, Any]


class OutOfTimeError(Exception):
    """The next run would not end in time."""


def main() -> None:
    """One server, or one fleet, meets every workload."""
    began = time.monotonic()
    words = parse()
    settings = {"small": words.small, "seconds": words.seconds, "seeds": words.seeds, "fleet": words.fleet}
    settings |= {"max_num_seqs": SEQUENCES, "prefix_caching": False, "fronts": words.fronts}
    settings |= {"clients": words.clients}
    found = Found.at(words.out, settings, "served_alone")
    works = [work for work in works_of(small=words.small) if work.name in words.workloads]
    with tempfile.TemporaryDirectory() as temporary:
        model = make_folder(Path(temporary) / "model", shape(small=words.small))
        log = Path(temporary) / "server.log"
        serve = server_words(model, small=words.small, fronts=words.fronts) + fleet_words(words.fleet)
        with serving(serve, log) as server:
            print(f"up after {time.monotonic() - began:.0f} s", flush=True)
            offers = Offers(words, found, server.port, began)
            for work in works:
                try:
                    rows = walk(
                        starts(work, words.fleet, small=words.small),
                        lambda rate, work=work: offers(work, rate),
                        half_last=work.spans > 1,
                    )
                except OutOfTimeError:
                    print(f"{work.name}: no time is left for the next rate", flush=True)
                    continue
                found.finish(words.fleet, work.name)
                print(f"{work.name}: {goodput(rows):.2f} requests/s", flush=True)
        warned = [line for line in log.read_text().splitlines() if "WARNING" in line or "ERROR" in line]
        print(f"{len(warned)} warnings", *warned[:5], sep="\n  ", flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [work.name for work in WORKLOADS]
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--fleet", choices=list(STARTS), default=FLEET)
    parser.add_argument("--seconds", type=float, default=10.0, help="arrivals of one run last so long")
    parser.add_argument("--seeds", type=int, default=1, help="runs at every rate")
    parser.add_argument("--fronts", type=int, default=4, help="processes that answer HTTP")
    parser.add_argument("--clients", type=int, help="processes that load the server; 4, --small 1")
    parser.add_argument("--workloads", nargs="+", choices=names, default=names)
    parser.add_argument("--until", type=float, help="seconds after the start by which the last run ends")
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    words.clients = words.clients or (1 if words.small else 4)
    return words


def works_of(*, small: bool) -> tuple[Workload, ...]:
    """The workloads of `disaggregate.py`."""
    return SMALL if small else WORKLOADS


def starts(work: Workload, fleet: str = FLEET, *, small: bool) -> tuple[float, float]:
    """Half load, and the rate at which the search for goodput begins."""
    start = max(work.rates) / 2 if small else STARTS[fleet][work.name]
    return start / 2, start


def walk(
    first: tuple[float, float], offer: Callable[[float], list[Row]], *, half_last: bool = False
) -> list[Row]:
    """Offer both rates, then rates a tenth apart from the second on until targets are met on one side only.

    Half load comes first, or last where runs are so long that time may not be left for all.

    Returns: all runs, by rate. At most `MOST` rates are offered.
    """
    half, rate = first
    rows = [] if half_last else [*offer(half)]
    rows += offer(rate)
    climbs = attained(rows, rate) >= ATTAINMENT
    for _ in range(MOST - 2):
        rate = round(rate * STEP if climbs else rate / STEP, 2)
        rows += offer(rate)
        if (attained(rows, rate) >= ATTAINMENT) != climbs:
            break
    rows += offer(half) if half_last else []
    return sorted(rows, key=lambda row: (row["rate"], row["seed"]))


@dataclass(frozen=True)
class Offers:
    """Runs at one server, of which those that are kept already are not repeated."""

    words: argparse.Namespace
    found: Found
    port: int
    began: float

    def __call__(self, work: Workload, rate: float) -> list[Row]:
        """A rate with every seed. Raises: OutOfTimeError before a run that would end too late."""
        return [self._run(work, rate, seed) for seed in range(self.words.seeds)]

    def _run(self, work: Workload, rate: float, seed: int) -> Row:
        kept = self.found.run(self.words.fleet, work.name, rate, seed)
        if kept is not None:
            return kept
        ends = time.monotonic() - self.began + self.words.seconds * work.spans + AROUND_S
        if self.words.until is not None and ends > self.words.until:
            raise OutOfTimeError
        return self.found.add(loaded(self.words.fleet, self.port, work, rate, seed, self.words))


if __name__ == "__main__":
    main()
