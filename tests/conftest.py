"""Settings that hold for every test, however it is started."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterator
from itertools import groupby
from subprocess import PIPE
from typing import Any

import pytest
from _pytest import logging as pytest_logging
from hypothesis import HealthCheck, settings
from typing_extensions import override

import warm_python

SLOW_SECONDS = 1.0
"""Of a slow test whose mark does not say how long it takes: about the mean of them."""

PROCESSES_PER_COMPUTING_ONE = 5
"""One process in so many begins with the slow tests that compute: in a simulation with partly guessed times, a second
one in five made it slower."""

# Before torch is imported: its threads, and those of child processes, compete with the other tests for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests of compiled kernels turn them on. They bring the same bits, and loading them takes each process seconds.
os.environ.setdefault("DISTRO_OPTIM_FAST", "0")

# Where RUST_BACKTRACE is set, iroh looks up its stack for each URL that it cannot read: 0.07 seconds of a core.
os.environ.setdefault("RUST_LIB_BACKTRACE", "0")

# While libraries and tests are loaded there is next to nothing to collect, and looking for it takes seconds.
gc.disable()

# What tests start with multiprocessing loads no library anew.
warm_python.serve_multiprocessing()

# How fast examples are made depends on what else the machine does, and on tables that a fresh clone has to build.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_collection_finish() -> None:
    """From here on only what the tests make is looked through, not the libraries."""
    gc.freeze()
    gc.enable()


class _CatchingLogsOfRoot(pytest_logging.catching_logs[Any]):
    """Catches what reaches the root logger, as pytest did before version 9, and nothing else. Since then it looks
    through all loggers six times in each test for those that keep to themselves; here there are over a thousand."""

    @override
    def __enter__(self) -> Any:
        root = logging.getLogger()
        if self.level is not None:
            self.handler.setLevel(self.level)
            self.orig_level = root.level
            root.setLevel(min(self.orig_level, self.level))
        root.addHandler(self.handler)
        self.attached_loggers = [root]
        return self.handler


if hasattr(pytest_logging.catching_logs, "attached_loggers"):
    setattr(pytest_logging, "catching_logs", _CatchingLogsOfRoot)  # noqa: B010


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """The processes that share the tests are forks: one loads the libraries for all."""
    from execnet import gateway_io
    from execnet.gateway_base import Popen2IO

    class Fork(gateway_io.Popen2IOMaster):
        def __init__(self, args: list[str], execmodel: Any) -> None:
            self.popen = warm_python.Popen(args, stdin=PIPE, stdout=PIPE, runs_tests=True)
            Popen2IO.__init__(self, self.popen.stdin, self.popen.stdout, execmodel=execmodel)

    gateway_io.Popen2IOMaster = Fork  # type: ignore[misc]


def _seconds(items: list[pytest.Item]) -> float:
    """How long slow tests take, about."""
    marks = [item.get_closest_marker("slow") for item in items]
    return sum(mark.args[0] if mark is not None and mark.args else SLOW_SECONDS for mark in marks)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests come first in what each process begins with: one that began last would be waited for by all others.

    pytest-xdist cuts the list in as many equal parts as there are processes. Those that are done take over from the
    ends of the others, where the short tests are. The slow tests of a file stay together, and so do the others. What
    takes longest comes first, and the slow tests of all processes take equally long, as far as marks say how long.

    Slow tests that compute are for a process of their own: those that wait leave the cores idle, if all processes
    begin with them, and cannot share them once only those that compute are left.
    """
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if processes == 1:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    files = [list(of_a_file) for _, of_a_file in groupby(slow, key=lambda item: item.path)]
    parts: list[list[pytest.Item]] = [[] for _ in range(processes)]
    computing = max(1, processes // PROCESSES_PER_COMPUTING_ONE)
    for of_a_file in sorted(files, key=_seconds, reverse=True):
        waits = any(item.get_closest_marker("waiting") for item in of_a_file)
        min(parts[computing:] if waits else parts[:computing], key=_seconds).extend(of_a_file)
    others = iter([item for item in items if not item.get_closest_marker("slow")])
    left = len(items)
    for number, part in enumerate(parts):
        size = left // (processes - number)
        left -= size
        part.extend(item for _, item in zip(range(size - len(part)), others, strict=False))
    items[:] = [item for part in parts for item in part]
    items.extend(others)


@pytest.fixture(autouse=True)
def _the_default_type_stays() -> Iterator[None]:
    """All tests of a process share it: the test that leaves another one behind is the one that fails."""
    yield
    if (torch := sys.modules.get("torch")) is not None and (left := torch.get_default_dtype()) != torch.float32:
        torch.set_default_dtype(torch.float32)
        pytest.fail(f"the test has left {left} as the default type")
