"""Nodes on loopback, without relays or discovery, for the live gossip tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from distro_optim.comm.iroh.endpoint import Node
from distro_optim.comm.loop import LoopThread


@pytest.fixture
def loop_thread() -> Iterator[LoopThread]:
    """One network thread for all nodes of a test."""
    thread = LoopThread("test-gossip")
    yield thread
    thread.stop()


@pytest.fixture
def make_node(loop_thread: LoopThread) -> Iterator[Callable[[], Node]]:
    """Makes bound nodes that know nobody; closes them at the end."""
    nodes: list[Node] = []

    def make() -> Node:
        node = Node(bind_addr="127.0.0.1:0", relay="none", discovery=False, loop=loop_thread).start()
        nodes.append(node)
        return node

    yield make
    for node in nodes:
        node.close()
