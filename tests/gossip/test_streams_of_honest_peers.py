"""How many streams honest peers open to each other at the most, which is what the limit for strangers is made from."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from distro_optim.comm.iroh.gossip.config import SWARM_GOSSIP
from distro_optim.comm.iroh.gossip.links import LinkLimits
from distro_optim.comm.swarm import Channel
from gossip.simulator import Simulator

ASKED_AT_ONCE = 8
"""As ``strategy/network/driver.py`` asks."""

MARGIN = 4


def tokens_needed(opened: Sequence[float], rate: float) -> float:
    """What a bucket has to hold so that streams may be opened at these times."""
    tokens, lowest, last = 0.0, 0.0, 0.0
    for when in opened:
        tokens = min(0.0, tokens + (when - last) * rate) - 1
        lowest, last = min(lowest, tokens), when
    return -lowest


@pytest.mark.parametrize("in_mesh", [False, True])
@pytest.mark.parametrize(
    ("peers", "asking"),
    [(16, 1), *(pytest.param(*many, marks=pytest.mark.slow) for many in [(16, 40), (64, 1), (64, 10)])],
)
def test_peers_that_start_together_open_far_fewer_streams_than_they_may(peers: int, asking: int, in_mesh: bool) -> None:
    """``in_mesh``: they know how many they are, few or not. ``asking``: how often each asks others to be its
    neighbours, every tenth of a second, as for every newcomer."""
    most = 0.0
    for seed, _ in enumerate(Channel):
        sim = Simulator(SWARM_GOSSIP, seed=seed, latency=(0.0005, 0.02))
        rng = random.Random(seed)
        everybody = [sim.add() for _ in range(peers)]
        for node in sim.nodes.values():
            node.protocol.set_others(peers - 1 if in_mesh else None)
        for _ in range(asking):
            for peer in everybody:
                sim.ask(peer, rng.sample(everybody, ASKED_AT_ONCE))
            sim.run(0.1)
        sim.run(10.0)
        most += max(tokens_needed(opened, LinkLimits().stream_rate) for opened in sim.opened.values())
    # All channels share a connection, and here the busiest pair of each is taken for the same.
    assert 2 <= most <= LinkLimits().stream_burst / MARGIN
