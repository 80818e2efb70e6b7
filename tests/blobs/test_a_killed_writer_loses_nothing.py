"""A store on disk is whole after SIGKILL at any moment."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

import warm_python

pytestmark = [pytest.mark.waiting, pytest.mark.slow]


ROUNDS = 50


@pytest.mark.skipif(os.name == "nt", reason="needs fork and SIGKILL")
def test_after_fifty_kills_every_acknowledged_blob_is_there_and_whole(tmp_path: Path) -> None:
    script = Path(__file__).with_name("kill_a_writer.py")
    done = warm_python.run(
        [sys.executable, str(script), str(tmp_path / "store"), str(ROUNDS)],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["rounds"] == ROUNDS
    assert told["lost"] == told["broken"] == 0
    # The kills did hit writers at work, and these did get something done before.
    assert told["killed_in_mid_write"] >= ROUNDS // 5, told
    assert told["acknowledged"] >= ROUNDS // 5, told
