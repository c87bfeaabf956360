"""The price of an operation: measured if it was, else the next best thing, and which of these it is."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final

from benthic.plan.cost.points import REACH
from benthic.plan.cost.priced import Priced
from benthic.plan.cost.roofline import floor, ideal, usual

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benthic.plan.cost.machine import Machine
    from benthic.plan.cost.ops import Op
    from benthic.plan.cost.points import Found
    from benthic.plan.cost.priced import Provenance

# parts of the seconds that an interval leaves on either side, at least
_MEASURED: Final = 0.03
_INTERPOLATED: Final = 0.06
_TRANSFERRED: Final = 0.25
_ROOFLINE_HIGH: Final = 0.75


@functools.lru_cache(maxsize=1 << 17)
def price(op: Op, machine: Machine) -> Priced:
    """Seconds of `op` on `machine`, never below its roofline.

    Measured at this size on this hardware; or interpolated between such points; or transferred: the share of
    the roofline that another machine reaches, or this one at a far size or in a like operation; or else usual
    shares of the hardware's peaks. Seconds fall, or stay, as any rate of the hardware rises.

    Raises:
        ConfigError: a product in FP8 on a GPU that has none.
    """
    least = floor(op, machine.hardware)
    found = next(_shares(op, machine), None)
    if found is None:
        seconds = usual(op, machine.hardware)
        return Priced(seconds, ideal(op, machine.hardware), seconds * (1 + _ROOFLINE_HIGH), "roofline")
    share, provenance = found
    base = ideal(op, machine.hardware)
    seconds = max(base / share.utilisation, least)
    margin = {"measured": _MEASURED, "interpolated": _INTERPOLATED, "transferred": _TRANSFERRED}[provenance]
    low = max(least, min(base / share.most, seconds * (1 - margin)))
    return Priced(seconds, low, max(base / share.least, seconds * (1 + margin)), provenance)


def _shares(op: Op, machine: Machine) -> Iterator[tuple[Found, Provenance]]:
    """What is known of the share of the roofline that `op` reaches, the best knowledge first.

    What is not portable is known from the first profile alone, and from others of this hardware.
    """
    tables = machine.tables
    far: list[Found] = []
    for table in tables:
        found = table.points(op.kind).find(op.at)
        if found is None:
            continue
        if found.distance > REACH:
            far += [found] if table.own or op.portable or table is tables[0] else []
        elif table.own:
            yield found, "interpolated" if found.distance else "measured"
        elif op.portable or table is tables[0]:
            yield found, "transferred"
    if far:
        yield min(far, key=_distance), "transferred"
    for kind, at in op.alike:
        for table in tables:
            found = table.points(kind).find(at)
            if found is not None:
                yield found, "transferred"


def _distance(found: Found) -> float:
    return found.distance
