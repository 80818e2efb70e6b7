"""A run with real threads, over a swarm in memory: three honest peers, and one that does not look ahead."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typing_extensions import override

from distro_optim import DisTrO
from distro_optim.errors import DistroError
from distro_optim.optim.rules import PUBLISHED
from distro_optim.strategy.network.link import RunLink
from distro_optim.strategy.network.runtime import Runtime
from distro_optim.strategy.session import SwarmSession
from rounds.simulator import secret
from runtime.memory import MemoryRun, MemorySource

pytestmark = [pytest.mark.waiting, pytest.mark.slow(7), pytest.mark.timeout(120)]

SAMPLES, BATCH, STEPS, CHEAT = 400, 16, 24, 4
LR = 2e-2
TRUTH = torch.randn(24, 24, generator=torch.Generator().manual_seed(9)) / 5
INPUTS = torch.randn(SAMPLES, 24, generator=torch.Generator().manual_seed(5))
TARGETS = torch.tanh(INPUTS @ TRUTH)


def loss_of(net: nn.Module, indices: list[int]) -> Tensor:
    return nn.functional.mse_loss(net(INPUTS[indices]), TARGETS[indices])


class AuditedRun(MemoryRun):
    """Its first peer hosts it, as far as audits are concerned."""

    def judge(self, peer: bytes, passed: bool) -> bool:
        if not passed:
            host = self.coordinator.host
            host.ban(peer)
            self.coordinator._publish(
                host.kick(next(c.id for c in host.state.epoch_state.clients if c.id.p2p_identity == peer))
            )
        return not passed


class HostSource(MemorySource):
    @override
    async def open(self) -> RunLink:
        link = await super().open()
        run = self.run
        assert isinstance(run, AuditedRun)
        reports: Mapping[Any, Any] = {}
        here: Any = SimpleNamespace(
            on_audit=run.judge, reports=reports, waiting=0, points=None, host=SimpleNamespace(missing=0)
        )
        return RunLink(**{**vars(link), "here": lambda: here})


class Peer(threading.Thread):
    def __init__(self, run: AuditedRun, number: int, cheats: Callable[[DisTrO], None] | None = None) -> None:
        super().__init__(daemon=True)
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 24))
        self.optimizer = DisTrO(self.net.parameters(), lr=LR, compression_topk=32, compression_chunk=16, **PUBLISHED)
        self.key = secret(number).public
        self.news: list[str] = []
        self.steps: list[int] = []
        self.cheats = cheats
        self.error: BaseException | None = None
        self.stopping = False
        self.memory = run
        source = HostSource(run, secret(number)) if number == 1 else MemorySource(run, secret(number))
        self.session = SwarmSession(
            self.net,
            self.optimizer,
            port=Runtime(source, loop=run.loop),
            dataset_size=SAMPLES,
            audit_loss=lambda indices: loss_of(self.net, indices),
            on_event=self.news.append,
        )
        self.start()

    @override
    def run(self) -> None:
        try:
            with self.session as session:
                for round_ in session.rounds():
                    if self.cheats is not None and len(self.steps) == 2:
                        self.cheats(self.optimizer)
                    loss_of(self.net, round_.indices).backward()
                    self.memory.loop.run(self.hears_of(round_.step - 1), 60)
                    if round_.finish():
                        self.steps.append(round_.step)
                    if self.stopping:
                        return
        except BaseException as error:
            self.error = error

    async def hears_of(self, step: int) -> None:
        """The network keeps up with the rounds, however busy the machine: nobody ends a round before the momenta of the
        one before have come."""
        rounds = self.session._access._driver.rounds  # type: ignore[union-attr]
        first = 1
        while step >= first:
            clients = {client.id.p2p_identity for client in self.memory.state.epoch_state.clients}
            known = {peer for of, peer in rounds._audits.momenta._momenta if of == step}
            if self.key not in clients or clients <= known:
                return
            await asyncio.sleep(0.005)

    @property
    def named(self) -> list[str]:
        return [text for text in self.news if "does not train what it is given" in text]


def does_not_look_ahead(optimizer: DisTrO) -> None:
    ahead = optimizer.lookahead
    optimizer.lookahead = lambda lr=None: ahead(0.0)  # type: ignore[method-assign]


def test_a_cheat_that_only_its_momentum_gives_away_is_named_and_dropped_and_nobody_else_is() -> None:
    config: dict[str, Any] = {
        "min_peers": 4,
        "keep_peers": 3,
        "total_steps": STEPS,
        "global_batch_size": BATCH,
        "audit_fraction": 1.0,
        "max_round_train_time": 60,
        "epoch_time": 250,
    }
    with AuditedRun(**config) as run:
        peers = [Peer(run, number, does_not_look_ahead if number == CHEAT else None) for number in range(1, 5)]
        *honest, cheat = peers
        for peer in honest:
            peer.join(60)
            assert peer.error is None, peer.error
        clients = [client.id.p2p_identity for client in run.state.epoch_state.clients]
        cheat.session.close()
        cheat.join(20)
    assert isinstance(cheat.error, DistroError | None)
    told = honest[0].named
    assert len(told) == 1
    assert cheat.key.hex()[:8] in told[0]
    assert "it is taken out of the run" in told[0]
    assert "momentum is not what its batch makes of the one before" in told[0]
    assert cheat.key not in clients
    assert len(cheat.steps) < STEPS
    for peer in honest:
        assert peer.steps == list(range(1, STEPS + 1)), "nobody else lost a round"
        assert all(cheat.key.hex()[:8] in text for text in peer.named)
    view = honest[0].session.view()
    assert all(view.audits[peer.key].passed and not view.audits[peer.key].failed for peer in honest)
    assert view.audit_limits is not None
