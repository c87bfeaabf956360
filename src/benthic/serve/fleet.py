"""Builds the instances that a router starts: one engine each, with a desk or its peers in a folder."""

from __future__ import annotations

import functools
import logging
import os
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benthic.errors import ConfigError, UnknownFieldError
from benthic.sched.replan import ReplanConfig
from benthic.sched.routing import RANKINGS, Policy, Role
from benthic.serve import followers
from benthic.serve.cluster import Needs, RayPlace, own_address
from benthic.serve.router import Router, RouterOptions
from benthic.serve.seats import Seat, Seats
from benthic.spec.objectives import Objectives

if TYPE_CHECKING:
    from benthic.serve.journal import Journal
    from benthic.serve.options import EngineOptions
    from benthic.serve.pages import Mover
    from benthic.serve.process import EngineFactory, EngineLike

logger = logging.getLogger("benthic.serve.engine")

SWITCH_S: Final = 0.0005
"""How long the engine's thread may keep the desk's waiting: by default 5 ms, a step of those who ask it."""


@dataclass(frozen=True, kw_only=True)
class FleetOptions:
    """How many instances of which kind, and how requests are spread over them.

    Attributes:
        prefill: instances that prefill; with none, every other one prefills for itself.
        decode: instances that decode.
        prefill_policy: ranks the former, by its name in `benthic.sched.routing.RANKINGS`.
        decode_policy: ranks the latter.
        local_tokens: prompts with at most so many tokens to compute are prefilled where they decode.
        retries: how often a request is moved when its instance dies.
        restarts: how many instances that died are replaced in an hour.
        replan_s: seconds of load by which instances change between the two kinds; None lets none change.
        prefill_ranks: tensor-parallel ranks of an instance that prefills; None takes the engine's.
        decode_ranks: of one that decodes.

    Raises:
        ConfigError: there is one instance alone or none that decodes, a policy is unknown, or instances are
            to change, but there are too few.
    """

    prefill: int
    decode: int
    prefill_policy: str = "prefix_affinity"
    decode_policy: str = "least_loaded"
    local_tokens: int = 0
    retries: int = 3
    restarts: int = 16
    replan_s: float | None = None
    prefill_ranks: int | None = None
    decode_ranks: int | None = None

    def __post_init__(self) -> None:
        if self.prefill < 0 or self.decode < 1 or self.prefill + self.decode < 2:
            msg = (
                f"--prefill {self.prefill} and --decode {self.decode}, but a fleet has 2 instances at least, "
                "one of them decoding. Leave both out to serve from one instance that does everything."
            )
            raise ConfigError(msg)
        if self.replan_s is not None and (not self.prefill or self.prefill + self.decode < 3):
            msg = (
                f"--replan {self.replan_s:g} with --prefill {self.prefill} and --decode {self.decode}, but "
                "one instance of each kind must stay, so that 3 are needed for one to change. Start more, or "
                "leave out --replan."
            )
            raise ConfigError(msg)
        for name in (self.prefill_policy, self.decode_policy):
            if name not in RANKINGS:
                kind = "policy"
                raise UnknownFieldError(kind, name, RANKINGS)

    @classmethod
    def together(cls, size: int) -> FleetOptions:
        """So many engines that share experts: when one ends, nothing can go on."""
        return cls(prefill=0, decode=size, decode_policy="cache_aware", retries=0, restarts=0)

    @property
    def policy(self) -> Policy:
        """The policy of these names."""
        return Policy(
            prefill=RANKINGS[self.prefill_policy],
            decode=RANKINGS[self.decode_policy],
            local_tokens=self.local_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """A checkpoint served by several instances. `engine` holds for each of them.

    They run on this host or, with `cluster`, on the nodes of a Ray cluster at that address; `nixl` moves
    blocks between hosts.

    Raises:
        ConfigError: an instance cannot have so many ranks, or is to change its role and would have others.
    """

    checkpoint: Path
    engine: EngineOptions
    options: FleetOptions
    cluster: str | None = None
    nixl: bool = False

    def __post_init__(self) -> None:
        ranks = [engine.tensor_parallel_size for engine in self.engines.values()]
        if self.options.replan_s is not None and ranks[0] != ranks[1]:
            msg = (
                f"--replan {self.options.replan_s:g} moves instances between prefill and decode, but those "
                f"have {ranks[0]} and {ranks[1]} tensor-parallel ranks. Give both as many, or leave out "
                "--replan."
            )
            raise ConfigError(msg)

    @property
    def engines(self) -> dict[Role, EngineOptions]:
        """The engine of an instance, by the role that it starts in."""
        asked: dict[Role, int | None] = {
            "prefill": self.options.prefill_ranks,
            "decode": self.options.decode_ranks,
        }
        return {
            role: self.engine if ranks is None else replace(self.engine, tensor_parallel_size=ranks)
            for role, ranks in asked.items()
        }


def start_router(
    fleet: Fleet, *, journal: Journal, stall_s: float, log_level: int, objectives: Objectives | None = None
) -> Router:
    """Start the instances of a fleet, and a router before them that notes where requests are.

    Latency targets count where instances change between the two kinds.
    """
    options = fleet.options
    router = RouterOptions(
        policy=options.policy,
        retries=options.retries,
        restarts=options.restarts,
        stall_s=stall_s,
        seed=fleet.engine.seed,
        log_level=log_level,
        replan=_replan(fleet, objectives or Objectives()),
        together=fleet.engine.data_parallel_size > 1,
    )
    roles: dict[Role, int] = {"prefill": options.prefill, "decode": options.decode}
    if fleet.cluster is not None:
        place = _place(fleet, fleet.cluster)

        def placed(name: str, index: int) -> EngineFactory:
            each = _recorded(fleet.engine, name)
            return functools.partial(load_placed, fleet.checkpoint, each, place.host, index, nixl=fleet.nixl)

        return Router(placed, roles, router, journal=journal, place=place)
    folder = Path(tempfile.mkdtemp(prefix="benthic-desks-"))
    engines = fleet.engines
    ranks = sum(count * engines[role].tensor_parallel_size for role, count in roles.items())
    threads = _threads(fleet.engine, ranks)
    seats = Seats(shared=all(each.ranks == 1 for each in engines.values()))

    def factory(name: str, index: int) -> EngineFactory:
        role: Role = "prefill" if name.startswith("prefill") else "decode"
        each = replace(engines[role], num_threads=threads)
        if each.data_parallel_size > 1:
            return functools.partial(load_data_rank, fleet.checkpoint, each, folder, index)
        seat, address = seats.take(name, each.ranks), f"ipc://{folder}/{name}"
        each = _recorded(each, name)
        return functools.partial(load_instance, fleet.checkpoint, each, address, seat, nixl=fleet.nixl)

    return Router(factory, roles, router, journal=journal, folder=folder, gone=seats.leave)


def _recorded(options: EngineOptions, name: str) -> EngineOptions:
    """The options of one instance, whose recording, if there is to be one, has its name."""
    if options.record is None:
        return options
    return replace(options, record=str(Path(options.record).with_name(f"{name}.jsonl")))


def _place(fleet: Fleet, address: str) -> RayPlace:
    """The cluster: a GPU for each instance unless it is to compute on a CPU, and a core for each thread."""
    gpus = 0 if fleet.engine.device == "cpu" else 1
    count = fleet.options.prefill + fleet.options.decode
    needs = Needs(gpus=gpus, cpus=fleet.engine.num_threads or 1, instances=count)
    return RayPlace(address, needs, moves_between_hosts=fleet.nixl)


def _replan(fleet: Fleet, objectives: Objectives) -> ReplanConfig | None:
    """When instances change their roles; they stay for four windows at least. None without a window."""
    window_s = fleet.options.replan_s
    if window_s is None:
        return None
    return ReplanConfig(
        max_num_batched_tokens=fleet.engine.max_num_batched_tokens,
        max_num_seqs=fleet.engine.max_num_seqs,
        window_s=window_s,
        dwell_s=4 * window_s,
        decode_share=fleet.options.policy.decode_share,
        ttft_s=objectives.ttft_s,
        tpot_s=objectives.tpot_s,
    )


def load_instance(
    path: Path, options: EngineOptions, address: str, seat: Seat, *, nixl: bool = False
) -> EngineLike:
    """Build one instance, in its own process; on GPUs it takes those of its seat."""
    if options.tensor_parallel_size > 1:
        followers.prepare()
    import torch  # noqa: PLC0415 (the router's process imports this module and must stay light)

    from benthic.serve.engine import Engine  # noqa: PLC0415
    from benthic.serve.instance import Instance, TransferOptions, digest_of  # noqa: PLC0415
    from benthic.serve.pages import Pages  # noqa: PLC0415
    from benthic.serve.spread import SpreadEngine  # noqa: PLC0415
    from benthic.serve.spread_pages import SpreadPages  # noqa: PLC0415

    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    sys.setswitchinterval(SWITCH_S)
    device = seat.device(options.device, options.ranks, torch.cuda.device_count())
    options = replace(options, device=device, share_pages=not nixl)
    logger.info("device: %s", options.device)
    mover: Mover = "nixl" if nixl else "host"

    def instance(engine: Engine, pages: SpreadPages | None = None) -> Instance:
        model = digest_of(engine.parts.runner.model)
        return Instance(engine, TransferOptions(address=address, model=model, mover=mover), pages)

    if options.tensor_parallel_size == 1:
        return instance(Engine.from_pretrained(path, options))
    spread = SpreadEngine.from_pretrained(path, options, mover=mover)
    try:
        return instance(spread, SpreadPages(Pages(spread.parts.runner.cache, mover), spread.followers))
    except Exception:
        spread.leave()  # this process would wait for the other ranks to end
        raise


def load_placed(path: Path, options: EngineOptions, router: str, index: int, *, nixl: bool) -> EngineLike:
    """Build an instance where it was placed, with a desk at the address from which it reaches the router."""
    return load_instance(path, options, f"tcp://{own_address(router)}:0", Seat(index), nixl=nixl)


def load_data_rank(path: Path, options: EngineOptions, folder: Path, rank: int) -> EngineLike:
    """Build one of the engines that share experts, in its own process; they meet in `folder`."""
    import torch  # noqa: PLC0415 (the router's process imports this module and must stay light)

    from benthic.serve.data_rank import DataRank  # noqa: PLC0415

    if options.device == "auto":
        options = replace(options, device="cuda" if torch.cuda.is_available() else "cpu")
    return DataRank.join(path, options, folder, rank)


def _threads(options: EngineOptions, count: int) -> int | None:
    """CPU threads of one instance: what was asked, else an equal share of all cores but one."""
    if options.num_threads is not None or options.device.startswith("cuda"):
        return options.num_threads
    return max(1, ((os.cpu_count() or 1) - 1) // count)
