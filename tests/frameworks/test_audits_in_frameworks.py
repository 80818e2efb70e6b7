"""Audits by the user's own ``training_step``, or by what a loop with Fabric gives: they tell batches apart and leave no
trace."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from distro_optim import DisTrO
from distro_optim.coordinator.types import BatchId
from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.rounds.actions import ApplyResults, AuditResult, AuditResults
from distro_optim.strategy.session import SwarmSession
from distro_optim.verify.recompute import Evidence
from frameworks.lightning_runs import QUIET, Numbered, make_module, make_trainer
from frameworks.quiet_run import QuietRun
from optimizer.models import copies

pytestmark = [pytest.mark.waiting, *QUIET]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lightning.fabric import Fabric

    from distro_optim.strategy.fabric import FabricPsycheStrategy

CONFIG = RunConfig(total_steps=8, global_batch_size=8)
OTHER = bytes([7] * 32)
SIZE = 64


class AuditedRun(QuietRun):
    """What this peer sent is audited as if another had sent it."""

    audits = True
    found: list[Evidence]

    @override
    def start(self) -> None:
        self.found = []
        super().start()

    @override
    def _begin_round(self) -> None:
        super()._begin_round()
        if not self.audits:
            return
        for place, action in enumerate(list(self._actions)):
            if isinstance(action, ApplyResults) and self._step <= CONFIG.total_steps:  # type: ignore[operator]
                of_step = action.step - 2
                result = AuditResult(trainer=OTHER, batch=self.batches[of_step], update=self.updates[of_step])
                control = BatchId(result.batch.start + 29, result.batch.end + 29)
                audit = AuditResults(
                    step=action.step, of_step=of_step, audited=(result,), control=control, own=result.update
                )
                self._actions.insert(place, audit)

    @override
    def audited(self, step: int, trainer: bytes, found: Evidence, own: Evidence | None) -> None:
        assert trainer == OTHER
        self.found.append(found)


def connect_to(monkeypatch: pytest.MonkeyPatch, *, audits: bool) -> list[AuditedRun]:
    ports: list[AuditedRun] = []

    def connect(session: SwarmSession) -> AuditedRun:
        ports.append(AuditedRun(session.hosting_config()))
        ports[-1].audits = audits
        return ports[-1]

    monkeypatch.setattr(SwarmSession, "connect", connect)
    return ports


class Noisy(Numbered):
    """Draws a random number for each sample that is read."""

    @override
    def __getitem__(self, index: int) -> tuple[int, Tensor, int]:
        number, x, y = super().__getitem__(index)
        return number, x + 0.01 * torch.randn(()), y


def dropping(self: Any, batch: Any) -> Tensor:
    _, x, y = batch
    return F.cross_entropy(self.net(F.dropout(x, 0.1)), y)


@pytest.mark.parametrize("batch_size", [8, 3])
def test_a_lightning_module_audits_by_its_own_training_step(
    pl: ModuleType,
    strategy: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
) -> None:
    def fit(*, audits: bool) -> tuple[Any, AuditedRun, dict[str, float]]:
        ports = connect_to(monkeypatch, audits=audits)
        module = make_module(
            pl, loss=dropping, optimizer=lambda p: DisTrO(p, lr=0.003, compression_topk=64, compression_chunk=16)
        )
        trainer = make_trainer(pl, tmp_path, strategy(pl, config=CONFIG), max_epochs=1)
        torch.manual_seed(3)
        trainer.fit(module, DataLoader(Noisy(SIZE), batch_size=batch_size, shuffle=True))
        return module, ports[-1], {name: float(value) for name, value in trainer.callback_metrics.items()}

    audited, run, metrics = fit(audits=True)
    state = torch.get_rng_state()
    plain, _, plain_metrics = fit(audits=False)
    assert torch.equal(state, torch.get_rng_state())
    assert len(run.found) >= 5
    total = sum(run.found[1:], run.found[0])
    assert total.only_assigned > 2 * total.only_control, "it tells the batch that was trained from another one"
    assert metrics == plain_metrics
    assert all(torch.equal(a, b) for a, b in zip(copies(audited.parameters()), copies(plain.parameters()), strict=True))


def loop(monkeypatch: pytest.MonkeyPatch, *, audits: bool, gives_loss: bool = True) -> tuple[nn.Module, AuditedRun]:
    ports = connect_to(monkeypatch, audits=audits)
    strategy = FabricPsycheStrategy(config=CONFIG)
    fabric = Fabric(strategy=strategy, accelerator="cpu", devices=1)
    fabric.launch()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 3))
    optimizer = DisTrO(net.parameters(), lr=0.003, compression_topk=64, compression_chunk=16)
    model, optimizer = fabric.setup(net, optimizer, _reapply_compile=False)

    def loss_of(model: nn.Module, batch: Any) -> Tensor:
        _, x, y = batch
        return F.cross_entropy(model(x), y)

    given = {"audit_loss": loss_of} if gives_loss else {}
    with strategy.rounds(DataLoader(Noisy(SIZE), batch_size=3), **given) as rounds:  # type: ignore[arg-type]
        for round_ in rounds:
            for batch in round_:
                fabric.backward(loss_of(model, batch))
            optimizer.step()
    return net, ports[-1]


def test_a_loop_with_fabric_audits_by_the_loss_that_it_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    audited, run = loop(monkeypatch, audits=True)
    plain, _ = loop(monkeypatch, audits=False)
    assert all(torch.equal(a, b) for a, b in zip(copies(audited.parameters()), copies(plain.parameters()), strict=True))
    total = sum(run.found[1:], run.found[0])
    assert total.only_assigned > 2 * total.only_control


def test_a_loop_that_gives_none_trains_on_and_does_not_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    _, run = loop(monkeypatch, audits=True, gives_loss=False)
    assert run.ended
    assert run.found == []
