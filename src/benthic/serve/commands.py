"""What rank 0 of an engine tells the other ranks to run, and what they answer: numbers, no tensors.

What tensors there are in a command (drafted and drawn tokens) follow it through a collective, from device to
device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from benthic.sched.plans import BlockCopy, Prefill, StepPlan, TableWrite
from benthic.serve.transfer.handshake import Region  # noqa: TC001 (msgspec reads the annotations of messages)

if TYPE_CHECKING:
    from benthic.serve.drafts import Drafts


class Step(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Run a plan. `drafts` counts those of each decode, which follow; None without any."""

    num_tokens: int
    slots: tuple[int, ...]
    positions: tuple[int, ...]
    planned: tuple[int, ...]
    prefills: tuple[Prefill, ...]
    tables: tuple[TableWrite, ...]
    drafts: tuple[int, ...] | None

    @classmethod
    def of(cls, plan: StepPlan, drafts: Drafts | None) -> Step:
        """The command to run `plan` and verify `drafts`."""
        return cls(
            num_tokens=plan.num_tokens,
            slots=plan.decode_slots,
            positions=plan.decode_positions,
            planned=plan.decode_drafts,
            prefills=plan.prefills,
            tables=plan.tables,
            drafts=None if drafts is None else drafts.counts,
        )

    def plan(self, slots: tuple[int, ...]) -> StepPlan:
        """The plan as far as a runner reads it: decodes have no names, and nothing has happened.

        `slots` equal its own; a runner that is handed the same tuple again need not send it to the device.
        """
        return StepPlan(
            number=0,
            num_tokens=self.num_tokens,
            decode_ids=("",) * len(slots),
            decode_slots=slots,
            decode_positions=self.positions,
            decode_drafts=self.planned,
            prefills=self.prefills,
            tables=self.tables,
            events=(),
        )


class Move(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Make the copies of a plan between the device's blocks and the host's."""

    to_host: tuple[BlockCopy, ...]
    from_host: tuple[BlockCopy, ...]


class Score(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Compute the logits of rows `start` to `stop` of the latest step."""

    start: int
    stop: int


class Remember(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Note the newest token of each slot; the tokens follow."""

    slots: tuple[int, ...]


class Draft(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Draft for the decodes of a plan by the prediction modules; what is guessed follows, token by token."""

    step: Step


class Learn(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Run the prediction modules over the latest step, of which `rows` tokens were drawn, which follow."""

    rows: int


class OpenPages(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Map the pages of another instance, which `regions` are, by rank: rank r takes r mod their number."""

    instance_id: str
    regions: tuple[Region, ...]


class ClosePages(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Let another instance's pages go."""

    instance_id: str


class Fetch(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Copy blocks of another instance into blocks of this one; answered by `Fetched`, at any time later."""

    number: int
    instance_id: str
    remote_blocks: tuple[int, ...]
    local_blocks: tuple[int, ...]


class Leave(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """There is nothing more to run."""


class Here(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A rank has come as far as this `stage` of starting."""

    stage: str


class Readable(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Where a rank's pages are, once it has built its engine."""

    region: Region


class Fetched(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A rank writes nothing more for a fetch; `trouble` says why it does not have the blocks, if so."""

    number: int
    trouble: str | None


class Failed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A rank is about to end, and why; `lost` when only because it has lost another one."""

    words: str
    lost: bool


Command = Step | Move | Score | Remember | Draft | Learn | OpenPages | ClosePages | Fetch | Leave
Answer = Here | Readable | Fetched | Failed

encode: Final = msgspec.msgpack.Encoder().encode
decode_command: Final = msgspec.msgpack.Decoder(Command).decode
decode_answer: Final = msgspec.msgpack.Decoder(Answer).decode
