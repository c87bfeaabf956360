"""Why a run of many ranks ended: the rank that failed says so in a file, the others name it.

When one rank ends, the others learn only that a connection broke. The rank to blame leaves
RUN/logs/failed-rank-N.txt; a rank that lost a peer looks for it before it gives up. A rank that was killed
leaves none, which is said too.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from benthic.errors import BenthicError, PeerLostError
from benthic.parallel.start import broke

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_PATIENCE_S: Final = 3.0
_LOOK_S: Final = 0.1


@dataclass(frozen=True)
class Failures:
    """The failures of one rank of a run and, through files in `folder`, of the others."""

    folder: Path
    rank: int
    ranks: int
    pause: Callable[[float], None] = time.sleep

    def forget(self) -> None:
        """Remove what this rank left before it was started again."""
        self._file(self.rank).unlink(missing_ok=True)

    def explain(self, error: Exception, step: int) -> Exception:
        """What to raise for `error` in `step`, so that it names this rank and the one to blame.

        The kind of error stays, but a broken connection becomes a PeerLostError. One process alone needs no
        names.
        """
        if self.ranks == 1:
            return error
        here = f"rank {self.rank} of {self.ranks}, step {step}: "
        if not broke(error):
            text = here + (
                str(error) if isinstance(error, BenthicError) else f"{type(error).__name__}: {error}"
            )
            self._leave(text)
            return type(error)(text) if isinstance(error, BenthicError) else error
        return PeerLostError(f"{here}lost another rank. {self._blame()} ({error})")

    def _leave(self, text: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        replacement = self._file(self.rank).with_suffix(".tmp")
        replacement.write_text(text + "\n", encoding="utf-8")
        replacement.replace(self._file(self.rank))

    def _blame(self) -> str:
        """What the rank that failed first left; it may still be writing."""
        waited = 0.0
        while not (found := sorted(self.folder.glob("failed-rank-*.txt"), key=_age)):
            if waited >= _PATIENCE_S:
                return (
                    f"No rank left a reason in {self.folder}, so one was killed: see what its host says (out "
                    "of memory?). Start all ranks again with --resume."
                )
            self.pause(_LOOK_S)
            waited += _LOOK_S
        return f"The first to fail was {found[0].read_text(encoding='utf-8').strip()}"

    def _file(self, rank: int) -> Path:
        return self.folder / f"failed-rank-{rank}.txt"


def _age(path: Path) -> float:
    return path.stat().st_mtime
