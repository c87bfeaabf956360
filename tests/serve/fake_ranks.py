"""What the processes of ranks do in tests; they import this file by name."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

from benthic.serve.commands import Failed, Here, Leave, decode_command, encode

if TYPE_CHECKING:
    from multiprocessing.connection import Connection


def obedient(rank: int, pipe: Connection) -> None:
    """Starts, and answers every command with its rank."""
    pipe.send_bytes(encode(Here("started")))
    while not isinstance(decode_command(pipe.recv_bytes()), Leave):
        pipe.send_bytes(encode(Here(f"rank {rank} heard")))


def second_fails(rank: int, pipe: Connection) -> None:
    """Rank 2 has a reason; rank 1 has only lost rank 2."""
    why = Failed("OutOfMemoryError: 7 GiB", lost=False) if rank == 2 else Failed("peer closed", lost=True)
    pipe.send_bytes(encode(why))


def second_is_killed(rank: int, pipe: Connection) -> None:
    """Rank 2 ends without a word once it has started."""
    pipe.send_bytes(encode(Here("started")))
    pipe.recv_bytes()
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    pipe.recv_bytes()


def stubborn(rank: int, pipe: Connection) -> None:
    """Does not leave."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pipe.send_bytes(encode(Here("started")))
    time.sleep(600)
