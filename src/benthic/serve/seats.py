"""Which GPUs of this host an instance takes."""

from __future__ import annotations

from dataclasses import dataclass, field

from benthic.errors import ConfigError


@dataclass(frozen=True)
class Seat:
    """The GPUs of an instance, as many as it has ranks, from number `first` on.

    Where they may be `shared`, numbers go round those that there are.
    """

    first: int = 0
    shared: bool = True

    def device(self, asked: str, ranks: int, gpus: int) -> str:
        """Where rank 0 of `ranks` computes, on a host with so many GPUs, if devices like `asked` are wanted.

        "auto" takes GPUs where there are any; the number in "cuda:N" is that of the first seat.

        Raises:
            ConfigError: GPUs are asked for and there are none, or fewer than instances of several ranks take.
        """
        kind, _, number = asked.partition(":")
        if asked == "cuda" and not gpus:
            msg = "device = cuda, but torch sees 0 GPUs here. Use --device cpu."
            raise ConfigError(msg)
        if kind not in ("auto", "cuda") or not gpus:
            return "cpu" if asked == "auto" else asked
        if self.shared:
            return asked if number else f"cuda:{self.first % gpus}"
        first = int(number or 0) + self.first
        if first + ranks > gpus:
            msg = (
                f"an instance of {ranks} ranks takes its GPUs from cuda:{first} on, so {first + ranks} are "
                f"needed, but torch sees {gpus} here: where instances have several ranks, none shares a GPU. "
                "Start fewer instances, or lower --tensor-parallel-size."
            )
            raise ConfigError(msg)
        return f"cuda:{first}"


@dataclass(frozen=True)
class Seats:
    """Who has which GPUs of a host. Instances of one rank each may share them."""

    shared: bool
    _taken: dict[str, range] = field(default_factory=dict)

    def take(self, name: str, ranks: int) -> Seat:
        """The first so many in a row that nobody has, whether they exist or not."""
        first = 0
        for taken in sorted(self._taken.values(), key=lambda taken: taken.start):
            if first + ranks <= taken.start:
                break
            first = taken.stop
        self._taken[name] = range(first, first + ranks)
        return Seat(first, self.shared)

    def leave(self, name: str) -> None:
        """An instance has ended; its GPUs are free."""
        self._taken.pop(name, None)
