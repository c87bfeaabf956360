"""Which instances are started again."""

from __future__ import annotations

import asyncio

from benthic.errors import EngineDeadError
from benthic.serve.members import Members
from benthic.serve.messages import Ready
from benthic.serve.restarts import WINDOW_S, Restarts

READY = Ready(model_name="m", max_model_len=8, vocab_size=8, eos_token_ids=(1,), num_blocks=4, block_size=2)


class Client:
    """An instance that comes up and ends when it is told."""

    stats = trouble = None

    def __init__(self) -> None:
        self.up: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self.dead: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def end(self) -> None:
        if not self.up.done():
            self.up.set_exception(EngineDeadError("no memory"))
        self.dead.set_result("no memory")

    async def wait_ready(self) -> Ready:
        return await asyncio.shield(self.up)

    async def wait_dead(self) -> str:
        return await asyncio.shield(self.dead)

    async def close(self) -> None:
        if not self.dead.done():
            self.end()


async def settle() -> None:
    for _ in range(9):
        await asyncio.sleep(0)


def test_an_instance_is_replaced_again_when_its_heir_does_not_come_up_but_a_first_one_is_not() -> None:
    async def scenario() -> None:
        clients: dict[str, Client] = {}

        def connect(name: str, _index: int) -> Client:
            return clients.setdefault(name, Client())

        members = Members(connect, restarts=3)
        members.join("decode")
        members.join("prefill")
        clients["decode-0"].up.set_result(READY)
        clients["prefill-1"].end()
        await settle()
        assert [member.name for member in members] == ["decode-0"]
        for name in ("decode-0", "decode-2", "decode-3"):
            clients[name].end()
            await settle()
        assert [member.name for member in members] == ["decode-4"]
        clients["decode-4"].end()
        await settle()
        assert not len(members)
        await members.close()

    asyncio.run(scenario())


def test_restarts_come_back_after_an_hour() -> None:
    now = 0.0
    restarts = Restarts(2, lambda: now)
    assert [restarts.take() for _ in range(3)] == [True, True, False]
    now = WINDOW_S - 1
    assert not restarts.take()
    now = WINDOW_S + 1
    assert [restarts.take() for _ in range(3)] == [True, True, False]
    assert not Restarts(0).take()
