"""Settings shared by every test: one torch thread a process, GPU tests only where there is a GPU."""

from __future__ import annotations

import gc
import importlib.util

import pytest
from hypothesis import settings

# A test on a busy machine may take any time; what is too slow is the suite's limit to say.
settings.register_profile("benthic", deadline=None)
settings.load_profile("benthic")


gc.disable()
"""Collecting tests makes a million objects that stay: to look through them again and again takes as long."""


def pytest_collection_finish() -> None:
    """From here on the collector looks only at what tests make."""
    gc.collect()
    gc.freeze()
    gc.enable()


def _cuda_devices() -> int:
    if importlib.util.find_spec("torch") is None:
        return 0
    import torch

    torch.set_num_threads(1)
    return torch.cuda.device_count()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    devices = _cuda_devices()
    for item in items:
        for marker, needed in (("gpu", 1), ("multigpu", 2)):
            if marker in item.keywords and devices < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA GPU(s), found {devices}"))
