"""Two devices that hold a model together are one peer, beside one that has it whole: in Lightning and in Fabric."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed.fsdp

import warm_python
from distro_optim.errors import ConfigurationError
from distro_optim.strategy.environment import RUN
from distro_optim.strategy.frameworks.shards import ShardSizes
from distro_optim.strategy.psyche import PsycheStrategy

pytestmark = [
    pytest.mark.waiting,
    pytest.mark.skipif(
        not hasattr(torch.distributed.fsdp, "fully_shard"), reason="FSDP2 comes with PyTorch 2.6 and later"
    ),
]

SECONDS = 250
SAID = re.compile(r"rank (\d) of ([12]) step 5 weights (\w+)")
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}


def test_sizes_that_make_no_mesh_are_said() -> None:
    with pytest.raises(ConfigurationError, match="tensor_parallel_size=0"):
        PsycheStrategy(tensor_parallel_size=0)
    sizes = ShardSizes.of(3, 2)
    assert sizes is not None
    with pytest.raises(ConfigurationError, match="product must be the number of devices"):
        sizes.mesh(4, "cpu")
    assert ShardSizes.of(None, None) is None


@pytest.mark.slow
@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize("script", ["shard_devices.py", "shard_fabric.py"])
def test_a_peer_in_shards_joins_one_that_is_whole(tmp_path: Path, script: str) -> None:
    def start(devices: int, **environment: str) -> subprocess.Popen[str]:
        return warm_python.Popen(
            [sys.executable, str(Path(__file__).with_name(script)), str(tmp_path), str(devices)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**ENVIRONMENT, **environment},
            its_children_too=True,
        )

    peers = [start(1)]
    try:
        assert peers[0].stdout is not None
        before = []
        ticket = None
        for line in peers[0].stdout:
            before.append(line)
            if (ticket := re.search(r"run='(psyche1\w+)", line)) is not None:
                break
        assert ticket is not None, "".join(before)
        peers.append(start(2, **{RUN: ticket[1]}))
        outputs = [peer.communicate(timeout=SECONDS)[0] for peer in peers]
    finally:
        for peer in peers:
            peer.kill()
            peer.wait()
    assert [peer.returncode for peer in peers] == [0, 0], "\n".join(outputs)
    said = [SAID.findall(output) for output in outputs]
    assert [sorted(rank for rank, _, _ in peer) for peer in said] == [["0"], ["0", "1"]], outputs
    weights = {weights for peer in said for _, _, weights in peer}
    assert len(weights) == 1, outputs
    assert all(re.findall(r"saved (\w+)", output) == list(weights) for output in outputs), outputs
