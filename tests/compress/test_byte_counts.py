"""``benchmarks/wire_bytes.py`` finds every form of a real update as long as its definition says, and readable."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT = 150  # seconds, of which loading PyTorch on a busy machine takes most


def test_every_form_has_the_length_of_its_definition_and_comes_back() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "wire_bytes.py"), "--steps", "2"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Psyche's form" in done.stdout
