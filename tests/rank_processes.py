"""Real processes in a process group: what each rank gave, or how it died."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from layerlens.training.launch import end_rank

PATIENCE_S = 120  # for all that the ranks do; it is seconds, unless one hangs


def on_ranks(work: Callable[..., Any], world: int, folder: Path, *arguments: Any, timeout_s: float = 60) -> list[Any]:
    """What `work(rank, world, *arguments)`, a function of a module, gave in each of `world` processes.

    Args:
        folder: Where they meet and leave what they gave; an empty one.
        timeout_s: How long a rank waits for the others in one exchange.
    """
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=_rank, args=(work, rank, world, str(folder), arguments, timeout_s))
        for rank in range(world)
    ]
    end = time.monotonic() + PATIENCE_S
    try:
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(max(0.0, end - time.monotonic()))
        hanging = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
                process.join()
    assert not hanging, f"ranks {hanging} still wait after {PATIENCE_S} s"
    assert [process.exitcode for process in ranks] == [0] * world, "a rank died; its traceback is on stderr"
    return [pickle.loads((folder / f"rank{rank}").read_bytes()) for rank in range(world)]


def _rank(
    work: Callable[..., Any], rank: int, world: int, folder: str, arguments: tuple[Any, ...], timeout_s: float
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout_s),
    )
    found = work(rank, world, *arguments)
    (Path(folder) / f"rank{rank}").write_bytes(pickle.dumps(found))
    end_rank()
