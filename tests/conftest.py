"""Settings that hold for every test, however it is started."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Before torch is imported: its threads, and those of child processes, compete with the other tests for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How fast examples are made depends on what else the machine does, and on tables that a fresh clone has to build.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
