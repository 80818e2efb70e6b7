"""The host of a running run turns peers away, and says who may come."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

from distro_optim.comm.iroh.home import NodeHome
from distro_optim.comm.loop import LoopThread
from distro_optim.comm.signing import SecretKey
from distro_optim.coordinator.server.acting import ServiceActs
from distro_optim.coordinator.server.host import RunHost
from distro_optim.coordinator.server.service import CoordinatorService
from distro_optim.coordinator.types import NodeIdentity
from distro_optim.errors import ConfigurationError
from distro_optim.strategy.session import SwarmSession
from runs import waiting_run
from runtime.live import config, live_run

pytestmark = pytest.mark.waiting

OWN, FRIEND, OTHER = (SecretKey(bytes([number]) * 32).public for number in (1, 2, 3))


class Service(CoordinatorService):
    """Notes what it was asked to do, in the network's thread."""

    def __init__(self) -> None:
        super().__init__(RunHost(waiting_run("run")), draw=bytes, unix_offset=0.0)
        self.asked: list[tuple[Any, ...]] = []
        self.host._pending = dict.fromkeys(map(NodeIdentity.from_single_key, (OWN, FRIEND)), 0)

    @override
    def kick(self, public: bytes, now: float, reason: str = "") -> None:
        self.asked.append(("kick", public))

    @override
    def ban(self, public: bytes, now: float, reason: str = "") -> None:
        self.asked.append(("ban", public))

    @override
    def let_in(self, allowed: Collection[bytes] | None, now: float) -> None:
        self.asked.append(("let in", allowed))


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def acts(service: Service) -> Iterator[ServiceActs]:
    loop = LoopThread("host")
    loop.start()
    yield ServiceActs(service, time.monotonic, loop.submit, own=OWN)
    loop.stop()


def test_a_peer_is_named_by_its_key_or_by_the_beginning_that_tables_show(acts: ServiceActs, service: Service) -> None:
    acts.kick(FRIEND)
    acts.kick(FRIEND.hex()[:8].upper())
    acts.ban(OTHER.hex())  # it is not here yet
    assert service.asked == [("kick", FRIEND), ("kick", FRIEND), ("ban", OTHER)]


def test_a_list_of_guests_always_has_ourselves(acts: ServiceActs, service: Service) -> None:
    acts.allow([FRIEND])
    acts.allow([])
    acts.allow(None)
    assert service.asked == [("let in", {OWN, FRIEND}), ("let in", {OWN}), ("let in", None)]


@pytest.mark.parametrize("peer", [FRIEND.hex()[:7], "", "x" * 64, OTHER.hex(), b"short", OWN, OWN.hex()[:8]])
def test_what_is_not_the_key_of_a_peer_that_is_here_is_refused(
    acts: ServiceActs, service: Service, peer: bytes | str
) -> None:
    with pytest.raises(ConfigurationError):
        acts.kick(peer)
    assert service.asked == []


def test_a_ban_outlives_the_host_and_can_be_taken_back(tmp_path: Path) -> None:
    loop = LoopThread("host")
    loop.start()
    home = NodeHome(tmp_path)

    def hosted() -> tuple[RunHost, ServiceActs]:
        host = RunHost(waiting_run("run"), banned=home.banned())
        service = CoordinatorService(host, draw=bytes, unix_offset=0.0)
        return host, ServiceActs(service, time.monotonic, loop.submit, keep=home.keep_banned)

    try:
        _, acts = hosted()
        assert acts.ban(FRIEND.hex()) == f"{FRIEND.hex()[:8]} was taken out for good"
        assert acts.ban(OTHER) == f"{OTHER.hex()[:8]} was taken out for good"
        again, acts = hosted()
        assert (again.is_allowed(FRIEND), again.is_allowed(OTHER), again.is_allowed(OWN)) == (False, False, True)
        assert acts.unban(FRIEND.hex()[:8]) == f"{FRIEND.hex()[:8]} may come again"
        once_more, _ = hosted()
        assert (once_more.is_allowed(FRIEND), once_more.is_allowed(OTHER)) == (True, False)
    finally:
        loop.stop()


def test_a_ban_that_cannot_be_kept_says_so(service: Service) -> None:
    loop = LoopThread("host")
    loop.start()
    try:
        for keep, words in ((lambda keys: False, "could not be written down"), (None, "as long as this host runs")):
            acts = ServiceActs(service, time.monotonic, loop.submit, keep=keep)
            assert words in acts.ban(FRIEND)
    finally:
        loop.stop()


def test_only_a_host_decides() -> None:
    from torch import nn

    from distro_optim import DisTrO

    model = nn.Linear(2, 2)
    session = SwarmSession(model, DisTrO(model.parameters(), lr=0.1), run="127.0.0.1:9/run")
    for act in (session.kick, session.ban, session.unban):
        with pytest.raises(ConfigurationError, match="for the host"):
            act(FRIEND)
    with pytest.raises(ConfigurationError, match="for the host"):
        session.allow(None)


@pytest.mark.slow
def test_a_peer_that_the_host_bans_is_out_and_the_host_trains_on() -> None:
    with live_run() as run:
        host = run.host(config(total_steps=2000, peers_to_start=2), step_seconds=0.005)
        guest = run.join(step_seconds=0.005)
        host.until(lambda peer: peer.port.view().num_peers == 2 and peer.port.view().step > 5)
        acts = host.port.acts
        assert acts is not None
        acts.ban(guest.port.identity.signer.hex()[:8])
        host.until(lambda peer: peer.port.view().num_peers == 1)
        step = host.port.view().step
        host.until(lambda peer: peer.port.view().step > step + 5)
