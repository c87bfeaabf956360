"""Starts the fronts of a server, replaces one that ends, and lets all of them drain.

Every front has a listening socket of its own on the one port (SO_REUSEPORT), over which the kernel spreads
connections by a hash of their addresses. On one shared socket whoever wakes takes all that wait, which is
very uneven. The main process keeps the sockets: what connects while a front is replaced waits for the
next one.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import TYPE_CHECKING, Final

from benthic.errors import ServeError
from benthic.serve import front
from benthic.serve.http import listen
from benthic.serve.restarts import Restarts

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from benthic.serve.front_link import FrontLink
    from benthic.serve.http import Parts
    from benthic.serve.hub import Hub

logger = logging.getLogger("benthic.serve.hub")

RESTARTS: Final = 16
"""How many fronts that ended are replaced in an hour; as many as instances of a fleet."""

LEAVE_S: Final = 15.0
"""Seconds a front has to end when its requests have."""

LOOK_S: Final = 1.0
"""Seconds between two looks at whether a front is silent."""


def spread(bound: socket.socket, count: int) -> list[socket.socket]:
    """As many sockets as asked that listen at the address of `bound`, which is the first.

    The first was bound without SO_REUSEPORT, so that a port which somebody else has is refused.
    Raises: ServeError when it was taken meanwhile.
    """
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    found = [bound]
    for _ in range(count - 1):
        another = socket.socket(bound.family, bound.type, bound.proto)
        another.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        another.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        another.setblocking(False)  # noqa: FBT003 (positional-only)
        another.bind(bound.getsockname())
        found.append(another)
    for each in found:
        listen(each)
    return found


class Fronts:
    """The processes that answer; belongs to the main process's event loop.

    Args:
        hub: speaks with them.
        sockets: one for each; they are closed at the end.
        parts: what they serve with.
    """

    def __init__(self, hub: Hub, sockets: list[socket.socket], parts: Parts) -> None:
        self._hub = hub
        self._sockets = sockets
        self._parts = parts
        self._restarts = Restarts(RESTARTS)
        self._stopping = False
        self._codes: list[int | None] = []
        self._processes: dict[int, BaseProcess] = {}
        self._first = [self._start(slot) for slot in range(len(sockets))]
        self._tasks = [asyncio.create_task(self._keep(slot, each)) for slot, each in enumerate(self._first)]

    async def wait_serving(self) -> None:
        """Wait until each of them serves. Raises: ServeError when one ends before."""
        everyone = asyncio.create_task(self._all_serve())
        await asyncio.wait({everyone, *self._tasks}, return_when=asyncio.FIRST_COMPLETED)
        if not everyone.done():
            everyone.cancel()
            msg = f"a front ended before it served (exit codes: {self._codes}); its words are in the log"
            raise ServeError(msg)

    async def wait_ended(self) -> None:
        """Wait until none is left."""
        await asyncio.wait(self._tasks)

    async def stop(self, now: asyncio.Event, drain_s: float) -> bool:
        """Let all of them drain, and end at once when `now` is set; whether each ended well."""
        self._stopping = True
        self._hub.stop_all()
        for each in self._sockets:
            each.close()
        ended = asyncio.ensure_future(self.wait_ended())
        hurried = asyncio.ensure_future(now.wait())
        await asyncio.wait({ended, hurried}, timeout=drain_s + LEAVE_S, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        if not ended.done():
            self._hub.stop_all()
            await asyncio.wait({ended}, timeout=LEAVE_S)
        await self.kill()
        await ended
        return all(code == 0 for code in self._codes)

    async def kill(self) -> None:
        """End those that are left."""
        self._stopping = True
        for process in tuple(self._processes.values()):
            process.kill()
        await self.wait_ended()
        for each in self._sockets:
            each.close()

    async def _all_serve(self) -> None:
        for each in self._first:
            await each.serving.wait()

    def _start(self, slot: int) -> FrontLink:
        joined = self._hub.join(slot, len(self._sockets))
        self._processes[slot] = front.start_front(joined.seat, self._sockets[slot], self._parts)
        return joined

    async def _keep(self, slot: int, current: FrontLink) -> None:
        """Watch the front of a slot, and those that replace it."""
        served = False
        while True:
            await self._watch(self._processes[slot], current)
            process = self._processes.pop(slot)
            await asyncio.to_thread(process.join)
            lost = len(current.streams)
            await self._hub.leave(current)
            served = served or current.serving.is_set()
            if self._stopping or not self._replaces(slot, process, served, lost):
                self._codes.append(process.exitcode)
                self._sockets[slot].close()
                return
            current = self._start(slot)

    def _replaces(self, slot: int, process: BaseProcess, served: bool, lost: int) -> bool:  # noqa: FBT001 (private)
        """Say that a front has ended, and whether another takes its place."""
        logger.error(
            "front %d (pid %s) ended with code %s; %d of its requests are lost",
            slot, process.pid, process.exitcode, lost,
        )  # fmt: skip
        if not served:
            logger.error("front %d never served and is not replaced", slot)
        elif not self._restarts.take():
            logger.error("front %d is not replaced: %d were within an hour", slot, RESTARTS)
        else:
            return True
        return False

    async def _watch(self, process: BaseProcess, watched: FrontLink) -> None:
        """Wait for its end; one that says nothing for as long as an engine may is killed."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(process.sentinel, ended.set)
        waiting = asyncio.create_task(ended.wait())
        try:
            while not waiting.done():
                await asyncio.wait({waiting}, timeout=LOOK_S)
                silence_s = self._hub.silence_s(watched)
                if silence_s > self._parts.options.stall_s and not waiting.done():
                    logger.error("front %d said nothing for %.0f s; killing it", watched.seat.slot, silence_s)
                    process.kill()
        finally:
            loop.remove_reader(process.sentinel)
            waiting.cancel()
