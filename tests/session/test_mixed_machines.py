"""Peers whose processors differ train a whole run with equal weights."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

import warm_python

pytestmark = [pytest.mark.waiting, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
ROUNDS = 103
SMALL = ["--width=64", "--layers=1", "--context=16", "--k=8"]


def test_three_kinds_of_processors_have_equal_weights_after_every_round(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, "benchmarks/mixed_machines.py", "--arithmetic=exact", f"--rounds={ROUNDS}", *SMALL]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = warm_python.run(
        [*command, f"--out={out}", "--timeout=500"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [figures] = json.loads(out.read_text())
    assert figures["rounds"] >= 100
    assert figures["equal"] == figures["rounds"]
    assert figures["trained"] == [ROUNDS] * 3
    assert figures["desynced"] == [0, 0, 0]
    assert figures["equal_in_the_end"]
