"""What prices are made on: hardware, how many GPUs share a node, and profiles of measured points."""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

from benthic.errors import ConfigError, UnknownFieldError
from benthic.plan.cost.ops import BY_NAME
from benthic.plan.cost.points import Points
from benthic.plan.cost.roofline import floor, ideal
from benthic.spec import hardware as gpus

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from benthic.plan.cost.ops import Op
    from benthic.spec.hardware import Hardware

LENDERS: Final = ("h200", "h800")
"""Profiles that lend their shares to machines that have none, an earlier one first."""
SHIPPED: Final = (*LENDERS, "h100")
"""Profiles that come with the package."""

_KEYS: Final = {"format", "hardware", "source", "overheads", "points"}
FORMAT: Final = 1


@dataclass(frozen=True, slots=True)
class Measured:
    """One measurement: the seconds that an operation took, and who says so."""

    op: Op
    seconds: float
    source: str = ""


@dataclass(frozen=True, eq=False, kw_only=True)
class Profile:
    """Points measured on one GPU model, or a few of them in one host.

    hardware: its name in `benthic.spec.hardware`, or of a machine that this profile describes alone.
    overheads: seconds by name that are no operation's, such as the host's work for a block of a model.
    """

    hardware: str
    source: str
    points: tuple[Measured, ...] = ()
    overheads: Mapping[str, float] = field(default_factory=dict)

    @functools.cached_property
    def kinds(self) -> dict[str, tuple[Measured, ...]]:
        """The points by kind."""
        found: dict[str, list[Measured]] = defaultdict(list)
        for one in self.points:
            found[one.op.kind].append(one)
        return {kind: tuple(points) for kind, points in found.items()}

    def as_json(self) -> str:
        """The profile as text that `read` takes."""
        points = [[type(one.op).__name__, asdict(one.op), one.seconds, one.source] for one in self.points]
        record = {
            "format": FORMAT,
            "hardware": self.hardware,
            "source": self.source,
            "overheads": dict(self.overheads),
        }
        head = json.dumps(record, indent=1)[:-2]
        rows = ",\n".join(f"  {json.dumps(point)}" for point in points)
        return f'{head},\n "points": [\n{rows}\n ]\n}}\n'


@dataclass(frozen=True, eq=False, kw_only=True)
class Machine:
    """Equal GPUs in nodes of `gpus_per_node`.

    profiles: whose points prices are made from, the machine's own first.
    """

    hardware: Hardware
    profiles: tuple[Profile, ...] = ()
    gpus_per_node: int = 8

    def __post_init__(self) -> None:
        if self.gpus_per_node < 1:
            message = f"gpus_per_node = {self.gpus_per_node}, but a node has at least one GPU."
            raise ConfigError(message)

    @property
    def name(self) -> str:
        """The hardware's."""
        return self.hardware.name

    @functools.cached_property
    def tables(self) -> tuple[Table, ...]:
        """The profiles as shares of rooflines."""
        return tuple(Table.of(profile, self.hardware) for profile in self.profiles)

    @functools.cached_property
    def sustained(self) -> float:
        """The part of its FLOP/s that products keep up for seconds, where power limits them; 1 if unknown."""
        found = self.profiles[0].kinds.get("sustained bf16", ()) if self.profiles else ()
        return min((floor(one.op, self.hardware) / one.seconds for one in found), default=1.0)

    def overhead(self, name: str) -> float:
        """Seconds of the first profile of this hardware that knows `name`; 0 if none does.

        A profile of one's own that was measured on one GPU knows no collective.
        """
        own = (one.overheads for one in self.profiles if one.hardware == self.name)
        return next((known[name] for known in own if name in known), 0.0)


@dataclass(frozen=True, eq=False)
class Table:
    """One profile's points as shares of the rooflines of its own hardware.

    own: whether that is the very hardware that is asked about.
    """

    profile: Profile
    hardware: Hardware
    own: bool
    _found: dict[str, Points] = field(default_factory=dict)

    @classmethod
    def of(cls, profile: Profile, asked: Hardware) -> Table:
        """The points of `profile` for prices on `asked`."""
        known = profile.hardware in gpus.names()
        hardware = gpus.get(profile.hardware) if known else asked
        return cls(profile, hardware, hardware == asked)

    def points(self, kind: str) -> Points:
        """The points of one kind."""
        if kind not in self._found:
            measured = self.profile.kinds.get(kind, ())
            shares = [(one.op.at, ideal(one.op, self.hardware) / one.seconds) for one in measured]
            self._found[kind] = Points(shares)
        return self._found[kind]


def get(name: str, *, gpus_per_node: int = 8, profile: Profile | None = None) -> Machine:
    """GPUs called `name`, with the profiles that come with the package; `profile` goes before them.

    Raises:
        UnknownFieldError: no such GPU; the message names the nearest one.
    """
    hardware = gpus.get(name)
    order = dict.fromkeys((hardware.name, *LENDERS) if hardware.name in SHIPPED else LENDERS)
    found = tuple(map(shipped_profile, order))
    own = () if profile is None else (profile,)
    return Machine(hardware=hardware, profiles=(*own, *found), gpus_per_node=gpus_per_node)


@functools.lru_cache(maxsize=8)
def shipped_profile(name: str) -> Profile:
    """The profile `name` of the package."""
    folder = resources.files("benthic.plan.cost") / "profiles"
    return parse((folder / f"{name}.json").read_text(encoding="utf-8"), where=f"profile {name}")


def read(path: Path) -> Profile:
    """The profile that `benthic calibrate` wrote to `path`.

    Raises:
        ConfigError: there is no such file, or it is no profile.
    """
    if not path.is_file():
        message = f"there is no profile {path}. Write one with `benthic calibrate --out {path}`."
        raise ConfigError(message)
    return parse(path.read_text(encoding="utf-8"), where=str(path))


def parse(text: str, *, where: str) -> Profile:
    """A profile from what `Profile.as_json` wrote.

    Raises:
        ConfigError: names what is missing or not as it should be.
    """
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        message = f"{where} is no JSON: {error}. Write it with `benthic calibrate`."
        raise ConfigError(message) from error
    missing = _KEYS - set(record) if isinstance(record, dict) else _KEYS
    if missing or record["format"] != FORMAT:
        wrong = f"lacks {', '.join(sorted(missing))}" if missing else f"has format {record['format']}"
        message = f"{where} {wrong}, but this is version {FORMAT}. Write it again with `benthic calibrate`."
        raise ConfigError(message)
    return Profile(
        hardware=str(record["hardware"]),
        source=str(record["source"]),
        points=tuple(_points(record["points"], where)),
        overheads={str(name): float(value) for name, value in record["overheads"].items()},
    )


def _points(rows: list[list[Any]], where: str) -> Iterable[Measured]:
    for name, sizes, seconds, source in rows:
        if name not in BY_NAME:
            raise UnknownFieldError(kind=f"operation in {where}", name=name, known=BY_NAME)
        op = BY_NAME[name](**sizes)
        if seconds <= 0 or min(op.at) <= 0:
            message = f"{where}: {op} takes {seconds} s; sizes and seconds must be above 0."
            raise ConfigError(message)
        yield Measured(op, float(seconds), str(source))
