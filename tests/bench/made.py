"""Requests with known times, and an event loop whose clock jumps to the next timer."""

from __future__ import annotations

import asyncio
import selectors
from typing import TYPE_CHECKING, TypeVar

from benthic.bench.samples import Answer, Delivery, Sample

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from benthic.bench.workload import Work

Result = TypeVar("Result")


class JumpingSelector(selectors.SelectSelector):
    """Never waits: what would be waited for is added to `now`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list:
        assert timeout is not None, "the loop would wait for ever"
        self.now += max(0.0, timeout)
        return super().select(0)


class JumpingLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.selector = JumpingSelector()
        super().__init__(self.selector)

    def time(self) -> float:
        return self.selector.now


def jump(scenario: Callable[[Callable[[], float]], Coroutine[None, None, Result]]) -> Result:
    """Run `scenario(clock)` on a loop whose clock jumps."""
    loop = JumpingLoop()
    try:
        return loop.run_until_complete(scenario(loop.time))
    finally:
        loop.close()


class FakeServer:
    """Answers after `ttft_s`, then a token every `tpot_s`; one request at a time when `serial`."""

    def __init__(
        self, clock: Callable[[], float], *, ttft_s: float, tpot_s: float = 0.0, serial: bool = False
    ) -> None:
        self._clock = clock
        self._ttft_s = ttft_s
        self._tpot_s = tpot_s
        self._turn = asyncio.Semaphore(1 if serial else 1_000_000)
        self.in_flight = 0
        self.most_in_flight = 0

    async def send(self, work: Work) -> Answer:
        sent_s = self._clock()
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        deliveries = []
        async with self._turn:
            await asyncio.sleep(self._ttft_s)
            deliveries.append(Delivery(at_s=self._clock(), tokens=1))
            for _ in range(work.output_tokens - 1):
                await asyncio.sleep(self._tpot_s)
                deliveries.append(Delivery(at_s=self._clock(), tokens=1))
        self.in_flight -= 1
        return Answer(
            sent_s=sent_s,
            ended_s=self._clock(),
            deliveries=tuple(deliveries),
            output_tokens=work.output_tokens,
            counted=True,
        )


def sample(
    *times: tuple[float, int], due: float = 0.0, sent: float | None = None, error: str | None = None
) -> Sample:
    """A request due at `due` with deliveries (time, tokens)."""
    deliveries = tuple(Delivery(at_s=at_s, tokens=tokens) for at_s, tokens in times)
    answer = Answer(
        sent_s=due if sent is None else sent,
        ended_s=times[-1][0] if times else due,
        deliveries=deliveries,
        output_tokens=sum(tokens for _, tokens in times),
        counted=True,
        error=error,
    )
    return Sample(origin_s=due, ready_s=due, input_tokens=5, answer=answer)
