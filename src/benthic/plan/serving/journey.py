"""A simulated request on its way, and the names of its blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benthic.plan.serving.outcome import Served
from benthic.sched.blocks import ROOT, block_key

if TYPE_CHECKING:
    from benthic.plan.serving.demand import Ask
    from benthic.plan.serving.fronts import Front
    from benthic.plan.serving.group import Lane


@dataclass(eq=False)
class Journey:
    """One request on its way. `alone`: one instance shall do all of it. `lent`: it is pulled early."""

    request_id: str
    ask: Ask
    keys: tuple[bytes, ...]
    front: Front
    decode: Lane | None = None
    owner: Lane | None = None
    prefilled_by: str = ""
    alone: bool = False
    leased: bool = False
    lent: bool = False
    first_token_s: float = math.nan
    cached_tokens: int = 0
    preemptions: int = 0


def served(journey: Journey, now: float) -> Served:
    """What became of it, once its last token is written."""
    ask, first = journey.ask, journey.first_token_s
    gaps = ask.output_tokens - 1
    return Served(
        at_s=ask.at_s,
        prompt_tokens=ask.prompt_tokens,
        output_tokens=ask.output_tokens,
        ttft_s=first - ask.at_s,
        tpot_s=(now - first) / gaps if gaps else None,
        e2e_s=now - ask.at_s,
        cached_tokens=journey.cached_tokens,
        preemptions=journey.preemptions,
        prefill=journey.prefilled_by,
        decode=known(journey.decode).name,
    )


def early_name(request_id: str) -> str:
    """Under which its prompt is pulled while it is being computed."""
    return f"{request_id}/early"


def block_names(journey: Journey) -> dict[str, Any]:
    """What names the blocks of a pull: those of a prompt that nobody else has get keys of their own."""
    if journey.ask.keys or not journey.lent:
        return {"block_keys": journey.ask.keys}
    columns = journey.ask.prompt_tokens // known(journey.decode).scheduler.config.block_size
    return {"block_keys": tuple(range(columns)), "salt": journey.request_id}


def known(lane: Lane | None) -> Lane:
    """The lane that a request was given."""
    assert lane is not None, "a request is routed before it is sent"  # noqa: S101 (ours to keep)
    return lane


def chain(keys: tuple[int, ...]) -> tuple[bytes, ...]:
    """One key for every beginning that these keys of blocks make."""
    parent, beginnings = ROOT, []
    for key in keys:
        parent = block_key(parent, repr(key).encode())
        beginnings.append(parent)
    return tuple(beginnings)
