"""Settings that hold for every test, however it is started."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# Before torch is imported: its threads, and those of child processes, compete with the other tests for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests of compiled kernels turn them on. They bring the same bits, and loading them takes each process seconds.
os.environ.setdefault("DISTRO_OPTIM_FAST", "0")

# How fast examples are made depends on what else the machine does, and on tables that a fresh clone has to build.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(autouse=True)
def _the_default_type_stays() -> Iterator[None]:
    """All tests of a process share it: the test that leaves another one behind is the one that fails."""
    yield
    if (torch := sys.modules.get("torch")) is not None and (left := torch.get_default_dtype()) != torch.float32:
        torch.set_default_dtype(torch.float32)
        pytest.fail(f"the test has left {left} as the default type")
