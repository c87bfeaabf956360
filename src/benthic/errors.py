"""Every error that benthic raises on purpose.

    BenthicError
    ├── ConfigError (ValueError)        a setting is unknown, malformed or contradicts another
    │   └── UnknownFieldError           a name that does not exist, with the nearest one that does
    ├── ScheduleError (ValueError)      a pipeline table is incomplete, misplaced or deadlocks
    ├── PipelineError                   a slot of a pipeline table failed; rank, slot and table are named
    │   └── PeerLostError               another rank ended or does not answer; what is known of it is named
    ├── ShapeError (ValueError)         a tensor's dimensions disagree with each other or with the config
    ├── BackendError                    no implementation of an op runs on this device and dtype
    ├── CheckpointError                 a checkpoint cannot be read or written
    │   ├── NotACheckpointError         the folder holds no checkpoint
    │   └── TensorMismatchError         tensors missing, extra, misshapen or truncated; each is named
    ├── DataError                       a corpus, shard or tokenizer cannot be used
    ├── NumericsError                   a loss or a tensor is no longer finite; step and tensor are named
    └── ServeError                      the server cannot do what was asked
        ├── AdmissionError (ValueError) a request that could never be served; the two numbers are named
        ├── OverloadedError             no room for a request now; it may be sent again
        ├── TransferError               blocks cannot be read from another instance; both sides are named
        └── EngineDeadError             the engine process ended; requests in flight are lost

A message says what is wrong, the two numbers that disagree and where they came from; then the remedy.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class BenthicError(Exception):
    """Base of every error that benthic raises on purpose."""


class ConfigError(BenthicError, ValueError):
    """A setting is unknown, malformed or contradicts another."""


class UnknownFieldError(ConfigError):
    """A name that does not exist.

    Args:
        kind: what was looked up, e.g. "config field".
        name: what was asked for.
        known: the names that exist.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        self.name = name
        self.known = tuple(sorted(known))
        super().__init__(f"unknown {kind} {name!r}. {did_you_mean(name, self.known)}")


class ScheduleError(BenthicError, ValueError):
    """A pipeline table is incomplete, puts actions on the wrong rank or deadlocks; the actions are named."""


class PipelineError(BenthicError):
    """A slot of a pipeline table failed while it was executed; rank, slot and table are named."""


class PeerLostError(PipelineError):
    """Another rank ended or does not answer; what is known of it is named."""


class ShapeError(BenthicError, ValueError):
    """A tensor's dimensions disagree with each other or with the config."""


class BackendError(BenthicError):
    """No implementation of an op runs on this device and dtype."""


class CheckpointError(BenthicError):
    """A checkpoint cannot be read or written."""


class NotACheckpointError(CheckpointError):
    """The folder holds no checkpoint."""


class TensorMismatchError(CheckpointError):
    """Tensors are missing, extra, misshapen or truncated; each is named."""


class DataError(BenthicError):
    """A corpus, token shard or tokenizer cannot be used."""


class NumericsError(BenthicError):
    """A loss or a tensor is no longer finite; step and tensor are named."""


class ServeError(BenthicError):
    """The server cannot do what was asked."""


class AdmissionError(ServeError, ValueError):
    """A request that could never be served; the two numbers that disagree are named."""


class OverloadedError(ServeError):
    """There is no room for a request now; it may be sent again."""


class TransferError(ServeError):
    """Blocks cannot be read from another instance; what the two sides say is named."""


class EngineDeadError(ServeError):
    """The engine process ended; requests in flight are lost."""


class ServerClosingError(EngineDeadError):
    """The server was told to stop, and requests in flight had no time left."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Say which known name is nearest to `name`, or list them all when none is near."""
    known = tuple(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"Did you mean {near[0]!r}?"
    return f"Known: {', '.join(known) or 'none'}."
