"""Every error that layerlens raises on purpose; catch `LayerlensError` to catch them all."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LayerlensError(Exception):
    """Root of the family. The message says what came, what is allowed and what to do."""


class UnknownNameError(LayerlensError, KeyError):
    """A model, data set, objective, transform or measure that does not exist."""

    def __str__(self) -> str:  # KeyError would print the message in quotes
        return str(self.args[0])


class UnknownLayerError(UnknownNameError):
    """A layer name or pattern that matches nothing which runs in the forward pass."""


class ShapeError(LayerlensError, ValueError):
    """Row counts, dimensions or batch sizes that do not fit."""


class BatchTooSmallError(ShapeError):
    """Fewer samples in a batch than the estimator needs."""


class DegenerateError(LayerlensError, ValueError):
    """A representation without variation, for which the ratio asked for is 0/0."""


class NonFiniteError(LayerlensError, ValueError):
    """NaN or infinity where a finite number is needed."""


class DataError(LayerlensError, ValueError):
    """A data set that is missing, unreadable or of the wrong shape or range."""


class EmptyLoaderError(DataError):
    """A loader that yielded no batch."""


class CheckpointError(LayerlensError, ValueError):
    """A checkpoint that is missing, damaged, unsafe or of another architecture."""


class ConfigError(LayerlensError, ValueError):
    """A setting that is unknown, of the wrong type or outside its range."""


class RunFolderError(LayerlensError, ValueError):
    """An output folder that can't be written, or that holds another run."""


class FolderInUseError(RunFolderError):
    """A run folder in which another process is working."""


class DiskFullError(RunFolderError):
    """No space left where a result is to be written; what was saved before is kept."""


class DamagedStateError(RunFolderError):
    """A saved state that can't be read, so that a run can't go on from it."""


class WorkerError(LayerlensError, RuntimeError):
    """A worker or a cluster that could not be started."""


class DownloadError(LayerlensError, ValueError):
    """Weights or data that could not be fetched."""


class DeviceMemoryError(LayerlensError, MemoryError):
    """The device, or the host, has no memory for a batch."""


class ExtraMissingError(LayerlensError, ImportError):
    """A feature whose optional packages are not installed."""


def check_known(kind: str, name: str, allowed: Iterable[str]) -> None:
    """Refuse a name that is not among the allowed ones; the message says which are, the closest first.

    Raises:
        UnknownNameError: It is none of them.
    """
    names = list(allowed)
    if name in names:
        return
    if not names:
        raise UnknownNameError(f"unknown {kind} {name!r}; there is none here")
    hint, everything = closest(name, names), f"allowed: {', '.join(names)}"
    raise UnknownNameError(f"unknown {kind} {name!r}; {hint}" + ("" if hint == everything else f" ({everything})"))


def require(fine: bool, name: str, came: object, allowed: str) -> None:
    """Refuse a setting in the common form.

    Raises:
        ConfigError: It is not fine; the message says what came and what is allowed.
    """
    if not fine:
        raise ConfigError(f"{name}={came!r}; allowed: {allowed}")


def closest(name: str, allowed: Iterable[str], count: int = 3) -> str:
    """The allowed names nearest to `name`, as the tail of an error message.

    >>> closest("simclar", ["simclr", "supervised"], count=1)
    'closest: simclr'
    """
    names = list(allowed)
    near = difflib.get_close_matches(name, names, n=count, cutoff=0.4)
    return f"closest: {', '.join(near)}" if near else f"allowed: {', '.join(names[:20])}"
