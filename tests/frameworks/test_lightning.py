"""Lightning's automatic optimization takes the optimizer as it takes AdamW, under both of its names."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from distro_optim import DisTrO
from optimizer.models import all_same_bits, copies

pytestmark = [
    pytest.mark.waiting,
    # Lightning imports what setuptools and torch deprecate, and has advice for tiny runs.
    pytest.mark.filterwarnings("ignore:pkg_resources is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\).*"),
]


@pytest.fixture(scope="module", params=["lightning.pytorch", "pytorch_lightning"])
def pl(request: pytest.FixtureRequest) -> ModuleType:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(request.param)


def data(batches: int = 8, size: int = 8) -> DataLoader[Any]:
    x = torch.randn(batches * size, 12, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return DataLoader(TensorDataset(x, y), batch_size=size)


def make_module(pl: ModuleType, *, accumulate: bool = False, **settings: Any) -> Any:
    class Boring(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))
            self.temperature = nn.Parameter(torch.ones(()))
            self.unused = nn.Parameter(torch.ones(5))
            self.losses: list[float] = []
            self.validated: list[list[Tensor]] = []
            self.trained: list[list[Tensor]] = []

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, y = batch
            loss = F.cross_entropy(self.net(x) * self.temperature, y)
            self.losses.append(loss.item())
            self.log("loss", loss)
            return loss

        def on_train_batch_end(self, *_: Any) -> None:
            self.trained.append(copies(self.parameters()))

        def validation_step(self, batch: Any, index: int) -> None:
            self.validated.append(copies(self.parameters()))

        def configure_optimizers(self) -> Any:
            optimizer = DisTrO(self.parameters(), lr=0.01, **settings)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.98**step)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    return Boring()


def fit(pl: ModuleType, module: Any, folder: Path, ckpt_path: Path | None = None, **settings: Any) -> Any:
    arguments = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
    }
    trainer = pl.Trainer(**{**arguments, **settings})
    trainer.fit(module, data(), data(1), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [False, True], ids=["blocking", "overlap"])
def test_fit_learns(pl: ModuleType, overlap: bool, tmp_path: Path) -> None:
    module = make_module(pl, overlap=overlap)
    trainer = fit(pl, module, tmp_path, max_epochs=6)
    assert trainer.global_step == 48
    assert isinstance(trainer.optimizers[0], DisTrO)
    assert sum(module.losses[-8:]) < 0.8 * sum(module.losses[:8])
    assert torch.equal(module.unused, torch.ones(5))


def test_validation_sees_the_true_weights(pl: ModuleType, tmp_path: Path) -> None:
    module = make_module(pl)
    fit(pl, module, tmp_path, num_sanity_val_steps=0)
    assert len(module.validated) == 2
    assert all_same_bits(module.validated[0], module.trained[7])


def test_gradients_are_clipped_before_they_reach_the_momentum(pl: ModuleType, tmp_path: Path) -> None:
    module = make_module(pl, overlap=False, quantize_1bit=False, compression_topk=1, compression_decay=1.0)
    limit = 1e-4
    trainer = fit(pl, module, tmp_path, max_steps=1, gradient_clip_val=limit, gradient_clip_algorithm="norm")
    [optimizer] = trainer.optimizers
    norm = sum(optimizer.delta(p).square().sum() for p in module.parameters()).sqrt()
    assert 0 < norm <= 0.01 * limit * 1.001


def test_accumulated_batches_make_one_step(pl: ModuleType, tmp_path: Path) -> None:
    module = make_module(pl, overlap=False)
    trainer = fit(pl, module, tmp_path, accumulate_grad_batches=3)
    assert trainer.global_step == 2 * 3  # 8 batches: 3, 3 and the 2 that are left
    assert all_same_bits(module.trained[0], module.trained[1])
    assert not all_same_bits(module.trained[1], module.trained[2])
    assert all_same_bits(module.trained[2], module.trained[3])


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [False, True], ids=["blocking", "overlap"])
def test_a_checkpoint_continues_bit_for_bit(pl: ModuleType, overlap: bool, tmp_path: Path) -> None:
    callbacks = importlib.import_module(f"{pl.__name__}.callbacks")
    whole = make_module(pl, overlap=overlap)

    def saver() -> Any:
        return callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=8)

    fit(pl, whole, tmp_path, enable_checkpointing=True, callbacks=[saver()])
    resumed = make_module(pl, overlap=overlap)
    path = tmp_path / "epoch=0-step=8.ckpt"
    trainer = fit(pl, resumed, tmp_path, path, enable_checkpointing=True, callbacks=[saver()])
    assert trainer.global_step == 16
    assert len(resumed.trained) == 8
    for ours, theirs in zip(resumed.trained, whole.trained[8:], strict=True):
        assert all_same_bits(ours, theirs)


def test_methods_called_on_lightnings_wrapper_reach_the_optimizer(pl: ModuleType, tmp_path: Path) -> None:
    module = make_module(pl)
    seen = []

    def flush(*_: Any) -> None:
        wrapper = module.optimizers()
        wrapper.flush()
        seen.append((wrapper is not module.trainer.optimizers[0], wrapper.quarantined))
        after = copies(module.parameters())
        module.trainer.optimizers[0].flush()  # nothing is left
        assert all_same_bits(after, copies(module.parameters()))

    module.on_train_end = flush
    fit(pl, module, tmp_path, max_steps=3)
    assert seen == [(True, 0)]


@pytest.mark.slow
def test_manual_optimization_trains(pl: ModuleType, tmp_path: Path) -> None:
    module = make_module(pl)
    module.automatic_optimization = False
    step = module.training_step

    def training_step(batch: Any, batch_idx: int) -> None:
        optimizer = module.optimizers()
        optimizer.zero_grad()
        module.manual_backward(step(batch, batch_idx))
        optimizer.step()

    module.training_step = training_step
    fit(pl, module, tmp_path, max_epochs=6)
    assert sum(module.losses[-8:]) < 0.8 * sum(module.losses[:8])


@pytest.mark.slow
def test_two_fits_of_one_trainer_go_on(pl: ModuleType, tmp_path: Path) -> None:
    module = make_module(pl)
    trainer = fit(pl, module, tmp_path, max_epochs=1)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, data(), data(1))
    assert trainer.global_step == 24
