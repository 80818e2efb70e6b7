"""Nodes with stores on loopback, without relays or discovery."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from distro_optim.comm.iroh.blobs.net import BlobService
from distro_optim.comm.iroh.blobs.store import Blob, BlobStore, MemoryStore
from distro_optim.comm.iroh.endpoint import Node
from node_fixtures import LOOPBACK, loop_thread, make_node

__all__ = ["LOOPBACK", "Peer", "loop_thread", "make_node", "make_peer"]


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
def make_peer(make_node: Callable[..., Node]) -> Callable[..., Peer]:
    """Makes peers that know each other's addresses."""

    def make(store: BlobStore | None = None, **options: Any) -> Peer:
        node, kept = make_node(), store if store is not None else MemoryStore()

        async def build() -> BlobService:
            return BlobService(node, kept, **options)

        return Peer(node, kept, node.submit(build()).result(10))

    return make
