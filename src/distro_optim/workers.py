"""Threads that share out the blocks of a step among a CPU's cores.

PyTorch would run each operation on all cores and wait for the slowest after each of them, which costs most where
another program has one of the cores. Here a core takes a block through all its stages on its own. And an operation on
one thread gives the same bits whatever the number of cores, so that peers with different machines agree.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Final, TypeVar

import torch

__all__ = ["MAX_WORKERS", "Workers"]

# Each has some 6 MiB of scratch memory, and that many cores should keep the memory busy. Chosen, not measured.
MAX_WORKERS: Final = 8

T = TypeVar("T")


class Workers:
    """``count`` threads, started when first used, that end with this object."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ThreadPoolExecutor | None = None

    def run(self, work: Callable[[T, int], None], items: Sequence[T]) -> None:
        """Calls ``work(item, worker)`` for every item, with ``worker`` below ``count`` and no two of one at a time.

        Returns, or raises what ``work`` raised first, when no call is running any more.
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

        pool = self._started()
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

    def _started(self) -> ThreadPoolExecutor:
        if self._pool is None:
            pool = ThreadPoolExecutor(self.count, thread_name_prefix="distro-optim-step")
            everybody = threading.Barrier(self.count)

            def alone_on_its_core() -> None:
                torch.get_num_threads()  # a thread takes the default when it first asks, also after it was told
                torch.set_num_threads(1)
                everybody.wait()

            threads = torch.get_num_threads()
            try:
                for future in [pool.submit(alone_on_its_core) for _ in range(self.count)]:
                    future.result()
            finally:
                # The number is kept per thread, but also as the default of threads still to come.
                torch.set_num_threads(threads)
            self._pool = pool
        return self._pool
