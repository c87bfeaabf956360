"""How often the host calls an operator, and a collective, for one microbatch.

Counted where torch dispatches them, in a step of the trainer on a CPU, whose experts are reached by
all-to-all: `benchmarks/launches.py` counts, and a test holds these numbers to what it found. A GPU's own
kernels stand for several of these calls, but each is launched from Python and takes the host about as long.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from benthic.plan.training.block import Shape


class Calls(NamedTuple):
    """Operators of a forward, a backward to the input and weights; collectives of the first two."""

    forward: int = 0
    input: int = 0
    weight: int = 0
    forward_collectives: int = 0
    input_collectives: int = 0

    def plus(self, other: Calls) -> Calls:
        """Both."""
        return Calls(*(a + b for a, b in zip(self, other, strict=True)))


DENSE: Final = Calls(100, 123, 25)
MIXTURE: Final = Calls(170, 201, 138)
HEAD: Final = Calls(43, 25)
PROJECTION: Final = Calls(27, 42, 4)
DENSE_CUTS: Final = Calls(7)
MIXTURE_CUTS: Final = Calls(20)
"""Of a block cut into its phases, where slots of the table overlap two microbatches."""
LOW_RANK_QUERY: Final = Calls(10, 18, 4)
TENSOR: Final = Calls(30, 31, 0, 5, 5)
CONTEXT: Final = Calls(72, 65, 0, 1, 1)
SHARED_BALANCE: Final = Calls(forward_collectives=1)
"""A mixture's counts, summed over the ranks that share a row."""
EXPERTS: Final = Calls(135, 111, 0, 4, 3)
SHARDED_SUMS: Final = Calls(0, 42, 0, 0, 3)
"""From ZeRO-2 on, for every block."""
SHARDED_WEIGHTS: Final = Calls(0, 0, 0, 3, 3)
"""Under ZeRO-3, on top."""
ATTENTION_AGAIN: Final = Calls(input=118)
EXPERTS_AGAIN: Final = Calls(input=67)
MLP_AGAIN: Final = Calls(input=20)


def of_block(shape: Shape, *, moe: bool) -> Calls:
    """Of one block, without what ZeRO adds."""
    apart = moe and shape.ep > 1
    parts = (
        (MIXTURE if moe else DENSE, True),
        (MIXTURE_CUTS if moe else DENSE_CUTS, shape.cut),
        (LOW_RANK_QUERY, shape.model.q_lora_rank is not None),
        (TENSOR, shape.tp > 1),
        (CONTEXT, shape.cp > 1),
        (SHARED_BALANCE, moe and shape.tp * shape.cp > 1),
        (EXPERTS, apart),
        (ATTENTION_AGAIN, "attention" in shape.again),
        (EXPERTS_AGAIN if moe else MLP_AGAIN, "experts" in shape.again),
    )
    found = Calls()
    for calls, made in parts:
        found = found.plus(calls) if made else found
    return found


def of_zero(stage: int) -> Calls:
    """What ZeRO adds to every block."""
    if stage == 1:
        return Calls()
    return SHARDED_SUMS.plus(SHARDED_WEIGHTS) if stage == 3 else SHARDED_SUMS


def of_end(name: str) -> Calls:
    """Of an "embedding", a "head", or the "projection" of a prediction module."""
    return {"embedding": Calls(), "head": HEAD, "projection": PROJECTION}[name]
