"""What `train_ranks.py` trains and `plan_accuracy.py` foretells: slices of Moonlight and their layouts."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from benthic.spec import presets
from benthic.spec.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benthic.spec.model import ModelConfig

LAYOUTS: Final[dict[str, Layout]] = {
    "pp2": Layout(pp_degree=2),
    "ep2": Layout(dp_degree=2, ep_degree=2),
    "zero3": Layout(dp_degree=2, zero_stage=3),
    "dualpipe": Layout(pp_degree=2, schedule="dualpipe"),
    "zb-h1": Layout(pp_degree=2, schedule="zb-h1"),
    "dualpipev-ep2": Layout(dp_degree=2, ep_degree=2, schedule="dualpipev"),
    "tp2": Layout(tp_degree=2),
    "cp2": Layout(cp_degree=2),
}
KEPT_PAIRS: Final = 0.81
"""Share of causal pairs that document masks leave of the standard library's sources, in rows of 4,096 tokens
of their own tokenizer of 4,096 words: 96 rows with 1.9 documents each."""
FIRST: Final = 6
"""Steps before those that are timed. Where experts are divided every microbatch brings other numbers of rows,
and until most have come by memory is asked of the driver, and on a fresh machine kernels are compiled."""


def timed(steps: int) -> slice:
    """Which of so many steps count: all but the first six, and at least three if there are as many."""
    return slice(max(0, min(FIRST, steps - 3)), None)


def steady(seconds: Sequence[float]) -> float:
    """The median of the steps that count."""
    return statistics.median(seconds[timed(len(seconds))])


def moonlight() -> ModelConfig:
    """All of it, with the token ids of the tokenizer."""
    return replace(presets.get("moonlight-16b-a3b"), bos_token_id=0, eos_token_id=1)


def moonlight_slice() -> ModelConfig:
    """One dense and three mixture layers of full width, and a vocabulary of 32,768."""
    return replace(moonlight(), name="moonlight-slice", num_hidden_layers=4, vocab_size=32768)
