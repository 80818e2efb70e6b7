"""Real endpoints, no relay, no public lookup: a ticket is enough to train together."""

from __future__ import annotations

import pytest

from distro_optim.strategy import actions as act
from runtime.live import config, live_run
from runtime.training import assert_equal_weights, changed_weights

pytestmark = pytest.mark.timeout(120)


def test_three_peers_train_together_with_nothing_but_the_hosts_ticket() -> None:
    with live_run() as run:
        host = run.host(config(min_peers=3, total_steps=30))
        assert host.port.ticket is not None
        assert host.port.is_host
        peers = [host, run.join(), run.join()]
        for peer in peers:
            peer.join()
            assert peer.error is None, peer.error
        assert len(assert_equal_weights(*peers)) >= 28
        assert changed_weights(host)
        assert all(len(action.updates) == 3 for action in host.of(act.ApplyResults)[1:])
        assert {view.num_peers for view in (peer.port.view() for peer in peers)} == {3}
