"""Real endpoints, no relay, no public lookup: a ticket is enough to train together."""

from __future__ import annotations

from pathlib import Path

import pytest

from distro_optim.comm.addresses import SocketAddr
from distro_optim.comm.iroh import local_discovery
from distro_optim.comm.tickets import EndpointTicket
from distro_optim.coordinator.ticket import RunTicket
from distro_optim.strategy.rounds import actions as act
from runtime.live import config, live_run, served_run
from runtime.training import assert_equal_weights, changed_weights

pytestmark = [pytest.mark.waiting, pytest.mark.slow]


def test_three_peers_train_together_with_nothing_but_the_hosts_ticket() -> None:
    with live_run() as run:
        host = run.host(config(min_peers=3, total_steps=30))
        assert host.port.ticket is not None
        assert host.port.is_host
        peers = [host, run.join(), run.join()]
        for peer in peers:
            peer.join()
            assert peer.error is None, peer.error
        assert len(assert_equal_weights(*peers)) >= 28
        assert changed_weights(host)
        assert all(len(action.updates) == 3 for action in host.of(act.ApplyResults)[1:])
        assert {view.num_peers for view in (peer.port.view() for peer in peers)} == {3}


def test_a_friend_who_comes_later_gets_the_weights_and_goes_on_with_the_host() -> None:
    with live_run() as run:
        host = run.host(config(total_steps=10_000, joiner_wait_time=1), step_seconds=0.05)
        host.until(lambda peer: peer.of(act.ApplyResults))
        friend = run.join(step_seconds=0.05)
        friend.until(lambda peer: len(peer.of(act.ApplyResults)) > 5)
        friend.until(lambda peer: any(len(step.updates) == 2 for step in peer.of(act.ApplyResults)))
        (start, *_) = friend.of(act.Initialize)
        assert start.providers == (host.port.identity.p2p_identity,)
        assert start.step > 1
        host.until(lambda peer: friend.hashes.keys() & peer.hashes.keys())
        assert assert_equal_weights(host, friend)


def test_a_friend_joins_over_tcp_and_meets_the_others() -> None:
    with live_run() as run:
        host = run.host(config(min_peers=2, total_steps=15, run_id="by-tcp"), tcp="127.0.0.1:0")
        assert host.port.ticket is not None
        ticket = RunTicket.parse(host.port.ticket)
        assert ticket.endpoint is not None
        (address,) = ticket.tcp
        # Without rendezvous or public lookup the address of one peer is all that it takes.
        peers = [str(EndpointTicket(ticket.endpoint))]
        friend = run.join(f"{address}/by-tcp", peers=peers)
        for peer in (host, friend):
            peer.join()
            assert peer.error is None, peer.error
        assert assert_equal_weights(host, friend)
        assert len(friend.of(act.ApplyResults)[-1].updates) == 2


def test_peers_on_one_machine_find_each_other_by_the_files_of_psyche(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_discovery, "FOLDER", tmp_path / "iroh_local_discovery")
    with live_run() as run:
        host = run.host(config(min_peers=2, total_steps=15, run_id="local"), tcp="127.0.0.1:0", discovery="local")
        assert host.port.ticket is not None
        (address,) = RunTicket.parse(host.port.ticket).tcp
        # As in a run of Psyche's: the coordinator's address, and the keys of the others, are all that is known.
        friend = run.join(f"{address}/local", discovery="local")
        for peer in (host, friend):
            peer.join()
            assert peer.error is None, peer.error
        assert assert_equal_weights(host, friend)
        assert len(friend.of(act.ApplyResults)[-1].updates) == 2
        names = {file.name for file in local_discovery.FOLDER.iterdir()}
        assert names == {peer.port.identity.p2p_identity.hex() for peer in (host, friend)}
    assert list(local_discovery.FOLDER.iterdir()) == []


def test_a_hosts_ticket_has_the_address_that_it_is_told() -> None:
    with live_run() as run:
        host = run.host(config(), external_addr="203.0.113.7:4433")
        assert host.port.ticket is not None
        endpoint = RunTicket.parse(host.port.ticket).endpoint
        assert endpoint is not None
        assert SocketAddr.parse("203.0.113.7:4433") in endpoint.direct


@pytest.mark.parametrize("tcp_only", [False, True])
def test_peers_of_a_run_that_only_a_server_hosts_find_each_other_without_internet(*, tcp_only: bool) -> None:
    settings = config(min_peers=2, total_steps=15)
    with live_run() as run, served_run(settings, "served", tcp_only=tcp_only) as ticket:
        peers = [run.join(ticket), run.join(ticket)]
        for peer in peers:
            peer.join()
            assert peer.error is None, peer.error
        assert assert_equal_weights(*peers)
        assert len(peers[0].of(act.ApplyResults)[-1].updates) == 2
