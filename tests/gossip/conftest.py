"""Nodes on loopback, without relays or discovery, for the live gossip tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from distro_optim.comm.iroh.endpoint import Node
from distro_optim.comm.loop import LoopThread
from node_fixtures import LOOPBACK, loop_thread

__all__ = ["loop_thread", "make_node"]


@pytest.fixture
def make_node(loop_thread: LoopThread) -> Iterator[Callable[[], Node]]:
    """Makes bound nodes that know nobody; closes them at the end."""
    nodes: list[Node] = []

    def make() -> Node:
        node = Node(**LOOPBACK, loop=loop_thread).start()
        nodes.append(node)
        return node

    yield make
    for node in nodes:
        node.close()
