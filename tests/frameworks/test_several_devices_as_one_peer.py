"""Two devices of one machine are one peer: they share its part of each round, and stay equal."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import warm_python
from distro_optim.strategy.environment import CONFIG, RUN
from distro_optim.strategy.sample_order import sample_indices, shuffle_seed

pytestmark = [pytest.mark.waiting, pytest.mark.slow]


SECONDS = 250  # of which loading PyTorch and Lightning twice on a busy machine takes most
SAID = re.compile(r"rank (\d) of [12] step 7 weights (\w+) (\[\[[^a-zA-Z`]*\]\])")
SCRIPT = Path(__file__).with_name("devices.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}


@pytest.mark.timeout(2 * SECONDS)
def test_two_devices_share_the_rounds_of_one_peer(tmp_path: Path) -> None:
    finished = warm_python.run(
        [sys.executable, str(SCRIPT), str(tmp_path), "2", "4"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=ENVIRONMENT,
        its_children_too=True,
    )
    output = finished.stdout + finished.stderr
    assert finished.returncode == 0, output
    assert output.count("Trainer(strategy=PsycheStrategy(run='psyche1") == 1, "one process hosts"
    said = SAID.findall(output)
    assert sorted(rank for rank, _, _ in said) == ["0", "1"], output
    assert len({weights for _, weights, _ in said}) == 1
    assert len(set(re.findall(r"losses (\S+)", output))) == 1, "validation is reduced over the devices"
    batches = [ast.literal_eval(samples) for _, _, samples in said]
    for number in range(7):
        # 13 samples: 7 and 6, both in two batches of at most 4.
        shared = [sample for rank in batches for batch in rank[2 * number : 2 * number + 2] for sample in batch]
        assert sorted(shared) == sorted(
            sample_indices(range(13 * number, 13 * number + 13), 64, shuffle_seed("devices"))
        )


@pytest.mark.timeout(2 * SECONDS)
def test_a_peer_of_two_devices_joins_one_of_one(tmp_path: Path) -> None:
    def start(devices: int, **environment: str) -> subprocess.Popen[str]:
        return warm_python.Popen(
            [sys.executable, str(SCRIPT), str(tmp_path), str(devices), "4"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**ENVIRONMENT, **environment},
            its_children_too=True,
        )

    peers = [start(1, **{CONFIG: json.dumps({"min_peers": 2})})]
    try:
        assert peers[0].stdout is not None
        invitation = next((line for line in peers[0].stdout if "run='psyche1" in line), "")
        ticket = re.search(r"psyche1\w+", invitation)
        assert ticket is not None, "nobody was invited"
        peers.append(start(2, **{RUN: ticket[0]}))
        outputs = [peer.communicate(timeout=SECONDS)[0] for peer in peers]
    finally:
        for peer in peers:
            peer.kill()
            peer.wait()
    assert [peer.returncode for peer in peers] == [0, 0], outputs
    said = [SAID.findall(output) for output in outputs]
    assert [sorted(rank for rank, _, _ in peer) for peer in said] == [["0"], ["0", "1"]]
    assert len({weights for peer in said for _, weights, _ in peer}) == 1
    batches = [ast.literal_eval(samples) for peer in said for _, _, samples in peer]
    trained = [sample for rank in batches for batch in rank for sample in batch]
    assert sorted(trained) == sorted(sample_indices(range(13 * 7), 64, shuffle_seed("devices")))
