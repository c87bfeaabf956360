"""Which exchange the ranks of a layout use, and why: a pure decision on facts that are gathered apart."""

from __future__ import annotations

import importlib.util
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import torch
import torch.distributed as dist

from benthic.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Sequence

Name = Literal["local", "all_to_all", "nvlink"]
NAMES: Final = ("auto", "local", "all_to_all", "nvlink")
GPUS_OF_A_HOST: Final = 8


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the choice depends on; every rank of a group finds the same.

    Attributes:
        device: type of the ranks' devices.
        ranks: of the group that shares the experts.
        hosts: machines they are on.
        peers: every GPU of the group can write every other's memory.
        triton: whether our kernels can be compiled here.
        combine_again: the backward pass finishes a combine a second time, because its phase is recomputed.
    """

    device: str
    ranks: int
    hosts: int = 1
    peers: bool = False
    triton: bool = False
    combine_again: bool = False


def choose_exchange(facts: Facts, asked: str = "auto") -> tuple[Name, str]:
    """The exchange and the reason; `asked` names one, and it is refused when it cannot run.

    Raises:
        BackendError: there is no such exchange, or it cannot run on these facts.
    """
    if asked not in NAMES:
        msg = f"there is no exchange {asked!r}; known: {', '.join(NAMES)}"
        raise BackendError(msg)
    refusals = {"local": _local_refusal(facts), "nvlink": _nvlink_refusal(facts), "all_to_all": None}
    if asked != "auto" and (refusal := refusals[asked]) is not None:
        msg = f"the exchange {asked!r} cannot run here: {refusal}. Set exchange.kind=auto."
        raise BackendError(msg)
    if asked == "local" or (asked == "auto" and facts.ranks == 1):
        return "local", "one rank holds all experts: nothing travels"
    if asked == "nvlink" or (asked == "auto" and refusals["nvlink"] is None):
        return "nvlink", f"{facts.ranks} GPUs of one host write each other's memory"
    reason = "asked for" if asked == "all_to_all" else str(refusals["nvlink"])
    return "all_to_all", f"{reason}: collectives of the process group, which run anywhere"


def _local_refusal(facts: Facts) -> str | None:
    return None if facts.ranks == 1 else f"{facts.ranks} ranks share the experts"


def _nvlink_refusal(facts: Facts) -> str | None:
    if facts.device != "cuda":
        return f"it moves rows between GPUs, and the device is {facts.device}"
    if facts.hosts > 1:
        return f"the ranks are on {facts.hosts} hosts, and GPUs write only memory of their own"
    if not facts.peers:
        return "some GPU of the group cannot reach another's memory"
    if not facts.triton:
        return "its kernels need Triton, which is not installed"
    if facts.combine_again:
        return "its mailbox is in use again when recompute=combine reads it a second time"
    return None


@dataclass(frozen=True)
class Spot:
    """Where one rank runs: its host, its GPU there, and the GPUs whose memory that one can write."""

    host: str
    gpu: int = 0
    reaches: frozenset[int] = frozenset()


def spots_of(group: dist.ProcessGroup | None, device: torch.device) -> tuple[Spot, ...]:
    """The spot of every rank of a group (None: the default one), in order; a collective call."""
    gpu = torch.cuda.current_device() if device.type == "cuda" else 0
    others = range(torch.cuda.device_count() if device.type == "cuda" else 0)
    reaches = frozenset(i for i in others if i != gpu and torch.cuda.can_device_access_peer(gpu, i))
    mine = Spot(socket.gethostname(), gpu, reaches)
    spots = [mine] * dist.get_world_size(group)
    dist.all_gather_object(spots, mine, group=group)
    return tuple(spots)


def assumed_spots(ranks: int) -> tuple[Spot, ...]:
    """Hosts of eight GPUs that all reach each other, filled in the order of ranks."""
    every = frozenset(range(GPUS_OF_A_HOST))
    places = (divmod(rank, GPUS_OF_A_HOST) for rank in range(ranks))
    return tuple(Spot(f"host {host}", gpu, every - {gpu}) for host, gpu in places)


def facts_among(spots: Sequence[Spot], groups: Sequence[Sequence[int]], device: str) -> Facts:
    """The facts that hold in every one of some equally large groups of ranks, which choose alike."""
    members = [[spots[rank] for rank in group] for group in groups]
    return Facts(
        device=device,
        ranks=len(groups[0]),
        hosts=max(len({spot.host for spot in group}) for group in members),
        peers=device == "cuda" and all(_reach_each_other(group) for group in members),
        triton=importlib.util.find_spec("triton") is not None,
    )


def _reach_each_other(spots: Sequence[Spot]) -> bool:
    """Whether every GPU can write every other's memory; one device twice does not count."""
    gpus = frozenset(spot.gpu for spot in spots)
    one_host = len({spot.host for spot in spots}) == 1
    return one_host and len(gpus) == len(spots) and all(gpus - {s.gpu} <= s.reaches for s in spots)
