"""Kill ranks of a running job, let torchrun restart it, and compare its losses with an undisturbed run's.

    python benchmarks/fault_drill.py [--data DIR] [--kills 5]
    python benchmarks/fault_drill.py --cuda        # two ranks on two GPUs and NCCL

Four ranks (2 pipeline ranks x 2 data ranks, experts over the two) train `nano_test` on a CPU. SIGKILL hits a
random rank, in turn during a step and during a save. Nobody helps: `torchrun --max-restarts` starts all ranks
again with `--resume`, and they go on from the newest complete checkpoint.
"""

# ruff: noqa: S101 (it is a test that prints)
from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from provenance import write_result
from stdlib_corpus import make_data

if TYPE_CHECKING:
    from collections.abc import Callable

BATCH = ("train.seq_len=32", "train.local_batch_size=1", "train.global_batch_size=4")
QUIET = ("evaluate.max_tokens=64", "log.every=1")
COMPARED = ("step", "loss", "mtp_loss", "balance", "grad_norm", "lr", "tokens", "max_vio")
STALE = "step-999.tmp"


@dataclass(frozen=True)
class Cluster:
    """How many ranks, and the settings that lay them out."""

    words: str
    ranks: int
    settings: tuple[str, ...]


FOUR_RANKS = Cluster(
    "pp 2 x dp 2, ep 2", 4, ("layout.pp_degree=2", "layout.dp_degree=2", "layout.ep_degree=2")
)
TWO_RANKS = Cluster("pp 2", 2, ("layout.pp_degree=2",))
TWO_GPUS = Cluster("pp 2 on two GPUs", 2, (*TWO_RANKS.settings, "device=cuda"))


@dataclass(frozen=True)
class Kill:
    """One kill, as it went.

    `newest` is the newest complete checkpoint that the dead ranks left, `save_lost` whether that is not the
    one that was due last: the kill hit its save, which the surviving ranks took away again.
    """

    during: str
    rank: int
    after_step: int
    newest: int | None
    save_lost: bool
    seconds_to_next_step: float


@dataclass
class Job:
    """A training job under torchrun.

    folder: of the run. data: dataset. steps, every: of the run and between checkpoints.
    """

    folder: Path
    data: Path
    steps: int
    every: int
    restarts: int = 0
    cluster: Cluster = FOUR_RANKS
    _agent: subprocess.Popen[str] | None = field(default=None)

    def start(self) -> None:
        """Start torchrun; what rank 0 prints goes to FOLDER.out."""
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--monitor-interval",
            "0.05",
        ]
        sizes = ["--nproc-per-node", str(self.cluster.ranks), "--max-restarts", str(self.restarts)]
        with self.printed.open("w") as out:
            self._agent = subprocess.Popen(
                [*launcher, *sizes, "-m", "--", "benthic", *self.words],
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    @property
    def words(self) -> list[str]:
        """What `benthic` is told on every rank."""
        loop = (f"train.steps={self.steps}", f"checkpoint.every={self.every}")
        options = [word for s in (*loop, *BATCH, *QUIET, *self.cluster.settings) for word in ("--set", s)]
        where = ["--run", str(self.folder), "--data", str(self.data)]
        return ["train", "nano_test", "--resume", *where, *options]

    def leave_alone(self) -> None:
        """Run it to its end under torchrun."""
        self.start()
        self.finish(600)

    @property
    def printed(self) -> Path:
        """Everything that the ranks printed."""
        return self.folder.with_suffix(".out")

    @property
    def running(self) -> bool:
        """Whether torchrun has not ended."""
        assert self._agent is not None
        return self._agent.poll() is None

    def finish(self, seconds: float) -> str:
        """Wait for torchrun; what was printed.

        Raises:
            RuntimeError: it failed.
        """
        assert self._agent is not None
        code = self._agent.wait(timeout=seconds)
        if code:
            message = f"torchrun ended with {code}:\n{self.printed.read_text()[-4000:]}"
            raise RuntimeError(message)
        return self.printed.read_text()

    def stop(self) -> None:
        """End torchrun, which ends its ranks, whatever state they are in."""
        if self._agent is not None and self.running:
            self._agent.send_signal(signal.SIGTERM)
            self._agent.wait(timeout=60)

    def workers(self) -> dict[int, tuple[int, int]]:
        """The living ranks: process id and how often they were restarted."""
        assert self._agent is not None
        found = {}
        for pid in _children(self._agent.pid):
            names = _environment(pid)
            if "TORCHELASTIC_RESTART_COUNT" in names and "RANK" in names:
                found[int(names["RANK"])] = pid, int(names["TORCHELASTIC_RESTART_COUNT"])
        return found

    def lines(self) -> list[dict[str, object]]:
        """The metrics, without a last line that is being written."""
        path = self.folder / "metrics.jsonl"
        text = path.read_text() if path.is_file() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def steps_done(self) -> int:
        """Lines of the metrics."""
        path = self.folder / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    def checkpoints(self) -> list[int]:
        """Steps of complete checkpoints."""
        names = [path.name for path in (self.folder / "checkpoint").glob("step-*") if path.suffix != ".tmp"]
        return sorted(int(name.removeprefix("step-")) for name in names)

    def unfinished(self) -> list[Path]:
        """Checkpoints that are being written or were not finished."""
        return [path for path in (self.folder / "checkpoint").glob("*.tmp") if path.name != STALE]


def _children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in path.read_text().split()] if path.is_file() else []


def _environment(pid: int) -> dict[str, str]:
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # it ended between being listed and being asked
        return {}
    return dict(word.split("=", 1) for word in words if "=" in word)


def until(ready: object, job: Job, seconds: float = 120.0) -> None:
    """Wait for a moment of a running job."""
    deadline = time.monotonic() + seconds
    while not ready():  # type: ignore[operator]
        if not job.running or time.monotonic() > deadline:
            message = f"the moment never came; printed so far:\n{job.printed.read_text()[-4000:]}"
            raise RuntimeError(message)
        time.sleep(0.0005)


def kill(job: Job, rng: random.Random, number: int, during: str, after: int) -> Kill:
    """SIGKILL a random rank at the first such moment after step `after`; return when steps are made again."""
    until(lambda: job.steps_done() >= after, job)
    if during == "save":
        until(job.unfinished, job)
    workers = job.workers()
    rank = rng.choice(sorted(workers))
    os.kill(workers[rank][0], signal.SIGKILL)
    killed, done = time.monotonic(), job.steps_done()
    until(lambda: _restarted(job, number), job)
    complete = job.checkpoints()
    count = job.printed.read_text().count("step: ")
    until(lambda: job.printed.read_text().count("step: ") > count, job)
    newest = complete[-1] if complete else None
    lost = (newest or 0) < done // job.every * job.every
    return Kill(during, rank, done, newest, lost, round(time.monotonic() - killed, 2))


def _restarted(job: Job, times: int) -> bool:
    """Whether all ranks of before are gone and new ones are there."""
    workers = job.workers()
    return len(workers) == job.cluster.ranks and {again for _, again in workers.values()} == {times}


def drill(
    folder: Path,
    data: Path,
    *,
    kills: int,
    steps: int,
    every: int,
    seed: int,
    cluster: Cluster = FOUR_RANKS,
    undisturbed: Callable[[Job], None] = Job.leave_alone,
) -> dict[str, object]:
    """An undisturbed job and one that is killed `kills` times, compared; raises where they differ."""
    straight = Job(folder / "straight", data, steps, every, cluster=cluster)
    broken = Job(folder / "broken", data, steps, every, restarts=kills, cluster=cluster)
    rng, done = random.Random(seed), []  # noqa: S311 (moments to kill at, not a secret)
    (broken.folder / "checkpoint" / STALE).mkdir(parents=True)
    try:
        undisturbed(straight)
        broken.start()
        for number in range(1, kills + 1):
            part = (steps - 2 * every) // kills
            after = (number - 1) * part + rng.randint(every + 1, every + max(1, part - 1))
            done.append(kill(broken, rng, number, "save" if number % 2 == 0 else "step", after))
        printed = broken.finish(600)
    finally:
        straight.stop()
        broken.stop()
    check(straight, broken, done, printed)
    return {
        "layout": cluster.words,
        "steps": steps,
        "kills": [dataclasses.asdict(one) for one in done],
        "losses_equal": True,
        "last_loss": straight.lines()[-1]["loss"],
    }


def check(straight: Job, broken: Job, kills: list[Kill], printed: str) -> None:
    """Losses bit for bit; every restart went on from the newest complete checkpoint; nothing is left over."""
    one, two = straight.lines(), broken.lines()
    assert [line["step"] for line in two] == list(range(1, straight.steps + 1))
    for key in COMPARED:
        assert [line[key] for line in one] == [line[key] for line in two], f"{key} differs"
    resumed = [line.split()[3] for line in printed.splitlines() if line.startswith("resumed from step")]
    expected = [str(one.newest) for one in kills if one.newest is not None]
    assert resumed == expected, f"resumed from steps {resumed}, but the newest complete ones were {expected}"
    assert not list((broken.folder / "checkpoint").glob("*.tmp")), "an unfinished checkpoint was left"


def main() -> None:
    """Run the drill and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, help="dataset of at most 320 tokens (default: standard library)")
    parser.add_argument("--cuda", action="store_true", help="two pipeline ranks on two GPUs")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep the two runs here")
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    sizes = {"kills": words.kills, "steps": words.steps, "every": words.every, "seed": words.seed}
    cluster = TWO_GPUS if words.cuda else FOUR_RANKS
    with tempfile.TemporaryDirectory() as temporary:
        data = words.data or make_data(Path(temporary) / "data", 320, parts=("json", "email"))
        found = drill(words.folder or Path(temporary), data, **sizes, cluster=cluster)
    print(json.dumps(found, indent=2))
    print(f"wrote {write_result('fault_drill', found, out=words.out, **sizes, cluster=cluster.words)}")


if __name__ == "__main__":
    main()
