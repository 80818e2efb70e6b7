"""Who hosts a run by now: asked of the host and the peers that a ticket names."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Final

from ...comm.addresses import EndpointAddr
from ...comm.iroh.endpoint import Node
from ...comm.iroh.whereabouts import Whereabouts, ask_whereabouts
from ...coordinator.ticket import MAX_PEERS, RunTicket
from ...errors import DistroError

__all__ = ["GRACE_SECONDS", "answers", "find_host", "fresh_ticket"]

GRACE_SECONDS: Final = 1.0
"""After one peer has named a host that is not that of the ticket, for others that know of a later one. Who has asked
for the sake of a host that is gone does not wait for that one to answer. Chosen arbitrarily, above round trips."""


async def find_host(node: Node, ticket: RunTicket, *, waits_for_all: bool = False) -> Whereabouts | None:
    """The answer of the latest term, of those that know a host; None if nobody answers, or none knows one.

    Peers are believed about this as the ticket is that names them.

    Args:
        node: whose connections are used.
        ticket: names those who are asked.
        waits_for_all: not only :data:`GRACE_SECONDS` longer than for the first that names another host: nobody must be
            missed that knows better.
    """
    named = [*([] if ticket.endpoint is None else [ticket.endpoint]), *ticket.peers]
    found: list[Whereabouts] = []
    try:
        async with asyncio.timeout(None) as limit:
            async for _, answer in answers(node, named, ticket.run_id):
                if answer.host is None:
                    continue
                found.append(answer)
                is_news = ticket.endpoint is None or answer.host.id != ticket.endpoint.id
                if is_news and limit.when() is None and not waits_for_all:
                    limit.reschedule(asyncio.get_running_loop().time() + GRACE_SECONDS)
    except TimeoutError:
        pass
    return max(found, key=lambda answer: answer.term, default=None)


async def answers(node: Node, peers: Sequence[EndpointAddr], run_id: str) -> AsyncGenerator[tuple[bytes, Whereabouts]]:
    """The answers of those that answer, each with the key of its peer, when it comes."""

    async def ask(peer: EndpointAddr) -> tuple[bytes, Whereabouts] | None:
        try:
            return peer.id, await ask_whereabouts(node, peer, run_id)
        except (DistroError, OSError):
            return None

    others = {peer.id: peer for peer in peers if peer.id != node.endpoint_id}
    tasks = [asyncio.ensure_future(ask(peer)) for peer in others.values()]
    try:
        for first in asyncio.as_completed(tasks):
            if (answer := await first) is not None:
                yield answer
    finally:
        for task in tasks:
            task.cancel()


def fresh_ticket(run_id: str, host: EndpointAddr, peers: Sequence[EndpointAddr], tcp: Sequence[str] = ()) -> RunTicket:
    """A ticket for a run that ``host`` hosts, with some of ``peers``, of which it names one address each."""
    others = {peer.id: _short(peer) for peer in peers if peer.id != host.id and not peer.is_empty}
    return RunTicket(run_id, tuple(tcp), host, tuple(others.values())[:MAX_PEERS])


def _short(peer: EndpointAddr) -> EndpointAddr:
    """``peer`` by its relay server and the two addresses that others reach most likely."""
    outside = sorted(peer.direct, key=lambda address: (not address.ip.is_global, address.ip.version))
    return EndpointAddr(peer.id, peer.relays[:1], tuple(outside[:2]))
