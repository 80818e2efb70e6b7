"""Whom a client asks for a result, and for how long."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from types import SimpleNamespace

import pytest

from distro_optim.comm.addresses import EndpointAddr
from distro_optim.comm.swarm import FULL_MESH
from distro_optim.comm.tickets import BlobTicket
from distro_optim.errors import BlobUnavailableError, StoreFullError
from distro_optim.strategy.network import driver
from distro_optim.strategy.network.driver import RoundDriver
from distro_optim.strategy.rounds import actions as act
from distro_optim.strategy.rounds.audits.momentum_watch import OPENING_TAG
from rounds.simulator import secret

OWNER, FIRST, SECOND = (secret(number).public for number in (1, 2, 3))
DATA = b"result"

pytestmark = [pytest.mark.waiting]


def fetch_of(step: int) -> act.FetchBlob:
    ticket = BlobTicket.raw(EndpointAddr(OWNER), bytes(32))
    tag = f"downloaded-distro-result-abcd_{step}"
    return act.FetchBlob(ticket=ticket, providers=(OWNER, FIRST, SECOND), max_size=100, tag=tag)


class Peers:
    """A swarm in which each peer has a result, has not got it, or is silent."""

    def __init__(self, **has: bool | None) -> None:
        self.has = {key: has.get(name) for key, name in ((OWNER, "owner"), (FIRST, "first"), (SECOND, "second"))}
        self.asked: list[bytes] = []
        self.came_along: bytes | None = None
        self.is_full = False

    def at_hand(self, ticket: BlobTicket, *, max_size: int, tag: str) -> bytes | None:
        if self.is_full:
            raise StoreFullError("no room")
        came, self.came_along = self.came_along, None
        return came

    async def fetch(
        self, ticket: BlobTicket, providers: Iterable[bytes] = (), *, max_size: int, tag: str | None = None
    ) -> bytes:
        for peer in dict.fromkeys([ticket.addr.id, *providers]):
            self.asked.append(peer)
            if self.has[peer] is None:
                await asyncio.Event().wait()
            if self.has[peer]:
                return DATA
        raise BlobUnavailableError("nobody has it", attempts=())

    def forget(self, unwanted: Callable[[str], bool]) -> int:
        return 0


class Answers:
    """Takes what the driver tells."""

    def __init__(self) -> None:
        self.told: asyncio.Queue[tuple[str, bool]] = asyncio.Queue()

    def fetched(self, blob: bytes, data: bytes, now: float) -> list[act.Action]:
        self.told.put_nowait(("fetched", False))
        return []

    def fetch_failed(self, blob: bytes, now: float, *, is_slow: bool = False) -> list[act.Action]:
        self.told.put_nowait(("failed", is_slow))
        return []

    def next_timer(self) -> None:
        return None


def in_driver(peers: Peers, scenario: Callable[[RoundDriver, Answers], Awaitable[object]]) -> object:
    async def run() -> object:
        answers = Answers()
        subject = RoundDriver(
            rounds=answers,  # type: ignore[arg-type]
            swarm=peers,  # type: ignore[arg-type]
            coordinator=SimpleNamespace(),  # type: ignore[arg-type]
            mailbox=SimpleNamespace(),  # type: ignore[arg-type]
            journal=SimpleNamespace(tell=print),  # type: ignore[arg-type]
        )
        return await scenario(subject, answers)

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "OWNER_SECONDS", 0.05)
    monkeypatch.setattr(driver, "FETCH_SECONDS", 0.3)


async def fetched(subject: RoundDriver, answers: Answers) -> object:
    subject._carry_out(fetch_of(5))
    return await answers.told.get()


def test_the_owner_is_asked_first_and_alone() -> None:
    peers = Peers(owner=True, first=True)
    assert in_driver(peers, fetched) == ("fetched", False)
    assert peers.asked == [OWNER]


def test_nobody_is_asked_for_what_came_along_and_it_is_not_told_before_what_was_to_be_done_first() -> None:
    peers = Peers(owner=True)
    peers.came_along = DATA

    async def scenario(subject: RoundDriver, answers: Answers) -> object:
        subject._carry_out(fetch_of(5))
        assert answers.told.empty()
        return await answers.told.get()

    assert in_driver(peers, scenario) == ("fetched", False)
    assert peers.asked == []


def test_what_came_along_and_finds_no_room_is_fetched_as_ever() -> None:
    peers = Peers(owner=True)
    peers.came_along, peers.is_full = DATA, True
    assert in_driver(peers, fetched) == ("fetched", False)
    assert peers.asked == [OWNER]


def test_others_are_asked_when_the_owner_is_silent_and_not_the_owner_with_them() -> None:
    peers = Peers(owner=None, first=False, second=True)
    assert in_driver(peers, fetched) == ("fetched", False)
    assert peers.asked == [OWNER, FIRST, SECOND]


def test_an_owner_that_is_only_slow_is_asked_again_and_does_not_count_as_failing() -> None:
    peers = Peers(owner=None, first=False, second=False)
    assert in_driver(peers, fetched) == ("failed", True)
    assert peers.asked == [OWNER, FIRST, SECOND, OWNER]


def test_what_nobody_has_has_failed() -> None:
    peers = Peers(owner=False, first=False, second=False)
    assert in_driver(peers, fetched) == ("failed", False)


def test_a_blob_that_is_announced_for_a_later_round_too_is_fetched_on_when_the_first_is_forgotten() -> None:
    peers = Peers(owner=None, first=None)

    async def scenario(subject: RoundDriver, answers: Answers) -> object:
        subject._carry_out(fetch_of(5))
        await asyncio.sleep(0)
        subject._carry_out(fetch_of(7))
        subject._carry_out(act.Forget(6))
        return await answers.told.get()

    assert in_driver(peers, scenario) == ("failed", True)


def test_momenta_that_come_slowly_hold_up_no_result() -> None:
    peers = Peers(owner=None, first=True)

    async def scenario(subject: RoundDriver, answers: Answers) -> object:
        for number in range(1, 2 * driver.MAX_FETCHES):
            ticket = BlobTicket.raw(EndpointAddr(OWNER), bytes([number] * 32))
            subject._carry_out(act.FetchBlob(ticket=ticket, providers=(), max_size=100, tag=f"{OPENING_TAG}_6"))
        await asyncio.sleep(0)
        assert peers.asked == [OWNER] * driver.MAX_FETCHES
        subject._carry_out(fetch_of(5))
        return await answers.told.get()

    assert in_driver(peers, scenario) == ("fetched", False)
    assert peers.asked[driver.MAX_FETCHES :] == [OWNER, FIRST]


@pytest.mark.parametrize(
    ("size", "at_once"),
    [(driver.SMALL_RESULT, driver.MAX_SMALL_FETCHES), (driver.SMALL_RESULT + 1, driver.MAX_FETCHES)],
    ids=["small", "large"],
)
def test_more_small_results_are_fetched_at_once_than_large_ones(size: int, at_once: int) -> None:
    peers = Peers(owner=None)

    async def scenario(subject: RoundDriver, answers: Answers) -> object:
        for number in range(1, 2 * driver.MAX_SMALL_FETCHES):
            ticket = BlobTicket.raw(EndpointAddr(OWNER), bytes([number] * 32))
            tag = f"downloaded-distro-result-abcd_{number}"
            subject._carry_out(act.FetchBlob(ticket=ticket, providers=(), max_size=size, tag=tag))
        await asyncio.sleep(0)
        return len(peers.asked)

    assert in_driver(peers, scenario) == at_once


def test_all_peers_of_a_small_epoch_are_neighbours_and_in_a_large_one_a_few_are_enough() -> None:
    # Gossip takes in whoever asks and sends another away: if all went on asking, nobody would keep a neighbour.
    for others in range(FULL_MESH + 1):
        assert [driver.lacks_neighbors(count, others) for count in range(others + 1)] == [True] * others + [False]
    large = [driver.lacks_neighbors(count, FULL_MESH + 1) for count in range(FULL_MESH)]
    assert large == [count < driver.ENOUGH_NEIGHBORS for count in range(FULL_MESH)]
