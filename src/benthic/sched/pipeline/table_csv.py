"""Tables as CSV: ours, which holds a whole table, and the one that torch's pipeline runtime loads."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING

from benthic.errors import ConfigError
from benthic.sched.pipeline.table import Table, parse_slot

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from benthic.sched.pipeline.table import Slot

_KEYWORDS = ("schedule", "route", "route_of", "rank")


def write_table(table: Table) -> str:
    """One line each: the name, the rank of every stage on each route, every microbatch's route, ranks' slots.

    The first cell says which: `schedule`, `route`, `route_of` or `rank`; the others are its values in order.
    """
    rows: list[list[object]] = [["schedule", table.name]]
    rows += [["route", *route] for route in table.routes]
    rows.append(["route_of", *table.route_of])
    rows += [["rank", *slots] for slots in table.slots]
    return _csv(rows)


def read_table(text: str) -> Table:
    """The table that `write_table` wrote, or one written by hand in its format; see `check` for its sense.

    Raises:
        ConfigError: a line that is none, a route that leads nowhere, a slot that is none.
    """
    lines: dict[str, list[list[str]]] = {keyword: [] for keyword in _KEYWORDS}
    for number, row in enumerate(csv.reader(io.StringIO(text)), 1):
        cells = [cell.strip() for cell in row if cell.strip()]
        if cells and cells[0] not in lines:
            message = f"line {number} starts with {cells[0]!r}; lines start with {', '.join(_KEYWORDS)}"
            raise ConfigError(message)
        if cells:
            lines[cells[0]].append(cells[1:])
    name, route_of = (_only(keyword, lines[keyword]) for keyword in ("schedule", "route_of"))
    table = Table(
        name=" ".join(name),
        slots=tuple(tuple(map(parse_slot, cells)) for cells in lines["rank"]),
        routes=tuple(tuple(_numbers("route", cells)) for cells in lines["route"]),
        route_of=tuple(_numbers("route_of", route_of)),
    )
    _refuse_bad_routes(table)
    return table


def torch_csv(table: Table) -> str:
    """What `_PipelineScheduleRuntime._load_csv` of `torch.distributed.pipelining` reads as "compute_only".

    One line a rank; an overlapped pair is `(3F7;4B2)OVERLAP_F_B`.

    Raises:
        ConfigError: a stage lives on two ranks, which that runtime cannot express.
    """
    if len(table.routes) > 1:
        lives = f"stage 0 of {table.name!r} lives on ranks {' and '.join(str(r[0]) for r in table.routes)}"
        message = (
            f"{lives}, but torch's runtime knows 1 rank a stage. Export 'dualpipev' or another schedule."
        )
        raise ConfigError(message)
    return _csv([_torch_slot(slot) for slot in slots] for slots in table.slots)


def _torch_slot(slot: Slot) -> str:
    return str(slot.first) if slot.second is None else f"({slot.first};{slot.second})OVERLAP_F_B"


def _csv(rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _only(keyword: str, lines: list[list[str]]) -> list[str]:
    if len(lines) != 1:
        message = f"{len(lines)} lines start with {keyword!r}, not 1. Write it as write_table does."
        raise ConfigError(message)
    return lines[0]


def _numbers(keyword: str, cells: list[str]) -> list[int]:
    bad = next((cell for cell in cells if not cell.isdecimal()), None)
    if bad is not None:
        message = f"{bad!r} in a line {keyword!r} is no number from 0. Write ranks, or routes, as numbers."
        raise ConfigError(message)
    return [int(cell) for cell in cells]


def _refuse_bad_routes(table: Table) -> None:
    lengths = {len(route) for route in table.routes}
    if len(lengths) != 1 or 0 in lengths:
        message = f"routes have {sorted(lengths)} stages. Write at least one route, all over the same stages."
        raise ConfigError(message)
    beyond = max(map(max, table.routes))
    if beyond >= table.ranks:
        message = (
            f"a route leads to rank {beyond}, but {table.ranks} lines start with 'rank'. Add the others."
        )
        raise ConfigError(message)
    route = max(table.route_of, default=0)
    if route >= len(table.routes):
        message = f"route_of names route {route}, but there are {len(table.routes)}, counted from 0."
        raise ConfigError(message)
