"""The other processes of a client, and the group in which all of them are."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from ...errors import ConfigurationError

__all__ = ["ctrl_c_noted", "in_group", "started"]

_START: Final = timedelta(minutes=5)
"""How long processes wait for each other to start. They import PyTorch first. Chosen arbitrarily."""

_END_SECONDS: Final = 20.0
"""How long each of the others has to end by itself. Chosen arbitrarily."""


@contextmanager
def started(count: int, body: Callable[[int, str], None]) -> Iterator[None]:
    """Processes 1 to ``count - 1`` of a group whose number 0 this one is, until the end of the block.

    Args:
        body: what each does, called with its number and the address at which they meet; can be pickled.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="distro-optim-") as folder:
        meeting = (Path(folder) / "meeting").as_uri()
        others: list[Any] = []
        try:
            for number in range(1, count):
                # They end with this one whatever becomes of it: their connections close.
                process = context.Process(target=_run, args=(body, number, meeting), daemon=True)
                process.start()
                others.append(process)
            with in_group(0, count, meeting):
                yield
        finally:
            for process in others:
                process.join(_END_SECONDS)
                if process.is_alive():
                    process.terminate()
                    process.join()


@contextmanager
def in_group(number: int, count: int, meeting: str) -> Iterator[None]:
    """In the process group of all of them.

    Raises:
        ConfigurationError: this process is in one already.
    """
    if dist.is_initialized():
        raise ConfigurationError(
            "a client of several processes starts them itself: run distro-optim join without torchrun",
            name="data_parallelism",
        )
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, init_method=meeting, rank=number, world_size=count, timeout=_START)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def ctrl_c_noted() -> Iterator[Callable[[], bool]]:
    """Gives whether Ctrl-C was pressed, or SIGTERM came: noted the first time, for a place at which all can end.

    A second one interrupts. Where signals do not arrive, as in other threads than the first, nothing is changed.
    """
    pressed: list[int] = []

    def note(number: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before: dict[signal.Signals, Any] = {}
    with suppress(ValueError):  # in another thread
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    try:
        yield lambda: bool(pressed)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(body: Callable[[int, str], None], number: int, meeting: str) -> None:
    # Ctrl-C goes to all processes of a terminal. The first one says when we end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    body(number, meeting)
