"""What arrives for everybody is checked, counted once and bounded."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distro_optim.comm import postcard
from distro_optim.comm.addresses import EndpointAddr
from distro_optim.comm.announcements import MAX_ANNOUNCEMENT, Announcement, AnnouncementInbox, InboxLimits
from distro_optim.comm.iroh.gossip.config import PSYCHE_GOSSIP
from distro_optim.comm.meter import RateMeter
from distro_optim.comm.seen import SeenSet
from distro_optim.comm.signing import SecretKey, SignedMessage
from distro_optim.comm.swarm import provider_order
from distro_optim.comm.tickets import BlobTicket
from distro_optim.errors import ConfigurationError

pytestmark = pytest.mark.waiting


ME, ALICE, BOB = (SecretKey(bytes([number]) * 32) for number in (1, 2, 3))


def inbox(**options: object) -> AnnouncementInbox:
    return AnnouncementInbox(ME.public, salt=b"salt", **options)  # type: ignore[arg-type]


def test_a_signed_message_is_queued_with_its_sender() -> None:
    box = inbox()
    expected = Announcement(ALICE.public, b"hello")
    assert box.receive(SignedMessage.seal(ALICE, b"hello")) == expected
    assert box.take() == expected
    assert box.take() is None
    assert box.counts.accepted == 1


def test_the_longest_announcement_fits_in_a_gossip_message_of_psyche() -> None:
    longest = SignedMessage.seal(ALICE, bytes(MAX_ANNOUNCEMENT))
    assert len(longest) <= PSYCHE_GOSSIP.max_content_size
    assert inbox().receive(longest) is not None
    assert inbox().receive(SignedMessage.seal(ALICE, bytes(MAX_ANNOUNCEMENT + 1))) is None


def test_who_says_it_over_its_own_connection_need_not_have_signed_it() -> None:
    unsigned = postcard.encode(SignedMessage(ALICE.public, b"said", bytes(64)))
    assert inbox().receive(unsigned, ALICE.public) is not None
    for via in (None, BOB.public, ME.public):
        assert inbox().receive(unsigned, via) is None


def test_a_copy_is_counted_once_even_after_it_was_read() -> None:
    box = inbox()
    sealed = SignedMessage.seal(ALICE, b"hello")
    for _ in range(3):
        box.receive(sealed)
    assert box.take() is not None
    box.receive(sealed)
    assert len(box) == 0
    assert box.counts.duplicate == 3
    assert box.receive(SignedMessage.seal(BOB, b"hello")) is not None


def test_a_forgery_is_dropped_and_does_not_shadow_the_true_message() -> None:
    box = inbox()
    true = SignedMessage.seal(ALICE, b"hello")
    assert box.receive(true[:-1] + bytes([true[-1] ^ 1])) is None
    assert box.counts.malformed == 1
    assert box.receive(true) is not None


def test_strangers_and_echoes_are_refused_before_their_signature_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "distro_optim.comm.announcements.is_signed_by", lambda *_: pytest.fail("a signature was checked")
    )
    box = inbox(allowed=[ALICE.public])
    box.receive(SignedMessage.seal(BOB, b"hello"))
    box.receive(SignedMessage.seal(ME, b"hello"))
    assert box.counts.refused == 2


def test_taking_a_sender_off_the_list_drops_what_waits_of_it() -> None:
    box = inbox()
    for key in (ALICE, BOB):
        box.receive(SignedMessage.seal(key, b"1"))
        box.receive(SignedMessage.seal(key, b"2"))
    box.set_allowed([BOB.public])
    assert [box.take(), box.take(), box.take()] == [
        Announcement(BOB.public, b"1"),
        Announcement(BOB.public, b"2"),
        None,
    ]
    box.set_allowed(None)
    assert box.receive(SignedMessage.seal(ALICE, b"3")) is not None


def test_a_full_queue_drops_the_oldest_of_whoever_has_most() -> None:
    box = inbox(limits=InboxLimits(queued=6, queued_per_sender=5))
    for number in range(5):
        box.receive(SignedMessage.seal(ALICE, b"%d" % number))
    for number in range(3):
        box.receive(SignedMessage.seal(BOB, b"%d" % number))
    assert box.waiting() == {ALICE.public: 3, BOB.public: 3}
    assert box.counts.dropped == 2
    heard = [box.take() for _ in range(6)]
    assert [a.data for a in heard if a is not None] == [b"2", b"3", b"4", b"0", b"1", b"2"]


@pytest.mark.slow
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9), st.booleans()), max_size=60))
def test_the_queue_never_exceeds_its_bounds_and_keeps_each_senders_order(steps: list[tuple[int, int, bool]]) -> None:
    limits = InboxLimits(queued=7, queued_per_sender=4)
    box = inbox(limits=limits)
    read: list[Announcement] = []
    for sender, number, take in steps:
        box.receive(SignedMessage.seal((ALICE, BOB, ME)[sender], b"%d" % number))
        assert len(box) <= limits.queued
        assert all(count <= limits.queued_per_sender for count in box.waiting().values())
        assert sum(box.waiting().values()) == len(box)
        if take and (announcement := box.take()) is not None:
            read.append(announcement)
    while (announcement := box.take()) is not None:
        read.append(announcement)
    assert len(set(read)) == len(read)
    assert len(read) + box.counts.dropped == box.counts.accepted


@given(st.binary(max_size=5000))
def test_any_bytes_are_counted_and_dropped(data: bytes) -> None:
    box = inbox()
    assert box.receive(data) is None
    assert box.counts.malformed + box.counts.refused == 1


# --- the long-run set of what was seen ---


def test_everything_of_the_last_generation_is_remembered() -> None:
    seen = SeenSet(b"salt", capacity=100)
    for number in range(1000):
        assert seen.add(b"%d" % number)
        assert not seen.add(b"%d" % number)
    assert all(b"%d" % number in seen for number in range(900, 1000))
    assert b"0" not in seen


def test_the_salt_decides_which_bits_stand_for_an_entry() -> None:
    first, second = SeenSet(b"one", capacity=100), SeenSet(b"two", capacity=100)
    first.add(b"entry")
    second.add(b"entry")
    assert first._young.bitarray != second._young.bitarray


def test_new_entries_are_hardly_ever_taken_for_old_ones() -> None:
    seen = SeenSet(b"salt", capacity=5000)
    assert all(seen.add(b"%d" % number) for number in range(9000))


def test_a_set_needs_room() -> None:
    with pytest.raises(ConfigurationError):
        SeenSet(b"", capacity=0)
    with pytest.raises(ConfigurationError):
        InboxLimits(queued=0)


# --- rates ---


def test_a_rate_is_the_mean_over_the_window() -> None:
    meter = RateMeter(window=15.0)
    assert meter.rate(0.0) == 0.0
    for second in range(100):
        meter.add(1000, float(second))
    assert meter.rate(99.5) == pytest.approx(1000, rel=0.1)
    assert meter.rate(200.0) == 0.0
    assert meter.total == 100_000


def test_a_first_packet_is_not_an_infinite_rate() -> None:
    meter = RateMeter(window=15.0)
    meter.add(1500, 10.0)
    assert meter.rate(10.0) == 1500.0


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 10**6)), max_size=200))
def test_a_meter_holds_a_bounded_number_of_steps(steps: list[tuple[float, int]]) -> None:
    meter, now = RateMeter(), 0.0
    for wait, count in steps:
        now += wait
        meter.add(count, now)
    assert len(meter._steps) <= 16
    assert meter.total == sum(count for _, count in steps)
    assert 0 <= meter.rate(now) <= meter.total + 1


def test_a_window_has_a_length() -> None:
    with pytest.raises(ConfigurationError):
        RateMeter(window=0)


# --- whom to ask ---


def test_the_nearest_provider_comes_first_and_the_unknown_are_shuffled() -> None:
    near, far, *unknown = (bytes([number]) * 32 for number in range(6))
    ticket = BlobTicket.raw(EndpointAddr(far), bytes(32))
    rtts = {near: 0.01, far: 0.1}
    orders = {
        tuple(provider_order(ticket, [*unknown, near, far, ME.public], ME.public, rtts, random.Random(seed)))
        for seed in range(50)
    }
    assert all(order[:2] == (near, far) for order in orders)
    assert all(set(order[2:]) == set(unknown) and len(order) == 6 for order in orders)
    assert len(orders) > 10
