"""``examples/fabric_loop.py`` learns its spirals, hosting a run of one, on one device or two."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

import warm_python

pytestmark = [pytest.mark.waiting, pytest.mark.slow]


EXAMPLE = Path(__file__).parents[2] / "examples" / "fabric_loop.py"
SECONDS = 250  # of which loading PyTorch and Lightning on a busy machine takes most


@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize("devices", [1, 2])
def test_a_loop_with_fabric_learns(devices: int) -> None:
    options = ["--relay", "none", "--steps", "180", "--devices", str(devices)]
    finished = warm_python.run(
        [sys.executable, "-W", "ignore", str(EXAMPLE), *options],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        its_children_too=True,
        env={**os.environ, "PYTHONPATH": str(EXAMPLE.parents[1] / "src"), "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.count("FabricPsycheStrategy(run='psyche1") == 1
    accuracy = re.search(r"([\d.]+)% of the points", finished.stdout)
    assert accuracy is not None
    assert float(accuracy[1]) > 60  # 25 by chance
