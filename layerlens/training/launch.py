"""Several processes for one run: started here, or by torchrun."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection
from typing import Any, NoReturn

from layerlens.devices import keep_freed_memory
from layerlens.errors import DeviceMemoryError, LayerlensError

Report = Callable[[Any], None]


def launched() -> int:
    """How many processes torchrun (or `launch`) has started with this one; 0 if none did."""
    with suppress(ValueError):
        world = int(os.environ.get("WORLD_SIZE", "1"))
        return world if world > 1 else 0
    return 0


def first_rank() -> bool:
    """Whether this process speaks for all: it is alone, or the first that was started."""
    return not launched() or os.environ.get("RANK", "0") == "0"


def launch(work: Callable[..., None], ranks: int, arguments: tuple[Any, ...], progress: Report | None) -> None:
    """Run `work(report, *arguments)` on every rank, each in a process of its own, and wait for all.

    Args:
        work: A function of a module; `report` hands what it is given to `progress` in this process.
        ranks: How many.
        arguments: Must survive pickling.
        progress: Takes the reports; what it raises ends the ranks.

    Raises:
        LayerlensError: What one of the ranks raised; the others are ended.
    """
    import torch.multiprocessing as mp
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # that it ends the others is no news
    pipes = [mp.get_context("spawn").Pipe(duplex=False) for _ in range(ranks)]
    failures: list[LayerlensError] = []
    writers = [writer for _, writer in pipes]
    with interrupts_held():
        context = spawn(_rank_main, (ranks, _free_port(), writers, work, arguments), nprocs=ranks, join=False)
    assert context is not None
    try:
        for writer in writers:
            writer.close()
        _listen([reader for reader, _ in pipes], context, failures, progress)
    except (ProcessRaisedException, ProcessExitedException) as error:
        if failures:
            raise failures[0] from None
        if getattr(error, "signal_name", None) == "SIGKILL":
            raise DeviceMemoryError(
                "a process of this run was killed, as the system does when memory runs out; try a smaller batch_size "
                "or fewer devices. The same command goes on from the last saved state"
            ) from error
        raise
    except BaseException:  # Ctrl-C is for this process, which ends the others
        for process in context.processes:
            process.terminate()
            process.join()
        raise


def _listen(readers: list[Any], context: Any, failures: list[LayerlensError], progress: Report | None) -> None:
    """Hand on what the ranks report until all have ended; a rank that fails ends the others."""
    while readers:
        ready: list[Any] = connection.wait(readers, timeout=1.0)
        for reader in ready:
            try:
                report = reader.recv()
            except EOFError:
                readers.remove(reader)
                continue
            if isinstance(report, LayerlensError):
                failures.append(report)
            elif progress is not None:
                progress(report)
        if len(readers) < len(context.processes):
            context.join(timeout=0)
    while not context.join():
        pass


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Processes started inside the block ignore Ctrl-C, from their first moment on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def _rank_main(
    rank: int, ranks: int, port: int, writers: list[Any], work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    """What torchrun would tell each process, then the work."""
    import torch

    threading.Thread(target=end_with_parent, daemon=True).start()
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    elastic = {"TORCHELASTIC_RUN_ID": "layerlens", "GROUP_RANK": 0}  # so that Fabric takes the processes as they are
    settings = {**place, **elastic, "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({key: str(value) for key, value in settings.items()})
    importlib.import_module("lightning_fabric")  # sets its own level when it is imported
    keep_freed_memory()
    torch.set_num_threads(max(torch.get_num_threads() // ranks, 1))
    for name in ("lightning_fabric", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # who joined which group is no news here
    report = writers[rank]
    for k, writer in enumerate(writers):
        if k != rank:
            writer.close()
    try:
        work(report.send, *arguments)
    except LayerlensError as error:
        report.send(error)
        raise
    finally:
        _leave_group()
    report.close()
    end_rank()


def end_rank() -> NoReturn:
    """End this process, whose work is done, without the interpreter's farewell.

    Threads of the process group can abort an interpreter that takes its leave slowly, and all ranks with it.
    """
    _leave_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _leave_group() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def end_with_parent() -> None:
    """However the parent ends: its ranks must not go on in a folder that it no longer holds."""
    from multiprocessing import parent_process

    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
