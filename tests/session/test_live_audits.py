"""A run over real endpoints with audits: four honest peers and one that sends its momentum without training."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typing_extensions import override

from distro_optim import DisTrO
from distro_optim.coordinator.server.ledger_file import read_ledger
from distro_optim.errors import DistroError
from distro_optim.optim.rules import PUBLISHED
from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.session import SwarmSession

pytestmark = [pytest.mark.waiting, pytest.mark.slow(40), pytest.mark.timeout(900)]

SAMPLES = 400
HONEST = 4
STEPS = 18
BATCH = 20
LOOPBACK: dict[str, Any] = {"relay": "none", "bind_addr": "127.0.0.1:0", "dataset_size": SAMPLES}
TRUTH = torch.randn(24, 24, generator=torch.Generator().manual_seed(9)) / 5
INPUTS = torch.randn(SAMPLES, 24, generator=torch.Generator().manual_seed(5))
TARGETS = torch.tanh(INPUTS @ TRUTH)


def new_net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 24))


def loss_of(net: nn.Module, indices: list[int]) -> Tensor:
    return nn.functional.mse_loss(net(INPUTS[indices]), TARGETS[indices])


class Peer(threading.Thread):
    """Trains, or rides for free: from its fourth round on it sends what its momentum has."""

    def __init__(self, *, trains: bool = True, **settings: Any) -> None:
        super().__init__(daemon=True)
        self.net, self.trains = new_net(), trains
        optimizer = DisTrO(self.net.parameters(), lr=4e-3, compression_topk=32, compression_chunk=16, **PUBLISHED)
        self.news: list[str] = []
        self.session = SwarmSession(
            self.net,
            optimizer,
            audit_loss=lambda indices: loss_of(self.net, indices),
            on_event=self.news.append,
            **{**LOOPBACK, **settings},
        )
        self.steps: list[int] = []
        self.error: BaseException | None = None
        self.started_run = threading.Event()
        self.key = b""
        self.start()

    @override
    def run(self) -> None:
        try:
            with self.session as session:
                self.key = session._access.facts.identity.p2p_identity  # type: ignore[union-attr]
                self.started_run.set()
                for round_ in session.rounds():
                    if self.trains or len(self.steps) < 3:
                        loss_of(self.net, round_.indices).backward()
                    else:
                        for parameter in self.net.parameters():
                            parameter.grad = torch.zeros_like(parameter)
                    if round_.finish():
                        self.steps.append(round_.step)
        except BaseException as error:
            self.error = error
        finally:
            self.started_run.set()


def final_loss(peer: Peer) -> float:
    with torch.no_grad():
        return float(loss_of(peer.net, list(range(SAMPLES))))


def run_of(folder: Path, *, with_rider: bool) -> tuple[list[Peer], Peer | None]:
    count = HONEST + with_rider
    config = RunConfig(
        total_steps=STEPS,
        global_batch_size=BATCH,
        min_peers=2,
        peers_to_start=count,
        epoch_time=280,
        warmup_time=60,
        max_round_train_time=60,
        joiner_wait_time=None,
        audit_fraction=1.0,
        save_dir=folder,
        run_id="audited",
    )
    host = Peer(config=config)
    host.started_run.wait()
    others = [Peer(run=host.session.ticket) for _ in range(HONEST - 1)]
    rider = Peer(trains=False, run=host.session.ticket) if with_rider else None
    for peer in [host, *others]:
        peer.join()
        assert peer.error is None, peer.error
    if rider is not None:
        rider.session.close()
        rider.join()
    return [host, *others], rider


def test_a_free_rider_is_named_and_dropped_and_the_loss_ends_as_without_it(tmp_path: Path) -> None:
    peers, rider = run_of(tmp_path / "with", with_rider=True)
    assert rider is not None
    host = peers[0]
    named = [text for text in host.news if "does not train what it is given: it is taken out of the run" in text]
    assert len(named) == 1
    assert rider.key.hex()[:8] in named[0]
    assert len(rider.steps) < STEPS - 2, "it was dropped before the end"
    assert isinstance(rider.error, DistroError | None)
    for peer in peers:
        assert peer.steps == list(range(1, STEPS + 1)), "nobody else lost a round"
        told = [text for text in peer.news if "does not train what it is given" in text]
        assert all(rider.key.hex()[:8] in text for text in told)
    view = host.session.view()
    assert view.audits[rider.key].failed == 1
    assert all(view.audits[peer.key].passed and not view.audits[peer.key].failed for peer in peers)

    (ledger,) = (tmp_path / "with").rglob("*.ledger.jsonl")
    totals = read_ledger(ledger)
    theirs = totals.clients[rider.key]
    assert theirs.audits_failed == 1
    assert (theirs.equal, theirs.work) == (0, 0)
    assert theirs.samples > 0
    for peer in peers:
        assert totals.clients[peer.key].work > 0
        assert totals.clients[peer.key].audits_passed > 0
        assert (totals.clients[peer.key].bytes_served > 1000) is (peer is not host), "the host served itself nothing"
    assert json.loads(ledger.read_bytes().splitlines()[0])["entry"]["run"] == "audited"

    alone, _ = run_of(tmp_path / "without", with_rider=False)
    assert not any("does not train" in text for peer in alone for text in peer.news)
    begun = float(loss_of(new_net(), list(range(SAMPLES))).detach())
    assert final_loss(host) < 0.8 * begun
    assert final_loss(host) == pytest.approx(final_loss(alone[0]), rel=0.2)
