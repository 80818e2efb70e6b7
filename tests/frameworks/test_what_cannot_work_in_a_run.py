"""What a run cannot do is refused before anything is connected, with what to write instead."""

from __future__ import annotations

import errno
import importlib
import os
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from distro_optim import DisTrO
from distro_optim.errors import ConfigurationError, DistroError, RunLostError
from distro_optim.strategy.config import RunConfig
from frameworks.lightning_runs import QUIET, Numbered, Runs, loader, make_module, make_trainer

pytestmark = [pytest.mark.waiting, *QUIET]


def refusal(trainer: Any, module: Any, data: Any = None) -> str:
    with pytest.raises(ConfigurationError) as caught:
        trainer.fit(module, loader() if data is None else data)
    return str(caught.value)


@pytest.mark.parametrize(
    ("optimizer", "line"),
    [
        (lambda p: torch.optim.AdamW(p, weight_decay=0.1), "DisTrO(self.parameters(), lr=4e-4, weight_decay=0.1)"),
        (lambda p: torch.optim.SGD(p, lr=1), "DisTrO(self.parameters(), lr=4e-4)  #"),
    ],
)
def test_another_optimizer(
    both: ModuleType, strategy: Any, runs: Runs, tmp_path: Path, optimizer: Any, line: str
) -> None:
    text = refusal(make_trainer(both, tmp_path, strategy(both)), make_module(both, optimizer=optimizer))
    assert "from distro_optim import DisTrO" in text
    assert line in text
    assert not runs.ports


def test_the_line_that_is_proposed_works() -> None:
    class Module(nn.Linear):
        def make(self) -> DisTrO:
            return DisTrO(self.parameters(), lr=4e-4, weight_decay=0.1)

    assert Module(3, 3).make().param_groups[0]["weight_decay"] == 0.1


def test_no_overlap(pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path) -> None:
    module = make_module(pl, optimizer=lambda p: DisTrO(p, overlap=False))
    assert "leave out overlap=False" in refusal(make_trainer(pl, tmp_path, strategy(pl)), module)


def test_several_optimizers_and_manual_optimization(
    both: ModuleType, strategy: Any, runs: Runs, tmp_path: Path
) -> None:
    module = make_module(both)
    module.automatic_optimization = False
    text = refusal(make_trainer(both, tmp_path, strategy(both)), module)
    assert "remove `self.automatic_optimization = False`" in text
    module = make_module(both, configure_optimizers=lambda self: [DisTrO([param]) for param in self.parameters()])
    text = refusal(make_trainer(both, tmp_path, strategy(both)), module)
    assert "give one DisTrO all parameters" in text, "and not what Lightning advises, which cannot be done here"
    assert not runs.ports


def test_callbacks_that_would_train_otherwise(pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path) -> None:
    callbacks = importlib.import_module(f"{pl.__name__}.callbacks")
    for callback, advice in [
        (callbacks.GradientAccumulationScheduler({2: 2}), "RunConfig(global_batch_size=...)"),
        (callbacks.StochasticWeightAveraging(1e-2), "use WeightAveraging"),
        (callbacks.BackboneFinetuning(2), "give DisTrO all of them"),
    ]:
        module = make_module(pl)
        module.backbone = module.net  # BackboneFinetuning looks for it
        text = refusal(make_trainer(pl, tmp_path, strategy(pl), callbacks=[callback]), module)
        assert type(callback).__name__ in text
        assert advice in text


def test_overfitting_on_purpose(pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path) -> None:
    trainer = make_trainer(pl, tmp_path, strategy(pl), overfit_batches=2)
    assert "torch.utils.data.Subset" in refusal(trainer, make_module(pl))


def test_several_machines_as_one_peer(both: ModuleType, strategy: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="a peer is one machine, so start the script on each one"):
        make_trainer(both, tmp_path, strategy(both), num_nodes=2)


@pytest.mark.slow
def test_several_training_loaders(pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path) -> None:
    loaders = {"a": loader(), "b": loader()}
    text = refusal(make_trainer(pl, tmp_path, strategy(pl)), make_module(pl), loaders)
    assert "exactly one training DataLoader" in text
    assert not runs.ports


def test_a_dataset_that_is_too_short(pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path) -> None:
    config = RunConfig(global_batch_size=65)
    text = refusal(make_trainer(pl, tmp_path, strategy(pl, config=config)), make_module(pl))
    assert "global_batch_size is 65, but the dataset has only 64 samples" in text


class Countless:
    def __getitem__(self, index: int) -> Any:
        return Numbered()[index]


def test_a_dataset_of_which_nobody_knows_the_length(
    both: ModuleType, strategy: Any, runs: Runs, tmp_path: Path
) -> None:
    data: DataLoader[Any] = DataLoader(Countless(), batch_size=8)  # type: ignore[arg-type]
    assert "Countless has no length" in refusal(make_trainer(both, tmp_path, strategy(both)), make_module(both), data)
    module = make_module(both, train_dataloader=lambda self: data)
    with pytest.raises(TypeError, match="has no len") as caught:  # from Lightning, before we are asked
        make_trainer(both, tmp_path, strategy(both)).fit(module)
    assert any("give the dataset of the training loader a __len__" in note for note in caught.value.__notes__)
    assert not runs.ports


def test_a_dataset_with_nothing_in_it(pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path) -> None:
    text = refusal(make_trainer(pl, tmp_path, strategy(pl)), make_module(pl), loader(0))
    assert "the training dataset is empty" in text


def test_a_checkpoint_that_cannot_be_written(pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    saver = importlib.import_module(f"{pl.__name__}.callbacks").ModelCheckpoint(
        tmp_path / "file" / "folder", every_n_train_steps=2
    )
    trainer = make_trainer(pl, tmp_path, strategy(pl), enable_checkpointing=True, callbacks=[saver])
    with pytest.raises(DistroError, match="make room or choose another folder"):
        trainer.fit(make_module(pl), loader())
    assert runs.port.closed == 1


def test_a_full_disk_leaves_the_checkpoint_of_before_and_no_other_file(
    pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints"
    saver = importlib.import_module(f"{pl.__name__}.callbacks").ModelCheckpoint(
        folder, every_n_train_steps=2, filename="newest", save_top_k=1, enable_version_counter=False
    )
    moved: list[str] = []
    really_move = shutil.move

    def to_a_disk_that_becomes_full(source: str, target: str, *args: Any, **kwargs: Any) -> Any:
        moved.append(target)
        if len(moved) == 1:
            return really_move(source, target, *args, **kwargs)
        Path(target).write_bytes(Path(source).read_bytes()[:4096])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "move", to_a_disk_that_becomes_full)
    trainer = make_trainer(pl, tmp_path, strategy(pl), enable_checkpointing=True, callbacks=[saver])
    with pytest.raises(DistroError, match="No space left"):
        trainer.fit(make_module(pl), loader())
    assert len(moved) == 2
    (kept,) = folder.iterdir()
    assert kept.name == "newest.ckpt"
    assert torch.load(kept, weights_only=True)["global_step"] == 2


class Endless(IterableDataset[Any]):
    @override
    def __iter__(self) -> Any:
        number = 0
        while True:
            yield Numbered()[number % 64]
            number += 1


@pytest.mark.filterwarnings("ignore:distro_optim. Endless is an IterableDataset")
def test_a_dataset_without_length_and_a_run_without_end(
    pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path
) -> None:
    data = DataLoader(Endless(), batch_size=8)
    text = refusal(make_trainer(pl, tmp_path, strategy(pl)), make_module(pl), data)
    assert "set Trainer(max_steps=...)" in text


def test_a_run_without_end(pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path) -> None:
    trainer = make_trainer(pl, tmp_path, strategy(pl), max_epochs=-1)
    assert "nobody has said when" in refusal(trainer, make_module(pl))


@pytest.mark.parametrize("run", ["psyche1notaticket", "nonsense", "host:99999/run", ""])
def test_a_run_that_cannot_be_one(pl: ModuleType, strategy: Any, tmp_path: Path, run: str) -> None:
    with pytest.raises(ConfigurationError):
        strategy(pl, run=run)


def test_a_lost_run_raises_and_leaves_the_weights(both: ModuleType, strategy: Any, runs: Runs, tmp_path: Path) -> None:
    runs.settings = {"error": RunLostError("the coordinator is gone"), "error_at": 5}
    module = make_module(both)
    trainer = make_trainer(both, tmp_path, strategy(both))
    with pytest.raises(RunLostError, match="the coordinator is gone"):
        trainer.fit(module, loader())
    assert runs.port.closed == 1
    assert trainer.global_step == 4
    assert trainer.accumulate_grad_batches == 1
    trainer.validate(module, loader(8), verbose=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_logging_in_a_compiled_module_ends_with_advice(
    pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path
) -> None:
    module = torch.compile(make_module(pl), backend="eager")
    trainer = make_trainer(pl, tmp_path, strategy(pl), max_steps=1, max_epochs=-1)
    with pytest.raises(Exception) as caught:
        trainer.fit(module, loader())
    assert "compile the network inside the module" in "".join(caught.value.__notes__)
    assert runs.port.closed == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("whole", [True, False], ids=["the module", "its network"])
def test_compiled_modules_train(pl: ModuleType, strategy: Any, runs: Runs, tmp_path: Path, whole: bool) -> None:
    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_model(self: Any) -> None:
        self.net = torch.compile(self.net, backend="eager")

    if whole:
        module = torch.compile(make_module(pl, training_step=training_step), backend="eager")
    else:
        module = make_module(pl, configure_model=configure_model)
    trainer = make_trainer(pl, tmp_path, strategy(pl), max_steps=3, max_epochs=-1)
    trainer.fit(module, loader())
    assert trainer.global_step == 3
