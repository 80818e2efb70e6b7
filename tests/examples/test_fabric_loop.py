"""``examples/fabric_loop.py`` learns its spirals, hosting a run of one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "fabric_loop.py"
SECONDS = 250  # of which loading PyTorch and Lightning on a busy machine takes most


@pytest.mark.timeout(2 * SECONDS)
def test_a_loop_with_fabric_learns() -> None:
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", str(EXAMPLE), "--relay", "none", "--steps", "150"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, "PYTHONPATH": str(EXAMPLE.parents[1] / "src"), "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "FabricPsycheStrategy(run='psyche1" in finished.stdout
    accuracy = re.search(r"([\d.]+)% of the points", finished.stdout)
    assert accuracy is not None
    assert float(accuracy[1]) > 60  # 25 by chance
