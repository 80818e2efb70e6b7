"""What a script wants to train is trained, and all of it is in the weights at the end."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch.nn.functional as F
from torch import nn

from distro_optim import DisTrO
from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.model.trainer import SwarmTrainer
from distro_optim.strategy.rounds import actions as act
from frameworks.lightning_runs import QUIET, Runs, loader, make_module, make_trainer
from optimizer.models import all_same_bits, copies

pytestmark = [pytest.mark.waiting, *QUIET]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lightning.fabric import Fabric

    from distro_optim.strategy.fabric import FabricPsycheStrategy

LOOPBACK: dict[str, Any] = {"relay": "none", "session_arguments": {"bind_addr": "127.0.0.1:0"}}


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many results were applied, each time."""
    counts: list[int] = []
    apply = SwarmTrainer.apply

    def note(trainer: SwarmTrainer, action: act.ApplyResults) -> None:
        counts.append(len(action.updates))
        apply(trainer, action)

    monkeypatch.setattr(SwarmTrainer, "apply", note)
    return counts


@pytest.mark.slow
def test_a_run_that_is_hosted_trains_max_steps_and_applies_them_all(
    both: ModuleType, strategy: Any, tmp_path: Path, applied: list[int]
) -> None:
    module = make_module(both)
    trainer = make_trainer(both, tmp_path, strategy(both, **LOOPBACK), max_steps=5, max_epochs=-1)
    trainer.fit(module, loader())
    assert module.steps == [0, 1, 2, 3, 4]
    assert trainer.global_step == 5
    assert applied == [1] * 5


@pytest.mark.slow
def test_epochs_of_lightning_are_passes_over_the_data(
    pl: ModuleType, strategy: Any, tmp_path: Path, applied: list[int]
) -> None:
    module = make_module(pl)
    trainer = make_trainer(pl, tmp_path, strategy(pl, **LOOPBACK), max_epochs=2)
    trainer.fit(module, loader(24, shuffle=True), loader(8))
    seen = [sample for batch in module.samples for sample in batch]
    assert sorted(seen[:24]) == sorted(seen[24:]) == list(range(24))
    assert trainer.global_step == 6
    assert trainer.current_epoch == 2
    assert applied == [1] * 6
    assert all_same_bits(module.validated[-1], copies(module.parameters()))


def test_validation_and_checkpoints_at_the_end_have_the_last_update(
    both: ModuleType, strategy: Any, runs: Runs, tmp_path: Path
) -> None:
    module = make_module(both)
    trainer = make_trainer(both, tmp_path, strategy(both), max_steps=8, max_epochs=-1)
    trainer.fit(module, loader(), loader(8))
    assert runs.port.applied == sorted(runs.port.updates) == list(range(1, 9))
    assert all_same_bits(module.validated[-1], copies(module.parameters()))


@pytest.mark.slow
def test_a_length_in_the_settings_of_the_run_means_the_same(
    pl: ModuleType, strategy: Any, tmp_path: Path, applied: list[int]
) -> None:
    module = make_module(pl)
    hosting = strategy(pl, config=RunConfig(total_steps=4), **LOOPBACK)
    trainer = make_trainer(pl, tmp_path, hosting, max_epochs=100)
    trainer.fit(module, loader())
    assert trainer.global_step == 4
    assert applied == [1] * 4


@pytest.mark.slow
def test_a_loop_with_fabric_trains_max_steps_and_applies_them_all(applied: list[int]) -> None:
    strategy = FabricPsycheStrategy(**LOOPBACK)
    fabric = Fabric(strategy=strategy, accelerator="cpu", devices=1)
    fabric.launch()
    net = nn.Linear(12, 3)
    model, optimizer = fabric.setup(net, DisTrO(net.parameters(), lr=0.01), _reapply_compile=False)
    steps = []
    for round_ in strategy.rounds(loader(), max_steps=5):
        steps.append(round_.step)
        for batch in round_:
            fabric.backward(F.cross_entropy(model(batch[1]), batch[2]))
        optimizer.step()
    assert steps == [1, 2, 3, 4, 5]
    assert applied == [1] * 5
