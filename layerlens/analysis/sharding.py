"""Batches shared out over the processes of torch.distributed: each gathers what all have seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from layerlens.errors import ConfigError, LayerlensError

T = TypeVar("T")


def gather(work: Callable[[], T]) -> list[T]:
    """What `work` returned in every process of the default group, in the order of the ranks.

    A process whose work fails still takes part, so that none waits for ever; all of them then fail.

    Args:
        work: This process's own part; its result travels by pickle between the processes of one job.

    Raises:
        ConfigError: No process group.
        LayerlensError: The work failed in some process; the message names its rank.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ConfigError(
            "sharded=True needs a process group; start with `torchrun` and call "
            "torch.distributed.init_process_group first"
        )
    failure: Exception | None = None
    mine: T | None = None
    try:
        mine = work()
    except Exception as error:  # whatever it is, the others wait for this process
        failure = error
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (mine, None if failure is None else (type(failure).__name__, str(failure))))
    if isinstance(failure, LayerlensError):
        raise type(failure)(f"rank {dist.get_rank()}: {failure}") from failure
    if failure is not None:
        raise failure
    for rank, (_, told) in enumerate(parts):
        if told is not None:
            raise ConfigError(f"rank {rank} failed: {told[0]}: {told[1]}")
    return [part for part, _ in parts]
