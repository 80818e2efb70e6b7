"""A run over real endpoints that somebody watches who is not in it, because its host lets it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from typing_extensions import override

from distro_optim import DisTrO
from distro_optim.comm.signing import SecretKey
from distro_optim.errors import ConfigurationError, JoinRefusedError
from distro_optim.optim.rules import PUBLISHED
from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.network import driver
from distro_optim.strategy.network.runtime import Runtime
from distro_optim.strategy.session import SwarmSession
from distro_optim.verify.recompute import Evidence

from .test_live_audits import LOOPBACK, SAMPLES, Peer, final_loss, loss_of, new_net

pytestmark = [pytest.mark.waiting, pytest.mark.slow, pytest.mark.timeout(900)]

STEPS, BATCH = 24, 20
KEY = SecretKey(bytes([5]) * 32)
CONNECTION: dict[str, Any] = {name: LOOPBACK[name] for name in ("relay", "bind_addr")}


class Watcher(threading.Thread):
    """The script of the others, which only looks."""

    def __init__(self, run: str) -> None:
        super().__init__(daemon=True)
        self.net = new_net()
        optimizer = DisTrO(self.net.parameters(), lr=4e-3, compression_topk=32, compression_chunk=16, **PUBLISHED)
        port = Runtime.connect(run, secret_key=KEY, watch=True, **CONNECTION)
        port.audit_alone = 1.0
        port.on_audited = self.on_audited
        self.audited: dict[int, dict[bytes, Evidence]] = {}
        self.news: list[str] = []
        self.error: BaseException | None = None
        self.session = SwarmSession(
            self.net,
            optimizer,
            port=port,
            dataset_size=SAMPLES,
            audit_loss=lambda indices: loss_of(self.net, indices),
            on_event=self.news.append,
        )
        self.start()

    def on_audited(self, step: int, peer: bytes, found: Evidence) -> None:
        self.audited.setdefault(step, {})[peer] = found

    @override
    def run(self) -> None:
        try:
            with self.session as session:
                for round_ in session.rounds():
                    raise AssertionError(f"it was given {round_} to train")
        except BaseException as error:
            self.error = error


def run_of_three(*, watched: bool, rider: bool = True) -> tuple[list[Peer], Watcher | None]:
    config = RunConfig(
        total_steps=STEPS,
        global_batch_size=BATCH,
        min_peers=2,
        peers_to_start=4,
        epoch_time=280,
        warmup_time=60,
        max_round_train_time=60,
        joiner_wait_time=None,
        observers=[KEY.public.hex()],
        run_id="watched",
    )
    host = Peer(config=config)
    host.started_run.wait()
    watcher = Watcher(str(host.session.ticket)) if watched else None
    peers = [host, *(Peer(run=host.session.ticket, trains=number < 2 or not rider) for number in range(3))]
    for peer in peers:
        peer.join()
        assert peer.error is None, peer.error
    if watcher is not None:
        watcher.join(60)
    return peers, watcher


def test_it_sees_every_round_names_the_free_rider_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # A machine that is busy for a second would leave it behind the run, and one that is behind leaves audits out.
    monkeypatch.setattr(driver, "MAX_BEHIND", 1 << 20)
    peers, watcher = run_of_three(watched=True)
    unwatched, _ = run_of_three(watched=False)
    assert watcher is not None
    assert watcher.error is None
    assert not watcher.is_alive()
    rider = peers[-1]
    named = [text for text in watcher.news if "does not train what it is given" in text]
    assert len(named) == 1
    assert rider.key.hex()[:8] in named[0]
    # The results of the last two rounds are never applied where rounds end, and so never audited.
    for step in range(1, STEPS - 1):
        assert watcher.audited[step].keys() == {peer.key for peer in peers}
    assert all(peer.steps == list(range(1, STEPS + 1)) for peer in peers)
    # Batches are dealt out by chance, so that no two runs are alike.
    assert final_loss(peers[0]) == pytest.approx(final_loss(unwatched[0]), rel=0.1)
    ours, theirs = watcher.net.state_dict(), peers[0].net.state_dict()
    assert all(bool((ours[name] == theirs[name]).all()) for name in ours)
    view = peers[0].session.view()
    assert KEY.public not in {peer.id for peer in view.peers if peer.is_neighbor}


def test_who_is_not_permitted_is_told_what_the_host_types() -> None:
    host = Peer(config=RunConfig(total_steps=50, global_batch_size=4, min_peers=2, run_id="alone"))
    host.started_run.wait()
    port = Runtime.connect(str(host.session.ticket), secret_key=KEY, watch=True, **CONNECTION)
    with pytest.raises(JoinRefusedError) as refused:
        port.look()
    assert KEY.public.hex() in str(refused.value)
    assert f'RunConfig(observers=["{KEY.public.hex()}"])' in str(refused.value)
    host.session.close()
    host.join(20)


def test_who_may_watch_may_not_take_part() -> None:
    config = RunConfig(total_steps=50, global_batch_size=4, min_peers=2, observers=[KEY.public], run_id="alone")
    host = Peer(config=config)
    host.started_run.wait()
    peer = Peer(run=host.session.ticket, secret_key=KEY)
    peer.join(60)
    assert isinstance(peer.error, JoinRefusedError)
    assert "may watch this run, and say nothing" in str(peer.error)
    host.session.close()
    host.join(20)


@pytest.mark.parametrize(
    ("observers", "words"),
    [
        (["ab"], "no public key"),
        ([bytes([number]) * 32 for number in range(9)], "at most 8"),
        ("text", "no public key"),
    ],
)
def test_a_list_that_cannot_be_is_refused(observers: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        RunConfig(observers=observers)
