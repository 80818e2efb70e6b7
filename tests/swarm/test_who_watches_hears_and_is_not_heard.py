"""One that may watch hears members, gets their results, and can say nothing to them, over real nodes on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress

import pytest

from distro_optim.comm.announcements import MAX_ANNOUNCEMENT, Announcement
from distro_optim.comm.iroh.blobs.request import ALPN as BLOBS_ALPN
from distro_optim.comm.iroh.connection import Connection
from distro_optim.comm.iroh.endpoint import CLOSE_NOT_ALLOWED, Node
from distro_optim.comm.iroh.gossip import feed
from distro_optim.comm.iroh.gossip.feed import FEED_ALPN, MAX_UNTOLD, read_feed
from distro_optim.comm.iroh.gossip.net import GOSSIP_ALPN
from distro_optim.comm.iroh.observing import swarm as observing
from distro_optim.comm.iroh.observing.swarm import ObservingSwarm
from distro_optim.comm.iroh.sharing.live import ALPN as LIVE_ALPN
from distro_optim.comm.iroh.swarm import IrohSwarm, topic_of_run
from distro_optim.comm.loop import LoopThread
from distro_optim.comm.signing import SignedMessage
from distro_optim.comm.swarm import Channel
from distro_optim.errors import ExchangeError

pytestmark = pytest.mark.waiting

SECONDS = 60.0
TOPIC = topic_of_run("test")


@pytest.fixture
def loop_thread() -> Iterable[LoopThread]:
    thread = LoopThread("test-network")
    yield thread
    thread.stop()


@asynccontextmanager
async def two_members_and_a_watcher(loop: LoopThread) -> AsyncIterator[tuple[IrohSwarm, IrohSwarm, ObservingSwarm]]:
    nodes = [Node(bind_addr="127.0.0.1:0", relay="none", loop=loop) for _ in range(3)]
    for node in nodes:
        await node.bind()
    ours = [node.addr() for node in nodes]
    for node in nodes:
        node.addresses.add(ours)
    alice, bob = IrohSwarm(nodes[0], TOPIC), IrohSwarm(nodes[1], TOPIC)
    watcher = ObservingSwarm(nodes[2], TOPIC)
    members = {alice.peer_id, bob.peer_id}
    for swarm in (alice, bob, watcher):
        swarm.set_allowed(members - {swarm.peer_id})
    for swarm in (alice, bob):
        swarm.set_watchers([watcher.peer_id])
        await swarm.join(ours[:2])
    try:
        while not (alice.neighbors and bob.neighbors):
            await asyncio.sleep(0.005)
        yield alice, bob, watcher
    finally:
        for swarm in (alice, bob, watcher):
            await swarm.aclose()
            await swarm.node.aclose()


def among_them(loop: LoopThread, check: Callable[[IrohSwarm, IrohSwarm, ObservingSwarm], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(SECONDS), two_members_and_a_watcher(loop) as (alice, bob, watcher):
            await check(alice, bob, watcher)

    loop.run(run(), SECONDS)


async def fed(watcher: ObservingSwarm, members: Iterable[IrohSwarm]) -> None:
    await watcher.join([member.node.addr() for member in members])
    while any(watcher.peer_id not in member._desk.listeners for member in members if member._desk is not None):
        await asyncio.sleep(0.005)


async def is_turned_away(node: Node, member: IrohSwarm, alpn: bytes) -> bool:
    """A connection is refused, or closed before anything can be said over it."""
    try:
        connection = await node.connect(member.node.addr(), alpn)
    except ExchangeError:
        return True
    await connection.closed()
    return connection.close_code == CLOSE_NOT_ALLOWED


async def heard(watcher: ObservingSwarm, channel: Channel, count: int) -> set[Announcement]:
    found: set[Announcement] = set()
    async for announcement in watcher.announcements(channel):
        found.add(announcement)
        if len(found) == count:
            break
    return found


def test_it_hears_what_members_announce_on_both_channels_once(loop_thread: LoopThread) -> None:
    async def check(alice: IrohSwarm, bob: IrohSwarm, watcher: ObservingSwarm) -> None:
        await fed(watcher, [alice, bob])
        assert set(watcher.neighbors) == {alice.peer_id, bob.peer_id}
        for channel in Channel:
            expected = set()
            for speaker in (alice, bob):
                for number in range(3):
                    data = b"%d" % number * (MAX_ANNOUNCEMENT if number == 2 else 10)
                    expected.add(Announcement(speaker.peer_id, data[:MAX_ANNOUNCEMENT]))
                    await speaker.announce(data[:MAX_ANNOUNCEMENT], channel=channel)
            assert await heard(watcher, channel, 6) == expected
        counts = watcher._streams[Channel.RUN].inbox.counts
        assert counts.accepted == 6

    among_them(loop_thread, check)


def test_one_member_is_enough_to_hear_all(loop_thread: LoopThread) -> None:
    async def check(alice: IrohSwarm, bob: IrohSwarm, watcher: ObservingSwarm) -> None:
        await fed(watcher, [alice])
        await bob.announce(b"from bob")
        assert await heard(watcher, Channel.RUN, 1) == {Announcement(bob.peer_id, b"from bob")}

    among_them(loop_thread, check)


def test_a_member_that_keeps_everything_to_itself_is_left_for_another(
    loop_thread: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observing, "FEEDS", 1)
    monkeypatch.setattr(observing, "TURN_SECONDS", 0.2)

    async def check(alice: IrohSwarm, bob: IrohSwarm, watcher: ObservingSwarm) -> None:
        assert alice._desk is not None
        monkeypatch.setattr(alice._desk, "tell", lambda *_: None)
        await fed(watcher, [alice])
        await fed(watcher, [bob])
        await bob.announce(b"from bob")
        assert await heard(watcher, Channel.RUN, 1) == {Announcement(bob.peer_id, b"from bob")}

    among_them(loop_thread, check)


def test_it_fetches_what_members_publish(loop_thread: LoopThread) -> None:
    async def check(alice: IrohSwarm, bob: IrohSwarm, watcher: ObservingSwarm) -> None:
        ticket = await alice.publish(b"a result" * 1000, "result_1")
        assert await watcher.fetch(ticket, max_size=100_000, tag="result_1") == b"a result" * 1000

    among_them(loop_thread, check)


def test_it_is_in_no_gossip_and_nothing_that_it_announces_goes_anywhere(loop_thread: LoopThread) -> None:
    async def check(alice: IrohSwarm, bob: IrohSwarm, watcher: ObservingSwarm) -> None:
        await fed(watcher, [alice, bob])
        await watcher.announce(b"nobody hears this")
        for alpn in (GOSSIP_ALPN, LIVE_ALPN):
            assert await is_turned_away(watcher.node, alice, alpn)
        await bob.announce(b"from bob")
        async for announcement in alice.announcements():
            assert announcement == Announcement(bob.peer_id, b"from bob")
            break
        assert alice.counts.refused == bob.counts.refused == 0
        assert watcher.peer_id not in {*alice.neighbors, *bob.neighbors}

    among_them(loop_thread, check)


def test_a_word_of_it_that_a_member_passes_on_is_not_heard(loop_thread: LoopThread) -> None:
    """A member may be in league with it; what it signs is refused by who says it."""

    async def check(alice: IrohSwarm, bob: IrohSwarm, watcher: ObservingSwarm) -> None:
        topic = await alice._enter(Channel.RUN)
        await topic.broadcast(SignedMessage.seal(watcher.node.secret_key, b"a lie"))
        await alice.announce(b"the truth")
        async for announcement in bob.announcements():
            assert announcement == Announcement(alice.peer_id, b"the truth")
            break

    among_them(loop_thread, check)


@pytest.mark.parametrize("alpn", [FEED_ALPN, BLOBS_ALPN])
def test_a_stranger_hears_and_gets_nothing(loop_thread: LoopThread, alpn: bytes) -> None:
    async def check(alice: IrohSwarm, bob: IrohSwarm, watcher: ObservingSwarm) -> None:
        stranger = Node(bind_addr="127.0.0.1:0", relay="none", loop=loop_thread)
        await stranger.bind()
        try:
            assert await is_turned_away(stranger, alice, alpn)
        finally:
            await stranger.aclose()

    among_them(loop_thread, check)


@asynccontextmanager
async def feed_of(node: Node, member: IrohSwarm) -> AsyncIterator[Connection]:
    connection = await node.connect(member.node.addr(), FEED_ALPN)
    try:
        send, _ = await connection.open_bi()
        await send.write(b"\0")
        yield connection
    finally:
        connection.close()


def test_feeds_that_ended_or_were_replaced_leave_nothing_behind(loop_thread: LoopThread) -> None:
    """While nobody says anything, too: otherwise one that comes again and again fills a member's memory."""

    async def check(alice: IrohSwarm, bob: IrohSwarm, watcher: ObservingSwarm) -> None:
        assert alice._desk is not None
        for _ in range(5):
            async with feed_of(watcher.node, alice) as older:
                while not alice._desk.listeners:
                    await asyncio.sleep(0.001)
                async with feed_of(watcher.node, alice):
                    await older.closed()  # one is enough
            while alice._desk.listeners:
                await asyncio.sleep(0.001)

    among_them(loop_thread, check)


def test_one_that_stops_watching_asks_nobody_any_more(loop_thread: LoopThread) -> None:
    async def check(alice: IrohSwarm, bob: IrohSwarm, watcher: ObservingSwarm) -> None:
        await fed(watcher, [alice])
        await watcher.join([bob.node.addr()])
        await watcher.aclose()
        assert all(feed.done() for feed in watcher._feeds.values())

    among_them(loop_thread, check)


def test_whoever_may_take_part_gets_no_feed(loop_thread: LoopThread) -> None:
    """Each feed holds bytes of a member, and of those that watch there are few. Everybody may take part here."""

    async def check(alice: IrohSwarm, bob: IrohSwarm, watcher: ObservingSwarm) -> None:
        alice.set_allowed(None)
        connection = await bob.node.connect(alice.node.addr(), FEED_ALPN)
        with suppress(ExchangeError):  # it may be closed by now
            send, _ = await connection.open_bi()
            await send.write(b"\0")
        await connection.closed()
        assert alice._desk is not None
        assert not alice._desk.listeners

    among_them(loop_thread, check)


def test_a_swarm_that_is_closed_ends_its_feeds(loop_thread: LoopThread) -> None:
    async def check(alice: IrohSwarm, bob: IrohSwarm, watcher: ObservingSwarm) -> None:
        async with feed_of(watcher.node, alice) as connection:
            while alice._desk is None or not alice._desk.listeners:
                await asyncio.sleep(0.001)
            await alice.aclose()
            await connection.closed()

    among_them(loop_thread, check)


def test_one_that_may_not_watch_any_more_is_cut_off(loop_thread: LoopThread) -> None:
    async def check(alice: IrohSwarm, bob: IrohSwarm, watcher: ObservingSwarm) -> None:
        await fed(watcher, [alice])
        alice.set_watchers([])
        while watcher.neighbors:
            await asyncio.sleep(0.005)
        with pytest.raises(ExchangeError):
            async for _ in read_feed(watcher.node, alice.peer_id, lambda: None):
                pass

    among_them(loop_thread, check)


def test_one_that_reads_nothing_costs_a_member_a_bounded_number_of_bytes(loop_thread: LoopThread) -> None:
    async def run() -> None:
        listener = feed._Listener()
        for number in range(400):
            listener.put(b"%3d" % number + bytes(4000))
        left = await listener.take()
        assert len(left) <= MAX_UNTOLD
        assert left.endswith(b"399" + bytes(4000))

    loop_thread.run(run(), SECONDS)


@pytest.mark.parametrize("said", [b"\x02\0\0\0\1x", b"\0\xff\xff\xff\xff", b"\0\0\0\x20\1", b"\1\0\0\x60\1"])
def test_a_member_that_says_what_makes_no_sense_is_left(loop_thread: LoopThread, said: bytes) -> None:
    async def check(alice: IrohSwarm, bob: IrohSwarm, watcher: ObservingSwarm) -> None:
        await fed(watcher, [alice])
        assert alice._desk is not None
        alice._desk._listeners[watcher.peer_id].put(said)
        while watcher.neighbors:
            await asyncio.sleep(0.001)

    among_them(loop_thread, check)


def test_a_result_that_comes_along_comes_to_who_watches(loop_thread: LoopThread) -> None:
    async def check(alice: IrohSwarm, bob: IrohSwarm, watcher: ObservingSwarm) -> None:
        await fed(watcher, [alice, bob])
        blob = bytes(range(256)) * 20
        ticket = await alice.publish(blob, "result")
        await alice.announce(b"said", carrying=blob)
        assert await heard(watcher, Channel.RUN, 1) == {Announcement(alice.peer_id, b"said")}
        assert watcher.at_hand(ticket, max_size=len(blob), tag="kept") == blob

    among_them(loop_thread, check)


def test_another_version_of_the_feed_is_refused(loop_thread: LoopThread) -> None:
    async def check(alice: IrohSwarm, bob: IrohSwarm, watcher: ObservingSwarm) -> None:
        connection = await watcher.node.connect(alice.node.addr(), FEED_ALPN)
        send, _ = await connection.open_bi()
        await send.write(b"\x09")
        await connection.closed()
        assert alice._desk is not None
        assert not alice._desk.listeners

    among_them(loop_thread, check)
