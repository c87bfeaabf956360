"""A request as it arrives, and the scheduler's own record of it while it lives."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum, auto
from typing import Any

from benthic.errors import AdmissionError
from benthic.sched.plans import Finished, FinishReason


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One sequence to generate.

    Attributes:
        request_id: unique among the requests in flight.
        prompt: token ids, or None when only `prompt_len` is known (counted requests).
        prompt_len: prompt tokens; taken from `prompt` when that is given.
        max_tokens: most tokens to generate; 0 computes the prompt and generates nothing.
        min_tokens: eos and stop ids end the request only after this many other tokens.
        stop_token_ids: tokens that end it, besides eos.
        ignore_eos: eos does not end it.
        priority: lower numbers go first.
        salt: requests share cached blocks only under equal salts.
        speculate: False plans no drafts for it.
        reuse_prefix: False computes every prompt token (prompt log-probabilities need all of them).
        block_keys: for counted requests, one key per full prompt block; equal keys at equal places mean equal
            tokens. The prefix cache works on them as on hashes of tokens.
        hold: when it ends by length, its computed blocks stay under a lease for another instance.
        pull: another instance has computed all but the last token of the prompt; see `benthic.sched.pulls`.

    Raises:
        AdmissionError: the prompt is empty, a count is negative, or the lengths contradict each other.
    """

    request_id: str
    prompt: tuple[int, ...] | None = None
    prompt_len: int = -1
    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    priority: int = 0
    salt: str = ""
    reuse_prefix: bool = True
    speculate: bool = True
    block_keys: tuple[int, ...] = ()
    hold: bool = False
    pull: bool = False

    def __post_init__(self) -> None:
        if self.prompt is not None:
            if self.prompt_len not in (-1, len(self.prompt)):
                msg = (
                    f"request {self.request_id!r}: prompt_len = {self.prompt_len}, but its prompt has "
                    f"{len(self.prompt)} tokens. Leave prompt_len out."
                )
                raise AdmissionError(msg)
            object.__setattr__(self, "prompt_len", len(self.prompt))
        if self.prompt_len < 1:
            msg = (
                f"request {self.request_id!r}: the prompt has {max(self.prompt_len, 0)} tokens, but needs 1. "
                "Start an empty prompt with the bos token."
            )
            raise AdmissionError(msg)
        if self.max_tokens < 0 or not 0 <= self.min_tokens <= self.max_tokens:
            msg = (
                f"request {self.request_id!r}: min_tokens = {self.min_tokens}, max_tokens = "
                f"{self.max_tokens}, but 0 <= min_tokens <= max_tokens must hold."
            )
            raise AdmissionError(msg)

    def changed(self) -> dict[str, Any]:
        """The fields that differ from their defaults, for a recording."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.prompt is not None:
            del values["prompt_len"]
        defaults = {field.name: field.default for field in fields(self)}
        return {name: value for name, value in values.items() if value != defaults[name]}


class Phase(Enum):
    """Where a sequence is in its life."""

    WAITING = auto()
    """Has no slot: in the queue, or parked behind a request that computes its prefix."""
    PULLING = auto()
    """Has a slot and blocks, whose contents come from another instance."""
    PREFILLING = auto()
    """Has a slot and blocks for its known tokens; some of them are not planned yet."""
    DECODING = auto()
    """One token (and drafts) a step."""
    DRAINING = auto()
    """Its last allowed token is planned but not committed."""
    FINISHED = auto()
    """Has an end; its blocks may be held until the plans in flight are committed."""


class SequenceState:
    """The scheduler's record of one request; nobody else writes to it.

    `num_tokens` counts known tokens (prompt and committed output), `planned` the positions handed out in
    plans; committed positions are the first `num_tokens - 1` of a decoding sequence. `horizon` is the
    position at which planning needs a decision (a new block, or the end), `next_check` the token count at
    which committing needs one (a full block, `min_tokens`, or the end): between them both are a comparison
    and an addition.
    """

    __slots__ = (
        "arrived",
        "busy",
        "cached_tokens",
        "first_token",
        "horizon",
        "keys",
        "limit",
        "lost",
        "min_total",
        "next_check",
        "num_registered",
        "num_tokens",
        "phase",
        "planned",
        "preemptions",
        "rank",
        "ready_after",
        "request",
        "slot",
        "started",
        "stops",
        "stops_now",
        "table",
        "ticket",
        "tokens",
        "unwritten",
    )

    def __init__(
        self, request: Request, *, limit: int, rank: tuple[float, int], stops: frozenset[int], arrived: float
    ) -> None:
        self.request = request
        self.tokens: list[int] = [] if request.prompt is None else list(request.prompt)
        self.num_tokens = request.prompt_len
        self.limit = limit
        self.rank = rank
        self.arrived = arrived
        self.stops = stops
        self.stops_now: frozenset[int] = frozenset() if request.min_tokens else stops
        self.min_total = request.prompt_len + request.min_tokens
        self.phase = Phase.WAITING
        self.slot = -1
        self.table: list[int] = []
        self.keys: list[bytes] = []
        self.num_registered = 0
        self.planned = 0
        self.horizon = 0
        self.next_check = 0
        self.busy = False
        self.lost = 0
        self.ready_after = -1
        self.ticket = -1
        self.cached_tokens = 0
        self.preemptions = 0
        self.unwritten = False
        self.started: float | None = None
        self.first_token: float | None = None

    @property
    def num_generated(self) -> int:
        """Output tokens committed so far."""
        return self.num_tokens - self.request.prompt_len

    def ended(self, reason: FinishReason, now: float, *, stop_token: int | None, kept: int) -> Finished:
        """The event that tells of its end."""
        return Finished(
            request_id=self.request.request_id,
            slot=self.slot,
            reason=reason,
            stop_token=stop_token,
            kept=kept,
            num_generated=self.num_generated,
            cached_tokens=self.cached_tokens,
            preemptions=self.preemptions,
            arrived=self.arrived,
            started=self.started,
            first_token=self.first_token,
            finished=now,
        )

    def vacate(self) -> None:
        """Forget slot, table and progress; the caller gives the blocks back."""
        self.slot = -1
        self.table = []
        self.num_registered = 0
        self.planned = 0
        self.horizon = 0
        self.next_check = 0
        self.busy = False
