"""The values that cross the scheduler's border: its configuration, its plans and its events.

Everything here is immutable and made of ints, strings and tuples, so two plans are equal exactly when they
ask for the same work; a recorded run is replayed by comparing them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from benthic.errors import ConfigError

FinishReason = Literal["stop", "length", "abort", "error"]

_COUNTS = (
    "num_blocks",
    "block_size",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "transfer_blocks",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchingConfig:
    """What one instance can hold and how much it does in one step.

    Attributes:
        num_blocks: blocks in the paged cache.
        block_size: tokens in a block.
        max_model_len: most tokens in a sequence, prompt and output together.
        max_num_seqs: most sequences that hold a slot at once.
        max_num_batched_tokens: most tokens computed in one step; at least `max_num_seqs`, so that every
            running
            sequence can always take its next token.
        num_speculative_tokens: most drafts per decoding sequence and step.
        adaptive_drafts: choose their number from measured step times, see `benthic.sched.drafting`; False
            always plans the most.
        mtp_depth: prediction modules that follow the sequences: chunks carry so many known tokens past
            their end.
        enable_prefix_caching: keep full blocks under the hash of everything before them and reuse them.
        eos_token_ids: tokens that end a sequence unless it ignores them.
        priority_seconds: one level of priority is worth this much waiting. A request of priority p is served
            as if
            it had arrived `p * priority_seconds` later, so a low priority waits longer but never forever.
        watermark: share of the blocks left free when a request is admitted beside running ones; they grow
            into it.
        counted: requests carry lengths instead of token ids (a simulator has none); commit with
            `commit_counts`.
        lease_seconds: how long a held request's blocks stay for their reader without a sign of it.
        lease_share: most of the blocks that held requests may occupy together, leased or being computed.
        transfer_blocks: most blocks pulled in one `Pulls.plan`.
        host_blocks: blocks of host memory that keep what is evicted from the cache; 0 keeps nothing.

    Raises:
        ConfigError: a number is out of range, or a step cannot hold one token of every sequence.
    """

    num_blocks: int
    block_size: int = 64
    max_model_len: int
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    num_speculative_tokens: int = 0
    adaptive_drafts: bool = False
    mtp_depth: int = 0
    enable_prefix_caching: bool = True
    eos_token_ids: tuple[int, ...] = ()
    priority_seconds: float = 60.0
    watermark: float = 0.01
    counted: bool = False
    lease_seconds: float = 30.0
    lease_share: float = 0.5
    transfer_blocks: int = 256
    host_blocks: int = 0

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) < 1:
                msg = f"{name} = {getattr(self, name)}, but at least 1 is needed."
                raise ConfigError(msg)
        if self.max_num_batched_tokens < self.max_num_seqs:
            msg = (
                f"max_num_batched_tokens = {self.max_num_batched_tokens} is below max_num_seqs = "
                f"{self.max_num_seqs}: a step could not hold one token of every running sequence. "
                "Raise the first or lower the second."
            )
            raise ConfigError(msg)
        if self.num_speculative_tokens < 0:
            msg = f"num_speculative_tokens = {self.num_speculative_tokens}; use 0 to draft nothing."
            raise ConfigError(msg)
        if self.host_blocks < 0:
            msg = f"host_blocks = {self.host_blocks}; use 0 to keep no evicted block."
            raise ConfigError(msg)
        if not 0.0 <= self.watermark < 1.0:
            msg = f"watermark = {self.watermark} is not a share in [0, 1)."
            raise ConfigError(msg)
        if not 0.0 < self.lease_share <= 1.0:
            msg = f"lease_share = {self.lease_share} is not a share in (0, 1]."
            raise ConfigError(msg)
        if not self.lease_seconds > 0.0:
            msg = f"lease_seconds = {self.lease_seconds}; nobody can read in 0 s."
            raise ConfigError(msg)
        if not self.priority_seconds >= 0.0:
            msg = f"priority_seconds = {self.priority_seconds}; a level cannot be worth less than 0 s."
            raise ConfigError(msg)


class Prefill(NamedTuple):
    """Compute `length` tokens of a sequence from position `start`; they attend to all positions before them.

    `tokens` are the ids at those positions (`None` when requests are counted). `samples` marks the chunk that
    ends the known tokens: a token is drawn from its last position. `ahead` are known tokens behind the chunk.
    """

    request_id: str
    slot: int
    start: int
    length: int
    tokens: tuple[int, ...] | None
    samples: bool
    ahead: tuple[int, ...] = ()


class TableWrite(NamedTuple):
    """Write `blocks` into row `slot` of the block table from column `first`; the rest stays.

    A write at column 0 starts a new sequence in that slot: what the row held before is meaningless.
    """

    slot: int
    first: int
    blocks: tuple[int, ...]


class BlockCopy(NamedTuple):
    """A block of the device's cache and the block of host memory that it is copied to, or from."""

    device: int
    host: int


class TransferPlan(NamedTuple):
    """Fill `blocks` with columns `first`, `first + 1`, … of what the request's lease holds.

    `last` marks the transfer that ends its request's pull; an early pull has none. Transfers are numbered
    from 0; those of one request come back in order.
    """

    number: int
    request_id: str
    first: int
    blocks: tuple[int, ...]
    last: bool


class Started(NamedTuple):
    """A request got a slot. `cached_tokens` were found in the prefix cache; `resumed` after a preemption."""

    request_id: str
    slot: int
    cached_tokens: int
    resumed: bool


class Preempted(NamedTuple):
    """A request lost its slot and blocks to another; it waits, and resumes with the same tokens."""

    request_id: str
    slot: int


class Finished(NamedTuple):
    """A request ended. Its slot and blocks come free when the last plan that uses them is committed.

    Attributes:
        request_id: which request.
        slot: where it ran; -1 when it was waiting.
        reason: "stop" (a stop token), "length" (`max_tokens` or `max_model_len`), "abort" or "error".
        stop_token: the token that ended it, when the reason is "stop".
        kept: how many tokens of its last accepted row count (a stop token may come before the row ends).
        num_generated: tokens generated in all, the stop token included.
        cached_tokens: prompt tokens found in the prefix cache at its first start.
        preemptions: times it lost its blocks.
        arrived: `now` when it was added.
        started: `now` of the first plan that held it, or None.
        first_token: `now` of the commit that gave its first token, or None.
        finished: `now` when it ended.
    """

    request_id: str
    slot: int
    reason: FinishReason
    stop_token: int | None
    kept: int
    num_generated: int
    cached_tokens: int
    preemptions: int
    arrived: float
    started: float | None
    first_token: float | None
    finished: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """One step: every decode and prefill to run in one forward pass.

    The four `decode_*` tuples are parallel. Row i feeds the newest token of `decode_ids[i]` at
    `decode_positions[i]`, followed by up to `decode_drafts[i]` draft tokens whose positions are covered by
    blocks.

    Attributes:
        number: plans are numbered from 0 and committed in this order; -1 for an idle plan (nothing to run).
        num_tokens: most tokens the step computes, drafts included; never above `max_num_batched_tokens`.
        decode_ids: request ids.
        decode_slots: rows of the block table, unique over decodes and prefills.
        decode_positions: position of the first token fed.
        decode_drafts: draft tokens reserved.
        prefills: chunks of prompts (or of prompt and output after a preemption).
        tables: what to write into the block table before the step.
        events: requests started and preempted while planning, in order.
        to_host: evicted blocks to copy to host memory first of all.
        from_host: blocks to copy back next, before anything is computed; see `benthic.sched.host_tier`.
    """

    number: int
    num_tokens: int
    decode_ids: tuple[str, ...]
    decode_slots: tuple[int, ...]
    decode_positions: tuple[int, ...]
    decode_drafts: tuple[int, ...]
    prefills: tuple[Prefill, ...]
    tables: tuple[TableWrite, ...]
    events: tuple[Started | Preempted, ...]
    # left out of `repr`, and so out of the digests of recordings that were made without a host tier
    to_host: tuple[BlockCopy, ...] = field(default=(), repr=False)
    from_host: tuple[BlockCopy, ...] = field(default=(), repr=False)

    @property
    def sampled_ids(self) -> tuple[str, ...]:
        """Requests that draw tokens in this step, in the order `commit` takes them."""
        return self.decode_ids + tuple(chunk.request_id for chunk in self.prefills if chunk.samples)

    @property
    def sampled_slots(self) -> tuple[int, ...]:
        """The slots of `sampled_ids`; the scheduler's own tuple while only decodes run."""
        drawing = tuple(chunk.slot for chunk in self.prefills if chunk.samples)
        return self.decode_slots + drawing if drawing else self.decode_slots


@dataclass(kw_only=True, slots=True)
class Totals:
    """Counters since the scheduler was made (tokens unless named otherwise).

    `prefix_queries` and `prefix_hits` count prompt tokens looked up and found at first starts; `recomputed`
    counts tokens computed again after preemptions (those not found in the prefix cache). Pulled requests
    count in `pulled_blocks` instead: prompts were looked up and computed elsewhere. Of those blocks,
    `early_blocks` came while the prompt was still being computed. `drafts` counts rows
    that had any, `drafted` and `accepted_drafts` their tokens, `accepted_at` those that held by place.
    `host_blocks_out` were copied to host memory at their eviction, `host_blocks_in` came back instead of
    being computed, at first starts (`prefix_hits` counts their tokens too) and after preemptions.
    """

    steps: int = 0
    requests: int = 0
    finished: int = 0
    preemptions: int = 0
    scheduled_tokens: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    recomputed: int = 0
    drafts: int = 0
    drafted: int = 0
    accepted_drafts: int = 0
    accepted_at: list[int] = field(default_factory=list)
    pulled_blocks: int = 0
    early_blocks: int = 0
    host_blocks_out: int = 0
    host_blocks_in: int = 0
