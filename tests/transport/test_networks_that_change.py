"""A run goes on when the network of one of its peers changes: three real processes, each in a network of its own.

Every case, with seconds, is ``benchmarks/changing_networks.py``; this is one of them, with what must hold on a slow
machine, too.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.waiting, pytest.mark.slow(30)]

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "changing_networks.py"
SECONDS = 280.0


@pytest.fixture
def networks() -> None:
    for tool in ("unshare", "ip", "nsenter"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no program {tool} here")
    command = ["unshare", "-Urn", "ip", "link", "add", "one", "type", "veth", "peer", "name", "other"]
    probe = subprocess.run(command, capture_output=True, text=True)
    if probe.returncode != 0:
        pytest.skip(f"no networks of one's own here: {probe.stderr.strip().splitlines()[-1:]}")


@pytest.mark.usefixtures("networks")
@pytest.mark.timeout(SECONDS + 10)
def test_a_peer_that_moves_from_ipv4_to_ipv6_stays_in_the_epoch_and_the_others_train_on() -> None:
    command = [sys.executable, str(SCRIPT), "--with", "--case", "to-ipv6", "--after", "10", "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["epochs"] == 0
    assert found["rounds"] >= 3
    # At most one on a machine that is not busy with something else.
    assert found["missed"] <= 3
    # Without the watch it hears nobody for thirty seconds, and is out of the epoch after the first round.
    assert found["silence"]["peers"] < 15
    assert found["longest_round"] < 12  # the limit of a round, and the report after it
