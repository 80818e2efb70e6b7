"""Who floods, withholds or holds back does not make others late, as long as they can reach each other."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from distro_optim.comm.iroh.gossip.config import PSYCHE_GOSSIP, SWARM_GOSSIP, GossipConfig
from distro_optim.comm.iroh.gossip.messages import Graft, PeerId, Prune
from distro_optim.comm.swarm import FULL_MESH
from gossip.attackers import Attacker, Rule, announces_and_withholds, holds_back, passes_on_nothing
from gossip.simulator import Simulator

FAST = 0.001
SETTLE_SECONDS = 3.0
PAUSE = 0.08
"""Between two messages of the honest: three peers with rounds of a quarter of a second."""


def passes_on_all(attacker: Attacker, to: PeerId, message: object) -> float | None:
    return 0


class Swarm:
    """Honest peers that all know each other, and attackers close to each of them, who do as everybody does at first."""

    def __init__(self, honest: int, attackers: int, seed: int = 1) -> None:
        self.sim = Simulator(SWARM_GOSSIP, seed=seed, latency=(0.02, 0.06))
        self.rng = random.Random(seed)
        peers: list[PeerId] = []
        for number in range(honest + attackers):
            peers.append(self.sim.add(peers))
            if number >= honest:
                for other in peers[:-1]:
                    self.sim.set_latency(peers[-1], other, FAST)
            self.sim.run(0.1)
        self.honest = peers[:honest]
        self.attackers = [Attacker(self.sim, peer, passes_on_all) for peer in peers[honest:]]
        for node in self.sim.nodes.values():
            node.protocol.set_others(len(peers) - 1)
        for peer in peers:  # as strategy/network/driver.py does for those whom it lacks
            lacking = [other for other in peers if other not in (peer, *self.sim.nodes[peer].neighbors)]
            self.sim.ask(peer, lacking)
        self.sim.run(SETTLE_SECONDS)
        self.said: list[tuple[float, PeerId, bytes]] = []
        self._flood = self._contents("flood")
        self._words = self._contents("word")

    @staticmethod
    def _contents(name: str) -> Iterator[bytes]:
        return (f"{name}-{number}".encode() for number in range(1 << 20))

    def talk(self, seconds: float, flood: int = 0) -> None:
        """The honest talk, and each attacker says so many things of its own between two of their messages."""
        until = self.sim.now + seconds
        while self.sim.now < until:
            peer, content = self.rng.choice(self.honest), next(self._words)
            self.said.append((self.sim.now, peer, content))
            self.sim.publish(peer, content)
            for attacker in self.attackers:
                for _ in range(flood):
                    attacker.publish(next(self._flood))
            self.sim.run(PAUSE)

    def turn(self, rule: Rule) -> None:
        """From now on the attackers do this; what was said before is forgotten."""
        for attacker in self.attackers:
            attacker.rule = rule
        self.said.clear()

    def delays(self) -> list[float]:
        """Of each message to each of the honest, beyond the time that its own link takes."""
        self.sim.run(2 * SETTLE_SECONDS)
        return [
            self.sim.nodes[other].delivered_at[content] - said - self.sim.latency(author, other)
            for said, author, content in self.said
            for other in self.honest
            if other != author
        ]


@pytest.mark.parametrize("flood", [0, 8], ids=["quiet", "flooding"])
@pytest.mark.parametrize("rule", [passes_on_all, passes_on_nothing, announces_and_withholds, holds_back(0.4)])
@pytest.mark.parametrize(("honest", "attackers"), [(3, 1), (7, 1), (3, 4), pytest.param(13, 4, marks=pytest.mark.slow)])
def test_what_honest_peers_say_takes_the_direct_way(honest: int, attackers: int, rule: Rule, flood: int) -> None:
    swarm = Swarm(honest, attackers)
    swarm.talk(SETTLE_SECONDS)
    swarm.turn(rule)
    swarm.talk(SETTLE_SECONDS, flood)
    delays = swarm.delays()
    assert len(delays) == len(swarm.said) * (honest - 1) > 0
    assert max(delays) < 1e-9


def test_an_attacker_that_grafts_and_prunes_everybody_delays_nothing() -> None:
    swarm = Swarm(3, 1)
    swarm.talk(SETTLE_SECONDS)
    swarm.turn(holds_back(0.4))
    for _ in range(30):
        for peer in swarm.honest:
            for message in (Graft(None, 0), Prune()) if swarm.rng.random() < 0.5 else (Prune(), Graft(None, 0)):
                swarm.sim.send(swarm.attackers[0].peer, peer, message)
        swarm.talk(PAUSE)
    assert max(swarm.delays()) < 1e-9


def test_a_small_swarm_sends_each_payload_to_each_peer_about_once() -> None:
    swarm = Swarm(8, 0)
    swarm.talk(4 * SETTLE_SECONDS)
    swarm.turn(passes_on_all)
    payloads, duplicates = swarm.sim.payloads()
    swarm.talk(4 * SETTLE_SECONDS)
    assert max(swarm.delays()) < 1e-9
    more_payloads, more_duplicates = swarm.sim.payloads()
    assert more_payloads - payloads >= len(swarm.said) * 7
    assert (more_duplicates - duplicates) / (more_payloads - payloads) < 0.02


def test_two_that_cannot_reach_each_other_hear_each_other_through_a_third_though_an_attacker_is_closer() -> None:
    swarm = Swarm(3, 1)
    one, other, _ = swarm.honest
    swarm.sim.part(one, other)
    swarm.talk(2 * SETTLE_SECONDS)
    swarm.turn(passes_on_nothing)
    swarm.talk(2 * SETTLE_SECONDS)
    swarm.sim.run(2 * SETTLE_SECONDS)
    for said, author, content in swarm.said:
        for peer in set(swarm.honest) - {author}:
            parted = {peer, author} == {one, other}
            late = (
                swarm.sim.nodes[peer].delivered_at[content] - said - (0 if parted else swarm.sim.latency(author, peer))
            )
            assert late < (2.0 if parted else 1e-9)


def test_in_a_swarm_of_many_or_of_unknown_size_payloads_go_over_the_tree() -> None:
    for others in (None, SWARM_GOSSIP.pushed_by_author + 1):
        swarm = Swarm(6, 0)
        for node in swarm.sim.nodes.values():
            node.protocol.set_others(others)
        swarm.talk(2 * SETTLE_SECONDS)
        assert sum(len(node.tree.lazy) for node in swarm.sim.live()) > 0
        assert max(swarm.delays()) > 0.005


def test_only_our_own_swarms_push_directly() -> None:
    assert SWARM_GOSSIP.pushed_by_author == FULL_MESH > 0
    for others in range(FULL_MESH + 1):
        assert SWARM_GOSSIP.neighbors(others) > others  # room for one more than all of them
    for unknown_or_many in (None, FULL_MESH + 1, 255):
        assert SWARM_GOSSIP.neighbors(unknown_or_many) == PSYCHE_GOSSIP.active_view_capacity
    assert GossipConfig().pushed_by_author == PSYCHE_GOSSIP.pushed_by_author == 0
