"""Which exchange a group of ranks uses, and why: a pure decision on facts that are gathered apart."""

from __future__ import annotations

import importlib.util
import socket
from dataclasses import dataclass
from typing import Final, Literal

import torch
import torch.distributed as dist

from benthic.errors import BackendError

Name = Literal["local", "all_to_all", "nvlink"]
NAMES: Final = ("auto", "local", "all_to_all", "nvlink")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the choice depends on; every rank of a group finds the same.

    Attributes:
        device: type of the ranks' devices.
        ranks: of the group that shares the experts.
        hosts: machines they are on.
        peers: every GPU of the group can write every other's memory.
        triton: whether our kernels can be compiled here.
    """

    device: str
    ranks: int
    hosts: int = 1
    peers: bool = False
    triton: bool = False


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
        msg = f"the exchange {asked!r} cannot run here: {refusal}"
        raise BackendError(msg)
    if asked == "local" or (asked == "auto" and facts.ranks == 1):
        return "local", "one rank holds all experts: nothing travels"
    if asked == "nvlink" or (asked == "auto" and refusals["nvlink"] is None):
        return "nvlink", f"{facts.ranks} GPUs of one host write each other's memory; the host never waits"
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
    return None


def facts_of(group: dist.ProcessGroup | None, device: torch.device) -> Facts:
    """Gather the facts of a group; a collective call."""
    ranks = dist.get_world_size(group)
    mine = (socket.gethostname(), device.index or 0)
    places: list[tuple[str, int]] = [mine] * ranks
    dist.all_gather_object(places, mine, group=group)
    hosts = {host for host, _ in places}
    return Facts(
        device=device.type,
        ranks=ranks,
        hosts=len(hosts),
        peers=device.type == "cuda" and len(hosts) == 1 and _reach_each_other(places),
        triton=importlib.util.find_spec("triton") is not None,
    )


def _reach_each_other(places: list[tuple[str, int]]) -> bool:
    """Whether every GPU can write every other's memory; one device twice does not count."""
    indices = [index for _, index in places]
    pairs = [(a, b) for a in indices for b in indices if a != b]
    distinct = len(set(indices)) == len(indices)
    return distinct and all(torch.cuda.can_device_access_peer(a, b) for a, b in pairs)
