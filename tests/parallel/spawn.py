"""Runs a function on n processes of this machine and fails with the traceback of the rank that failed.

On a CPU (gloo) they are forked from a server that has imported torch once, since importing it takes each of
them seconds; like spawned ones they share nothing with the test. For GPUs (NCCL) they are spawned.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import inspect
import multiprocessing
import signal
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist  # noqa: TID251 (starts the process groups that the tests use)
import torch.multiprocessing as mp

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.context import ForkServerContext

SECONDS = 60
# torch._dynamo: checkpointing imports it on first use; triton: the op table asks it whether it interprets
IMPORTED_ONCE = [
    "torch",
    "torch.distributed",
    "torch._dynamo",
    "triton.knobs",
    "benthic.model.network",
    "benthic.train.run",
    "benthic.cli.main",
    "benthic.serve.instance",
    "benthic.serve.process",
    "benthic.serve.server",
    "pytest",
]


class RankError(AssertionError):
    """A rank raised; the message is its traceback."""


def spawn(
    function: Callable[..., None],
    ranks: int,
    *arguments: object,
    seconds: float = SECONDS,
    device: str = "cpu",
) -> None:
    """Call `function(rank, *arguments)` in `ranks` processes that share a default group.

    `function` is a module-level function of a file, `arguments` can be pickled. With `device="cuda"` rank i
    has GPU i.

    Raises:
        RankError: ranks raised; it tells of the first, which made others fail. All are ended.
        TimeoutError: some rank was not done within `seconds`; all are ended.
    """
    where = (inspect.getsourcefile(function), function.__name__)
    forking()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, folder, seconds, device, *where, arguments)
        method = "forkserver" if device == "cpu" else "spawn"
        context = mp.start_processes(_run, arguments, ranks, join=False, start_method=method)
        try:
            _join(context, function.__name__, seconds)
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            raise RankError(_first_failure(Path(folder)) or str(error)) from None
        finally:
            for process in context.processes:
                process.kill()
                process.join()


def forking() -> ForkServerContext:
    """How processes are forked from the server that has imported torch once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    return context


def _join(context: mp.ProcessContext, name: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not context.join(timeout=max(0.0, deadline - time.monotonic())):
        if time.monotonic() >= deadline:
            alive = [rank for rank, process in enumerate(context.processes) if process.is_alive()]
            msg = f"{name}: ranks {alive} of {len(context.processes)} were not done after {seconds} s"
            raise TimeoutError(msg)


def _first_failure(folder: Path) -> str | None:
    """The traceback of the rank that failed first: when one rank ends, the others lose their connection."""
    failures = sorted(folder.glob("failed-*"), key=lambda path: float(path.name.split("-")[1]))
    return failures[0].read_text() if failures else None


def _run(
    rank: int,
    ranks: int,
    folder: str,
    seconds: float,
    device: str,
    source: str,
    name: str,
    arguments: tuple[object, ...],
) -> None:
    die_with_parent()
    gc.freeze()  # it need not look through what the server imported
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        store=dist.FileStore(str(Path(folder) / "store"), ranks),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=seconds),
        device_id=torch.device("cuda", rank) if device == "cuda" else None,
    )
    try:
        getattr(_module(source), name)(rank, *arguments)
    except BaseException:
        report = f"rank {rank} of {ranks}:\n{traceback.format_exc()}"
        (Path(folder) / f"failed-{time.monotonic()}-{rank}").write_text(report)
        raise
    dist.destroy_process_group()


def die_with_parent() -> None:
    """A test run that is killed must not leave ranks behind that wait for each other."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _module(source: str) -> object:
    """The test's module, loaded from its file: pytest gives test modules names that cannot be imported."""
    sys.path.insert(0, str(Path(source).parent))
    spec = importlib.util.spec_from_file_location(Path(source).stem, source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
