"""Threads that share out the blocks of a step among a CPU's cores, and what must be set for all of them meanwhile.

PyTorch would run each operation on all cores and wait for the slowest after each of them, which costs most where
another program has one of the cores. Here a core takes a block through all its stages on its own. And an operation on
one thread gives the same bits whatever the number of cores, so that peers with different machines agree.

The precision of products in float32 belongs to the process, too: a script that allows TensorFloat-32 or bfloat16 for
its model's (``torch.set_float32_matmul_precision``) does not mean those of a step, where it would change weights.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import torch

__all__ = ["MAX_WORKERS", "Workers", "true_float32", "workers_of_a_step"]

MAX_WORKERS: Final = 8
"""Each has some 6 MiB of scratch memory, and that many cores should keep the memory busy. Chosen, not measured."""

_BACKENDS: Final = ("cuda", "mkldnn")
"""Whose products in float32 can be told to be others."""

T = TypeVar("T")


class _Precision:
    """How many are in need of true float32, and what was set before the first of them."""

    def __init__(self) -> None:
        self.changing = threading.Lock()
        self.users = 0
        self.before: dict[str, str] = {}

    def pin(self) -> None:
        with self.changing:
            self.users += 1
            if self.users == 1:
                self.before = {name: value for name, value in _precisions().items() if value not in _TRUE}
                _set_precisions(dict.fromkeys(self.before, "highest" if _OLD in self.before else "ieee"))

    def release(self) -> None:
        with self.changing:
            self.users -= 1
            if self.users == 0:
                _set_precisions(self.before)
                self.before = {}


_OLD: Final = "all"
"""Before torch 2.9 there is one setting for all backends."""

_TRUE: Final = ("none", "ieee", "highest")


def _precisions() -> dict[str, str]:
    get: Any = getattr(torch._C, "_get_fp32_precision_getter", None)
    if get is None:
        return {_OLD: torch.get_float32_matmul_precision()}
    return {name: get(name, "matmul") for name in _BACKENDS}


def _set_precisions(values: dict[str, str]) -> None:
    for name, value in values.items():
        if name == _OLD:
            torch.set_float32_matmul_precision(value)
        else:
            _set_precision(name, "none")
            if _precisions()[name] != value:  # otherwise it comes from a setting above, and goes with it
                _set_precision(name, value)


def _set_precision(backend: str, value: str) -> None:
    torch._C._set_fp32_precision_setter(backend, "matmul", value)


_precision = _Precision()


@contextmanager
def true_float32() -> Iterator[None]:
    """Within this block products of float32 are IEEE 754's in all threads, whatever the script allows for its model."""
    pinned = _precision
    pinned.pin()
    try:
        yield
    finally:
        pinned.release()


# One pool for each number of threads: it ends with the process, as PyTorch's own threads do. A pool per optimizer would
# leave its threads to the garbage collector, and several optimizers that step at once would crowd the cores.
_pools: dict[int, ThreadPoolExecutor] = {}
_starting = threading.Lock()


def _after_fork() -> None:
    global _starting, _precision
    _pools.clear()  # threads do not survive a fork
    _starting = threading.Lock()
    _precision = _Precision()


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
