"""Instances forked from a server that has imported torch, which takes a fresh process seconds."""

from __future__ import annotations

import multiprocessing
from typing import TYPE_CHECKING

from spawn import IMPORTED_ONCE

from benthic.serve.process import EngineFactory, Pipes, engine_main

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess


def start_engine(factory: EngineFactory, pipes: Pipes, log_level: int) -> BaseProcess:
    """In place of the function of the same name in `benthic.serve.process`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    process = context.Process(target=engine_main, args=(factory, pipes, log_level), name="benthic-engine")
    process.start()
    return process
