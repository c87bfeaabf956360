"""Shared experts beside routed ones, latents beside queries: a second stream in the graph of a decode step.

Choosing experts, sorting rows and the small kernels between products leave most of a GPU idle, and so do
products of a few rows. Side by side both end sooner. Only where a graph is recorded: the two
waits between streams cost the host more than they save where it launches kernel by kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch

from benthic.kernels.ops.moe import DOZENS_FROM
from benthic.model.sockets import at_once

if TYPE_CHECKING:
    from collections.abc import Callable

    from benthic.model.sockets import Aside

T = TypeVar("T")


def aside_for(device: torch.device) -> Aside:
    """What a step's side work runs on: a stream of its own on a GPU."""
    return SecondStream(device) if device.type == "cuda" else at_once


class SecondStream:
    """Runs work on a stream of its own while a CUDA graph is recorded, at once otherwise.

    Memory that the work takes belongs to that stream. What it reads and returns may be given up after the
    result was taken: the next work starts behind everything that came before it, or before its moment.
    """

    def __init__(self, device: torch.device) -> None:
        # or it would wait for the last program of a product beside it to begin, and then hide behind nothing
        self._stream = torch.cuda.Stream(device, priority=-1)

    def moment(self, rows_an_expert: float) -> torch.cuda.Event | None:
        """See `benthic.model.sockets.Aside`.

        With dozens of rows and more, experts' products hold whole multiprocessors: shared experts then begin
        beside the gate, though they delay it. With fewer there is room for them beside experts.
        """
        early = rows_an_expert >= DOZENS_FROM and torch.cuda.is_current_stream_capturing()
        return torch.cuda.current_stream().record_event() if early else None

    def __call__(self, work: Callable[[], T], since: torch.cuda.Event | None = None) -> Callable[[], T]:
        """See `benthic.model.sockets.Aside`."""
        if not torch.cuda.is_current_stream_capturing():
            return at_once(work)
        self._stream.wait_event(since or torch.cuda.current_stream().record_event())
        with torch.cuda.stream(self._stream):
            result = work()

        def taken() -> T:
            torch.cuda.current_stream().wait_stream(self._stream)
            return result

        return taken
