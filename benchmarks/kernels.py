"""Check, then time, every op beside its peers, and write what was found with where it came from.

    python benchmarks/kernels.py [--only attention decode] [--small] [--out FILE]

`benthic bench kernels` prints the same as a table and draws it.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from provenance import write_result

from benthic.kernels.bench.run import SUITES, measure


def main() -> None:
    """Parse, run the suites, write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=None, help="JSON (default: results/kernels.json)")
    parser.add_argument("--small", action="store_true", help="tiny sizes: a rehearsal, figures mean nothing")
    parser.add_argument("--only", nargs="+", choices=SUITES)
    words = parser.parse_args()
    benches = [measure(only, small=words.small) for only in words.only or [None]]
    settings = {"small": benches[0].small, "dtype": str(benches[0].dtype)}
    rows = [asdict(line) for bench in benches for line in bench.lines]
    print(write_result("kernels", rows, out=words.out, **settings))


if __name__ == "__main__":
    main()
