"""A neighbour that does not answer is dialled beside the old connection; nobody is lost, and nothing that was said."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import pytest

from distro_optim.comm.iroh.connection import Connection
from distro_optim.comm.iroh.endpoint import Node
from distro_optim.comm.iroh.gossip.config import GossipConfig
from distro_optim.comm.iroh.gossip.events import JoinPeers, RequestTimer, Send, UpdatePeerData
from distro_optim.comm.iroh.gossip.hyparview import HyParView
from distro_optim.comm.iroh.gossip.messages import Neighbor
from distro_optim.comm.iroh.gossip.net import GOSSIP_ALPN, GossipService, Topic
from distro_optim.comm.loop import LoopThread
from gossip.live import CALL_SECONDS, count_messages, until

TOPIC = b"t" * 32
CONFIG = GossipConfig()
ME, FRIEND, STRANGER = (bytes([number]) * 32 for number in (1, 2, 3))

MakeNode = Callable[[], Node]


def fall_silent(connection: Connection) -> None:
    """What the watch of a node does when a connection does not answer."""
    connection.look = lambda now, *, at_ways=True: connection._is_silent  # type: ignore[method-assign]
    connection._is_silent = True
    for hook in connection._silence_hooks:
        hook()


@asynccontextmanager
async def two_neighbours(
    first: Node, second: Node
) -> AsyncGenerator[tuple[GossipService, Topic, GossipService, Topic]]:
    services = GossipService(first), GossipService(second)
    there = await services[1].join(TOPIC)
    here = await services[0].join(TOPIC, [second.addr()])
    await here.joined(CALL_SECONDS)
    await there.joined(CALL_SECONDS)
    yield services[0], here, services[1], there
    for service in services:
        await service.aclose()


def held(service: GossipService, peer: Node) -> list[Connection]:
    return [channel.connection for channel in service._links[peer.endpoint_id]._channels]


@pytest.mark.waiting
def test_a_neighbour_that_does_not_answer_is_dialled_anew_and_stays_one(
    make_node: MakeNode, loop_thread: LoopThread
) -> None:
    first, second = make_node(), make_node()

    async def scenario() -> None:
        async with two_neighbours(first, second) as (service, here, other, there):
            heard: Counter[bytes] = Counter()
            listening = asyncio.create_task(count_messages(there, heard))
            before = held(service, second)
            await here.broadcast(b"before")
            await until(lambda: heard[b"before"] > 0)
            # Found unanswered from before that message on, which goes out again: gossip drops what comes twice.
            for connection in before:
                connection._silence._since = 0.0
                fall_silent(connection)
            await here.broadcast(b"meanwhile")
            await until(lambda: heard[b"meanwhile"] > 0)
            await until(lambda: all(connection.is_closed for connection in before))
            await until(lambda: not set(before) & set(held(service, second)))
            (new,) = held(service, second)
            assert not new.is_silent
            await there.broadcast(b"back")
            await until(lambda: first.endpoint_id in other.neighbors_of(TOPIC))
            assert here.neighbors == (second.endpoint_id,)
            assert heard == {b"before": 1, b"meanwhile": 1}
            listening.cancel()

    loop_thread.run(scenario(), 60)


@pytest.mark.waiting
def test_a_link_goes_on_over_another_connection_that_answers_without_any_dial(
    make_node: MakeNode, loop_thread: LoopThread
) -> None:
    first, second = make_node(), make_node()

    async def scenario() -> None:
        async with two_neighbours(first, second) as (service, here, _, there):
            heard: Counter[bytes] = Counter()
            listening = asyncio.create_task(count_messages(there, heard))
            link = service._links[second.endpoint_id]
            older = held(service, second)[-1]
            link.add(newer := await first.connect(second.endpoint_id, GOSSIP_ALPN))
            fall_silent(newer)
            assert link.peer not in service._dials
            await here.broadcast(b"still here")
            await until(lambda: heard[b"still here"] > 0)
            await until(lambda: newer not in held(service, second))
            assert held(service, second)[-1] is older
            assert here.neighbors == (second.endpoint_id,)
            listening.cancel()

    loop_thread.run(scenario(), 60)


@pytest.mark.waiting
def test_a_peer_that_is_no_neighbour_cannot_make_us_dial_by_falling_silent(
    make_node: MakeNode, loop_thread: LoopThread
) -> None:
    victim, stranger = make_node(), make_node()

    async def scenario() -> None:
        service = GossipService(victim)
        await service.join(TOPIC)
        await stranger.connect(victim.addr(), GOSSIP_ALPN)
        await until(lambda: stranger.endpoint_id in service._links)
        fall_silent(held(service, stranger)[-1])
        assert service._dials == {}
        await service.aclose()

    loop_thread.run(scenario(), 60)


@pytest.mark.waiting
def test_a_neighbour_that_falls_silent_again_and_again_is_dialled_once_at_a_time(
    make_node: MakeNode, loop_thread: LoopThread
) -> None:
    first, second = make_node(), make_node()

    async def scenario() -> None:
        async with two_neighbours(first, second) as (service, _, _, _):
            connections = held(service, second)
            for _ in range(50):
                for connection in connections:
                    fall_silent(connection)
            assert len(service._dials) == 1
            await until(lambda: not service._dials)
            await until(lambda: len(held(service, second)) == 1)

    loop_thread.run(scenario(), 60)


# -- where we are ------------------------------------------------------------------------------------------------------


def neighbours_told(view: HyParView, data: bytes, now: float) -> list[bytes]:
    """Who is told that our addresses are ``data``."""
    return [
        peer
        for action in view.handle(UpdatePeerData(data), now)
        if isinstance(action, Send) and action.message == Neighbor(True, data)
        for peer in action.peers
    ]


def with_a_neighbour() -> HyParView:
    """After the handshake with a neighbour, and all that it leaves behind."""
    view = HyParView(ME, CONFIG, random.Random(0))
    view.handle(JoinPeers((STRANGER,)), 0.0)
    view.receive(FRIEND, Neighbor(True, None), 0.0)
    view.handle(RequestTimer(FRIEND), CONFIG.neighbor_request_timeout)
    assert set(view.active) == {FRIEND}
    return view


def test_neighbours_hear_at_once_where_we_are_now_and_nobody_else_does() -> None:
    assert neighbours_told(with_a_neighbour(), b"here", 10.0) == [FRIEND]


def test_addresses_that_change_all_the_time_are_not_told_before_the_last_word_was_answered() -> None:
    view = with_a_neighbour()
    told = [neighbours_told(view, b"%d" % number, 10.0) for number in range(99)]
    assert told == [[FRIEND], *98 * [[]]]
    view.receive(FRIEND, Neighbor(True, None), 10.0)
    assert neighbours_told(view, b"settled", 10.0) == [FRIEND]
