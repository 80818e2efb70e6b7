"""``examples/lightning_digits.py``: two terminals with a ticket train one network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import warm_python

pytestmark = [pytest.mark.waiting, pytest.mark.slow]


pytest.importorskip("sklearn")

EXAMPLE = Path(__file__).parents[2] / "examples" / "lightning_digits.py"
SECONDS = 250  # of which loading PyTorch and Lightning on a busy machine takes most


def start(*arguments: str) -> subprocess.Popen[str]:
    return warm_python.Popen(
        [sys.executable, "-W", "ignore", str(EXAMPLE), "--relay", "none", "--steps", "100", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(EXAMPLE.parents[1] / "src"), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.timeout(2 * SECONDS)
def test_two_terminals_train_one_network() -> None:
    processes = [start("--peers", "2")]
    outputs = []
    try:
        assert processes[0].stdout is not None
        for line in processes[0].stdout:
            outputs.append(line)
            if ticket := re.search(r"run='(psyche1\w+)'", line):
                break
        else:
            raise AssertionError("".join(outputs))
        processes.append(start("--run", ticket[1]))
        outputs = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for output in outputs:
        assert "step 100: " in output, output
        accuracy = re.search(r"([\d.]+)% of the images", output)
        assert accuracy is not None
        assert float(accuracy[1]) > 80
    assert len({re.search(r"weights (\w+)", output)[1] for output in outputs}) == 1, outputs  # type: ignore[index]
