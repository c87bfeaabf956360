"""Instances on the nodes of a Ray cluster: Ray chooses where and gives each its GPU; all else stays as it is.

An instance is an actor that runs the engine's process. It calls the router over TCP, and other instances find
its desk at an address of its node. Messages are neither encrypted nor signed, so the network has to be a
trusted one. Ray is optional (`pip install 'benthic[cluster]'`). Its version, Python's and this package's have
to be the same on all nodes, and the checkpoint has to be at the same path.
"""

from __future__ import annotations

import importlib
import logging
import os
import socket
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benthic.errors import ConfigError
from benthic.serve.process import EngineProcess, Pipes, engine_main

if TYPE_CHECKING:
    from benthic.serve.process import EngineFactory

logger = logging.getLogger("benthic.serve.router")


@dataclass(frozen=True)
class Needs:
    """What each of so many instances takes of its node."""

    gpus: int
    cpus: int
    instances: int = 1


class RayPlace:
    """A Ray cluster (a `benthic.serve.process.Place`).

    Args:
        address: what `ray.init` takes: `ray://HEAD:10001`, `HEAD:6379`, `auto`, or `local` for one on this
            host.
        needs: of the instances to start with; those that find no room wait until there is.
        moves_between_hosts: whether blocks can go from one host to another.

    Raises:
        ConfigError: Ray is not installed, the cluster cannot be reached, has nothing to give, or has several
            nodes between which blocks cannot go.
    """

    def __init__(self, address: str, needs: Needs, *, moves_between_hosts: bool) -> None:
        self._ray = _ray()
        self._needs = needs
        try:
            self._ray.init(address=address, namespace="benthic", logging_level=logging.WARNING)
        except Exception as error:
            msg = f"--cluster {address}: {error}. Is `ray start` running there, in the same version?"
            raise ConfigError(msg) from error
        try:
            self._check(address, moves_between_hosts=moves_between_hosts)
            self.host = own_address(_head_of(address))
        except ConfigError:
            self.close()
            raise

    def start(self, factory: EngineFactory, pipes: Pipes, log_level: int) -> EngineProcess:
        """Ask for an actor; it runs as soon as a node has room."""
        chosen = self._ray.remote(Actor).options(
            num_gpus=self._needs.gpus, num_cpus=self._needs.cpus, max_restarts=0, scheduling_strategy="SPREAD"
        )
        return ActorProcess(self._ray, chosen.remote(), (factory, pipes, log_level))

    def close(self) -> None:
        """Leave the cluster."""
        self._ray.shutdown()

    def _check(self, address: str, *, moves_between_hosts: bool) -> None:
        nodes = sum(bool(node["Alive"]) for node in self._ray.nodes())
        if nodes > 1 and not moves_between_hosts:
            msg = (
                f"--cluster {address} has {nodes} nodes, and without --kv-nixl blocks stay on one host. Add "
                "--kv-nixl (`pip install 'benthic[nixl]'` on every node)."
            )
            raise ConfigError(msg)
        there = self._ray.cluster_resources()
        for name, needed in (("GPU", self._needs.gpus), ("CPU", self._needs.cpus)):
            found = there.get(name, 0)
            if found < needed:
                msg = (
                    f"--cluster {address} has {found:g} {name}s, but an instance needs {needed}. Add nodes, "
                    "or change --device or --num-threads."
                )
                raise ConfigError(msg)
            wanted = needed * self._needs.instances
            if found < wanted:
                logger.warning(
                    "%s has %g %ss, but %d are wanted: instances wait", address, found, name, wanted
                )


class Actor:
    """The process of an instance."""

    def where(self) -> tuple[str, int]:
        """Its node's name and its number there."""
        return socket.gethostname(), os.getpid()

    def run(self, factory: EngineFactory, pipes: Pipes, log_level: int) -> None:
        """Be the engine until it ends."""
        engine_main(factory, pipes, log_level)


class ActorProcess:
    """An actor as a process; a thread waits for its end."""

    def __init__(self, ray: Any, actor: Any, work: tuple[EngineFactory, Pipes, int]) -> None:
        self._ray = ray
        self._actor = actor
        self._ended = threading.Event()
        self._sentinel, self._writing = os.pipe()
        self.pid: int | None = None
        self.exitcode: int | None = None
        threading.Thread(target=self._follow, args=work, name="benthic-actor", daemon=True).start()

    @property
    def sentinel(self) -> int:
        """Readable once it has ended."""
        return self._sentinel

    def is_alive(self) -> bool:
        """Whether it runs, or waits for a node."""
        return not self._ended.is_set()

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end."""
        self._ended.wait(timeout)

    def kill(self) -> None:
        """End it at once, or take it out of the queue."""
        self._ray.kill(self._actor, no_restart=True)

    def _follow(self, *work: object) -> None:
        """Say where it runs, wait, and note how it ended."""
        errors = self._ray.exceptions.RayError
        try:
            node, self.pid = self._ray.get(self._actor.where.remote())
            logger.info("an instance runs on %s, process %d", node, self.pid)
            self._ray.get(self._actor.run.remote(*work))
            self.exitcode = 0
        except errors as error:
            logger.debug("an actor ended: %s", error)
            self.exitcode = 1
        finally:
            self._ended.set()
            os.close(self._writing)
            self.kill()  # gives its node's room back


def own_address(toward: str) -> str:
    """The address of this host from which packets to another would leave; nothing is sent."""
    if toward in ("localhost", "127.0.0.1"):
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((toward, 9))
        except OSError as error:
            msg = f"no way from this host to {toward}: {error.strerror or error}."
            raise ConfigError(msg) from error
        address: str = probe.getsockname()[0]
    return address


def _head_of(address: str) -> str:
    """The host in an address of a cluster; this one where it names none."""
    if address in ("auto", "local"):
        return "127.0.0.1" if address == "local" else str(_ray().util.get_node_ip_address())
    return address.removeprefix("ray://").rsplit(":", 1)[0]


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        msg = f"--cluster needs Ray, which is not installed ({error}). Run pip install 'benthic[cluster]'."
        raise ConfigError(msg) from error
