"""A host is gone without a word, and the others train on to the end: sessions over real endpoints on loopback."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distro_optim.cli import main
from distro_optim.comm.signing import SecretKey
from distro_optim.coordinator.server.acting import ServiceActs
from distro_optim.coordinator.ticket import RunTicket
from distro_optim.errors import RunError
from distro_optim.strategy.network.runtime import Runtime
from distro_optim.strategy.rounds.trust.succeeding import Succession

from .test_live_sessions import CONFIG, Peer, host

pytestmark = [pytest.mark.waiting, pytest.mark.slow(12)]

PATIENCE_SECONDS = 60.0
AFTER = 4.0
UNHURRIED_SECONDS = 0.2
"""Of a training in runs without an end: while somebody is waited for, others need not train as fast as they can."""
LOOPBACK_ONLY: dict[str, Any] = {"relay": "none", "bind_addr": "127.0.0.1:0"}
STEPS = 20
OUTLIVED = replace(CONFIG, succession_after=AFTER, total_steps=STEPS)


class Killed(BaseException):
    """Ends the script of a peer that was killed."""


def runtime_of(peer: Peer) -> Runtime:
    access = peer.session._access
    assert isinstance(access, Runtime)
    return access


def succession_of(peer: Peer) -> Succession:
    link = runtime_of(peer)._link
    assert link is not None
    assert link.keeper is not None
    return link.keeper.core


def kill(peer: Peer) -> None:
    """As kill -9 does it: nothing is said to anybody. Ends the script that calls it."""
    runtime = runtime_of(peer)
    assert runtime._link is not None
    keeper = runtime._link.keeper
    assert keeper is not None
    acts = runtime.acts
    if isinstance(acts, ServiceActs):  # a killed process does not tell the others that it loses them one by one
        setattr(acts._service, "disconnect", lambda *_: None)  # noqa: B010
    runtime._loop.submit(keeper._node.aclose()).result(PATIENCE_SECONDS)
    raise Killed


def until_all_vote(peers: Sequence[Peer]) -> None:
    """Waits in the midst of a round until all of these vote for hosts, and no others."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    keys = {runtime_of(peer).secret_key.public for peer in peers}
    while any(set(succession_of(peer).voters) != keys for peer in peers):
        assert time.monotonic() < deadline, "the peers have not agreed on who votes"
        time.sleep(0.05)


def unhurried(peer: Peer, step: int) -> None:
    time.sleep(UNHURRIED_SECONDS)


def end(peers: Sequence[Peer]) -> None:
    """They leave in the midst of whatever they do: where too few remain no round begins in which they could."""
    for peer in peers:
        peer.session.close()
    for peer in peers:
        peer.join()


def equal(peers: list[Peer]) -> bool:
    weights = [peer.result() for peer in peers]
    return all(torch.equal(a, b) for mine in weights[1:] for a, b in zip(weights[0], mine, strict=True))


def test_the_others_train_to_the_end_with_equal_weights() -> None:
    def dies(peer: Peer, step: int) -> None:
        if step >= 8:  # on a busy machine it may miss a round
            until_all_vote([first, *others])
            kill(peer)

    others: list[Peer] = []
    first = host(1, replace(OUTLIVED, min_peers=4, keep_peers=2), during=dies)
    others += [Peer(seed, run=first.ticket) for seed in (2, 3, 4)]
    first.join()
    assert isinstance(first.error, Killed)
    assert equal(others)
    for peer in others:
        assert peer.steps[-1] == STEPS
        assert len(set(peer.steps)) == len(peer.steps)
        assert len(peer.steps) >= STEPS - 2
        assert not [text for text in peer.news if "loading them again" in text]
    assert sum("this peer hosts the run now" in text for peer in others for text in peer.news) == 1
    assert sum("hosts the run now, in term" in text for peer in others for text in peer.news) == 3


def test_hosts_are_killed_twice_and_the_rest_end_with_equal_weights() -> None:
    killed: list[Peer] = []
    everybody: list[Peer] = []

    def dies(peer: Peer, step: int) -> None:
        if step >= 6 + 6 * len(killed) and len(killed) < 2 and succession_of(peer).hosts:
            until_all_vote([other for other in everybody if other not in killed])
            killed.append(peer)
            kill(peer)

    first = host(1, replace(OUTLIVED, min_peers=5, keep_peers=2), during=dies)
    everybody += [first, *(Peer(seed, run=first.ticket, during=dies) for seed in (2, 3, 4, 5))]
    for peer in everybody:
        peer.join()
    assert len(killed) == 2
    assert killed[0] is first
    rest = [peer for peer in everybody if peer not in killed]
    assert equal(rest)
    for peer in rest:
        assert peer.steps[-1] == STEPS
        assert len(peer.steps) >= STEPS - 4
    assert len({peer.session.view().weights_root for peer in rest}) == 1


def test_a_host_may_forbid_it() -> None:
    config = replace(CONFIG, global_batch_size=8, succession=False)
    access = Runtime.connect(config=config, **LOOPBACK_ONLY)
    access.look()
    assert access._link is not None
    assert access._link.keeper is None
    assert access.acts is not None
    access.close()


def test_without_a_majority_a_peer_waits_and_says_so() -> None:
    def dies(peer: Peer, step: int) -> None:
        if step >= 6:
            if peer is first:
                until_all_vote([first, *others])
                agreed.set()
            assert agreed.wait(PATIENCE_SECONDS)
            kill(peer)

    def waits(peer: Peer, step: int) -> None:
        if step >= 6:
            assert agreed.wait(PATIENCE_SECONDS)

    agreed = threading.Event()
    others: list[Peer] = []
    first = host(1, replace(OUTLIVED, min_peers=3, keep_peers=2), during=dies)
    others += [Peer(2, run=first.ticket, during=dies), Peer(3, run=first.ticket, during=waits)]
    last = others[1]
    for peer in (first, others[0]):
        peer.join()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not any("this peer waits for them" in text for text in last.news):
        assert time.monotonic() < deadline, last.news
        last.join(0.05)
    assert last.steps[-1] <= 8
    assert last.is_alive()
    assert not succession_of(last).hosts
    last.session.close()
    last.join()
    assert isinstance(last.error, RunError)


def test_a_host_that_has_slept_comes_back_as_a_peer() -> None:
    def sleeps(peer: Peer, step: int) -> None:
        if step == 6:
            until_all_vote([first, *others])
            runtime_of(peer)._loop.start().call_soon_threadsafe(until_others_have_a_host)
        time.sleep(0.05)

    def until_others_have_a_host() -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not any(succession_of(peer).hosts for peer in others):
            assert time.monotonic() < deadline, "nobody was elected"
            time.sleep(0.05)
        slept.set()

    slept = threading.Event()
    others: list[Peer] = []
    first = host(1, replace(OUTLIVED, min_peers=3, total_steps=40), during=sleeps)
    others += [Peer(seed, run=first.ticket, during=lambda peer, step: time.sleep(0.05)) for seed in (2, 3)]
    for peer in (first, *others):
        peer.join()
    assert slept.is_set()
    assert first.error is None
    assert any("hosts it now" in text or "hosts the run now" in text for text in first.news)
    assert equal([first, *others])


def test_a_host_that_starts_again_too_late_joins_as_a_peer(tmp_path: Path) -> None:
    def dies(peer: Peer, step: int) -> None:
        if step >= 6 and (tmp_path / "run.ticket").exists():
            ticket = RunTicket.parse((tmp_path / "run.ticket").read_text())
            if len(ticket.peers) == 2:
                until_all_vote([first, *others])  # just before: who votes changes with each epoch
                kill(peer)
        unhurried(peer, step)

    others: list[Peer] = []
    endless = replace(OUTLIVED, min_peers=3, keep_peers=2, total_steps=10_000, joiner_wait_time=1)
    first = host(1, endless, during=dies, checkpoint_dir=tmp_path)
    others += [Peer(seed, run=first.ticket, during=unhurried) for seed in (2, 3)]
    first.join()
    assert isinstance(first.error, Killed)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not any(succession_of(peer).hosts for peer in others):
        assert time.monotonic() < deadline, "nobody was elected"
        time.sleep(0.05)
    again = Peer(4, config=endless, checkpoint_dir=tmp_path, resume=True)
    while not again.steps and again.is_alive():
        again.join(0.05)
    assert again.error is None
    assert not again.session.is_host
    assert any("has gone on without this host" in text for text in again.news)
    again.enough.set()
    again.join()
    end(others)
    assert again.error is None


def test_an_old_ticket_that_names_peers_leads_a_joiner_to_the_new_host(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def dies(peer: Peer, step: int) -> None:
        ticket = runtime_of(peer).ticket
        if step >= 6 and ticket is not None and len(RunTicket.parse(ticket).peers) == 2:
            until_all_vote([first, *others])
            old.append((step, ticket))
            kill(peer)
        unhurried(peer, step)

    def waits(peer: Peer, step: int) -> None:
        unhurried(peer, step)
        if old and step >= old[0][0] + 6 and peer is others[0]:
            newcomer_may_come.set()

    old: list[tuple[int, str]] = []
    newcomer_may_come = threading.Event()
    others: list[Peer] = []
    endless = replace(OUTLIVED, min_peers=3, keep_peers=2, total_steps=10_000, joiner_wait_time=1)
    first = host(1, endless, during=dies)
    others += [Peer(seed, run=first.ticket, during=waits, checkpoint_dir=tmp_path / str(seed)) for seed in (2, 3)]
    assert newcomer_may_come.wait(PATIENCE_SECONDS)
    ((_, ticket),) = old
    assert main(["ticket", ticket, "--iroh-relay", "none"]) == 0
    printed = RunTicket.parse(capsys.readouterr().out)
    assert printed.endpoint is not None
    assert printed.endpoint.id in {runtime_of(peer).secret_key.public for peer in others}
    assert RunTicket.parse((tmp_path / "2" / "run.ticket").read_text()).endpoint == printed.endpoint
    newcomer = Peer(4, run=ticket)
    while not newcomer.steps and newcomer.is_alive():
        newcomer.join(0.05)
    assert newcomer.error is None
    newcomer.enough.set()
    newcomer.join()
    end(others)
    assert newcomer.steps


def waits_at(peer: Peer, other: Peer) -> bool:
    """Whether ``other`` waits for an epoch at the coordinator of ``peer``."""
    link = runtime_of(peer)._link
    assert link is not None
    opened = link.here()
    return opened is not None and opened.host.is_pending(runtime_of(other).secret_key.public)


def test_one_that_waits_for_the_next_epoch_waits_at_the_new_host() -> None:
    def dies(peer: Peer, step: int) -> None:
        unhurried(peer, step)
        if newcomer_waits.is_set():
            until_all_vote([first, *others])
            kill(peer)

    newcomer_waits = threading.Event()
    others: list[Peer] = []
    endless = replace(OUTLIVED, min_peers=3, keep_peers=2, total_steps=10_000, joiner_wait_time=1000, epoch_time=2000)
    first = host(1, endless, during=dies)
    others += [Peer(seed, run=first.ticket, during=unhurried) for seed in (2, 3)]
    while not all(peer.steps for peer in others):
        others[0].join(0.05)
    newcomer = Peer(4, run=first.ticket)
    assert newcomer.started_run.wait(PATIENCE_SECONDS)
    newcomer_waits.set()
    first.join()
    deadline = time.monotonic() + 2 * PATIENCE_SECONDS
    while not any(waits_at(peer, newcomer) for peer in others):
        assert time.monotonic() < deadline, newcomer.news
        time.sleep(0.05)
    assert newcomer.error is None
    end([newcomer, *others])


def test_the_next_host_lets_those_watch_whom_the_first_one_did() -> None:
    key = SecretKey(bytes([5]) * 32)

    def dies(peer: Peer, step: int) -> None:
        if step >= 8:
            until_all_vote([first, *others])
            kill(peer)

    others: list[Peer] = []
    endless = replace(OUTLIVED, total_steps=1_000_000, min_peers=4, keep_peers=2, observers=[key.public])
    first = host(1, endless, during=dies)
    others += [Peer(seed, run=first.ticket, during=unhurried) for seed in (2, 3, 4)]
    first.join()
    deadline = time.monotonic() + PATIENCE_SECONDS
    names_itself: list[str] = []
    while not names_itself:
        assert time.monotonic() < deadline, "nobody hosts the run"
        for runtime in map(runtime_of, others):
            ticket = runtime.ticket
            place = None if ticket is None or runtime.acts is None else RunTicket.parse(ticket).endpoint
            if ticket is not None and place is not None and place.id == runtime.secret_key.public:
                names_itself.append(ticket)
        time.sleep(0.05)
    watching = Runtime.connect(names_itself[0], watch=True, secret_key=key, **LOOPBACK_ONLY)
    watching.look()
    assert watching.state is not None
    assert watching.state.run_id == watching.run_id
    watching.close()
    end(others)
