"""Several runtimes in one process go through a run: their weights stay equal, peers come and go, and it ends."""

from __future__ import annotations

import pytest

from distro_optim.strategy.rounds import actions as act
from runtime.memory import MemoryRun
from runtime.training import assert_equal_weights, changed_weights

pytestmark = [pytest.mark.waiting, pytest.mark.slow]


def test_one_peer_alone_goes_through_the_whole_run() -> None:
    with MemoryRun(total_steps=20) as run:
        peer = run.peer(1)
        peer.join()
        assert peer.error is None
        assert peer.of(act.RunEnded) == [act.RunEnded(step=23)]
        assert [action.step for action in peer.of(act.TrainBatch)] == list(range(1, 21))
        assert changed_weights(peer)


def test_three_peers_end_with_equal_weights() -> None:
    with MemoryRun(min_peers=3, total_steps=30) as run:
        peers = [run.peer(number) for number in (1, 2, 3)]
        for peer in peers:
            peer.join()
            assert peer.error is None
        shared = assert_equal_weights(*peers)
        assert len(shared) >= 28
        assert changed_weights(peers[0])
        assert all(len(action.updates) == 3 for action in peers[0].of(act.ApplyResults))
