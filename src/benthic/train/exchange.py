"""The exchange that a run's config names, with room for its microbatches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from benthic.errors import ConfigError
from benthic.model.local import LocalExchange
from benthic.parallel.exchange import AllToAllExchange
from benthic.parallel.setup import expanded, number

if TYPE_CHECKING:
    from typing import TypeGuard

    from benthic.model.sockets import Exchange
    from benthic.parallel.exchange_routes import Room
    from benthic.parallel.mesh import Group
    from benthic.sched.pipeline.table import Table
    from benthic.train.config import RunConfig


def build_exchange(config: RunConfig, table: Table, group: Group) -> Exchange:
    """The exchange of the ranks of `group`, which share the experts; a collective call.

    Microbatches that a slot of the table overlaps are in flight together.

    Raises:
        ConfigError: the config is not resolved.
    """
    model, experts = config.model, config.model.n_routed_experts
    if group.handle is None:
        return LocalExchange(experts)
    if "auto" in {config.exchange.kind, config.exchange.fp8}:
        message = f"exchange={config.exchange} is not resolved; call train.resolve first."
        raise ConfigError(message)
    fp8 = bool(config.exchange.fp8)
    if config.exchange.kind == "all_to_all":
        return AllToAllExchange(group.handle, experts, fp8=fp8)
    from benthic.parallel.exchange_nvlink import NvlinkExchange  # noqa: PLC0415 (needs Triton)
    from benthic.parallel.exchange_size import Size  # noqa: PLC0415 (needs Triton)

    tokens = number(config.train.local_batch_size) * number(config.train.seq_len)
    size = Size(
        n_routed_experts=experts,
        top_k=model.num_experts_per_tok,
        hidden_size=model.hidden_size,
        dtype=torch.float32 if config.precision.weights == "float32" else torch.bfloat16,
        max_tokens=tokens // config.layout.token_shards,
        fp8=fp8,
        in_flight=2 if overlaps(table) else 1,
        exact_rows=True,
        keep_arrivals=bool(expanded(config.recompute) & {"experts", "expert_inputs"}),
    )
    return NvlinkExchange.on(group.handle, size, torch.device(config.device))


@runtime_checkable
class AsksForRows(Protocol):
    """An exchange whose host asks how many rows came, unless there is `room` for a fixed number."""

    room: Room | None
    counted: list[int]

    def begin(self) -> None:
        """A step begins."""
        ...


def asks_for_rows(exchange: Exchange) -> TypeGuard[AsksForRows]:
    """Whether it is one."""
    return isinstance(exchange, AsksForRows)


def room_of(exchange: Exchange) -> Room | None:
    """For how many rows an exchange has room, if their number is fixed."""
    return exchange.room if asks_for_rows(exchange) else None


def overlaps(table: Table) -> bool:
    """Whether some slot runs a forward and a backward together."""
    return any(slot.second is not None for slots in table.slots for slot in slots)
