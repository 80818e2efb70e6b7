"""Nodes on loopback, without relays or discovery, for the live tests of the peer-to-peer network."""

from __future__ import annotations

from node_fixtures import LOOPBACK, loop_thread, make_node

__all__ = ["LOOPBACK", "loop_thread", "make_node"]
