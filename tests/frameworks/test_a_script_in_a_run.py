"""An ordinary Lightning script trains in a run: one batch is one round is one step."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate

from distro_optim import DisTrO
from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.sample_order import sample_indices, shuffle_seed
from distro_optim.strategy.session import SwarmSession
from frameworks.lightning_runs import QUIET, Runs, loader, make_module, make_trainer
from frameworks.quiet_run import QuietRun
from optimizer.models import all_same_bits, copies

pytestmark = [pytest.mark.waiting, *QUIET]


@pytest.mark.slow
def test_fit_learns_and_everything_else_works(both: ModuleType, strategy: Any, runs: Runs, tmp_path: Path) -> None:
    module = make_module(both)
    trainer = make_trainer(both, tmp_path, strategy(both), max_epochs=6)
    trainer.fit(module, loader(), loader())
    assert trainer.global_step == 48
    assert trainer.current_epoch == 6
    assert sum(module.losses[-8:]) < 0.8 * sum(module.losses[:8])
    assert list(runs.port.losses.values()) == pytest.approx(module.losses)
    [validated] = trainer.validate(module, loader(), verbose=False)
    [tested] = trainer.test(module, loader(), verbose=False)
    assert tested["test_loss"] == pytest.approx(validated["val_loss"])
    predictions = torch.cat(trainer.predict(module, loader()))
    assert predictions.shape == (64,)
    assert len(runs.ports) == 1, "only fit needs a network"
    assert (runs.port.started, runs.port.closed) == (1, 1)


def test_the_run_takes_its_length_and_its_batch_from_the_script(
    both: ModuleType, strategy: Any, runs: Runs, tmp_path: Path
) -> None:
    trainer = make_trainer(both, tmp_path, strategy(both, config=RunConfig(min_peers=2)), max_epochs=3)
    trainer.fit(make_module(both), loader())
    assert runs.port.config.global_batch_size == 16
    assert runs.port.config.total_steps == 3 * 4
    assert trainer.global_step == 12


def test_every_sample_is_trained_once_per_epoch_in_the_order_of_the_run(
    pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path
) -> None:
    module = make_module(pl)
    make_trainer(pl, tmp_path, strategy(pl)).fit(module, loader(shuffle=True))
    seen = [sample for batch in module.samples for sample in batch]
    assert seen == sample_indices(range(128), 64, shuffle_seed("quiet"))
    assert sorted(seen[:64]) == sorted(seen[64:]) == list(range(64))


def test_it_trains_as_a_plain_loop_with_a_session_does(
    pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path
) -> None:
    module, twin = make_module(pl), make_module(pl)
    make_trainer(pl, tmp_path, strategy(pl), max_epochs=1).fit(module, loader())
    optimizer = DisTrO(twin.parameters(), lr=0.01)
    data = loader().dataset
    with SwarmSession(twin, optimizer, dataset_size=64, port=QuietRun(runs.port.config)) as session:
        for round_ in session.rounds():
            loss = twin.loss(default_collate([data[n] for n in round_.indices]))
            loss.backward()
            round_.finish(loss=loss.detach())
    assert all_same_bits(copies(module.parameters()), copies(twin.parameters()))


def test_validation_sees_the_true_weights(both: ModuleType, strategy: Any, runs: Runs, tmp_path: Path) -> None:
    module = make_module(both)
    make_trainer(both, tmp_path, strategy(both), val_check_interval=4).fit(module, loader(), loader(8))
    assert len(module.validated) == 4
    assert all_same_bits(module.validated[0], module.trained[3])
    assert all_same_bits(module.validated[-1], copies(module.parameters()))


def test_the_run_is_over_before_the_last_batch_is(pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path) -> None:
    module = make_module(pl)
    trainer = make_trainer(pl, tmp_path, strategy(pl), max_steps=5, max_epochs=-1)
    trainer.fit(module, loader(), loader(8))
    assert runs.port.config.total_steps == 5
    assert sorted(runs.port.updates) == [1, 2, 3, 4, 5]
    assert trainer.global_step == 5
    assert runs.port.ended, "and not left"
    assert all_same_bits(module.trained[4], copies(module.parameters()))


def test_accumulated_batches_make_a_larger_round(both: ModuleType, strategy: Any, runs: Runs, tmp_path: Path) -> None:
    module = make_module(both)
    trainer = make_trainer(both, tmp_path, strategy(both), accumulate_grad_batches=4)
    trainer.fit(module, loader(batch_size=4))
    assert runs.port.config.global_batch_size == 16
    assert trainer.global_step == 2 * 4
    assert len(module.losses) == 4 * trainer.global_step
    assert trainer.accumulate_grad_batches == 4


def test_a_round_of_several_batches_has_the_gradient_of_one(
    pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path
) -> None:
    gradients: list[list[Tensor]] = []

    def keep(self: Any, optimizer: Any) -> None:
        gradients.append(copies(p.grad for p in self.parameters()))

    for batch_size in (16, 5):
        config = RunConfig(global_batch_size=16)
        module = make_module(pl, on_before_optimizer_step=keep)
        trainer = make_trainer(pl, tmp_path, strategy(pl, config=config), max_steps=1, max_epochs=-1)
        trainer.fit(module, loader(batch_size=batch_size))
        assert runs.port.losses[1] == pytest.approx(trainer.callback_metrics["loss_epoch"].item())
    assert [len(batch) for batch in module.samples] == [5, 5, 5, 1]
    for whole, pieces in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, pieces)


def test_gradients_are_clipped_before_they_are_sent(
    both: ModuleType, strategy: Any, runs: Runs, tmp_path: Path
) -> None:
    norms: list[float] = []

    def keep(self: Any, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None) -> None:
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        norms.append(float(sum(p.grad.square().sum() for p in self.parameters())) ** 0.5)

    module = make_module(both, configure_gradient_clipping=keep)
    make_trainer(both, tmp_path, strategy(both), gradient_clip_val=1e-3, max_epochs=1).fit(module, loader())
    assert len(norms) == 8
    assert all(0 < norm <= 1e-3 * 1.001 for norm in norms)


def test_a_run_that_clips_gradients_does_so_in_place_of_the_trainer(
    pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SwarmSession, "clip_grad_norm", 0.5)
    seen: list[Any] = []
    module = make_module(pl, on_train_batch_start=lambda self, *_: seen.append(self.trainer.gradient_clip_val))
    trainer = make_trainer(pl, tmp_path, strategy(pl), gradient_clip_val=1.0, max_epochs=1)
    with pytest.warns(UserWarning, match="the run clips gradients to a norm of 0.5"):
        trainer.fit(module, loader())
    assert set(seen) == {None}
    assert trainer.gradient_clip_val == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_precisions_of_the_cpu(pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path, precision: str) -> None:
    module = make_module(pl)
    trainer = make_trainer(pl, tmp_path, strategy(pl), precision=precision, accumulate_grad_batches=2, max_epochs=12)
    trainer.fit(module, loader(), loader())
    assert trainer.global_step == 12 * 4
    assert sum(module.losses[-8:]) < 0.9 * sum(module.losses[:8])


def test_an_overflow_of_half_precision_is_an_empty_contribution(
    both: ModuleType, strategy: Any, runs: Runs, tmp_path: Path
) -> None:
    overflows = {3, 6}

    def spoil(self: Any) -> None:
        if self.trainer.global_step + 1 in overflows:
            next(self.parameters()).grad.fill_(float("inf"))

    plugins = importlib.import_module(f"{both.__name__}.plugins.precision")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    module = make_module(both, on_after_backward=spoil)
    trainer = make_trainer(
        both, tmp_path, strategy(both), max_epochs=1, plugins=[plugins.MixedPrecision("16-mixed", "cpu", scaler)]
    )
    trainer.fit(module, loader())
    assert trainer.global_step == 8
    said = {step: sum(t.index.numel() for t in update.tensors()) for step, update in runs.port.updates.items()}
    assert [step for step, count in said.items() if not count] == sorted(overflows)
    assert runs.port.losses[3] is None
    assert scaler.get_scale() == 2.0**6
    assert trainer.optimizers[0].quarantined == 0


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_training_step_that_returns_none_sends_nothing(
    pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path
) -> None:
    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch) if batch_idx != 2 else None

    trainer = make_trainer(pl, tmp_path, strategy(pl), max_epochs=1)
    trainer.fit(make_module(pl, training_step=training_step), loader())
    assert trainer.global_step == 8
    assert runs.port.losses[3] is None


def test_training_stops_between_batches_when_the_round_is_over(
    pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path
) -> None:
    runs.settings = {"cancelled": {2}}
    module = make_module(pl)
    trainer = make_trainer(pl, tmp_path, strategy(pl), max_steps=4, max_epochs=-1, accumulate_grad_batches=4)
    trainer.fit(module, loader(batch_size=4))
    assert runs.port.stopped == [2]
    assert sorted(runs.port.updates) == [1, 3, 4]
    assert len(module.samples) == 4 + 1 + 4 + 4
    assert trainer.global_step == 4


def test_a_script_that_returns_a_dict_gets_the_mean_loss_back(
    pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path
) -> None:
    outputs: list[Any] = []

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return {"loss": loss, "size": len(batch[0])}

    def note(self: Any, output: Any, batch: Any, batch_idx: int) -> None:
        outputs.append(output)

    module = make_module(pl, training_step=training_step, on_train_batch_end=note)
    trainer = make_trainer(pl, tmp_path, strategy(pl), max_steps=1, max_epochs=-1, accumulate_grad_batches=4)
    trainer.fit(module, loader(batch_size=4))
    [output] = outputs
    assert float(output["loss"]) == pytest.approx(sum(module.losses) / 4)
    assert output["size"] == 4


def test_hooks_see_the_scripts_own_batches(both: ModuleType, strategy: Any, runs: Runs, tmp_path: Path) -> None:
    """A round of several: the first of them when it begins, the last when it ends; never fetched a second time."""
    seen: list[tuple[str, list[int]]] = []

    def before(self: Any, batch: Any, batch_idx: int) -> None:
        index, x, y = batch
        seen.append(("module", index.tolist()))
        assert x.dtype == torch.float32
        assert len(x) == len(y) == 4

    class Watches(both.Callback):  # type: ignore[name-defined, misc]
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            index, _, _ = batch
            seen.append(("callback", index.tolist()))

    watches = Watches()
    module = make_module(both, on_train_batch_start=before)
    trainer = make_trainer(
        both, tmp_path, strategy(both), max_steps=2, max_epochs=-1, accumulate_grad_batches=4, callbacks=[watches]
    )
    trainer.fit(module, loader(batch_size=4))
    trained = module.samples
    assert len(trained) == 8
    assert seen == [
        ("module", trained[0]),
        ("callback", trained[3]),
        ("module", trained[4]),
        ("callback", trained[7]),
    ]
    assert "on_train_batch_start" not in vars(module), "nothing is left on the script's objects"
    assert "on_train_batch_end" not in vars(watches)


@pytest.mark.slow
def test_a_fit_after_a_fit(both: ModuleType, strategy: Any, runs: Runs, tmp_path: Path) -> None:
    module = make_module(both)
    trainer = make_trainer(both, tmp_path, strategy(both), max_epochs=1)
    trainer.fit(module, loader(), loader())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(), loader())
    assert trainer.global_step == 16
    assert [port.closed for port in runs.ports] == [1, 1]
