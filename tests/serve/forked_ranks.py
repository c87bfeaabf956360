"""Engines of several ranks, each rank forked: a server of theirs would import torch for seconds."""

from __future__ import annotations

import multiprocessing
from typing import TYPE_CHECKING

from spawn import forking

from benthic.serve import followers
from benthic.serve.process import EngineFactory, Pipes, engine_main

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess


def start_engine(factory: EngineFactory, pipes: Pipes, log_level: int) -> BaseProcess:
    """In place of the function of the same name in `benthic.serve.process`."""
    process = forking().Process(target=engine_with_ranks, args=(factory, pipes, log_level))
    process.start()
    return process


def engine_with_ranks(factory: EngineFactory, pipes: Pipes, log_level: int) -> None:
    """`engine_main`, whose ranks are forked from here."""
    followers.prepare = lambda: None
    followers.start_rank = start_rank
    engine_main(factory, pipes, log_level)


def start_rank(body: followers.Body, rank: int, pipe: Connection) -> BaseProcess:
    """In place of the function of the same name in `benthic.serve.followers`."""
    process = multiprocessing.get_context("fork").Process(target=body, args=(rank, pipe))
    process.start()
    pipe.close()
    return process
