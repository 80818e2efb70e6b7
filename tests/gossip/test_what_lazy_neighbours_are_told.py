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
WAIT = SWARM_GOSSIP.mesh_dispatch_timeout
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
    assert SWARM_GOSSIP.mesh_dispatch_timeout == PSYCHE_GOSSIP.mesh_dispatch_timeout > SWARM_GOSSIP.dispatch_timeout
    like_psyche = replace(SWARM_GOSSIP, dispatch_timeout=PSYCHE_GOSSIP.dispatch_timeout, pushed_by_author=0)
    assert like_psyche == PSYCHE_GOSSIP


# -- in a swarm of few, where everybody is everybody's neighbour and each author pushes to all -------------------------

MEMBERS = [bytes([number]) * 32 for number in range(1, 11)]


def in_mesh(me: bytes, lacks: int = 0) -> PlumTree:
    """One of the members, of whose neighbours some are lacking; all links are lazy, as they soon are."""
    tree = PlumTree(me, SWARM_GOSSIP, random.Random(1))
    tree.others = len(MEMBERS) - 1
    for peer in [peer for peer in MEMBERS if peer != me][lacks:]:
        tree.handle(NeighborUp(peer), 0.0)
        tree.receive(peer, Prune(), 0.0)
    return tree


def dispatch_at(actions: list[Action], now: float) -> float | None:
    """When the announcements of a mesh are to be made."""
    timer = DispatchTimer(of_mesh=True)
    return next((now + one.delay for one in actions if isinstance(one, Schedule) and one.timer == timer), None)


def test_of_what_was_pushed_to_all_each_member_is_told_by_three() -> None:
    author, others = MEMBERS[0], MEMBERS[1:]
    for number in range(40):
        content = b"%d" % number
        pushed = Gossip(message_id(content), content, 0)
        told: list[bytes] = []
        for me in others:
            tree = in_mesh(me)
            actions = tree.receive(author, pushed, 1.0)
            assert announced(actions) == []
            assert not any(isinstance(action, Send) for action in actions)
            told += [peer for peer, _ in announced(tree.handle(DispatchTimer(of_mesh=True), 1.0 + WAIT))]
        # Three tell each; of those whom the author is one of the three for, only two have to.
        assert sorted(told.count(peer) for peer in others) == [2] * 3 + [3] * (len(others) - 3)
        assert author not in told


def test_what_a_member_says_takes_the_announcements_with_it() -> None:
    tree, silent = in_mesh(MEMBERS[4]), in_mesh(MEMBERS[4])
    for one in (tree, silent):
        one.receive(MEMBERS[0], Gossip(ID, CONTENT, 0), 1.0)
    actions = [action for action in tree.handle(Publish(b"mine"), 1.1) if isinstance(action, Send)]
    assert isinstance(actions[0].message, Gossip)
    assert len(actions[0].peers) == len(MEMBERS) - 1
    assert announced([*actions]) == announced(silent.handle(DispatchTimer(of_mesh=True), 1.0 + WAIT)) != []
    # The timer that was set meanwhile finds nothing, or what is not due yet.
    assert tree.handle(DispatchTimer(of_mesh=True), 1.0 + WAIT) == []


def test_announcements_that_nothing_goes_with_are_made_in_the_end() -> None:
    tree = in_mesh(MEMBERS[4])
    first = tree.receive(MEMBERS[0], Gossip(ID, CONTENT, 0), 1.0)
    assert dispatch_at(first, 1.0) == 1.0 + WAIT
    tree.handle(Publish(b"mine"), 1.5)
    second = b"second"
    assert dispatch_at(tree.receive(MEMBERS[1], Gossip(message_id(second), second, 0), 2.0), 2.0) is None
    early = tree.handle(DispatchTimer(of_mesh=True), 1.0 + WAIT)
    assert announced(early) == []
    assert dispatch_at(early, 1.0 + WAIT) == 2.0 + WAIT
    assert len(announced(tree.handle(DispatchTimer(of_mesh=True), 2.0 + WAIT))) == 3


def test_who_has_pushed_or_announced_it_is_not_told_in_a_mesh_either() -> None:
    tree = in_mesh(MEMBERS[4])
    tree.receive(MEMBERS[0], Gossip(ID, CONTENT, 0), 1.0)
    for peer in MEMBERS:
        if peer != MEMBERS[4]:
            tree.receive(peer, IHave(((ID, 1),)), 1.1)
    assert announced(tree.handle(DispatchTimer(of_mesh=True), 1.0 + WAIT)) == []


def test_an_author_that_lacks_a_neighbour_says_so_and_others_announce_it_at_once_to_all() -> None:
    def rounds(tree: PlumTree) -> set[int | None]:
        actions = tree.handle(Publish(CONTENT), 1.0)
        return {one.message.round for one in actions if isinstance(one, Send) and isinstance(one.message, Gossip)}

    assert rounds(in_mesh(MEMBERS[0])) == {0}
    assert rounds(in_mesh(MEMBERS[0], lacks=1)) == {1}
    tree = in_mesh(MEMBERS[4])
    tree.receive(MEMBERS[0], Gossip(ID, CONTENT, 1), 1.0)
    first, second = (announced(tree.handle(DispatchTimer(), 1.0 + wait)) for wait in (0.1, 0.2))
    assert {peer for peer, _ in first + second} == set(MEMBERS) - {MEMBERS[0], MEMBERS[4]}


def test_what_comes_from_one_that_pushes_only_where_it_is_asked_to_is_announced_at_once_to_all() -> None:
    tree = in_mesh(MEMBERS[4])
    tree.handle(NeighborUp(MEMBERS[0]), 0.5)  # eager again, as a client of Psyche's that has just come
    tree.receive(MEMBERS[0], Gossip(ID, CONTENT, 0), 1.0)
    first, second = (announced(tree.handle(DispatchTimer(), 1.0 + wait)) for wait in (0.1, 0.2))
    assert len(first + second) == len(MEMBERS) - 2


def test_one_that_lacks_a_neighbour_itself_announces_to_all() -> None:
    tree = in_mesh(MEMBERS[4], lacks=1)
    tree.receive(MEMBERS[2], Gossip(ID, CONTENT, 0), 1.0)
    first, second = (announced(tree.handle(DispatchTimer(), 1.0 + wait)) for wait in (0.1, 0.2))
    assert len(first + second) == len(MEMBERS) - 3
