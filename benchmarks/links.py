"""Breaking the connection between a router and an instance, both of which live on."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benthic.serve.client import EngineClient


def cut(client: EngineClient, pipe: str) -> None:
    """Shut down this process's connections through one of the pipes, as a broken link would."""
    path = getattr(client.pipes, pipe).removeprefix("ipc://")
    ends = [end for end in sockets() if path in names(end)]
    for end in ends:
        end.shutdown(socket.SHUT_RDWR)
        end.close()
    if not ends:
        message = f"this process has no connection through {path}"
        raise RuntimeError(message)


def sockets() -> Iterator[socket.socket]:
    """This process's open sockets, as duplicates."""
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # it has been closed meanwhile
            copy = os.dup(int(entry.name))
            try:
                yield socket.socket(fileno=copy)
            except OSError:  # another kind of file
                os.close(copy)


def names(end: socket.socket) -> tuple[object, ...]:
    """Both ends of a connection; nothing for a socket that only listens."""
    try:
        return end.getsockname(), end.getpeername()
    except OSError:
        return ()
