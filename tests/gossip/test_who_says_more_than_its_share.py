"""What an author says beyond its share goes nowhere, and it is the flooder that is cut off, not who stands between."""

from __future__ import annotations

import pytest

from distro_optim.comm import postcard
from distro_optim.comm.announcements import MAX_ANNOUNCEMENT
from distro_optim.comm.iroh.gossip.gate import MAX_AUTHORS, AnnouncementGate, GateLimits, Verdict
from distro_optim.comm.signing import SecretKey, SignedMessage

FLOODER, FRIEND = (SecretKey(bytes([number]) * 32) for number in (1, 2))
LIMITS = GateLimits()


def said(author: SecretKey, number: int, size: int = 300) -> bytes:
    return SignedMessage.seal(author, number.to_bytes(size, "big"))


def flood(gate: AnnouncementGate, via: bytes, count: int, size: int, now: float = 0.0) -> list[Verdict]:
    return [gate.judge(said(FLOODER, number, size), via, now) for number in range(count)]


@pytest.mark.slow
def test_an_honest_peer_is_within_its_share_in_the_shortest_rounds() -> None:
    gate = AnnouncementGate()
    for number in range(3000):  # three messages in each of a thousand rounds of 20 ms
        assert gate.judge(said(FRIEND, number), FRIEND.public, number / 150) is Verdict.PASS


@pytest.mark.parametrize("size", [8, MAX_ANNOUNCEMENT])
def test_a_flooder_is_cut_off_by_those_that_it_talks_to(size: int) -> None:
    verdicts = flood(AnnouncementGate(), FLOODER.public, 1500, size)
    passed = verdicts.count(Verdict.PASS)
    assert passed == min(LIMITS.messages_burst, LIMITS.bytes_burst // len(said(FLOODER, 0, size)))
    assert verdicts[passed : passed + int(LIMITS.excess_burst)] == [Verdict.IGNORE] * int(LIMITS.excess_burst)
    assert set(verdicts[passed + int(LIMITS.excess_burst) :]) == {Verdict.OFFENCE}


def test_who_passes_a_flood_on_is_not_cut_off_and_has_its_own_share() -> None:
    gate = AnnouncementGate()
    assert set(flood(gate, FRIEND.public, 1500, 8)) == {Verdict.PASS, Verdict.IGNORE}
    assert gate.judge(said(FRIEND, 1), FRIEND.public, 0.0) is Verdict.PASS


def test_nobody_can_use_up_the_share_of_another() -> None:
    gate = AnnouncementGate()
    for number in range(100):
        forged = SignedMessage(FRIEND.public, number.to_bytes(3900, "big"), bytes(64))
        assert gate.judge(postcard.encode(forged), FLOODER.public, 0.0) is Verdict.IGNORE
    assert set(flood(gate, FLOODER.public, 10, 8)) == {Verdict.PASS}
    assert gate.judge(said(FRIEND, 1), FRIEND.public, 0.0) is Verdict.PASS


def test_what_comes_from_its_author_is_taken_unsigned_and_goes_no_further() -> None:
    gate = AnnouncementGate(me=FLOODER.public)
    for signature, is_true in ((bytes(64), False), (FRIEND.sign(b"said"), True)):
        sealed = postcard.encode(SignedMessage(FRIEND.public, b"said", signature))
        assert gate.judge(sealed, FRIEND.public, 0.0) is Verdict.PASS
        assert (gate.judge(sealed, FLOODER.public, 0.0) is Verdict.PASS) == is_true
        assert gate.may_pass_on(sealed) == is_true
    assert gate.may_pass_on(postcard.encode(SignedMessage(FLOODER.public, b"ours", bytes(64))))
    assert not gate.may_pass_on(b"no message")


def test_who_sends_what_is_badly_signed_again_and_again_is_cut_off() -> None:
    gate = AnnouncementGate()
    verdicts = [gate.judge(bytes([number % 256]) * 200, FLOODER.public, 0.0) for number in range(300)]
    assert set(verdicts[: int(LIMITS.excess_burst)]) == {Verdict.IGNORE}
    assert set(verdicts[int(LIMITS.excess_burst) :]) == {Verdict.OFFENCE}


def test_a_share_comes_back_with_time() -> None:
    gate = AnnouncementGate()
    flood(gate, FRIEND.public, 1001, 8)
    assert gate.judge(said(FLOODER, 5000), FRIEND.public, 0.0) is Verdict.IGNORE
    assert gate.judge(said(FLOODER, 5001), FRIEND.public, 1.0) is Verdict.PASS


def test_the_book_of_authors_is_bounded() -> None:
    gate = AnnouncementGate()
    for number in range(MAX_AUTHORS + 10):
        gate.judge(b"\xff", number.to_bytes(32, "big"), 0.0)
    assert len(gate._budgets) == MAX_AUTHORS
