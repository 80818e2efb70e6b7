"""A peer that joins late, or goes on from a checkpoint, counts and schedules as the run does."""

from __future__ import annotations

import importlib
import sys
import textwrap
from pathlib import Path
from queue import Queue
from threading import Thread
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import warm_python
from distro_optim import DisTrO
from distro_optim.errors import ConfigurationError
from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.frameworks.framework_session import FrameworkSession
from frameworks.lightning_runs import QUIET, SAFE, Runs, loader, make_module, make_trainer
from optimizer.models import all_same_bits, copies

pytestmark = [pytest.mark.waiting, *QUIET]


def of_steps(rate: Any) -> Any:
    return lambda optimizer: {"scheduler": lr_scheduler.LambdaLR(optimizer, rate), "interval": "step"}


def test_a_late_joiner_counts_as_the_run_does(both: ModuleType, strategy: Any, runs: Runs, tmp_path: Path) -> None:
    runs.settings = {"config": RunConfig(total_steps=30, global_batch_size=8), "first_step": 20}
    module = make_module(both, schedule=of_steps(lambda step: 0.9**step))
    trainer = make_trainer(both, tmp_path, strategy(both), max_epochs=100)
    trainer.fit(module, loader(), loader(8))
    assert module.steps == list(range(19, 30))
    assert module.rates == pytest.approx([0.01 * 0.9**step for step in range(19, 30)])
    assert trainer.global_step == 30
    assert trainer.current_epoch == 4  # of 8 rounds each; the last one is cut short
    assert len(module.validated) == 2


def test_who_missed_rounds_catches_up(pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path) -> None:
    runs.settings = {"skipped": {3, 4, 5, *range(14, 28)}}
    module = make_module(pl, schedule=of_steps(lambda step: 1 / (1 + step)))
    trainer = make_trainer(pl, tmp_path, strategy(pl), max_epochs=4)
    trainer.fit(module, loader())
    steps = [0, 1, *range(5, 13), *range(27, 32)]
    assert module.steps == steps
    assert module.rates == pytest.approx([0.01 / (1 + step) for step in steps])
    assert trainer.global_step == 32
    assert trainer.current_epoch == 4


SCHEDULES: dict[str, Any] = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 40),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=40, cycle_momentum=False),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=5), lr_scheduler.ExponentialLR(o, 0.9)], [5]
    ),
    "chain": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 7), lr_scheduler.ExponentialLR(o, 0.95)]
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using 'interval'")
@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_late_joiner_has_the_rates_of_those_who_were_there_from_the_start(
    pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path, name: str, interval: str
) -> None:
    def schedule(optimizer: Any) -> Any:
        return {"scheduler": SCHEDULES[name](optimizer), "interval": interval, "frequency": 2}

    config = RunConfig(total_steps=40, global_batch_size=8)
    seen = []
    for first_step in (1, 14):
        runs.settings = {"config": config, "first_step": first_step}
        module = make_module(pl, schedule=schedule)
        make_trainer(pl, tmp_path, strategy(pl), max_epochs=10).fit(module, loader(40))
        seen.append(dict(zip(module.steps, module.rates, strict=True)))
    assert len(seen[0]) == 40
    assert min(seen[1]) == 13
    for step, rate in seen[1].items():
        assert rate == pytest.approx(seen[0][step]), step


def test_a_schedule_of_a_metric_is_refused(pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path) -> None:
    module = make_module(pl, schedule=lambda o: {"scheduler": lr_scheduler.ReduceLROnPlateau(o), "monitor": "loss"})
    with pytest.raises(ConfigurationError, match="drift apart: use a schedule that depends on the step alone"):
        make_trainer(pl, tmp_path, strategy(pl)).fit(module, loader())
    assert not runs.ports


def test_the_length_of_an_epoch_is_that_of_the_run_that_is_joined(
    pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path
) -> None:
    runs.settings = {"config": RunConfig(total_steps=8, global_batch_size=32), "share_of": 2}
    module = make_module(pl)
    trainer = make_trainer(pl, tmp_path, strategy(pl, run="127.0.0.1:20000/quiet"), max_epochs=50)
    trainer.fit(module, loader())
    assert trainer.num_training_batches == 2
    assert trainer.global_step == 8
    assert trainer.current_epoch == 4
    assert all(len(batch) == 8 for batch in module.samples)
    assert len(module.samples) == 8 * 2


@pytest.mark.slow
def test_estimated_steps_are_there_for_a_schedule(pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path) -> None:
    def configure_optimizers(self: Any) -> Any:
        optimizer = DisTrO(self.parameters(), lr=0.01)
        steps = self.trainer.estimated_stepping_batches
        assert steps == 16
        schedule = lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=int(steps), cycle_momentum=False)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    module = make_module(pl, configure_optimizers=configure_optimizers)
    trainer = make_trainer(pl, tmp_path, strategy(pl))
    trainer.fit(module, loader())
    assert trainer.global_step == 16


@pytest.mark.parametrize(
    ("limits", "asks_in", "leaves_at"),
    [
        ({"max_epochs": 2}, "configure_optimizers", 8),  # an epoch of the run has 4 rounds
        ({"max_epochs": 50}, "setup", 11),
        ({"max_epochs": -1, "max_steps": 600}, "configure_optimizers", 11),
        ({"max_epochs": 9, "max_steps": 5}, "setup", 5),
    ],
)
def test_who_joins_is_told_the_steps_of_the_run(
    pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path, limits: dict[str, int], asks_in: str, leaves_at: int
) -> None:
    told: list[Any] = []

    def setup(self: Any, stage: str) -> None:
        if asks_in == "setup":
            told.append(self.trainer.estimated_stepping_batches)

    def configure_optimizers(self: Any) -> Any:
        if asks_in == "configure_optimizers":
            told.append(self.trainer.estimated_stepping_batches)
        told.append(self.trainer.max_steps)
        return DisTrO(self.parameters(), lr=0.01)

    runs.settings = {"config": RunConfig(total_steps=11, global_batch_size=16), "first_step": 3}
    module = make_module(pl, setup=setup, configure_optimizers=configure_optimizers)
    trainer = make_trainer(
        pl, tmp_path, strategy(pl, run="127.0.0.1:20000/quiet"), **{**limits, "accumulate_grad_batches": 2}
    )
    trainer.fit(module, loader())
    assert told == [11, 11]
    assert trainer.max_steps == limits.get("max_steps", -1)
    assert trainer.global_step == leaves_at
    assert len(runs.ports) == 1


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_host_and_a_joiner_with_other_settings_have_the_same_schedule(
    pl: ModuleType, strategy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def configure_optimizers(self: Any) -> Any:
        optimizer = DisTrO(self.parameters(), lr=0.01)
        steps = self.trainer.estimated_stepping_batches
        schedule = lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=int(steps), cycle_momentum=False)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    monkeypatch.delenv("DISTRO_OPTIM_RUN", raising=False)
    reach = {"relay": "none", "bind_addr": "127.0.0.1:0"}
    tickets: Queue[str | None] = Queue()
    monkeypatch.setattr(FrameworkSession, "invite", lambda session, code: tickets.put(session.ticket))
    hosting = strategy(pl, config=RunConfig(min_peers=2), **reach)
    modules = [make_module(pl, configure_optimizers=configure_optimizers) for _ in range(2)]
    trainers = [make_trainer(pl, tmp_path / "host", hosting)]
    host = Thread(target=trainers[0].fit, args=(modules[0], loader()), daemon=True)
    host.start()
    trainers.append(make_trainer(pl, tmp_path / "joiner", strategy(pl, run=tickets.get(timeout=60), **reach)))
    trainers[1].fit(modules[1], loader())
    host.join(timeout=60)
    assert not host.is_alive()
    assert [trainer.global_step for trainer in trainers] == [8, 8]
    steps = [trainer.lr_scheduler_configs[0].scheduler.total_steps for trainer in trainers]
    assert steps == [8, 8]
    first, second = (dict(zip(module.steps, module.rates, strict=True)) for module in modules)
    assert len(first) == 8
    assert first == second
    assert all_same_bits(*(copies(module.parameters()) for module in modules))


def test_a_host_is_told_the_steps_of_its_settings(
    pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTRO_OPTIM_CONFIG", '{"global_batch_size": 16}')
    told: list[Any] = []

    def configure_optimizers(self: Any) -> Any:
        told.append((self.trainer.estimated_stepping_batches, self.trainer.max_epochs))
        return DisTrO(self.parameters(), lr=0.01)

    module = make_module(pl, configure_optimizers=configure_optimizers)
    trainer = make_trainer(pl, tmp_path, strategy(pl, config=RunConfig(total_steps=7)), max_epochs=9)
    trainer.fit(module, loader())
    assert told == [(7, 2)]
    assert trainer.global_step == 7


def test_a_run_that_is_looked_at_is_left_if_the_script_fails(
    pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path
) -> None:
    def configure_optimizers(self: Any) -> Any:
        raise ValueError("the script's own")

    runs.settings = {"config": RunConfig(total_steps=8, global_batch_size=8)}
    trainer = make_trainer(pl, tmp_path, strategy(pl, run="127.0.0.1:20000/quiet"), max_epochs=3)
    with pytest.raises(ValueError, match="the script's own"):
        trainer.fit(make_module(pl, configure_optimizers=configure_optimizers), loader())
    assert (runs.port.started, runs.port.closed) == (0, 1)
    assert (trainer.max_steps, trainer.max_epochs) == (-1, 3)


@pytest.mark.parametrize(
    ("limits", "totals"),
    [
        ({"max_steps": 600}, [(2, 8, 3), (3, 6, 3)]),
        ({"max_steps": 29}, [(2, 8, 3), (3, 5, 3)]),
        ({"max_epochs": 50}, [(2, 8, 3), (3, 6, 3)]),
        ({"max_epochs": 3}, [(2, 8, 2)]),
    ],
)
def test_the_bar_of_a_late_joiner_counts_the_whole_epoch(
    both: ModuleType, strategy: Any, runs: Runs, tmp_path: Path, limits: dict[str, int], totals: list[tuple[int, ...]]
) -> None:
    progress = importlib.import_module(f"{both.__name__}.callbacks")
    shown: list[tuple[int, ...]] = []
    done: list[int] = []

    class Bar(progress.ProgressBar):  # type: ignore[misc, name-defined]
        def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
            shown.append((trainer.current_epoch, self.total_train_batches, trainer.max_epochs - 1))

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, number: int) -> None:
            done.append(number + 1)

    runs.settings = {"config": RunConfig(total_steps=30, global_batch_size=8), "first_step": 20}
    settings = {"enable_progress_bar": True, "callbacks": [Bar()], **limits}
    make_trainer(both, tmp_path, strategy(both), **{"max_epochs": None, **settings}).fit(make_module(both), loader())
    assert shown == totals
    assert done[0] == 4  # of the epoch that was under way
    assert done[-1] == totals[-1][1]


# -- checkpoints -----------------------------------------------------------------------------------------------------


def saver(pl: ModuleType, folder: Path, **settings: Any) -> Any:
    return importlib.import_module(f"{pl.__name__}.callbacks").ModelCheckpoint(folder, save_top_k=-1, **settings)


@pytest.mark.slow
def test_a_run_goes_on_from_a_checkpoint_of_lightnings(
    both: ModuleType, strategy: Any, runs: Runs, tmp_path: Path
) -> None:
    def fit(**arguments: Any) -> Any:
        module = make_module(both, schedule=of_steps(lambda step: 0.9**step))
        trainer = make_trainer(
            both,
            tmp_path,
            strategy(both),
            enable_checkpointing=True,
            callbacks=[saver(both, tmp_path, every_n_train_steps=5)],
        )
        trainer.fit(module, loader(), **arguments)
        return module

    whole = fit()
    path = tmp_path / "epoch=0-step=5.ckpt"
    runs.settings = {"first_step": 6}
    resumed = fit(ckpt_path=path, **SAFE)
    assert resumed.steps == list(range(5, 16))
    assert resumed.rates == pytest.approx(whole.rates[5:])
    assert [sorted(batch) for batch in resumed.samples] == [sorted(batch) for batch in whole.samples[5:]]
    [state] = [port.begins_with for port in runs.ports[1:]]
    assert state is not None
    assert (state.run_id, state.progress.step, state.progress.epoch_start_data_index) == ("quiet", 6, 40)
    saved = torch.load(path, weights_only=True)
    assert saved["global_step"] == 5
    delta = saved["optimizer_states"][0]["state"][0]["delta"]
    assert delta.abs().sum() > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_dataset_that_has_grown_since_the_checkpoint_is_told(
    pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path
) -> None:
    callbacks = [saver(pl, tmp_path, every_n_train_steps=5)]
    trainer = make_trainer(pl, tmp_path, strategy(pl), enable_checkpointing=True, callbacks=callbacks, max_epochs=1)
    trainer.fit(make_module(pl), loader(64))
    runs.settings = {"first_step": 6}
    told: dict[int, list[str]] = {64: [], 80: []}
    for size, news in told.items():
        resumed = make_trainer(pl, tmp_path, strategy(pl, on_event=news.append), max_epochs=1)
        resumed.fit(make_module(pl), loader(size), ckpt_path=tmp_path / "epoch=0-step=5.ckpt", **SAFE)
        assert resumed.global_step == size // 8
    assert [len([text for text in news if "has 80 samples, and had 64" in text]) for news in told.values()] == [0, 1]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_that_does_not_fit_is_told_with_what_to_do_instead(
    pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path
) -> None:
    saved = tmp_path / "saved.ckpt"
    trainer = make_trainer(pl, tmp_path, strategy(pl), max_steps=2)
    trainer.fit(make_module(pl), loader())
    trainer.save_checkpoint(saved)
    (tmp_path / "damaged.ckpt").write_bytes(b"hello")
    count = len(runs.ports)
    in_groups = make_module(pl, optimizer=lambda params: DisTrO([{"params": [param]} for param in params]))
    wider = make_module(pl)
    wider.net.add_module("more", nn.Linear(2, 2))
    for module, file, advice in (
        (make_module(pl), "damaged.ckpt", "it is damaged, or something else"),
        (wider, "saved.ckpt", "of another model: (?s:.*)Build the same model"),
        (in_groups, "saved.ckpt", "Make the same groups"),
    ):
        with pytest.raises(ConfigurationError, match=advice):
            make_trainer(pl, tmp_path, strategy(pl)).fit(module, loader(), ckpt_path=tmp_path / file, **SAFE)
    assert len(runs.ports) == count


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_who_joins_with_a_checkpoint_takes_what_the_run_has(
    pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path
) -> None:
    callbacks = [saver(pl, tmp_path, every_n_train_steps=5)]
    trainer = make_trainer(pl, tmp_path, strategy(pl), enable_checkpointing=True, callbacks=callbacks)
    trainer.fit(make_module(pl), loader())
    runs.settings = {"config": RunConfig(total_steps=30, global_batch_size=8), "first_step": 28}
    news: list[str] = []
    joining = strategy(pl, run="127.0.0.1:20000/quiet", on_event=news.append)
    module = make_module(pl)
    trainer = make_trainer(pl, tmp_path, joining, max_epochs=9)
    trainer.fit(module, loader(), ckpt_path=tmp_path / "epoch=0-step=5.ckpt", **SAFE)
    assert module.steps == [27, 28, 29]
    assert sum("the run is at step 28" in sentence and "checkpoint of step 5" in sentence for sentence in news) == 1


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(("first_step", "kept"), [(6, True), (7, False)])
def test_who_joins_with_a_checkpoint_of_this_very_step_keeps_its_momentum(
    pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path, first_step: int, kept: bool
) -> None:
    callbacks = [saver(pl, tmp_path, every_n_train_steps=5)]
    trainer = make_trainer(pl, tmp_path, strategy(pl), enable_checkpointing=True, callbacks=callbacks)
    trainer.fit(make_module(pl), loader())
    runs.settings = {"config": RunConfig(total_steps=30, global_batch_size=8), "first_step": first_step}
    news: list[str] = []
    joining = strategy(pl, run="127.0.0.1:20000/quiet", on_event=news.append)
    momenta: list[float] = []

    def on_train_batch_start(self: Any, *_: Any) -> None:
        momenta.append(sum(float(s["delta"].abs().sum()) for s in self.trainer.optimizers[0].state.values()))

    module = make_module(pl, on_train_batch_start=on_train_batch_start)
    trainer = make_trainer(pl, tmp_path, joining, max_epochs=1)
    trainer.fit(module, loader(), ckpt_path=tmp_path / "epoch=0-step=5.ckpt", **SAFE)
    assert (momenta[0] > 0) == kept
    assert bool([text for text in news if "its weights and its step count" in text]) != kept


def test_a_checkpoint_has_the_weights_that_all_peers_have(
    pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path
) -> None:
    taken = []

    def on_train_batch_start(self: Any, batch: Any, batch_idx: int) -> None:
        taken.append((copies(self.parameters()), tmp_path / f"{batch_idx}.ckpt"))
        self.trainer.save_checkpoint(taken[-1][1])

    module = make_module(pl, on_train_batch_start=on_train_batch_start)
    make_trainer(pl, tmp_path, strategy(pl), max_epochs=1).fit(module, loader())
    for number, (ahead, path) in list(enumerate(taken))[2:-1]:  # after the last one comes the end of the run
        saved = list(torch.load(path, weights_only=True)["state_dict"].values())
        # At the start of a round the weights look ahead, and results of two rounds before were just applied.
        assert not all_same_bits(saved, ahead)
        assert all_same_bits(saved, module.trained[number])


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_and_loads_without_this_package(
    both: ModuleType, strategy: Any, runs: Runs, tmp_path: Path
) -> None:
    callbacks = importlib.import_module(f"{both.__name__}.callbacks")
    best = callbacks.ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=1, save_last=True)
    trainer = make_trainer(both, tmp_path, strategy(both), enable_checkpointing=True, callbacks=[best], max_epochs=3)
    module = make_module(both)
    trainer.fit(module, loader(), loader(16))
    assert Path(best.best_model_path).exists()
    assert (tmp_path / "last.ckpt").exists()
    trainer.test(module, loader(16), ckpt_path="best", verbose=False)
    script = """
        import sys, torch
        saved = torch.load(sys.argv[1], weights_only=True)
        assert "net.0.weight" in saved["state_dict"]
        assert not any(name.startswith("distro_optim") for name in sys.modules)
    """
    loads = [sys.executable, "-c", textwrap.dedent(script), best.best_model_path]
    warm_python.run(loads, check=True, timeout=120, without_this_package=True)


def test_early_stopping_leaves_the_run(both: ModuleType, strategy: Any, runs: Runs, tmp_path: Path) -> None:
    callbacks = importlib.import_module(f"{both.__name__}.callbacks")
    stop = callbacks.EarlyStopping("val_loss", patience=0, stopping_threshold=1e9, verbose=False)
    trainer = make_trainer(both, tmp_path, strategy(both), callbacks=[stop], max_epochs=50)
    trainer.fit(make_module(both), loader(), loader(16))
    assert trainer.global_step == 8
    assert not runs.port.ended
    assert runs.port.closed == 1


@pytest.mark.parametrize("minimum", [{"min_epochs": 10}, {"min_steps": 100}])
def test_the_end_of_the_run_ends_fit_whatever_the_script_wants(
    pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path, minimum: dict[str, int]
) -> None:
    runs.settings = {"config": RunConfig(total_steps=11, global_batch_size=8)}
    trainer = make_trainer(pl, tmp_path, strategy(pl), max_epochs=50, **minimum)
    trainer.fit(make_module(pl), loader())
    assert trainer.global_step == 11
    assert runs.port.ended
