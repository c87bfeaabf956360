"""What a NVLink exchange has room for, and how its rows travel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from benthic.errors import ConfigError
from benthic.parallel.exchange_memory import Shape, words_needed

if TYPE_CHECKING:
    import torch

COPIED_SHARE: Final = 0.8
"""Two ranks, and 4 from top_k 6 on; with 8 ranks and top_k 8 a third of the bytes would be for nothing."""

COPIED_BYTES: Final = 8 << 20
"""23 us at the 370 GB/s between two H200s, of which the start of a copy, about 5 us, is a fifth."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """What an exchange has room for.

    Attributes:
        n_routed_experts: of all ranks together.
        top_k: experts of a token.
        hidden_size: elements of a row.
        dtype: of a row.
        max_tokens: of one rank in one dispatch. Up to 256, kernels cut rows into parts to fill the GPU.
        fp8: send tokens, and in backward the gradient of the output, as E4M3 with 1 x 128 scales.
        in_flight: dispatches (and combines) that may be started before the first of them is finished.
        exact_rows: ask the device how many rows arrived, so that nothing after it works on spare ones; the
            host then waits once a dispatch, and no CUDA graph can capture it. Without, there is a row for
            every copy that could arrive.
        keep_arrivals: copy arrived tokens out of the mailbox, so that `finish_dispatch` can run again when
            the experts' phase is recomputed.
        copies: move all rows to all ranks by copy engines, which take no multiprocessor from what computes
            meanwhile, instead of rows to the ranks of their experts by kernels. None: where at least
            `COPIED_SHARE` of all rows go to a rank by uniform routing, 1 - (1 - 1/n)^top_k, and one rank's
            rows are `COPIED_BYTES` or more. Results are the same bits.
    """

    n_routed_experts: int
    top_k: int
    hidden_size: int
    dtype: torch.dtype
    max_tokens: int
    fp8: bool = False
    in_flight: int = 1
    exact_rows: bool = False
    keep_arrivals: bool = False
    copies: bool | None = None

    def kinds(self, ranks: int) -> list[Shape]:
        """The mailboxes of the way out and of the way home.

        Raises:
            ConfigError: a row is not a whole number of words.
        """
        row = self.hidden_size * self.dtype.itemsize
        out = self.hidden_size + 4 * -(-self.hidden_size // 128) if self.fp8 else row
        if row % 4 or out % 4:
            msg = (
                f"rows of {self.hidden_size} x {self.dtype} take {row} bytes ({out} on the way out), which "
                "are not whole words of 4. Use a hidden_size that is a multiple of 4."
            )
            raise ConfigError(msg)
        slots = ranks * self.max_tokens
        return [Shape(slots, out // 4, 2 * self.top_k), Shape(slots, row // 4, self.top_k)]

    def words(self, ranks: int) -> int:
        """Words of memory that each rank shares with the others."""
        return words_needed(self.kinds(ranks), ranks, self.in_flight)

    def copied(self, ranks: int) -> bool:
        """Whether copy engines move rows between so many ranks."""
        if self.copies is not None:
            return self.copies
        share = 1 - (1 - 1 / ranks) ** self.top_k
        out = self.kinds(ranks)[0]
        return share >= COPIED_SHARE and 4 * self.max_tokens * out.row_words >= COPIED_BYTES
