"""`/instances`: which instances serve, and how one joins, drains or leaves while requests run."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Literal, Protocol

from fastapi import APIRouter
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict

from benthic.errors import ServeError
from benthic.sched.routing import Role  # noqa: TC001 (FastAPI reads the annotations of models)
from benthic.serve import api_errors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benthic.serve.members import Member, Members


class JoinBody(BaseModel):
    """Asks for one more instance."""

    model_config = ConfigDict(strict=True, extra="forbid")

    role: Role


class InstanceCard(BaseModel):
    """One instance as it is now; blocks are those assigned to it by the router."""

    name: str
    role: Role
    status: Literal["starting", "serving", "draining", "dead"]
    requests: int
    queued_tokens: int
    used_blocks: int
    num_blocks: int | None


class InstanceList(BaseModel):
    """Every instance, in the order in which they joined."""

    data: list[InstanceCard]


class Instances(Protocol):
    """The instances of a server, wherever they are kept."""

    @property
    def seen(self) -> Sequence[InstanceCard]:
        """How they were a moment ago."""
        ...

    async def cards(self) -> list[InstanceCard]:
        """How they are."""
        ...

    async def join(self, role: Role) -> InstanceCard:
        """Start one more. Raises: ApiError."""
        ...

    async def leave(self, name: str, *, now: bool) -> InstanceCard:
        """Give one nothing new and end it when it is done, or `now`. Raises: ApiError."""
        ...


class OwnInstances:
    """Those of a router in this process."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self._leaving: set[asyncio.Task[None]] = set()

    @property
    def seen(self) -> list[InstanceCard]:
        """How they are."""
        return [card(member) for member in self._members]

    async def cards(self) -> list[InstanceCard]:
        """How they are."""
        return self.seen

    async def join(self, role: Role) -> InstanceCard:
        """Start one more. Raises: ApiError."""
        _refuse_if_together(self._members)
        return card(self._members[self._members.join(role)])

    async def leave(self, name: str, *, now: bool) -> InstanceCard:
        """Give one nothing new and end it when it is done, or `now`. Raises: ApiError."""
        members = self._members
        try:
            member = members[name]
        except ServeError as error:
            raise api_errors.ApiError(404, str(error), param="name") from error
        _refuse_if_together(members)
        member.draining = True
        task = asyncio.create_task(members.leave(name) if now else members.drain(name))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
        return card(member)


def fleet_routes(fleet: Instances) -> APIRouter:
    """Routes of a server with several instances; keys guard them like every other path."""
    router = APIRouter(tags=["instances"])

    @router.get("/instances", response_model=InstanceList)
    async def instances() -> Response:
        """What serves, and how loaded it is."""
        return _json(InstanceList(data=await fleet.cards()))

    @router.post("/instances", response_model=InstanceCard, status_code=202)
    async def join(body: JoinBody) -> Response:
        """Start one more; it gets requests as soon as it is up."""
        return _json(await fleet.join(body.role), 202)

    @router.delete("/instances/{name}", response_model=InstanceCard, status_code=202)
    async def leave(name: str, *, now: bool = False) -> Response:
        """Give an instance nothing new and end it when it is done; with `now`, its requests move at once."""
        return _json(await fleet.leave(name, now=now), 202)

    return router


def _refuse_if_together(members: Members) -> None:
    """Raises: ApiError when none may come or leave."""
    if members.together:
        msg = (
            f"the {len(members)} instances share experts (--data-parallel-size), so none can come or leave. "
            "Start the server anew with another number."
        )
        raise api_errors.ApiError(409, msg)


def card(member: Member) -> InstanceCard:
    """What the page says of one instance."""
    loads = member.loads.values()
    return InstanceCard(
        name=member.name,
        role=member.role,
        status=_status(member),
        requests=len(loads),
        queued_tokens=sum([load.queued_tokens for load in loads]),
        used_blocks=sum([load.blocks for load in loads]),
        num_blocks=None if member.ready is None else member.ready.num_blocks,
    )


def _status(member: Member) -> Literal["starting", "serving", "draining", "dead"]:
    if member.open:
        return "serving"
    if member.draining or member.turning is not None:
        return "draining"
    return "starting" if member.ready is None else "dead"


def _json(body: BaseModel, status: int = 200) -> Response:
    return Response(body.model_dump_json(), status_code=status, media_type="application/json")
