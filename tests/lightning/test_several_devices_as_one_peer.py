"""Two devices of one machine are one peer: they share its part of each round, and stay equal."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distro_optim.strategy.data import sample_indices, shuffle_seed

SECONDS = 250  # of which loading PyTorch and Lightning twice on a busy machine takes most
SAID = re.compile(r"rank (\d) of 2 step 7 weights (\w+) (\[\[[^a-zA-Z`]*\]\])")


@pytest.mark.timeout(2 * SECONDS)
def test_two_devices_share_the_rounds_of_one_peer(tmp_path: Path) -> None:
    script = Path(__file__).with_name("devices.py")
    finished = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "2", "4"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
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
