"""``benchmarks/gpu.py``, which is for the day when there is a GPU, runs through without one."""

from __future__ import annotations

import importlib.util
import json
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

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
TESTS = Path(__file__).parents[1]

QUICKLY = """
import os, runpy, sys
sys.argv = sys.argv[1:]
sys.path += [sys.argv.pop(1), os.path.dirname(sys.argv[0])]
from engines.quick_interpreter import replace_the_language_once
replace_the_language_once()
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""The script as it is, in an interpreter that does nothing twice."""


def test_every_part_of_it_runs_at_toy_size_and_finds_the_bits_of_the_cpu(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    done = subprocess.run(
        [sys.executable, "-c", QUICKLY, str(SCRIPT), str(TESTS), "--device", "cpu", "--toy", "--json", str(numbers)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(numbers.read_text("utf-8"))
    assert answer["failed"] == []
    compared = answer["found"]["weights with other bits than on the CPU"]["rows"]
    assert [row[2:4] for row in compared] == [[0, 0]] * len(compared)
    stages = [row[0] for row in answer["found"]["toy: milliseconds"]["rows"]]
    assert {"kernels: whole step", "torch: merge", "AdamW, fused"} <= set(stages)
    assert {"toy: extraction by precision", "toy: copies"} <= set(answer["found"])
