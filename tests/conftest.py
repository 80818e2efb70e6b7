"""Which tests wait: they start processes, listen on sockets, or wait for each other in real time.

``make test`` runs them one after the other, and beside them, at a lower priority, those that only compute: while the
former wait, a core is free. ``pytest`` alone runs all tests in one process.
"""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
WAITING = {
    *("blobs", "client", "examples", "gossip", "iroh", "lightning", "runtime", "swarm", "testnet", "token_data"),
    *("session/test_checkpoints.py", "session/test_live_sessions.py"),
    "test_coordinator_clients.py",
    "test_coordinator_link_failures.py",
    "test_coordinator_server.py",
    "test_coordinator_service.py",
    "test_coordinator_swarm_run.py",
    "test_distributed_checkpoint.py",
    "test_embedded_coordinator.py",
    "test_exchanges.py",
    "test_fabric.py",
    "test_lightning.py",
    "test_other_training_loops.py",
    "test_peers_agree.py",
    "test_process_group.py",
    "test_serve_command.py",
    "test_state_store.py",
    "test_training_data.py",
    "test_training_script.py",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        place = item.path.relative_to(TESTS)
        if WAITING.intersection([place.as_posix(), place.parts[0]]):
            item.add_marker(pytest.mark.waiting)
