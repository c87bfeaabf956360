"""An end to waiting: pieces of an answer for as long as its deadline allows."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from benthic.serve.api_errors import ApiError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

Item = TypeVar("Item")


async def until_deadline(
    items: AsyncIterator[Item], *, arrival_s: float, timeout_s: float | None, clock: Callable[[], float]
) -> AsyncGenerator[Item]:
    """The items that come within `timeout_s` of `arrival_s`; None waits for ever.

    Raises:
        ApiError: 408 when the time is over; whoever owns `items` closes them.
    """
    if timeout_s is None:
        async for item in items:
            yield item
        return
    while True:
        try:
            item = await asyncio.wait_for(anext(items), max(0.0, arrival_s + timeout_s - clock()))
        except StopAsyncIteration:
            return
        except TimeoutError:
            msg = f"the answer was not complete within {timeout_s:g} s of the request's arrival (timeout_s)"
            raise ApiError(408, msg, param="timeout_s", code="deadline_exceeded") from None
        yield item
