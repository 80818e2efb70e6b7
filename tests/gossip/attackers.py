"""Members of a simulated swarm that speak the protocol and do not keep to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distro_optim.comm.iroh.gossip.events import Action, Event, Send
from distro_optim.comm.iroh.gossip.messages import Gossip, IHave, Message, PeerId
from distro_optim.comm.iroh.gossip.protocol import GossipProtocol, TopicAction
from gossip.simulator import Simulator

__all__ = ["Attacker", "announces_and_withholds", "holds_back", "passes_on_nothing"]

Rule = Callable[["Attacker", PeerId, Message], float | None]
"""After how many seconds the attacker sends a message to a peer; None for never."""


class Attacker:
    """Stands in the place of a node's protocol: takes part as everybody does, but sends what ``rule`` lets through.

    Args:
        sim: the swarm.
        peer: the node that is the attacker from now on.
        rule: see :data:`Rule`.
    """

    def __init__(self, sim: Simulator, peer: PeerId, rule: Rule) -> None:
        self.sim = sim
        self.peer = peer
        self.rule = rule
        self.own: set[bytes] = set()
        self._inner: GossipProtocol = sim.nodes[peer].protocol
        sim.nodes[peer].protocol = self  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def handle(self, topic: bytes, event: Event, now: float) -> list[TopicAction]:
        return self._twist(self._inner.handle(topic, event, now))

    def tick(self, now: float) -> list[TopicAction]:
        return self._twist(self._inner.tick(now))

    def disconnected(self, peer: PeerId, now: float) -> list[TopicAction]:
        return self._twist(self._inner.disconnected(peer, now))

    def publish(self, content: bytes) -> None:
        """Says something of its own."""
        self.own.add(content)
        self.sim.publish(self.peer, content)

    def _twist(self, actions: list[TopicAction]) -> list[TopicAction]:
        kept: list[tuple[bytes, Action]] = []
        for topic, action in actions:
            if not isinstance(action, Send):
                kept.append((topic, action))
                continue
            for to in action.peers:
                delay = self.rule(self, to, action.message)
                if delay == 0:
                    kept.append((topic, Send((to,), action.message)))
                elif delay is not None:
                    self.sim.at(self.sim.now + delay, self.sim.send, self.peer, to, action.message)
        return kept


def _is_of_others(attacker: Attacker, message: Message) -> bool:
    return isinstance(message, Gossip) and message.content not in attacker.own


def passes_on_nothing(attacker: Attacker, to: PeerId, message: Message) -> float | None:
    """Neither the others' payloads nor that there are any."""
    return None if isinstance(message, IHave) or _is_of_others(attacker, message) else 0


def announces_and_withholds(attacker: Attacker, to: PeerId, message: Message) -> float | None:
    """Says what there is, and gives it to nobody."""
    return None if _is_of_others(attacker, message) else 0


def holds_back(seconds: float) -> Rule:
    """Passes the others' payloads on so much later, and says at once what there is."""
    return lambda attacker, to, message: seconds if _is_of_others(attacker, message) else 0
