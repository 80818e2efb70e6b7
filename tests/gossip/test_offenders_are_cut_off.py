"""Numbered attacks of a peer that speaks bytes of its own; each time it is cut off and the others go on."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest

from distro_optim.comm.iroh.endpoint import CLOSE_NOT_ALLOWED, CLOSE_PROTOCOL_ERROR, Node
from distro_optim.comm.iroh.gossip.frames import encode_frame, encode_header
from distro_optim.comm.iroh.gossip.links import LinkLimits
from distro_optim.comm.iroh.gossip.messages import Gossip, Graft, IHave, Join, Neighbor, encode_message, message_id
from distro_optim.comm.iroh.gossip.net import _HIGH_WATER, GossipService, ServiceLimits
from distro_optim.comm.loop import LoopThread
from distro_optim.errors import DistroError, PeerUnreachableError
from gossip.live import CALL_SECONDS, RawPeer, count_messages, until

pytestmark = [pytest.mark.waiting]

TOPIC = b"t" * 32
OUTBOX = 2 << 20
Attack = Callable[[RawPeer, GossipService], Awaitable[None]]


async def garbage(attacker: RawPeer, victim: GossipService) -> None:
    stream = await attacker.connection.open_uni()
    await stream.write(b"\xa7" * (10 << 20))


async def garbage_after_a_good_header(attacker: RawPeer, victim: GossipService) -> None:
    stream = await attacker.connection.open_uni()
    await stream.write(encode_header(TOPIC) + encode_frame(b"\xa7" * 4000) * 2500)


async def a_frame_of_four_gigabytes(attacker: RawPeer, victim: GossipService) -> None:
    stream = await attacker.connection.open_uni()
    await stream.write(encode_header(TOPIC) + b"\xff\xff\xff\xff")
    attacker._kept = stream


async def ten_thousand_streams(attacker: RawPeer, victim: GossipService) -> None:
    for _ in range(10_000):
        stream = await attacker.connection.open_uni()
        await stream.write(encode_header(TOPIC))
        await stream.finish()


async def streams_that_say_nothing(attacker: RawPeer, victim: GossipService) -> None:
    attacker._kept = await attacker.connection.open_uni()
    await attacker._kept.write(b"\x00")


async def a_forged_id(attacker: RawPeer, victim: GossipService) -> None:
    await attacker.send(Join(), Gossip(b"\x01" * 32, b"not that", 0))


async def never_reading(attacker: RawPeer, victim: GossipService) -> None:
    await attacker.send(Join(), Neighbor(high=True))
    (topic,) = victim._topics.values()
    await until(lambda: attacker.node.endpoint_id in topic.neighbors)
    link = victim._links[attacker.node.endpoint_id]
    for i in range(6000):
        if attacker.connection.is_closed:
            return
        await topic.broadcast(i.to_bytes(4, "big") + bytes(1000))
        assert link.queued <= OUTBOX


async def asking_for_payloads_and_never_reading(attacker: RawPeer, victim: GossipService) -> None:
    (topic,) = victim._topics.values()
    content = bytes(4000)
    await topic.broadcast(content)
    peer = attacker.node.endpoint_id
    await until(lambda: peer in victim._links)
    link = victim._links[peer]
    stream = await attacker.connection.open_uni()
    await stream.write(encode_header(TOPIC))
    graft = encode_frame(encode_message(Graft(message_id(content), 0)))
    # Not as a neighbour: what it may have queued is less.
    while not attacker.connection.is_closed:
        await stream.write(graft * 20)
        assert link.queued <= victim.limits.link.stranger_outbox
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    "attack",
    [
        garbage,
        garbage_after_a_good_header,
        a_frame_of_four_gigabytes,
        ten_thousand_streams,
        streams_that_say_nothing,
        a_forged_id,
        never_reading,
        asking_for_payloads_and_never_reading,
    ],
)
def test_an_attacker_is_cut_off_and_the_others_go_on(
    attack: Attack, make_node: Callable[[], Node], loop_thread: LoopThread
) -> None:
    victim, friend, enemy = make_node(), make_node(), make_node()
    limits = ServiceLimits(link=LinkLimits(header_seconds=0.5, stall_seconds=1.0, outbox=OUTBOX))

    async def scenario() -> None:
        services = [GossipService(victim, limits=limits), GossipService(friend)]
        topic = await services[0].join(TOPIC)
        other = await services[1].join(TOPIC, [victim.addr()])
        received: Counter[bytes] = Counter()
        reader = asyncio.create_task(count_messages(other, received))
        await topic.joined(CALL_SECONDS)
        attacker = RawPeer(enemy, TOPIC)
        await attacker.connect(victim)

        # It ends with an error of its own when it is cut off in the middle of a write.
        attacking = asyncio.create_task(swallow(attack(attacker, services[0])))
        assert await attacker.cut_off() == CLOSE_PROTOCOL_ERROR
        await attacking

        assert services[0].stats.offenders == 1
        assert services[0].stats.frames_received < 5000
        assert enemy.endpoint_id not in topic.neighbors
        assert topic.neighbors == (friend.endpoint_id,)
        before = sum(received.values())
        await topic.broadcast(b"still here")
        await until(lambda: received[b"still here"] == 1)
        if attack is never_reading:
            assert before > 1000
        for service in services:
            await service.aclose()
        await reader

    loop_thread.run(scenario(), 100)


def test_nobody_waits_to_speak_for_a_neighbour_that_does_not_read(
    make_node: Callable[[], Node], loop_thread: LoopThread
) -> None:
    speaker, friend, enemy = make_node(), make_node(), make_node()
    # It is not cut off within this test.
    limits = ServiceLimits(link=LinkLimits(stall_seconds=1000.0, outbox=64 << 20))
    count = 4 * _HIGH_WATER // 4000

    async def scenario() -> None:
        services = [GossipService(speaker, limits=limits), GossipService(friend)]
        topic = await services[0].join(TOPIC)
        other = await services[1].join(TOPIC, [speaker.addr()])
        received: Counter[bytes] = Counter()
        reader = asyncio.create_task(count_messages(other, received))
        await topic.joined(CALL_SECONDS)
        attacker = RawPeer(enemy, TOPIC)
        await attacker.connect(speaker)
        await attacker.send(Join(), Neighbor(high=True))
        await until(lambda: enemy.endpoint_id in topic.neighbors)

        # What fits into the connection, and then more than may wait for one that matters.
        link, sent = services[0]._links[enemy.endpoint_id], 0
        while link.queued <= _HIGH_WATER:
            await topic.broadcast(sent.to_bytes(4, "big") + bytes(3996))
            sent += 1
        for _ in range(count):
            await topic.broadcast(sent.to_bytes(4, "big") + bytes(3996))
            sent += 1
        assert link.queued > _HIGH_WATER
        assert services[0].stats.offenders == 0
        await until(lambda: len(received) == sent)
        for service in services:
            await service.aclose()
        await reader

    loop_thread.run(scenario(), 60)


async def swallow(attack: Awaitable[None]) -> None:
    try:
        await attack
    except DistroError:
        pass


@pytest.mark.slow
def test_an_offender_is_not_talked_to_for_a_while_and_then_again(
    make_node: Callable[[], Node], loop_thread: LoopThread
) -> None:
    victim, enemy = make_node(), make_node()

    async def scenario() -> None:
        service = GossipService(victim, limits=ServiceLimits(ban_seconds=1.0))
        topic = await service.join(TOPIC)
        attacker = RawPeer(enemy, TOPIC)
        await attacker.connect(victim)
        await garbage_after_a_good_header_quietly(attacker)
        assert await attacker.cut_off() == CLOSE_PROTOCOL_ERROR

        await attacker.connect(victim)
        assert await attacker.cut_off() == CLOSE_NOT_ALLOWED

        async def accepted() -> bool:
            try:
                await attacker.connect(victim)
                await attacker.send(Join())
                await until(lambda: topic.neighbors != (), 1.0)
            except (DistroError, TimeoutError):
                return False
            return True

        async with asyncio.timeout(CALL_SECONDS):
            while not await accepted():
                pass
        await service.aclose()

    loop_thread.run(scenario(), 60)


async def garbage_after_a_good_header_quietly(attacker: RawPeer) -> None:
    await swallow(garbage_after_a_good_header(attacker, None))  # type: ignore[arg-type]


def test_a_stream_without_a_header_does_not_hold_up_the_next_stream(
    make_node: Callable[[], Node], loop_thread: LoopThread
) -> None:
    victim, peer = make_node(), make_node()

    async def scenario() -> None:
        service = GossipService(victim)
        topic = await service.join(TOPIC)
        raw = RawPeer(peer, TOPIC)
        await raw.connect(victim)
        silent = await raw.connection.open_uni()
        await silent.write(b"\x00\x00")
        await raw.send(Join())
        await until(lambda: topic.neighbors == (peer.endpoint_id,))
        await service.aclose()

    loop_thread.run(scenario(), 60)


def test_messages_of_a_topic_we_are_not_in_are_ignored(make_node: Callable[[], Node], loop_thread: LoopThread) -> None:
    victim, peer = make_node(), make_node()

    async def scenario() -> None:
        service = GossipService(victim)
        await service.join(TOPIC)
        raw = RawPeer(peer, b"u" * 32)
        await raw.connect(victim)
        await raw.send(Join(), IHave(((b"\x01" * 32, 0),)))
        await until(lambda: service.stats.frames_received == 2)
        assert list(service.protocol.topics) == [TOPIC]
        assert not raw.connection.is_closed
        await service.aclose()

    loop_thread.run(scenario(), 60)


@pytest.mark.slow
def test_a_connection_that_no_topic_needs_is_closed_after_a_while(
    make_node: Callable[[], Node], loop_thread: LoopThread
) -> None:
    victim, peer = make_node(), make_node()

    async def scenario() -> None:
        service = GossipService(victim, limits=ServiceLimits(linger_seconds=0.1))
        await service.join(TOPIC)
        raw = RawPeer(peer, TOPIC)
        await raw.connect(victim)
        assert await raw.cut_off() == 0
        assert service.stats.offenders == 0
        await service.aclose()

    loop_thread.run(scenario(), 60)


def test_more_peers_than_the_limit_are_turned_away(make_node: Callable[[], Node], loop_thread: LoopThread) -> None:
    victim, *peers = [make_node() for _ in range(4)]

    async def scenario() -> None:
        service = GossipService(victim, limits=ServiceLimits(links=2))
        await service.join(TOPIC)
        raws = [RawPeer(peer, TOPIC) for peer in peers]
        for raw in raws[:2]:
            await raw.connect(victim)
        await until(lambda: len(service._links) == 2)
        await raws[2].connect(victim)
        assert await raws[2].cut_off() == CLOSE_NOT_ALLOWED
        await service.aclose()
        with pytest.raises(PeerUnreachableError):
            await raws[2].connect(victim)

    loop_thread.run(scenario(), 60)


def test_an_encoded_message_is_what_the_raw_peer_of_these_tests_sends() -> None:
    assert encode_frame(encode_message(Join())) == bytes.fromhex("00000003000000")
