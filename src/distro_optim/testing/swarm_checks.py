"""The promises of :class:`~distro_optim.comm.swarm.Swarm`, as checks to run against any implementation.

Bring a :class:`SwarmArena`, which makes swarms that know each other; await each of :data:`CHECKS` with a fresh one::

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_my_swarm(check):
        async def run():
            async with MyArena() as arena:
                await check(arena)

        asyncio.run(run())
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Final, Self

from blake3 import blake3

from ..comm.addresses import EndpointAddr
from ..comm.announcements import MAX_ANNOUNCEMENT, Announcement
from ..comm.swarm import Channel, Swarm
from ..comm.tickets import BlobTicket
from ..errors import BlobUnavailableError, ConfigurationError, NodeClosedError

__all__ = ["CHECKS", "SwarmArena"]

_SECONDS: Final = 30.0
"""No check takes long; this only ends one that hangs."""
_MEGABYTE: Final = 1 << 20
_PAUSE_SECONDS: Final = 0.05
"""Between two attempts to be heard."""


class SwarmArena(ABC):
    """Makes swarms for a check and closes them at its end."""

    @abstractmethod
    async def make(self, *, allowed: Iterable[bytes] | None = None, queued_per_sender: int | None = None) -> Swarm:
        """A new swarm; it and those made before know of each other."""

    @abstractmethod
    async def settle(self) -> None:
        """Waits until all swarms made so far hear each other's announcements."""

    async def __aenter__(self) -> Self:
        return self

    @abstractmethod
    async def __aexit__(self, *_: object) -> None:
        """Closes all swarms."""


async def _take(announcements: AsyncIterator[Announcement], count: int) -> list[Announcement]:
    async with asyncio.timeout(_SECONDS):
        return [await anext(announcements) for _ in range(count)]


async def an_announcement_reaches_everybody_else_once(arena: SwarmArena) -> None:
    """Unaltered, with its sender; and not the one who made it."""
    swarms = [await arena.make() for _ in range(3)]
    await arena.settle()
    expected = set()
    for swarm in swarms:
        for number in range(5):
            data = b"announcement %d " % number * 100
            expected.add(Announcement(swarm.peer_id, data))
            await swarm.announce(data)
    for swarm in swarms:
        heard = await _take(swarm.announcements(), 10)
        assert set(heard) == {announcement for announcement in expected if announcement.sender != swarm.peer_id}
        assert len(set(heard)) == len(heard)


async def a_repeated_announcement_is_delivered_once(arena: SwarmArena) -> None:
    """Only an announcement with other content counts as another one."""
    alice, bob = await arena.make(), await arena.make()
    await arena.settle()
    for data in (b"the same", b"the same", b"the same", b"the end"):
        await alice.announce(data)
    heard = await _take(bob.announcements(), 2)
    assert {announcement.data for announcement in heard} == {b"the same", b"the end"}


async def the_longest_announcement_arrives_and_a_longer_one_is_refused(arena: SwarmArena) -> None:
    """The bound is ``MAX_ANNOUNCEMENT`` bytes."""
    alice, bob = await arena.make(), await arena.make()
    await arena.settle()
    try:
        await alice.announce(bytes(MAX_ANNOUNCEMENT + 1))
    except ConfigurationError:
        pass
    else:
        raise AssertionError("an announcement above the bound was accepted")
    await alice.announce(bytes(MAX_ANNOUNCEMENT))
    assert await _take(bob.announcements(), 1) == [Announcement(alice.peer_id, bytes(MAX_ANNOUNCEMENT))]


async def who_is_not_allowed_is_not_heard(arena: SwarmArena) -> None:
    """A peer that is taken off the list later is not heard from then on."""
    alice, bob, carol = [await arena.make() for _ in range(3)]
    await arena.settle()
    bob.set_allowed([carol.peer_id])
    await alice.announce(b"from alice")
    await carol.announce(b"from carol")
    assert await _take(bob.announcements(), 1) == [Announcement(carol.peer_id, b"from carol")]
    assert bob.counts.accepted == 1


async def a_flood_displaces_only_the_announcements_of_its_sender(arena: SwarmArena) -> None:
    """Of the flood the newest stay."""
    flooder, quiet = await arena.make(), await arena.make()
    listener = await arena.make(queued_per_sender=4)
    await arena.settle()
    await quiet.announce(b"once")
    async with asyncio.timeout(_SECONDS):
        while not listener.counts.accepted:
            await asyncio.sleep(0.001)
        for number in range(20):
            await flooder.announce(b"%d" % number)
            # One after the other, so that they arrive in order.
            while listener.counts.accepted < number + 2:
                await asyncio.sleep(0.001)
    heard = await _take(listener.announcements(), 5)
    assert [announcement.data for announcement in heard] == [b"once", b"16", b"17", b"18", b"19"]
    assert listener.counts.dropped == 16


async def what_is_announced_on_one_channel_is_not_heard_on_another(arena: SwarmArena) -> None:
    """The channel for peers of our own kind, and the run's, carry the same bytes apart from each other."""
    alice, bob, carol = [await arena.make() for _ in range(3)]
    listening = {swarm: swarm.announcements(Channel.OWN_KIND) for swarm in (alice, bob)}
    first = {swarm: asyncio.ensure_future(anext(stream)) for swarm, stream in listening.items()}
    await asyncio.sleep(0)
    await arena.settle()
    async with asyncio.timeout(_SECONDS):
        number = 0
        while not first[bob].done():  # a channel may take a moment to be entered
            number += 1
            await alice.announce(b"own kind %d" % number, channel=Channel.OWN_KIND)
            await asyncio.wait({first[bob]}, timeout=_PAUSE_SECONDS)
    await alice.announce(b"for all")
    assert (await first[bob]).data.startswith(b"own kind")
    for swarm in (bob, carol):
        assert await _take(swarm.announcements(), 1) == [Announcement(alice.peer_id, b"for all")]
        assert swarm.counts.accepted == 1
    await bob.announce(b"back", channel=Channel.OWN_KIND)
    async with asyncio.timeout(_SECONDS):
        assert (await first[alice]).data == b"back"


async def a_published_blob_is_fetched_by_its_ticket(arena: SwarmArena) -> None:
    """Byte for byte, whatever its size; and from the own store without asking anybody."""
    alice, bob = await arena.make(), await arena.make()
    await arena.settle()
    for size in (0, 1, 1024, 16_385, _MEGABYTE + 1):
        data = bytes(number % 251 for number in range(size))
        ticket = await alice.publish(data, f"size-{size}")
        assert ticket.hash == blake3(data).digest()
        assert ticket.addr.id == alice.peer_id
        async with asyncio.timeout(_SECONDS):
            assert await bob.fetch(ticket, max_size=2 * _MEGABYTE) == data
            assert await alice.fetch(ticket, max_size=2 * _MEGABYTE) == data


async def a_blob_that_nobody_has_is_an_error(arena: SwarmArena) -> None:
    """The next fetch succeeds all the same."""
    alice, bob = await arena.make(), await arena.make()
    await arena.settle()
    ticket = await alice.publish(b"there", "tag")
    missing = BlobTicket.raw(ticket.addr, bytes(32))
    async with asyncio.timeout(_SECONDS):
        try:
            await bob.fetch(missing, [bob.peer_id], max_size=100)
        except BlobUnavailableError as error:
            told = error.attempts
        else:
            raise AssertionError("a blob came out of nothing")
        assert told, "the error does not name the peers that were asked"
        assert await bob.fetch(ticket, max_size=100) == b"there"


async def a_blob_above_the_bound_is_not_fetched(arena: SwarmArena) -> None:
    """The bound is in bytes, inclusive."""
    alice, bob = await arena.make(), await arena.make()
    await arena.settle()
    ticket = await alice.publish(bytes(50_000), "tag")
    async with asyncio.timeout(_SECONDS):
        try:
            await bob.fetch(ticket, max_size=49_999)
        except BlobUnavailableError:
            pass
        else:
            raise AssertionError("a blob above the bound was fetched")
        assert await bob.fetch(ticket, max_size=50_000) == bytes(50_000)


async def another_provider_stands_in_for_one_that_is_gone(arena: SwarmArena) -> None:
    """What is fetched under a tag is offered to others."""
    alice, bob, carol = [await arena.make() for _ in range(3)]
    await arena.settle()
    ticket = await alice.publish(b"x" * 100_000, "tag")
    async with asyncio.timeout(_SECONDS):
        await bob.fetch(ticket, max_size=_MEGABYTE, tag="from alice")
        await alice.aclose()
        assert await carol.fetch(ticket, [bob.peer_id], max_size=_MEGABYTE) == b"x" * 100_000


async def a_peer_that_may_not_be_reached_gives_nothing(arena: SwarmArena) -> None:
    """The allow-list holds for blobs, in both directions."""
    alice, bob, carol = [await arena.make() for _ in range(3)]
    await arena.settle()
    ticket = await alice.publish(b"for bob", "tag")
    alice.set_allowed([bob.peer_id])
    async with asyncio.timeout(_SECONDS):
        assert await bob.fetch(ticket, max_size=100) == b"for bob"
        try:
            await carol.fetch(ticket, max_size=100)
        except BlobUnavailableError:
            pass
        else:
            raise AssertionError("a peer that is not allowed got a blob")


async def a_fetch_can_be_cancelled(arena: SwarmArena) -> None:
    """It can be started again."""
    alice, bob = await arena.make(), await arena.make()
    await arena.settle()
    data = bytes(4 * _MEGABYTE)
    ticket = await alice.publish(data, "tag")
    for turns in range(5):
        task = asyncio.ensure_future(bob.fetch(ticket, max_size=len(data)))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    async with asyncio.timeout(_SECONDS):
        assert await bob.fetch(ticket, max_size=len(data)) == data


async def tags_are_forgotten_by_rule(arena: SwarmArena) -> None:
    """The number of tags taken off is returned; the others stay."""
    alice, bob = await arena.make(), await arena.make()
    await arena.settle()
    await alice.publish(b"one", "result_1")
    two = await alice.publish(b"two", "result_2")
    assert alice.forget(lambda tag: tag == "result_1") == 1
    assert alice.forget(lambda tag: tag == "result_1") == 0
    async with asyncio.timeout(_SECONDS):
        assert await bob.fetch(two, max_size=100) == b"two"


async def peers_are_listed_with_what_they_sent(arena: SwarmArena) -> None:
    """Sent here is received there, but for the overhead."""
    alice, bob = await arena.make(), await arena.make()
    await arena.settle()
    ticket = await alice.publish(bytes(500_000), "tag")
    async with asyncio.timeout(_SECONDS):
        await bob.fetch(ticket, max_size=_MEGABYTE)
    (info,) = [info for info in bob.peers() if info.id == alice.peer_id]
    assert info.path == "direct"
    assert info.bytes_received >= 500_000
    assert info.receive_rate > 0
    (mirror,) = [info for info in alice.peers() if info.id == bob.peer_id]
    assert mirror.bytes_sent >= 500_000
    assert bob.peer_id not in {info.id for info in bob.peers()}


async def a_closed_swarm_ends_its_listeners_and_refuses_work(arena: SwarmArena) -> None:
    """Closing twice is closing."""
    alice, bob = await arena.make(), await arena.make()
    await arena.settle()
    ticket = await alice.publish(b"data", "tag")

    async def listen() -> list[Announcement]:
        return [announcement async for announcement in alice.announcements()]

    listening = asyncio.ensure_future(listen())
    await asyncio.sleep(0)
    async with asyncio.timeout(_SECONDS):
        await alice.aclose()
        await alice.aclose()
        assert await listening == []
    attempts: list[Callable[[], Awaitable[object]]] = [
        lambda: alice.announce(b"x"),
        lambda: alice.publish(b"x", "tag"),
        lambda: alice.fetch(ticket, max_size=100),
        lambda: alice.join([EndpointAddr(bob.peer_id)]),
    ]
    for attempt in attempts:
        try:
            await attempt()
        except NodeClosedError:
            continue
        raise AssertionError("a closed swarm still works")


CHECKS: Final[tuple[Callable[[SwarmArena], Awaitable[None]], ...]] = (
    an_announcement_reaches_everybody_else_once,
    a_repeated_announcement_is_delivered_once,
    the_longest_announcement_arrives_and_a_longer_one_is_refused,
    who_is_not_allowed_is_not_heard,
    a_flood_displaces_only_the_announcements_of_its_sender,
    what_is_announced_on_one_channel_is_not_heard_on_another,
    a_published_blob_is_fetched_by_its_ticket,
    a_blob_that_nobody_has_is_an_error,
    a_blob_above_the_bound_is_not_fetched,
    another_provider_stands_in_for_one_that_is_gone,
    a_peer_that_may_not_be_reached_gives_nothing,
    a_fetch_can_be_cancelled,
    tags_are_forgotten_by_rule,
    peers_are_listed_with_what_they_sent,
    a_closed_swarm_ends_its_listeners_and_refuses_work,
)
"""Each promise of a swarm; a docstring says which."""
