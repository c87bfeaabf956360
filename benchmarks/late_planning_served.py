"""What planning late gives on a GPU: latencies of one server that plans at once, then of one that plans late.

The workloads of `disaggregate.py` at shares of the highest rate that it asks of a GPU; each margin has a
server of its own, one after the other on the same GPU, and meets the same requests.

    python benchmarks/late_planning_served.py [--margins-ms 1 2 4]
    python benchmarks/late_planning_served.py --small    # tiny, on a CPU: a rehearsal
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from disaggregate import SEQUENCES, SMALL, WORKLOADS, loaded
from provenance import write_result
from random_checkpoint import DUMMY, QUIET, make_folder, shape

from benthic.bench.served import serving


def main() -> None:
    """Planned at once, then with every margin."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--margins-ms", type=float, nargs="+", default=[2.0])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.3, 0.6, 0.9])
    parser.add_argument("--workloads", nargs="+", default=[work.name for work in WORKLOADS])
    parser.add_argument("--seconds", type=float, default=12.0, help="arrivals of one run last so long")
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        model = make_folder(Path(temporary) / "model", shape(small=words.small))
        for margin in (None, *words.margins_ms):
            rows += served(model, margin, words)
            written = {"seconds": words.seconds, "small": words.small, "max_num_seqs": SEQUENCES}
            print(write_result("late_planning_served", rows, out=words.out, **written), flush=True)


def served(model: Path, margin_ms: float | None, words: argparse.Namespace) -> list[dict[str, Any]]:
    """Every workload and rate at one server."""
    serve = [str(model), *DUMMY, *QUIET, "--no-enable-prefix-caching", "--async-scheduling"]
    serve += ["--gpu-memory-utilization", "0.85"]
    serve += ["--max-num-seqs", "8" if words.small else str(SEQUENCES)]
    serve += ["--max-num-batched-tokens", "256" if words.small else "4096"]
    if margin_ms is not None:
        serve += ["--late-planning-ms", str(margin_ms)]
    name = "at once" if margin_ms is None else f"{margin_ms} ms late"
    with serving(serve, model.parent / f"{name}.log") as server:
        return [
            loaded(name, server.port, work, round(share * max(work.rates) / 2, 1), 0, words)
            for work in (SMALL if words.small else WORKLOADS)
            if work.name in words.workloads
            for share in words.shares
        ]


if __name__ == "__main__":
    main()
