"""Settings that hold for every test, however it is started."""

from __future__ import annotations

import os

# Before torch is imported: its threads, and those of child processes, compete with the other tests for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
