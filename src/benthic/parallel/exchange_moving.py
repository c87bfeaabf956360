"""A transfer of the NVLink exchange from its start to its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benthic.errors import BackendError

if TYPE_CHECKING:
    from torch import Tensor

    from benthic.parallel.exchange_memory import Mailbox
    from benthic.parallel.exchange_stream import Pushed
    from benthic.parallel.exchange_trip import Here


class Moving:
    """A transfer in a mailbox, which is None when it is over; `here` are its tokens if they were kept.

    `count` is how many rows arrive for the experts here, once the host has waited; whoever counted them has
    awaited the mailbox. With `flags` the push raises them itself.
    """

    def __init__(
        self,
        box: Mailbox,
        pushed: Pushed,
        *,
        dweight: bool = False,
        count: Tensor | None = None,
        flags: bool = False,
    ) -> None:
        self.box: Mailbox | None = box
        self.dweight, self.flags = dweight, flags
        self.here: Here | None = None
        self._pushed = pushed
        self._count = count

    def opened(self) -> Mailbox:
        """The mailbox, full.

        Raises:
            BackendError: the transfer is over.
        """
        box = self.filling()
        awaited = self._count is not None
        if self.flags and not awaited:
            box.await_full()
        self.join()
        if not self.flags and not awaited:
            box.await_full()
        return box

    def filling(self) -> Mailbox:
        """The mailbox, whatever of it is there.

        Raises:
            BackendError: the transfer is over.
        """
        if self.box is None:
            msg = (
                "this dispatch was finished before and its mailbox is in use again. To recompute the "
                "experts' phase, build the exchange with keep_arrivals=True."
            )
            raise BackendError(msg)
        return self.box

    def join(self) -> None:
        """Wait for the end of the own push, and let go of what it read."""
        self._pushed.join()

    def rows(self, most: int) -> int:
        """How many rows there are, `most` where nobody counted; the host waits for the number."""
        if self._count is None:
            return most
        self._pushed.wait()
        return int(self._count)
