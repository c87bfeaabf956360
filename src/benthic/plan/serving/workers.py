"""Simulations of several deployments at once, in forked processes: the same results sooner."""

from __future__ import annotations

import multiprocessing
from collections import deque
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, TypeVar

from benthic.errors import BenthicError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkProcess

Item = TypeVar("Item")
Result = TypeVar("Result")


def mapped(work: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """`work` of every item, in order, up to `workers` of them at a time.

    With one worker, or where a process cannot fork, here and one after the other. What is forked inherits
    the items, which need not be picklable; results must be.

    Raises:
        Exception: the first that `work` raised.
        BenthicError: a process ended without a result.
    """
    if workers < 2 or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(work, items)
        return
    waiting = deque(enumerate(items))
    running: dict[Connection, tuple[int, ForkProcess]] = {}
    found: dict[int, Result] = {}
    try:
        for number in range(len(items)):
            while number not in found:
                while waiting and len(running) < workers:
                    index, item = waiting.popleft()
                    process, results = _start(work, item)
                    running[results] = index, process
                for ready in wait(list(running)):
                    index, process = running.pop(ready)  # type: ignore[call-overload]
                    found[index] = _result(process, ready)  # type: ignore[arg-type]
            yield found.pop(number)
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()


def _start(work: Callable[[Item], Result], item: Item) -> tuple[ForkProcess, Connection]:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(work, item, there), daemon=True)
    process.start()
    there.close()
    return process, here


def _run(work: Callable[[Item], Result], item: Item, results: Connection) -> None:
    try:
        results.send((True, work(item)))
    except Exception as error:  # noqa: BLE001 (it is raised again where the result is awaited)
        results.send((False, error))


def _result(process: ForkProcess, results: Connection) -> Result:  # type: ignore[type-var]
    try:
        worked, found = results.recv()
    except EOFError as error:
        process.join()
        message = f"a simulation's process ended with code {process.exitcode} and 0 results. Ask again."
        raise BenthicError(message) from error
    process.join()
    if not worked:
        raise found
    result: Result = found
    return result
