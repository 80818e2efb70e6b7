"""A small blob that travels with the announcement that names it: its bytes, its bounds, and over real nodes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest
from blake3 import blake3

from distro_optim.comm import postcard
from distro_optim.comm.addresses import EndpointAddr
from distro_optim.comm.announcements import MAX_ANNOUNCEMENT, Announcement, AnnouncementInbox
from distro_optim.comm.carrying import (
    MARK,
    MAX_CARRIED,
    MAX_CARRYING,
    MAX_KEPT,
    MAX_PEERS,
    CarriedBlobs,
    carries,
    pack,
    unpack,
)
from distro_optim.comm.iroh.blobs.disk import DiskStore
from distro_optim.comm.iroh.blobs.store import BlobStore
from distro_optim.comm.iroh.endpoint import Node
from distro_optim.comm.iroh.gossip.config import SWARM_GOSSIP
from distro_optim.comm.iroh.gossip.events import Send
from distro_optim.comm.iroh.gossip.frames import encode_frame
from distro_optim.comm.iroh.gossip.messages import Gossip, encode_message, message_id
from distro_optim.comm.iroh.swarm import IrohSwarm, topic_of_channel, topic_of_run
from distro_optim.comm.loop import LoopThread
from distro_optim.comm.signing import SecretKey, SignedMessage
from distro_optim.comm.swarm import FULL_MESH, Channel
from distro_optim.comm.tickets import BlobTicket
from distro_optim.errors import BlobUnavailableError, ProtocolError
from distro_optim.strategy.rounds.audits.momentum_messages import is_momentum_message
from distro_optim.strategy.rounds.audits.reports import is_report
from distro_optim.strategy.rounds.trust.succession_messages import is_letter

SECONDS = 60.0
TOPIC = topic_of_run("test")
BLOB = os.urandom(5000)


# -- bytes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("announcement", "blob"), [(b"", b""), (b"said", b"blob"), (bytes(MAX_ANNOUNCEMENT), bytes(MAX_CARRIED))]
)
def test_both_come_out_as_they_went_in(announcement: bytes, blob: bytes) -> None:
    data = pack(announcement, blob)
    assert carries(data)
    assert not any(is_other(data) for is_other in (is_report, is_momentum_message, is_letter))
    assert unpack(data) == (announcement, blob)
    assert len(data) <= MAX_CARRYING


def test_the_bytes_are_those_of_the_page() -> None:
    assert pack(b"said", b"blob") == bytes.fromhex("ffffffff20 0004") + b"saidblob"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        MARK,
        MARK + b"\0",
        MARK + b"\0\5said",
        b"\xff\xff\xff\xff\x01\0\0",
        pack(bytes(MAX_ANNOUNCEMENT + 1), b""),
        pack(b"", bytes(MAX_CARRIED + 1)),
    ],
)
def test_what_is_no_such_message_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack(data)


def test_a_peer_that_sends_many_pushes_out_only_its_own() -> None:
    carried = CarriedBlobs()
    carried.keep(b"quiet", b"one")
    for number in range(100):
        carried.keep(b"flooder", b"%d" % number)
    assert carried.take(blake3(b"one").digest(), 10) == b"one"
    left = [number for number in range(100) if carried.take(blake3(b"%d" % number).digest(), 10) is not None]
    assert left == list(range(100 - MAX_KEPT, 100))


def test_many_peers_cannot_fill_the_memory() -> None:
    carried = CarriedBlobs()
    for number in range(3 * MAX_PEERS):
        carried.keep(b"peer %d" % number, b"blob %d" % number)
    found = sum(carried.take(blake3(b"blob %d" % number).digest(), 100) is not None for number in range(3 * MAX_PEERS))
    assert found == MAX_PEERS


def test_a_blob_is_given_once_and_never_to_who_wants_a_shorter_one() -> None:
    carried, root = CarriedBlobs(), blake3(BLOB).digest()
    carried.keep(b"peer", BLOB)
    assert carried.take(root, len(BLOB) - 1) is None
    assert carried.take(root, len(BLOB)) == BLOB
    assert carried.take(root, len(BLOB)) is None


def test_an_inbox_takes_what_was_said_elsewhere_once() -> None:
    inbox = AnnouncementInbox(bytes(32), salt=bytes(16))
    said = Announcement(SecretKey(b"\1" * 32).public, b"said")
    assert inbox.admit(said)
    assert not inbox.admit(said)
    assert inbox.receive(SignedMessage.seal(SecretKey(b"\1" * 32), b"said")) is None
    assert (inbox.counts.accepted, inbox.counts.duplicate) == (1, 2)
    assert inbox.take() == said


def test_an_inbox_of_longer_messages_has_a_bound_as_well() -> None:
    key = SecretKey(b"\1" * 32)
    for bound in (MAX_ANNOUNCEMENT, MAX_CARRYING):
        inbox = AnnouncementInbox(bytes(32), salt=bytes(16), max_data=bound)
        assert inbox.open(SignedMessage.seal(key, bytes(bound))) is not None
        assert inbox.open(SignedMessage.seal(key, bytes(bound + 1))) is None
        assert inbox.counts.malformed == 1


# -- over real nodes ---------------------------------------------------------------------------------------------------


@pytest.fixture
def loop_thread() -> Iterable[LoopThread]:
    thread = LoopThread("test-network")
    yield thread
    thread.stop()


class Pair:
    """Two swarms that hear each other on both channels; ``others`` more are said to be in the run."""

    def __init__(self, loop: LoopThread, others: int = 0, store: BlobStore | None = None) -> None:
        self.nodes = [Node(bind_addr="127.0.0.1:0", relay="none", loop=loop) for _ in range(2)]
        self.alice = IrohSwarm(self.nodes[0], TOPIC)
        self.bob = IrohSwarm(self.nodes[1], TOPIC, store=store)
        self.absent = [SecretKey(bytes([9, number]) * 16).public for number in range(others)]
        self.heard: AsyncIterator[Announcement] = self.bob.announcements()
        self.beside: AsyncIterator[Announcement] = self.bob.announcements(Channel.OWN_KIND)

    async def __aenter__(self) -> Pair:
        for node in self.nodes:
            await node.bind()
        for swarm, other in ((self.alice, self.bob), (self.bob, self.alice)):
            swarm.set_allowed([other.peer_id, *self.absent])
            swarm.node.addresses.add(other.node.addr())
        for swarm in (self.alice, self.bob):
            await swarm.join([node.addr() for node in self.nodes])
        topics = [await swarm._enter(channel) for swarm in (self.alice, self.bob) for channel in Channel]
        for topic in topics:
            await topic.joined(SECONDS)
        return self

    async def __aexit__(self, *_: object) -> None:
        for swarm in (self.alice, self.bob):
            await swarm.aclose()
            await swarm.node.aclose()

    async def publishes(self, blob: bytes, *, says: bytes = b"said") -> BlobTicket:
        ticket = await self.alice.publish(blob, f"of {len(blob)}")
        await self.alice.announce(says, carrying=blob)
        assert await anext(self.heard) == Announcement(self.alice.peer_id, says)
        return ticket


waiting = pytest.mark.waiting


@waiting
@pytest.mark.parametrize("size", [0, 1, 5000, MAX_CARRIED])
def test_it_is_at_hand_when_the_announcement_is_heard_and_is_offered_to_others(
    loop_thread: LoopThread, size: int
) -> None:
    async def check() -> None:
        async with asyncio.timeout(SECONDS), Pair(loop_thread) as pair:
            blob = BLOB.ljust(MAX_CARRIED, b"x")[:size]
            ticket = await pair.publishes(blob)
            assert pair.bob.at_hand(ticket, max_size=size, tag="kept") == blob
            assert pair.bob.store.tags()["kept"] == ticket.hash
            assert pair.bob.at_hand(ticket, max_size=size, tag="kept") is None
            elsewhere = BlobTicket.raw(EndpointAddr(pair.bob.peer_id), ticket.hash)
            pair.alice.forget(lambda tag: True)
            assert await pair.alice.fetch(elsewhere, max_size=size) == blob

    loop_thread.run(check(), SECONDS)


@waiting
def test_a_store_that_takes_its_time_is_asked_by_fetch(loop_thread: LoopThread, tmp_path: Path) -> None:
    async def check() -> None:
        with DiskStore(tmp_path) as store:
            async with asyncio.timeout(SECONDS), Pair(loop_thread, store=store) as pair:
                ticket = await pair.publishes(BLOB)
                pair.alice.forget(lambda tag: True)  # nobody else has it any more
                assert pair.bob.at_hand(ticket, max_size=len(BLOB), tag="kept") is None
                assert await pair.bob.fetch(ticket, max_size=len(BLOB), tag="kept") == BLOB
                assert store.tags()["kept"] == ticket.hash

    loop_thread.run(check(), SECONDS)


@waiting
def test_what_is_too_much_is_fetched(loop_thread: LoopThread) -> None:
    async def check() -> None:
        async with asyncio.timeout(SECONDS), Pair(loop_thread) as pair:
            long = await pair.publishes(bytes(MAX_CARRIED + 1))
            assert pair.bob.at_hand(long, max_size=1 << 20, tag="kept") is None
            assert await pair.bob.fetch(long, max_size=1 << 20) == bytes(MAX_CARRIED + 1)
            came = 0
            for number in range(100):  # more than others would pass on
                blob = number.to_bytes(2, "big") * (MAX_CARRIED // 2)
                ticket = await pair.publishes(blob, says=b"%d" % number)
                came += pair.bob.at_hand(ticket, max_size=len(blob), tag="kept") is not None
            assert 16 <= came < 100
            assert await pair.bob.fetch(ticket, max_size=len(blob)) == blob

    loop_thread.run(check(), SECONDS)


@waiting
@pytest.mark.parametrize("others", [FULL_MESH - 1, FULL_MESH])
def test_among_many_it_stays_where_it_is(loop_thread: LoopThread, others: int) -> None:
    async def check() -> None:
        async with asyncio.timeout(SECONDS), Pair(loop_thread, others) as pair:
            ticket = await pair.publishes(BLOB)
            came = pair.bob.at_hand(ticket, max_size=len(BLOB), tag="kept") is not None
            assert came == (others < FULL_MESH)

    loop_thread.run(check(), SECONDS)


@waiting
def test_a_blob_that_the_announcement_does_not_name_takes_nobodys_place(loop_thread: LoopThread) -> None:
    async def check() -> None:
        async with asyncio.timeout(SECONDS), Pair(loop_thread) as pair:
            ticket = await pair.alice.publish(BLOB, "true")
            await pair.alice.announce(b"said", carrying=b"something else")
            await anext(pair.heard)
            assert pair.bob.at_hand(ticket, max_size=len(BLOB), tag="kept") is None
            assert await pair.bob.fetch(ticket, max_size=len(BLOB)) == BLOB
            nowhere = BlobTicket.raw(ticket.addr, bytes(32))
            with pytest.raises(BlobUnavailableError):
                await pair.bob.fetch(nowhere, max_size=len(BLOB))

    loop_thread.run(check(), SECONDS)


@waiting
@pytest.mark.parametrize("said", [MARK, MARK + b"\0\5said", pack(b"", bytes(MAX_CARRIED + 1)), bytes(MAX_CARRIED)])
def test_what_makes_no_sense_on_the_other_channel_is_not_heard_and_what_follows_is(
    loop_thread: LoopThread, said: bytes
) -> None:
    async def check() -> None:
        async with asyncio.timeout(SECONDS), Pair(loop_thread) as pair:
            topic = await pair.alice._enter(Channel.OWN_KIND)
            await topic.broadcast(SignedMessage.seal(pair.alice.node.secret_key, said))
            await pair.alice.announce(b"plain", channel=Channel.OWN_KIND)
            assert (await anext(pair.beside)).data == b"plain"
            await pair.publishes(BLOB, says=b"carried")
            assert pair.bob._streams[Channel.OWN_KIND].inbox.counts.malformed == 1

    loop_thread.run(check(), SECONDS)


@waiting
def test_what_its_author_did_not_sign_is_heard_from_it_and_passed_on_to_nobody(loop_thread: LoopThread) -> None:
    async def check() -> None:
        async with asyncio.timeout(SECONDS), Pair(loop_thread) as pair:
            unsigned = postcard.encode(SignedMessage(pair.alice.peer_id, b"said", bytes(64)))
            signed = SignedMessage.seal(pair.alice.node.secret_key, b"said")
            topic = await pair.alice._enter(Channel.RUN)
            # Ours goes out only signed; so a peer that does otherwise writes it to its connections itself.
            (link,) = pair.alice.gossip._links.values()
            link.send(topic.id, encode_frame(encode_message(Gossip(message_id(unsigned), unsigned, 0))))
            assert await anext(pair.heard) == Announcement(pair.alice.peer_id, b"said")
            refused, (link,) = pair.bob.gossip.stats.refused, pair.bob.gossip._links.values()
            for content, goes in ((unsigned, False), (signed, True)):
                queued = link.queued
                message = Gossip(message_id(content), content, 1)
                pair.bob.gossip._perform([(topic.id, Send((pair.alice.peer_id,), message))])
                assert (link.queued > queued) == goes
            assert pair.bob.gossip.stats.refused == refused + 1

    loop_thread.run(check(), SECONDS)


@waiting
def test_messages_on_the_runs_own_channel_are_as_short_as_psyches(loop_thread: LoopThread) -> None:
    async def check() -> None:
        async with asyncio.timeout(SECONDS), Pair(loop_thread) as pair:
            topics = {channel: topic_of_channel(TOPIC, channel) for channel in Channel}
            for swarm in (pair.alice, pair.bob):
                sizes = {channel: swarm.gossip.max_content_of(topic) for channel, topic in topics.items()}
                assert sizes[Channel.RUN] == SWARM_GOSSIP.max_content_size
                assert sizes[Channel.OWN_KIND] == SignedMessage.size_with(MAX_CARRYING)
            (link,) = pair.alice.gossip._links.values()
            # As one would say it that keeps to no bound.
            link.send(topics[Channel.RUN], (5000).to_bytes(4, "big") + bytes(5000))
            while pair.bob.gossip.stats.offenders == 0:
                await asyncio.sleep(0.005)

    loop_thread.run(check(), SECONDS)
