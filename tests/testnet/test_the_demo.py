"""``make demo``, shorter: one Lightning script in several processes, one of them killed, another joining."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

import warm_python

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "lightning_bytes.py"

pytestmark = [pytest.mark.waiting, pytest.mark.slow(25)]


def test_one_script_trains_as_several_peers_who_come_and_go(tmp_path: Path) -> None:
    # Two are needed: the run waits for the third peer when the second is gone, however long that one takes to start.
    command = [sys.executable, "-m", "distro_optim", "testnet", "--peers", "2", "--kill", "1@6", "--join-at", "6"]
    command += ["--set", "joiner_wait_time=1", "--set", "min_peers=2", "--set", "global_batch_size=4"]
    command += ["--target", "5.3", "--timeout", "280", "--json", "--out", str(tmp_path), str(SCRIPT), "40"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    ended = warm_python.run(
        command, env=environment, capture_output=True, text=True, timeout=290, its_children_too=True
    )
    summary = json.loads(ended.stdout.splitlines()[-1])
    assert ended.returncode == 0, (summary, ended.stderr)
    host, killed, joined = summary["peers"]
    assert (host["state"], killed["state"], joined["state"]) == ("ended", "killed -9", "ended")
    assert killed["rounds"] >= 3
    assert joined["rounds"] >= 3
    assert host["weights_hash"] == joined["weights_hash"]
    assert summary["rounds_compared"] >= 8
    assert summary["rounds_differing"] == 0
    assert 0 < host["bytes_sent"] < host["ddp_bytes"]
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
