"""Threads that share out the blocks of a step among a CPU's cores.

PyTorch would run each operation on all cores and wait for the slowest after each of them, which costs most where
another program has one of the cores. Here a core takes a block through all its stages on its own. And an operation on
one thread gives the same bits whatever the number of cores, so that peers with different machines agree.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Final, TypeVar

import torch

__all__ = ["MAX_WORKERS", "Workers", "workers_of_a_step"]

MAX_WORKERS: Final = 8
"""Each has up to 12 MiB of scratch memory, and that many cores should keep the memory busy. Chosen, not measured."""

T = TypeVar("T")


# One pool for each number of threads: it ends with the process, as PyTorch's own threads do. A pool per optimizer would
# leave its threads to the garbage collector, and several optimizers that step at once would crowd the cores.
_pools: dict[int, ThreadPoolExecutor] = {}
_starting = threading.Lock()


def _after_fork() -> None:
    global _starting
    _pools.clear()  # threads do not survive a fork
    _starting = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Workers:
    """``count`` threads of the process, started when first used; all objects with this ``count`` share them."""

    def __init__(self, count: int) -> None:
        self.count = count

    def run(self, work: Callable[[T, int], None], items: Sequence[T]) -> None:
        """Calls ``work(item, worker)`` for every item; each worker, a number below ``count``, has one call at a time.

        Returns when no call is running any more.

        Raises:
            Exception: what ``work`` raised, in the first worker in which it did.
        """
        busy = min(self.count, len(items))
        # Even a single item goes to a worker: in the calling thread its operations would run on all cores.
        if self.count == 1:
            for item in items:
                work(item, 0)
            return
        remaining = iter(items)
        taking = threading.Lock()

        def take_turns(worker: int) -> None:
            with torch.no_grad():
                while True:
                    with taking:
                        item = next(remaining, None)
                    if item is None:
                        return
                    work(item, worker)

        pool = _started(self.count)
        futures = [pool.submit(take_turns, worker) for worker in range(busy)]
        try:
            wait(futures)
        finally:
            with taking:
                for _ in remaining:
                    pass
            wait(futures)
        for future in futures:
            future.result()


def _started(count: int) -> ThreadPoolExecutor:
    with _starting:
        pool = _pools.get(count)
        if pool is None:
            pool = ThreadPoolExecutor(count, thread_name_prefix="distro-optim-step")
            everybody = threading.Barrier(count)

            def alone_on_its_core() -> None:
                torch.get_num_threads()  # a thread takes the default when it first asks, also after it was told
                torch.set_num_threads(1)
                everybody.wait()

            threads = torch.get_num_threads()
            try:
                for future in [pool.submit(alone_on_its_core) for _ in range(count)]:
                    future.result()
            finally:
                # The number is kept per thread, but also as the default of threads still to come.
                torch.set_num_threads(threads)
            _pools[count] = pool
        return pool


def workers_of_a_step() -> Workers:
    """As many as PyTorch may use threads, up to :data:`MAX_WORKERS`."""
    return Workers(min(torch.get_num_threads(), MAX_WORKERS))
