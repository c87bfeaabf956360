"""Check, then time, every op beside its peers, and write what was found with where it came from.

    python benchmarks/kernels.py [--only attention] [--small] [--out FILE]

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
    parser.add_argument("--only", choices=SUITES)
    words = parser.parse_args()
    bench = measure(words.only, small=words.small)
    settings = {"small": bench.small, "dtype": str(bench.dtype)}
    rows = [asdict(line) for line in bench.lines]
    print(write_result("kernels", rows, out=words.out, **settings))


if __name__ == "__main__":
    main()
