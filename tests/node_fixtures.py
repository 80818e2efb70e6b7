"""Fixtures for live tests: nodes on loopback, without relays or discovery, for each conftest to import."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from distro_optim.comm.iroh.endpoint import Node
from distro_optim.comm.loop import LoopThread

__all__ = ["LOOPBACK", "loop_thread", "make_node"]

LOOPBACK: dict[str, Any] = {"bind_addr": "127.0.0.1:0", "relay": "none", "discovery": False}


@pytest.fixture
def loop_thread() -> Iterator[LoopThread]:
    """One network thread for all nodes of a test."""
    thread = LoopThread("test-network")
    yield thread
    thread.stop()


@pytest.fixture
def make_node(loop_thread: LoopThread) -> Iterator[Callable[..., Node]]:
    """Makes bound nodes on loopback that know each other's addresses; closes them at the end."""
    nodes: list[Node] = []

    def make(**options: Any) -> Node:
        node = Node(**{**LOOPBACK, "loop": loop_thread, **options}).start()
        for other in nodes:
            if not other.is_closed:
                other.addresses.add(node.addr())
                node.addresses.add(other.addr())
        nodes.append(node)
        return node

    yield make
    for node in nodes:
        node.close()
