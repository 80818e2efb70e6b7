"""Who may be in a run goes with it to its next host, and a host that leaves hands the run over: with real letters."""

from __future__ import annotations

import random

import pytest

from distro_optim.comm.announcements import MAX_ANNOUNCEMENT
from distro_optim.errors import ProtocolError
from distro_optim.strategy.rounds.trust.estate import MAX_KEYS, MAX_PARTS, PART_SIZE, Estate, EstateParts, LedgerEnd
from distro_optim.strategy.rounds.trust.succession_messages import (
    MAX_VOTERS,
    EstatePart,
    Pledge,
    Proposal,
    VoterList,
    repeat_letter,
    run_mark,
    seal_letter,
)

from .test_a_run_keeps_a_host import KEYS, RUN, World

GUESTS = Estate(allowed=tuple(sorted(key.public for key in KEYS)), banned=(bytes(32),), joiner_wait_time=7)


def largest() -> Estate:
    keys = tuple(number.to_bytes(32, "big") for number in range(MAX_KEYS))
    return Estate(keys, keys, (1 << 32) - 1, True, LedgerEnd(bytes(32), bytes(32)))


def test_the_next_host_has_the_list_of_guests_and_the_bans() -> None:
    world = World(4, loss=0.2, seed=3)
    world.peers[0].succession.leave_behind(GUESTS)
    world.run(40)
    assert [peer.succession.estate for peer in world.peers] == [GUESTS] * 4
    world.peers[0].alive = False
    world.run(40)
    (host,) = world.hosts()
    assert world.peers[host].succession.estate == GUESTS
    banned = Estate(GUESTS.allowed, (bytes(32), bytes([1] * 32)), 7)
    world.peers[host].succession.leave_behind(banned)
    world.run(40)
    assert {peer.succession.estate for peer in world.peers if peer.alive} == {banned}
    world.check()


def test_one_that_has_not_heard_who_may_come_does_not_host() -> None:
    world = World(3)
    world.run(10)
    world.groups = [{1}]
    world.peers[0].succession.leave_behind(GUESTS)
    world.run(4)  # less than it takes to elect somebody
    assert world.peers[1].succession.estate == Estate()
    world.peers[0].alive = False
    world.groups = []
    for peer in world.peers[1:]:  # it has heard that there is a list, and not which
        peer.succession._estate.latest = world.peers[2].succession._estate.latest
    world.run(40)
    assert world.hosts() == [2]
    world.check()


def test_what_was_said_before_a_ban_and_is_said_again_by_others_takes_nothing_back() -> None:
    parts = EstateParts()
    newer, older = GUESTS, Estate(GUESTS.allowed, ())
    assert [parts.add((1, 2), 0, 1, data) for data in newer.parts()] == [newer]
    assert [parts.add((1, 1), 0, 1, data) for data in older.parts()] == [None]
    assert [parts.add((2, 1), 0, 1, data) for data in older.parts()] == [older]


def test_the_largest_estate_comes_whole_in_any_order_and_each_part_is_one_announcement() -> None:
    estate, run = largest(), run_mark(RUN)
    data = estate.parts()
    assert len(data) <= MAX_PARTS
    said = EstatePart(KEYS[0].public + bytes(8), (1 << 64) - 1, (1 << 32) - 1, 0, len(data), bytes(PART_SIZE))
    assert len(repeat_letter(0, seal_letter(KEYS[0], run, (1 << 32) - 1, said))) <= MAX_ANNOUNCEMENT
    order = list(range(len(data)))
    random.Random(1).shuffle(order)
    parts = EstateParts()
    *early, whole = (parts.add((1, 1), place, len(data), data[place]) for place in order)
    assert whole == estate
    assert set(early) == {None}


@pytest.mark.parametrize(
    ("place", "count", "data"), [(1, 1, b""), (0, MAX_PARTS + 1, b""), (0, 1, b"\xff"), (0, 1, b"")]
)
def test_parts_that_cannot_be_are_refused(place: int, count: int, data: bytes) -> None:
    with pytest.raises(ProtocolError):
        EstateParts().add((1, 1), place, count, data)


def test_the_longest_list_of_voters_with_its_promises_is_one_announcement() -> None:
    run, big = run_mark(RUN), ((1 << 32) - 1, (1 << 50) - 1)
    name = KEYS[0].public + bytes(8)
    promise = seal_letter(KEYS[0], run, (1 << 32) - 1, Pledge(big, big, name))
    voters = VoterList(big[0], big[1], (name,) * MAX_VOTERS, big)
    said = Proposal(name, big[0], voters, big, (promise,) * (MAX_VOTERS // 2 + 1), 0xFFFF, (1 << 32) - 1)
    assert len(repeat_letter(0, seal_letter(KEYS[0], run, (1 << 32) - 1, said))) <= MAX_ANNOUNCEMENT


def test_a_host_of_two_that_leaves_hands_the_run_to_the_other() -> None:
    world = World(2)
    world.run(10)
    before = len(world.counted)
    world.peers[0].succession.resign()
    world.carry_out(0, world.peers[0])
    world.tick()
    world.peers[0].alive = False
    world.run(3)
    assert world.hosts() == [1]
    assert len(world.counted) > before
    assert any("the host has left: this peer hosts the run now" in text for text in world.peers[1].told)
    world.check()


def test_a_host_that_leaves_says_so_until_another_one_hosts() -> None:
    world = World(2)
    world.run(10)
    leaves = world.peers[0].succession
    leaves.resign()
    world.carry_out(0, world.peers[0])
    world.mail.clear()  # nothing of it arrives
    for _ in range(6):
        assert leaves.is_handing_over
        leaves.hand_over()
        world.tick()
        if not leaves.is_handing_over:
            break
    world.peers[0].alive = False
    assert world.hosts() == [1]
    assert not leaves.is_handing_over
    assert any("the host has left: this peer hosts the run now" in text for text in world.peers[1].told)
    world.check()


def test_nobody_but_the_host_can_hand_the_run_over() -> None:
    world = World(3)
    world.run(10)
    world.peers[2].succession._order = world.peers[2].succession._order[::-1]
    world.peers[2].succession._hosts = True  # it says so, and votes for another as a host that leaves
    world.peers[2].succession.resign()
    world.peers[2].succession._hosts = False
    world.carry_out(2, world.peers[2])
    world.run(5)
    assert world.hosts() == [0]
    world.check()
