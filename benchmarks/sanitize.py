"""Do kernels touch memory that is not theirs, or read what nobody wrote? `python benchmarks/sanitize.py`.

One small call of every kernel (`sanitize_calls.py`) under `compute-sanitizer`, by its tools memcheck and
initcheck, where every tensor has an allocation of its own. The result has the errors of each tool and the
calls; the exit status is 1 if there is an error, or a tool did not end well.

The tools see addresses of threads, and errors of CUDA's own functions are left out. Copies by TMA are bounded
by their descriptors, which memcheck does not doubt, and initcheck may take what TMA wrote for unwritten: look
at the kernels it names. Racecheck is not run, as it follows neither TMA nor mbarriers well; repeated calls
that give the same bits stand in for it (`tests/kernels/test_repeats_gpu.py`). `--calls` makes the calls
alone, as `--small` does on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from provenance import write_result

TOOLS: Final = ("memcheck", "initcheck")
USUAL: Final = "/usr/local/cuda/bin/compute-sanitizer"
SUMMARY: Final = re.compile(r"ERROR SUMMARY: (\d+) error")
ERROR: Final = re.compile(
    r"^=+ (\S.*)\n=+ +at (?:0x[0-9a-f]+ in )?(?:\S+:\d+:)?(?:void )?([\w:<>~]+)", re.MULTILINE
)
"""A kind of error, and on the next line the kernel that made it."""


def main() -> None:
    """The calls alone, or children that make them under each tool, side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--calls", action="store_true", help="make the calls in this process and list them")
    parser.add_argument("--small", action="store_true", help="a rehearsal: the calls that run on a CPU")
    parser.add_argument("--only", nargs="+", default=[], metavar="OP", help="instead of all ops")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that a tool may take")
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    if words.calls or words.small:
        calls = made(small=words.small, only=words.only)
        print(json.dumps(calls) if words.calls else "\n".join(calls))
        return
    program, command = sanitizer(), [sys.executable, __file__, "--calls"]
    command += ["--only", *words.only] if words.only else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # so kernels are compiled
    calls = json.loads(done.stdout.splitlines()[-1])
    print(f"{len(calls)} calls of {len({call.split(':')[0] for call in calls})} ops", flush=True)
    with ThreadPoolExecutor() as pool:
        rows = list(pool.map(lambda tool: watched(program, tool, command, words.timeout), TOOLS))
    write_result("sanitize", rows, out=words.out, calls=calls)
    if any(row["errors"] != 0 for row in rows):
        raise SystemExit(1)


def made(*, small: bool, only: list[str]) -> list[str]:
    """What was called."""
    import torch
    from sanitize_calls import make_calls

    return make_calls("cuda" if torch.cuda.is_available() and not small else "cpu", only)


def sanitizer() -> str:
    """The program, or an end that says what to install."""
    found = shutil.which("compute-sanitizer") or (USUAL if Path(USUAL).exists() else None)
    if found is None:
        msg = (
            f"compute-sanitizer is neither in PATH nor at {USUAL}. Install the CUDA toolkit, or of it the "
            "package cuda-sanitizer (apt: cuda-sanitizer-13-0)."
        )
        raise SystemExit(msg)
    return found


def watched(program: str, tool: str, command: list[str], timeout: float) -> dict[str, Any]:
    """The calls under one tool: its count of errors (None: it did not end well) and what it said of them."""
    watching = [program, "--tool", tool, "--print-limit", "1000", "--report-api-errors", "no", *command]
    alone = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    child = subprocess.Popen(
        watching,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=alone,
        start_new_session=True,
    )
    try:
        said, _ = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # the tool, and what it watches
        said = f"{child.communicate()[0]}\nnot done after {timeout:.0f} s"
    row = parsed(said)
    if child.returncode or row["errors"] is None:
        row["failed"] = said.strip().splitlines()[-20:]
    shown = "no summary" if row["errors"] is None else f"{row['errors']} errors"
    print(f"{tool}: {shown}, exit status {child.returncode}", *row["where"].items(), sep="\n  ", flush=True)
    return {"tool": tool, **row, "errors": row["errors"] if child.returncode == 0 else row["errors"] or None}


def parsed(said: str) -> dict[str, Any]:
    """The count of a tool's last line, and how often it names each kind of error and each kernel."""
    summary = SUMMARY.findall(said)
    where = Counter(f"{kind} in {kernel}" for kind, kernel in ERROR.findall(said))
    return {"errors": int(summary[-1]) if summary else None, "where": dict(where.most_common(30))}


if __name__ == "__main__":
    main()
