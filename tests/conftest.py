"""Settings shared by every test: one torch thread a process, GPU tests only where there is a GPU."""

from __future__ import annotations

import gc
import importlib.util
import itertools
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from collections.abc import Generator

# A test on a busy machine may take any time; what is too slow is the suite's limit to say.
settings.register_profile("benthic", deadline=None)
settings.load_profile("benthic")


if (
    threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):
    # a shell starts what runs in its background deaf to Ctrl-C, and so would be all that the tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)

gc.disable()
"""Collecting tests makes a million objects that stay: to look through them again and again takes as long."""


def pytest_configure(config: pytest.Config) -> None:
    """Each worker of a parallel run starts to read the test files at another place.

    Where none has been read before, pytest rewrites the assertions of every one of them, for seconds, and
    keeps what it wrote; in one order, workers would do so side by side, each for itself.
    """
    worker = getattr(config, "workerinput", None)
    folders = [Path(argument) for argument in config.args]
    if worker is not None and all(folder.is_dir() for folder in folders):
        files = [str(file) for folder in folders for file in sorted(folder.rglob("test_*.py"))]
        number, workers = int(worker["workerid"].removeprefix("gw")), worker["workercount"]
        starts = [(number + turn) % workers for turn in range(workers)]
        config.args[:] = itertools.chain(*(files[start::workers] for start in starts))


def pytest_collection_finish() -> None:
    """From here on the collector looks only at what tests make; to look for leftovers takes a second."""
    gc.freeze()
    gc.enable()


def _cuda_devices() -> int:
    if importlib.util.find_spec("torch") is None:
        return 0
    import torch

    torch.set_num_threads(1)
    return torch.cuda.device_count()


LONG = {"dist", "slow", "interp", "browser"}


def _long_first(items: list[pytest.Item], workers: int) -> list[pytest.Item]:
    """Each worker starts with an equal run of this list: files with long tests go to the front of all runs.

    What is left at the end, for idle workers to take over, is short then.
    """
    files = [list(tests) for _, tests in itertools.groupby(items, key=lambda item: item.path)]
    ahead = [tests for tests in files if any(not LONG.isdisjoint(test.keywords) for test in tests)]
    behind = [test for tests in files if tests not in ahead for test in tests]
    order: list[pytest.Item] = []
    for worker in range(workers):
        order += itertools.chain(*ahead[worker::workers])
        missing = len(items) * (worker + 1) // workers - len(order)
        order += behind[: max(missing, 0)]
        del behind[: max(missing, 0)]
    return order + behind


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None]:
    worker = getattr(config, "workerinput", None)
    if worker is not None:
        items.sort(key=lambda item: item.path)
    yield
    items[:] = _long_first(items, worker["workercount"] if worker else 1)
    devices = _cuda_devices()
    for item in items:
        for marker, needed in (("gpu", 1), ("multigpu", 2)):
            if marker in item.keywords and devices < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA GPU(s), found {devices}"))
