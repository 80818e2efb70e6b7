"""The next host decides as the one before did, whatever led the peers to it: sessions over endpoints on loopback."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from distro_optim.comm.loop import LoopThread
from distro_optim.comm.signing import SecretKey
from distro_optim.coordinator.server.ledger_file import read_ledger
from distro_optim.coordinator.ticket import RunTicket
from distro_optim.errors import JoinRefusedError
from distro_optim.strategy.network.hosting import HostedRun
from distro_optim.strategy.network.joining import NodeOptions

from .test_a_run_outlives_its_host import (
    OUTLIVED,
    PATIENCE_SECONDS,
    STEPS,
    Killed,
    equal,
    kill,
    runtime_of,
    succession_of,
    until_all_vote,
)
from .test_live_sessions import Peer, host

pytestmark = [pytest.mark.waiting, pytest.mark.slow]

KEYS = [SecretKey(bytes([number]) * 32) for number in range(6)]


def new_host(peers: list[Peer]) -> Peer:
    """Whoever of these hosts, once somebody does."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := [peer for peer in peers if succession_of(peer).hosts]):
        assert time.monotonic() < deadline, "nobody was elected"
        time.sleep(0.05)
    return found[0]


def until_heard(peers: list[Peer]) -> None:
    """Waits until all have what the host leaves behind."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len({succession_of(peer).estate for peer in peers}) > 1:
        assert time.monotonic() < deadline, "what the host leaves behind has not come"
        time.sleep(0.05)


def test_guests_bans_and_the_ledger_move_to_the_next_host(tmp_path: Path) -> None:
    def dies(peer: Peer, step: int) -> None:
        if step >= 6:
            until_all_vote([first, *others])
            peer.session.ban(KEYS[4].public)
            until_heard([first, *others])
            kill(peer)

    def slowly(peer: Peer, step: int) -> None:
        if step > 8 and strangers_were_refused.exists() is False:
            time.sleep(0.1)

    strangers_were_refused = tmp_path / "refused"
    others: list[Peer] = []
    config = replace(OUTLIVED, min_peers=3, keep_peers=2, save_dir=str(tmp_path / "saved"), total_steps=60)
    guests = [key.public for key in KEYS[1:5]]
    first = host(1, config, during=dies, allow=guests, secret_key=KEYS[0])
    folders = {number: tmp_path / str(number) for number in (1, 2)}
    others += [
        Peer(number, run=first.ticket, secret_key=KEYS[number], during=slowly, checkpoint_dir=folders[number])
        for number in (1, 2)
    ]
    first.join()
    assert isinstance(first.error, Killed)
    chosen = new_host(others)
    while len(chosen.steps) < 9 and chosen.is_alive():
        time.sleep(0.05)
    for key in (KEYS[4], KEYS[5]):  # banned, and no guest
        stranger = Peer(9, run=chosen.session.ticket, secret_key=key)
        stranger.join()
        assert isinstance(stranger.error, JoinRefusedError)
    chosen.session.ban(KEYS[3].public)  # it decides now
    strangers_were_refused.touch()
    assert equal(others)
    ledger = read_ledger(next((folders[others.index(chosen) + 1] / "hosted").glob("*.ledger.jsonl")))
    assert ledger.host == runtime_of(chosen).secret_key.public
    assert all(ledger.clients[runtime_of(peer).secret_key.public].work > 0 for peer in others)
    assert runtime_of(chosen).view().num_peers == 2


def test_peers_that_were_given_an_address_follow_the_next_host() -> None:
    def dies(peer: Peer, step: int) -> None:
        if step >= 6:
            until_all_vote([first, *others])
            kill(peer)

    others: list[Peer] = []
    first = host(1, replace(OUTLIVED, min_peers=3, keep_peers=2), during=dies, tcp="127.0.0.1:0")
    ticket = RunTicket.parse(str(first.ticket))
    others += [Peer(seed, run=f"{ticket.tcp[0]}/{ticket.run_id}") for seed in (2, 3)]
    first.join()
    assert isinstance(first.error, Killed)
    assert equal(others)
    for peer in others:
        assert peer.steps[-1] == STEPS
        assert len(peer.steps) >= STEPS - 2


def test_a_host_of_two_that_is_closed_hands_the_run_to_the_other() -> None:
    def leaves(peer: Peer, step: int) -> None:
        if step >= 6 and not peer.enough.is_set():
            until_all_vote([first, *others])
            peer.enough.set()

    others: list[Peer] = []
    first = host(1, replace(OUTLIVED, keep_peers=1), during=leaves)
    others += [Peer(2, run=first.ticket)]
    first.result()
    (other,) = others
    other.result()
    assert other.steps[-1] == STEPS
    assert len(other.steps) >= STEPS - 2
    assert any("the host has left: this peer hosts the run now" in text for text in other.news)


def test_the_first_host_lets_the_same_ones_watch_if_it_hosts_the_run_again() -> None:
    watcher = SecretKey(bytes([5]) * 32).public

    async def told() -> frozenset[bytes] | None:
        link = await source.open()
        try:
            return None if link.keeper is None else link.keeper.watchers
        finally:
            await link.aclose()

    loop = LoopThread("test-network")
    try:
        options = NodeOptions(key=KEYS[0], relays="none", bind_addr="127.0.0.1:0")
        source = HostedRun(replace(OUTLIVED, observers=[watcher]), "watched", options, loop=loop)
        assert loop.run(told(), PATIENCE_SECONDS) == frozenset([watcher])
    finally:
        loop.stop()
