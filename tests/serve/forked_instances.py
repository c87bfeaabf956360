"""Instances and servers forked from a server that has imported torch, which takes a fresh process seconds."""

from __future__ import annotations

import multiprocessing
from multiprocessing import forkserver
from typing import TYPE_CHECKING

import fake_server
import forked
from spawn import forking

from benthic.serve import client, front
from benthic.serve.process import EngineFactory, Pipes, engine_main

if TYPE_CHECKING:
    import socket
    from multiprocessing.process import BaseProcess

    from benthic.serve.front_messages import Seat
    from benthic.serve.http import Parts


def warm_up() -> None:
    """Start that server now."""
    forking()
    forkserver.ensure_running()


STARTED: list[BaseProcess] = []
"""Every engine that `start_engine` has started here."""


def start_engine(factory: EngineFactory, pipes: Pipes, log_level: int) -> BaseProcess:
    """In place of the function of the same name in `benthic.serve.process`."""
    process = forking().Process(target=engine_main, args=(factory, pipes, log_level), name="benthic-engine")
    process.start()
    STARTED.append(process)
    return process


def benthic_with_forked_engine() -> int | None:
    """The command line in a forked process."""
    client.start_engine = start_engine_of_server
    front.start_front = start_front
    return forked.benthic()


def fake_with_forked_engine() -> int | None:
    """The server round the fake engine in a forked process."""
    client.start_engine = start_engine_of_server
    front.start_front = start_front
    return fake_server.main()


def start_engine_of_server(factory: EngineFactory, pipes: Pipes, log_level: int) -> BaseProcess:
    """The same for a server that was itself forked from there: nothing runs in it yet."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=engine_main, args=(factory, pipes, log_level), name="benthic-engine")
    process.start()
    return process


def start_front(seat: Seat, bound: socket.socket, parts: Parts) -> BaseProcess:
    """In place of the function of the same name in `benthic.serve.front`."""
    process = multiprocessing.get_context("fork").Process(target=front.front_main, args=(seat, bound, parts))
    process.start()
    return process
