"""`/dash`: the page, the files that it is made of, and the events that it listens to."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, Final

from fastapi import APIRouter
from fastapi.responses import Response

from benthic.dash.board import Board
from benthic.serve import api_errors
from benthic.serve.sse import EventStream

if TYPE_CHECKING:
    from benthic.serve.service import Service

MEDIA_TYPES: Final = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}

HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""The page can talk to the server it came from and to nobody else."""


class DashPage:
    """The page of one server.

    Args:
        service: what it shows.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._board = Board(service)
        folder = resources.files("benthic.dash") / "assets"
        self._files = {file.name: file.read_bytes() for file in folder.iterdir()}
        self.routes = self._make_routes()

    async def run(self) -> None:
        """Take samples."""
        await self._board.run()

    def _make_routes(self) -> APIRouter:
        router = APIRouter()

        @router.get("/dash")
        async def page() -> Response:
            return Response(self._files["index.html"], headers=HEADERS, media_type="text/html")

        @router.get("/dash/assets/{name}")
        async def asset(name: str) -> Response:
            kind = MEDIA_TYPES.get(name.rpartition(".")[2])
            if kind is None or name not in self._files:
                msg = f"the page has no file {name[:80]!r}"
                raise api_errors.ApiError(404, msg, param="name")
            return Response(self._files[name], headers=HEADERS, media_type=kind)

        @router.get("/dash/events")
        async def events() -> Response:
            return EventStream(self._board.events(), self._service.metrics)

        return router
