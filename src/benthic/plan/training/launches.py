"""How often the host calls an operator or a kernel, and a collective, for one microbatch.

Counted in a step of the trainer on torch's meta device with the choices of a GPU: what torch dispatches,
views and empty tensors too, launches of Triton kernels, events and switches of streams.
`benchmarks/launches.py` counts, and a test holds these numbers to what it found.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benthic.plan.training.shape import Shape


class Calls(NamedTuple):
    """Calls of a forward, a backward to the input and weights; collectives of the first two."""

    forward: int = 0
    input: int = 0
    weight: int = 0
    forward_collectives: int = 0
    input_collectives: int = 0

    def plus(self, other: Calls) -> Calls:
        """Both."""
        return Calls(*(a + b for a, b in zip(self, other, strict=True)))


STAGE: Final = Calls(6)
"""For what enters and leaves a stage."""
EMBEDDING: Final = Calls(2, 11)
DENSE: Final = Calls(48, 52, 13)
MIXTURE: Final = Calls(86, 87, 16)
HEAD: Final = Calls(13, 23)
CUT: Final = Calls(8, 8)
"""Of a cut between two phases. Torch dispatches nothing for it backward, but another run of autograd takes
the host as long: forward and backward 0.15 ms on a host that takes 10 us for a call."""
PROJECTION: Final = Calls(19, 4, 2).plus(Calls(input=CUT.input))
DENSE_FP8: Final = Calls(28, 64, 14)
MIXTURE_FP8: Final = Calls(39, 78, 22)
JOINED: Final = Calls(2, 11)
"""A mixture whose experts are one step, on top of FP8."""
LOW_RANK_QUERY: Final = Calls(5, 8, 2)
TENSOR: Final = Calls(22, 20, 0, 5, 5)
CONTEXT: Final = Calls(7, 9, 0, 1, 1)
SHARED_BALANCE: Final = Calls(forward_collectives=1)
"""A mixture's counts, summed over the ranks that share a row."""
EXPERTS_NEAR: Final = Calls(62, 48)
"""Experts of ranks of one host, whose memory kernels write."""
EXPERTS_FAR: Final = Calls(31, 8, 0, 4, 3)
"""By all-to-all."""
SENT_FP8: Final = Calls(17, 23)
"""Of rows that travel in FP8, packed and unpacked, and of the phase that is cut off for it."""
SHARDED_SUMS: Final = Calls(2, 42, 0, 0, 3)
"""From ZeRO-2 on, for every block."""
SHARDED_WEIGHTS: Final = Calls(3, CUT.input, 0, 3, 3)
"""Under ZeRO-3, on top: every block is a phase."""
ATTENTION_AGAIN: Final = Calls(input=73)
EXPERTS_AGAIN: Final = Calls(input=43)
MLP_AGAIN: Final = Calls(input=13)
KEEPING: Final = (Calls(19, 18), Calls(26, 24))
"""Of a block, dense or mixed, that does not keep all: what autograd saves is looked at, as in FP8 always."""
NORMS_AGAIN: Final = (Calls(4, 16), Calls(4, 22))
NORMS_AGAIN_FP8: Final = (Calls(4, 24), Calls(4, 29))
UP_AGAIN: Final = (Calls(2, 29), Calls(2, 30))
UP_AGAIN_FP8: Final = (Calls(2, 36), Calls(2, 36))
SWIGLU_AGAIN: Final = (Calls(input=3), Calls(input=6))
FP8_SWIGLU: Final = (Calls(4, 3), Calls(8, 6))
E5M6: Final = Calls(6, 5)
MESSAGE: Final = Calls(forward_collectives=1, input_collectives=1)
"""Between two pipeline ranks: one is sent or received for a forward, one for its backward."""


def of_block(shape: Shape, *, moe: bool) -> Calls:
    """Of one block, without what ZeRO adds."""
    apart, near = moe and shape.ep > 1, shape.ep <= shape.gpus_per_node
    narrow = shape.products == "fp8"
    parts = (
        (MIXTURE if moe else DENSE, True),
        (MIXTURE_FP8 if moe else DENSE_FP8, narrow),
        (JOINED, moe and shape.joined),
        (LOW_RANK_QUERY, shape.model.q_lora_rank is not None),
        (TENSOR, shape.tp > 1),
        (CONTEXT, shape.cp > 1),
        (SHARED_BALANCE, moe and shape.tp * shape.cp > 1),
        (EXPERTS_NEAR if near else EXPERTS_FAR, apart),
        (SENT_FP8, apart and narrow),
        (CUT.plus(CUT), apart and shape.cut),
        *_pieces(shape, moe=moe),
        (ATTENTION_AGAIN, "attention" in shape.again),
        (EXPERTS_AGAIN if moe else MLP_AGAIN, "experts" in shape.again),
    )
    found = Calls()
    for calls, made in parts:
        found = found.plus(calls) if made else found
    return found


def _pieces(shape: Shape, *, moe: bool) -> Iterator[tuple[Calls, bool]]:
    """What is not kept, or kept narrow, of phases that are not computed again as a whole."""
    again, narrow = shape.again, shape.products == "fp8"
    attention, experts = "attention" not in again, "experts" not in again
    norms, up = "norms" in again and attention and experts, "up_projections" in again and attention
    swiglu = "swiglu" in again and experts
    yield KEEPING[moe], not narrow and (norms or up or swiglu or shape.e5m6_attention)
    yield (NORMS_AGAIN_FP8 if narrow else NORMS_AGAIN)[moe], norms
    yield (UP_AGAIN_FP8 if narrow else UP_AGAIN)[moe], up
    yield SWIGLU_AGAIN[moe], swiglu
    yield FP8_SWIGLU[moe], shape.fp8_swiglu and experts
    yield E5M6, shape.e5m6_attention and attention


def of_zero(stage: int) -> Calls:
    """What ZeRO adds to every block."""
    if stage == 1:
        return Calls()
    return SHARDED_SUMS.plus(SHARDED_WEIGHTS) if stage == 3 else SHARDED_SUMS


def of_end(name: str) -> Calls:
    """Of an "embedding", a "head", or the "projection" of a prediction module."""
    return {"embedding": EMBEDDING, "head": HEAD, "projection": PROJECTION}[name]


def of_stage(messages: int) -> Calls:
    """Of a stage beside its blocks and ends, of whose two neighbours so many are other pipeline ranks."""
    found = STAGE
    for _ in range(messages):
        found = found.plus(MESSAGE)
    return found
