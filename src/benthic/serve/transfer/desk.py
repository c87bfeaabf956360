"""An owner's desk: a thread that answers readers at once, whatever the engine is computing.

The engine alone decides who holds which block. The desk keeps one set, the leases that are open, under a
lock: a reader's `Done` and the engine's `close` both take a lease out of it, and only the first of them finds
it. So a reader that is told "valid" has read before any block was handed on.
"""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

import msgspec
import zmq

from benthic.serve.transfer.handshake import (
    Check,
    Done,
    FromDesk,
    Greet,
    Held,
    Refuse,
    Renew,
    ToDesk,
    Welcome,
    disagreements,
)

if TYPE_CHECKING:
    from benthic.serve.transfer.handshake import Terms

TICK_S = 0.25
"""How often an engine without other work is woken to look at the deadlines of open leases."""


class Desk:
    """Serves readers of one instance's blocks from a thread of its own.

    Args:
        address: where to listen: `ipc://…`, or `tcp://HOST:PORT` (port 0 picks one).
        terms: what readers must agree with.
        welcome: what those get to know that do.
    """

    def __init__(self, address: str, terms: Terms, welcome: Welcome) -> None:
        self._terms = terms
        self._welcome = welcome
        self._lock = threading.Lock()
        self._open: set[str] = set()
        self._renewed: set[str] = set()
        self._done: list[str] = []
        self._wake_up, self._wake_end = socket.socketpair()
        self._wake_up.setblocking(False)  # noqa: FBT003 (positional-only)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(address)
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._decode = msgspec.msgpack.Decoder(ToDesk).decode
        self._encode = msgspec.msgpack.Encoder().encode
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="benthic-desk", daemon=True)
        self._thread.start()

    # --- the engine's side

    @property
    def wake_fd(self) -> int:
        """Readable when the engine should look at the desk."""
        return self._wake_end.fileno()

    def open(self, lease_id: str) -> None:
        """Let a lease be read."""
        with self._lock:
            self._open.add(lease_id)

    def close(self, lease_id: str) -> bool:
        """End a lease before its blocks are handed on; False when its reader was first or just renewed it."""
        with self._lock:
            if lease_id not in self._open or lease_id in self._renewed:
                return False
            self._open.remove(lease_id)
            return True

    def revoke(self, lease_id: str) -> None:
        """End a lease that nobody wants any more, renewed or not."""
        with self._lock:
            self._open.discard(lease_id)
            self._renewed.discard(lease_id)

    def collect(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What readers said since the last call: leases renewed, and leases done with."""
        with self._lock:
            renewed, done = tuple(sorted(self._renewed)), tuple(self._done)
            self._renewed.clear()
            self._done.clear()
        return renewed, done

    def quiet(self) -> None:
        """Take the wake-up that made `wake_fd` readable."""
        self._wake_end.recv(4096)

    def shut(self) -> None:
        """Stop answering."""
        self._closing.set()
        self._thread.join()
        self._socket.close()
        self._context.term()
        self._wake_up.close()
        self._wake_end.close()

    # --- the thread

    def _run(self) -> None:
        while not self._closing.is_set():
            if self._socket.poll(int(TICK_S * 1000)):
                reader, *frames = self._socket.recv_multipart()
                try:
                    answer = self._answer(self._decode(b"".join(frames)))
                except msgspec.DecodeError as error:
                    answer = Refuse(f"a message of another kind came: {error}")
                if answer is not None:
                    self._socket.send_multipart([reader, self._encode(answer)])
            elif self._open:
                self._wake()

    def _answer(self, message: ToDesk) -> FromDesk | None:
        if isinstance(message, Greet):
            reason = disagreements(message.terms, self._terms)
            return Refuse(reason) if reason else self._welcome
        if isinstance(message, Renew):
            with self._lock:
                self._renewed.update(self._open.intersection(message.lease_ids))
            return None
        if isinstance(message, Check):
            with self._lock:
                return Held(message.lease_id, message.lease_id in self._open)
        return Held(message.lease_id, self._end(message))

    def _end(self, message: Done) -> bool:
        with self._lock:
            valid = message.lease_id in self._open
            if valid:
                self._open.remove(message.lease_id)
                self._renewed.discard(message.lease_id)
                self._done.append(message.lease_id)
        if valid:
            self._wake()
        return valid

    def _wake(self) -> None:
        try:
            self._wake_up.send(b"x")
        except BlockingIOError:
            return  # it has more wake-ups to take than it needs
