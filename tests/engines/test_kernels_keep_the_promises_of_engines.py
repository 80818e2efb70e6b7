"""The suite of all engines, for the kernels: in a process of its own, where Triton interprets them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install 'distro-optim[gpu]'"
    ),
]

CHOSEN = (
    "interpreted and (1x1-signs or 3x6-extreme or look_ahead or (looks_ahead and bfloat16) or device_knows"
    " or (of_equals and signs))"
)
"""A few of each promise; without ``-k`` all of them take some minutes."""


def test_kernels_keep_the_promises_of_all_engines() -> None:
    suite = Path(__file__).with_name("test_every_engine_keeps_its_promises.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", CHOSEN, str(suite)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout
