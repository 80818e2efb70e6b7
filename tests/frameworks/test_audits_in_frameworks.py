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
from distro_optim.optim.rules import PUBLISHED
from distro_optim.strategy.config import RunConfig
from frameworks.audited_run import AuditedRun, connect_to
from frameworks.lightning_runs import QUIET, Numbered, make_module, make_trainer
from optimizer.models import copies

pytestmark = [pytest.mark.waiting, *QUIET]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lightning.fabric import Fabric

    from distro_optim.strategy.fabric import FabricPsycheStrategy

CONFIG = RunConfig(total_steps=8, global_batch_size=8)
SIZE = 64


class Noisy(Numbered):
    """Draws a random number for each sample that is read."""

    @override
    def __getitem__(self, index: int) -> tuple[int, Tensor, int]:
        number, x, y = super().__getitem__(index)
        return number, x + 0.01 * torch.randn(()), y


def dropping(self: Any, batch: Any) -> Tensor:
    _, x, y = batch
    return F.cross_entropy(self.net(F.dropout(x, 0.1)), y)


@pytest.mark.slow
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
            pl,
            loss=dropping,
            optimizer=lambda p: DisTrO(p, lr=0.003, compression_topk=64, compression_chunk=16, **PUBLISHED),
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
    optimizer = DisTrO(net.parameters(), lr=0.003, compression_topk=64, compression_chunk=16, **PUBLISHED)
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
