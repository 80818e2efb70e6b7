"""Who hosts a run by now: asked of the host and the peers that a ticket names."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from ...comm.addresses import EndpointAddr
from ...comm.iroh.endpoint import Node
from ...comm.iroh.whereabouts import Whereabouts, ask_whereabouts
from ...coordinator.ticket import MAX_PEERS, RunTicket
from ...errors import DistroError

__all__ = ["ask_all", "find_host", "fresh_ticket"]


async def find_host(node: Node, ticket: RunTicket) -> Whereabouts | None:
    """The answer of the latest term, of those that know a host; None if nobody answers, or none knows one.

    Peers are believed about this as the ticket is that names them.
    """
    named = [*([] if ticket.endpoint is None else [ticket.endpoint]), *ticket.peers]
    found = [answer for _, answer in await ask_all(node, named, ticket.run_id) if answer.host is not None]
    return max(found, key=lambda answer: answer.term, default=None)


async def ask_all(node: Node, peers: Sequence[EndpointAddr], run_id: str) -> list[tuple[bytes, Whereabouts]]:
    """The answers of those that answer, each with the key of its peer."""

    async def ask(peer: EndpointAddr) -> tuple[bytes, Whereabouts] | None:
        try:
            return peer.id, await ask_whereabouts(node, peer, run_id)
        except (DistroError, OSError):
            return None

    others = {peer.id: peer for peer in peers if peer.id != node.endpoint_id}
    answers = await asyncio.gather(*(ask(peer) for peer in others.values()))
    return [answer for answer in answers if answer is not None]


def fresh_ticket(run_id: str, host: EndpointAddr, peers: Sequence[EndpointAddr], tcp: Sequence[str] = ()) -> RunTicket:
    """A ticket for a run that ``host`` hosts, with some of ``peers``, of which it names one address each."""
    others = {peer.id: _short(peer) for peer in peers if peer.id != host.id and not peer.is_empty}
    return RunTicket(run_id, tuple(tcp), host, tuple(others.values())[:MAX_PEERS])


def _short(peer: EndpointAddr) -> EndpointAddr:
    """``peer`` by its relay server and the two addresses that others reach most likely."""
    outside = sorted(peer.direct, key=lambda address: (not address.ip.is_global, address.ip.version))
    return EndpointAddr(peer.id, peer.relays[:1], tuple(outside[:2]))
