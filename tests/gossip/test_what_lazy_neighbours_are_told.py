"""Who of two neighbours announces a payload to the other, and when. No network."""

from __future__ import annotations

import random
from dataclasses import replace

from distro_optim.comm.iroh.gossip.config import PSYCHE_GOSSIP, SWARM_GOSSIP, GossipConfig
from distro_optim.comm.iroh.gossip.events import Action, DispatchTimer, NeighborUp, Publish, Schedule, Send
from distro_optim.comm.iroh.gossip.messages import Gossip, IHave, Prune, message_id
from distro_optim.comm.iroh.gossip.plumtree import PlumTree

ME, SMALLER, GREATER = (bytes([number]) * 32 for number in (5, 3, 7))
CONTENT = b"something"
ID = message_id(CONTENT)


def tree_with_lazy(*peers: bytes) -> PlumTree:
    tree = PlumTree(ME, GossipConfig(), random.Random(1))
    for peer in peers:
        tree.handle(NeighborUp(peer), 0.0)
        tree.receive(peer, Prune(), 0.0)
    return tree


def announced(actions: list[Action]) -> list[tuple[bytes, int]]:
    """To whom, and how many payloads."""
    return [
        (peer, len(action.message.entries))
        for action in actions
        if isinstance(action, Send) and isinstance(action.message, IHave)
        for peer in action.peers
    ]


def test_the_neighbour_with_the_greater_id_is_told_at_once_and_the_other_one_later() -> None:
    tree = tree_with_lazy(SMALLER, GREATER)
    assert announced(tree.handle(Publish(CONTENT), 0.0)) == []
    first = tree.handle(DispatchTimer(), 0.1)
    assert announced(first) == [(GREATER, 1)]
    assert any(isinstance(action, Schedule) and action.timer == DispatchTimer() for action in first)
    second = tree.handle(DispatchTimer(), 0.2)
    assert announced(second) == [(SMALLER, 1)]
    assert not any(isinstance(action, Schedule) for action in second)


def test_what_is_said_between_two_announcements_waits_for_its_own_turn() -> None:
    tree = tree_with_lazy(SMALLER)
    tree.handle(Publish(CONTENT), 0.0)
    tree.handle(DispatchTimer(), 0.1)
    tree.handle(Publish(CONTENT * 2), 0.15)
    assert announced(tree.handle(DispatchTimer(), 0.2)) == [(SMALLER, 1)]
    assert announced(tree.handle(DispatchTimer(), 0.3)) == [(SMALLER, 1)]


def test_who_has_announced_a_payload_is_not_told_of_it() -> None:
    tree = tree_with_lazy(SMALLER, GREATER)
    tree.handle(Publish(CONTENT), 0.0)
    tree.receive(SMALLER, IHave(((ID, 0),)), 0.01)
    tree.receive(GREATER, IHave(((ID, 0),)), 0.01)
    assert announced(tree.handle(DispatchTimer(), 0.1)) + announced(tree.handle(DispatchTimer(), 0.2)) == []


def test_who_has_pushed_a_payload_that_we_had_is_not_told_of_it() -> None:
    tree = tree_with_lazy(SMALLER, GREATER)
    tree.handle(Publish(CONTENT), 0.0)
    tree.receive(SMALLER, Gossip(ID, CONTENT, 1), 0.01)
    assert announced(tree.handle(DispatchTimer(), 0.1)) == [(GREATER, 1)]
    assert announced(tree.handle(DispatchTimer(), 0.2)) == []


def test_a_swarm_collects_announcements_for_longer_than_psyche_and_is_like_it_otherwise() -> None:
    assert SWARM_GOSSIP.dispatch_timeout > PSYCHE_GOSSIP.dispatch_timeout
    like_psyche = replace(SWARM_GOSSIP, dispatch_timeout=PSYCHE_GOSSIP.dispatch_timeout, pushed_by_author=0)
    assert like_psyche == PSYCHE_GOSSIP
