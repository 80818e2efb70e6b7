"""Nodes with stores on loopback, without relays or discovery."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from distro_optim.comm.iroh.blobs.net import BlobService
from distro_optim.comm.iroh.blobs.store import Blob, BlobStore, MemoryStore
from distro_optim.comm.iroh.endpoint import Node
from distro_optim.comm.loop import LoopThread

LOOPBACK = {"bind_addr": "127.0.0.1:0", "relay": "none", "discovery": False}


@dataclass
class Peer:
    """A node with a blob service."""

    node: Node
    store: BlobStore
    service: BlobService

    @property
    def id(self) -> bytes:
        return self.node.endpoint_id

    def fetch(self, root: bytes, providers: list[bytes], *, timeout: float = 60.0, **options: Any) -> Blob:
        """Fetches and waits."""
        coroutine = self.service.fetch(root, providers, **{"max_size": 2**30, "tag": "fetched", **options})
        return self.node.submit(coroutine).result(timeout)


@pytest.fixture
def loop_thread() -> Iterator[LoopThread]:
    """One network thread for all nodes of a test."""
    thread = LoopThread("test-network")
    yield thread
    thread.stop()


@pytest.fixture
def make_node(loop_thread: LoopThread) -> Iterator[Callable[..., Node]]:
    """Makes bound nodes that know each other's addresses; closes them at the end."""
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


@pytest.fixture
def make_peer(make_node: Callable[..., Node]) -> Callable[..., Peer]:
    """Makes peers that know each other's addresses."""

    def make(store: BlobStore | None = None, **options: Any) -> Peer:
        node, kept = make_node(), store if store is not None else MemoryStore()

        async def build() -> BlobService:
            return BlobService(node, kept, **options)

        return Peer(node, kept, node.submit(build()).result(10))

    return make
