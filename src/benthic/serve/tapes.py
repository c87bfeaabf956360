"""Decode steps on a CPU from tapes: a recorded forward pass for each batch size, replayed without Python.

The plain loop stays beside it and must give the same tokens; whatever a tape cannot hold (prefill rows, other
dtypes or devices, a batch too large to be worth it) runs plainly.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from benthic.errors import BackendError
from benthic.kernels.constants import Constants
from benthic.kernels.tape import Tape, record
from benthic.model.sockets import Sockets
from benthic.serve.attend import DecodeRows, PagedAttend, StepLayout
from benthic.serve.steps import Replayed

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from benthic.model.network import DeepSeek
    from benthic.model.sockets import Exchange, Linear
    from benthic.serve.cache import LatentCache
    from benthic.serve.steps import StepTensors

logger = logging.getLogger("benthic.serve.engine")

MOST_BYTES: Final = 256 << 20
"""What all tapes together may keep; the tape not used for longest goes first."""

SEEN_BEFORE: Final = 3
"""A batch size is recorded when it comes for this time: recording costs about as much as five plain steps."""


@dataclass(frozen=True)
class Inputs:
    """The tensors that a tape of S sequences reads, overwritten before every replay.

    As recorded they store nothing (slot -1) and attend to nothing (context 0).
    """

    tokens_S: Tensor
    positions_S: Tensor
    slot_S: Tensor
    block_table_SP: Tensor
    context_S: Tensor

    @classmethod
    def blank(cls, sequences: int, columns: int) -> Inputs:
        """Inputs of a step that does nothing."""
        zeros = torch.zeros(sequences, dtype=torch.int64)
        return cls(
            tokens_S=zeros,
            positions_S=zeros.clone(),
            slot_S=torch.full_like(zeros, -1),
            block_table_SP=torch.zeros((sequences, columns), dtype=torch.int32),
            context_S=torch.zeros(sequences, dtype=torch.int32),
        )

    def fill(self, step: StepTensors, decode: DecodeRows) -> None:
        """Take over a step's tokens, positions, slots and pages."""
        pages_SP = decode.block_table_SP.numpy()
        self.tokens_S.numpy()[:] = step.tokens_T.numpy()
        self.positions_S.numpy()[:] = step.positions_T.numpy()
        self.slot_S.numpy()[:] = step.layout.slot_T.numpy()
        self.block_table_SP.numpy()[:, : pages_SP.shape[1]] = pages_SP
        self.context_S.numpy()[:] = decode.context_S.numpy()


class DecodeTapes:
    """Tapes by batch size over one model and its cache.

    Args:
        model: on a CPU, in float32, its weights laid out for `linear`.
        cache: its pages.
        linear: the socket; its products must be native.
        exchange: the socket.
        columns: columns of the block table, enough for the longest sequence.
        most_bytes: what all tapes together may keep.
    """

    def __init__(
        self,
        model: DeepSeek,
        cache: LatentCache,
        *,
        linear: Linear,
        exchange: Exchange,
        columns: int,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self.refusal: str | None = None
        self._model = model
        self._cache = cache
        self._linear = linear
        self._exchange = exchange
        self._columns = columns
        self._most_bytes = most_bytes
        self._constants = Constants(model.parameters())
        self._tapes: OrderedDict[int, tuple[Inputs, Tape]] = OrderedDict()
        self._seen: Counter[int] = Counter()

    def __len__(self) -> int:
        """How many batch sizes are recorded."""
        return len(self._tapes)

    def profile(self, clock: Callable[[], float]) -> dict[int, dict[str, float]]:
        """Seconds of one replay by batch size and function, on the inputs of its latest step."""
        return {sequences: tape.profile(clock) for sequences, (_, tape) in self._tapes.items()}

    def warm_up(self) -> None:
        """Record the tape of one sequence, which tells whether this model can be taped at all."""
        self._record(1)
        if self.refusal is not None:
            logger.info("decode steps run plainly: %s", self.refusal)

    def run(self, step: StepTensors) -> Replayed | None:
        """A step of decode rows alone; None if the plain loop has to run it.

        The next call overwrites what this one returned.
        """
        decode = step.layout.decode
        if (
            decode is None
            or step.layout.prefill is not None
            or step.sampled_S is not None
            or decode.queries != 1
        ):
            return None
        found = self._tape_for(step.tokens_T.shape[0])
        if found is None:
            return None
        inputs, tape = found
        inputs.fill(step, decode)
        return Replayed(*tape.replay())

    def _tape_for(self, sequences: int) -> tuple[Inputs, Tape] | None:
        if sequences in self._tapes:
            self._tapes.move_to_end(sequences)
            return self._tapes[sequences]
        self._seen[sequences] += 1
        if self.refusal is not None or self._seen[sequences] != SEEN_BEFORE:
            return None
        return self._record(sequences)

    def _record(self, sequences: int) -> tuple[Inputs, Tape] | None:
        inputs = Inputs.blank(sequences, self._columns)
        decode = DecodeRows(1, inputs.block_table_SP, inputs.context_S)
        attend = PagedAttend(self._cache, StepLayout(inputs.slot_S, decode, None))
        sockets = Sockets(attend, self._exchange, self._linear)

        def forward() -> tuple[Tensor, Tensor, Tensor]:
            hidden = self._model(inputs.tokens_S, inputs.positions_S, sockets)
            logits_SV = self._model.logits(hidden.hidden_TD, self._linear)
            return hidden.pre_norm_TD, hidden.hidden_TD, logits_SV

        try:
            tape = record(forward, self._constants)
        except BackendError as error:
            self.refusal = str(error)
            return None
        if tape.num_bytes > self._most_bytes:
            return None
        self._tapes[sequences] = (inputs, tape)
        while sum(kept.num_bytes for _, kept in self._tapes.values()) > self._most_bytes:
            forgotten, _ = self._tapes.popitem(last=False)
            del self._seen[forgotten]
        return self._tapes[sequences]
