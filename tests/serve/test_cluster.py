"""Instances on a cluster: engines that call back, an actor as a process, and Ray itself (`make drill`)."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import sys
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING

import fake_engine
import pytest
from small_engine import random_model, serve
from spawn import forking
from test_process import request, run, tokens_of, wait_until
from test_router import all_of, seeded

from benthic.errors import ConfigError, EngineDeadError
from benthic.model.checkpoint import save_pretrained
from benthic.serve import cluster
from benthic.serve.client import EngineClient
from benthic.serve.cluster import Needs, RayPlace
from benthic.serve.engine import Engine
from benthic.serve.fleet import Fleet, FleetOptions, start_router
from benthic.serve.journal import Journal
from benthic.serve.options import EngineOptions

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benthic.sched.routing import Role


class RayError(Exception):
    """What Ray raises when an actor ends."""


class FakeActor:
    """Runs an actor's work in a forked process when it is asked to."""

    def __init__(self, kind: type) -> None:
        self.kind, self.process = kind, None
        self.where = SimpleNamespace(remote=lambda: lambda: kind().where())
        self.run = SimpleNamespace(remote=self._start)

    def _start(self, *work: object) -> Callable[[], None]:
        self.process = forking().Process(target=act, args=(self.kind, *work))
        self.process.start()

        def end() -> None:
            self.process.join()
            if self.process.exitcode:
                raise RayError

        return end


def act(kind: type, *work: object) -> None:
    kind().run(*work)


class FakeRay:
    """A cluster of one host."""

    exceptions = SimpleNamespace(RayError=RayError)

    def __init__(self, *, nodes: int = 1, **resources: float) -> None:
        self._nodes, self.resources = nodes, resources or {"CPU": 8}
        self.actors: list[FakeActor] = []
        self.asked: list[dict] = []
        self.left = False

    def init(self, address: str, **_options: object) -> None:
        if address == "ray://nobody:1":
            msg = "no answer"
            raise ConnectionError(msg)

    def nodes(self) -> list[dict]:
        return [{"Alive": True}] * self._nodes + [{"Alive": False}]

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def remote(self, kind: type) -> SimpleNamespace:
        def make() -> FakeActor:
            self.actors.append(FakeActor(kind))
            return self.actors[-1]

        return SimpleNamespace(options=lambda **how: self.asked.append(how) or SimpleNamespace(remote=make))

    def get(self, end: Callable[[], object]) -> object:
        return end()

    def kill(self, actor: FakeActor, *, no_restart: bool) -> None:
        assert no_restart
        if actor.process is not None:
            actor.process.kill()

    def shutdown(self) -> None:
        self.left = True


def placed(monkeypatch: pytest.MonkeyPatch, ray: FakeRay, address: str = "local", **how: object) -> RayPlace:
    monkeypatch.setattr(cluster, "_ray", lambda: ray)
    return RayPlace(address, **{"needs": Needs(gpus=0, cpus=1), "moves_between_hosts": False} | how)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> RayPlace:
    return placed(monkeypatch, FakeRay())


def test_an_engine_that_calls_back_serves_what_was_asked_before_it_came(place: RayPlace) -> None:
    async def scenario() -> None:
        client = EngineClient(fake_engine.fake, place=place)
        try:
            early = asyncio.create_task(tokens_of(client, request("early", (20,), 3)))
            await client.wait_ready()
            assert await early == [21, 22, 23]
            answers = await asyncio.gather(
                *(tokens_of(client, request(f"r{i}", (7 * i + 4,), 6)) for i in range(20))
            )
            assert answers == [[7 * i + 5 + k for k in range(6)] for i in range(20)]
            assert client.pid is not None
        finally:
            await client.close()
        assert not place._ray.actors[0].process.is_alive()

    run(scenario())


def test_the_end_of_an_actor_fails_its_requests_and_gives_its_room_back(place: RayPlace) -> None:
    async def scenario() -> None:
        client = EngineClient(functools.partial(fake_engine.fake, step_seconds=0.01), place=place)
        try:
            await client.wait_ready()
            waiting = asyncio.create_task(tokens_of(client, request("a", (20,), 1000)))
            await wait_until(lambda: client.stats is not None and client.stats.num_running == 1)
            os.kill(place._ray.actors[0].process.pid, signal.SIGKILL)
            with pytest.raises(EngineDeadError, match="exited with code 1"):
                await waiting
        finally:
            await client.close()

    run(scenario())


def test_an_engine_that_cannot_start_says_why(place: RayPlace) -> None:
    async def scenario() -> None:
        client = EngineClient(fake_engine.broken, place=place)
        try:
            with pytest.raises(EngineDeadError, match="truncated"):
                await client.wait_ready()
        finally:
            await client.close()

    run(scenario())


def test_an_engine_whose_router_is_gone_leaves(place: RayPlace) -> None:
    async def scenario() -> None:
        client = EngineClient(fake_engine.fake, place=place)
        await client.wait_ready()
        process = place._ray.actors[0].process
        for each in (*client._hang_ups, client._to_engine, client._from_engine):
            each.close(linger=0)
        await wait_until(lambda: not process.is_alive())
        for task in client._tasks:
            task.cancel()

    run(scenario())


ENGINE = EngineOptions(
    device="cpu", max_num_seqs=8, max_num_batched_tokens=64, block_size=4, num_blocks=256, num_threads=1
)


def alone(folder: Path) -> dict[str, list[int]]:
    """The tokens of one engine."""
    engine = Engine.from_pretrained(folder, ENGINE)
    return {name: answer.tokens for name, answer in serve(engine, seeded(20)).items()}


def serve_on(address: str, folder: Path, *, prefill: int, decode: int) -> dict[str, list[int]]:
    """The tokens of 20 requests from a fleet placed there, whose instances are asked to leave at the end."""
    chosen = FleetOptions(prefill=prefill, decode=decode)
    fleet = Fleet(checkpoint=folder, engine=ENGINE, options=chosen, cluster=address)
    answers: dict[str, list[int]] = {}

    async def scenario() -> None:
        router = start_router(fleet, journal=Journal(time.monotonic), stall_s=60.0, log_level=30)
        try:
            await router.wait_ready()
            answers.update(await all_of(router, seeded(20)))
            states: dict[str, Role] = {each.name: each.role for each in router.members}
            assert sorted(states.values()) == ["decode"] * decode + ["prefill"] * prefill
            assert router.stats is not None
            assert router.stats.pulled_blocks > 0
        finally:
            await router.close()

    asyncio.run(asyncio.wait_for(scenario(), 120))
    return answers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("cluster") / "nano"
    save_pretrained(random_model(), where)
    return where


def test_a_placed_fleet_gives_the_tokens_of_one_engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay()
    monkeypatch.setattr(cluster, "_ray", lambda: ray)
    assert serve_on("local", folder, prefill=1, decode=1) == alone(folder)
    assert [how["num_cpus"] for how in ray.asked] == [1, 1]
    assert ray.left
    assert not any(actor.process.is_alive() for actor in ray.actors)


@pytest.mark.drill
def test_ray_itself_places_a_fleet_that_gives_the_tokens_of_one_engine(folder: Path) -> None:
    pytest.importorskip("ray")
    assert serve_on("local", folder, prefill=1, decode=1) == alone(folder)


def test_what_a_cluster_lacks_is_said_with_numbers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    placed(monkeypatch, FakeRay(CPU=4), needs=Needs(gpus=0, cpus=2, instances=3))
    assert "local has 4 CPUs, but 6 are wanted: instances wait" in caplog.text
    with pytest.raises(ConfigError, match=r"has 0 GPUs, but an instance needs 1"):
        placed(monkeypatch, ray := FakeRay(CPU=4), needs=Needs(gpus=1, cpus=1))
    assert ray.left
    with pytest.raises(ConfigError, match=r"has 4 CPUs, but an instance needs 6"):
        placed(monkeypatch, FakeRay(CPU=4), needs=Needs(gpus=0, cpus=6))
    with pytest.raises(ConfigError, match=r"has 3 nodes, and without --kv-nixl blocks stay on one host"):
        placed(monkeypatch, FakeRay(nodes=3))
    with pytest.raises(ConfigError, match=r"--cluster ray://nobody:1: no answer"):
        placed(monkeypatch, FakeRay(), "ray://nobody:1")


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'benthic\[cluster\]'"):
        RayPlace("auto", Needs(gpus=0, cpus=1), moves_between_hosts=False)
