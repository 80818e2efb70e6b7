"""A small script for Lightning, under either of its names, and trainers that need no network."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from distro_optim import DisTrO
from distro_optim.strategy.frameworks import run_ahead
from distro_optim.strategy.session import SwarmSession
from frameworks.quiet_run import QuietRun
from optimizer.models import copies

NAMESPACES = ("lightning.pytorch", "pytorch_lightning")
STRATEGIES = {
    "lightning.pytorch": ("distro_optim.strategy.psyche_lightning", "LightningPsycheStrategy"),
    "pytorch_lightning": ("distro_optim.strategy.psyche_pytorch_lightning", "PytorchLightningPsycheStrategy"),
}

SAFE: dict[str, Any] = {"weights_only": True} if tuple(map(int, version("lightning").split(".")[:2])) >= (2, 6) else {}
"""For ``Trainer.fit``: a checkpoint is loaded without unpickling, where Lightning can be told so (2.6 and later)."""

QUIET = [
    # Lightning imports what setuptools and torch deprecate, and has advice for tiny runs.
    pytest.mark.filterwarnings("ignore:pkg_resources is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\).*"),
    pytest.mark.filterwarnings("ignore:.*ended before the epoch ended and your dataloader is not resumable"),
]


def load(name: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


class Numbered(Dataset[Any]):
    """Samples that say which they are: ``(index, features, label)``."""

    def __init__(self, size: int = 64) -> None:
        self.x = torch.randn(size, 12, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.x)

    @override
    def __getitem__(self, index: int) -> tuple[int, Tensor, int]:
        x = self.x[index]
        return index, x, int(x[0] > 0) + int(x[1] > 0)


def loader(size: int = 64, batch_size: int = 8, **settings: Any) -> DataLoader[Any]:
    return DataLoader(Numbered(size), batch_size=batch_size, **settings)


Schedule = Callable[[torch.optim.Optimizer], Any]


def make_module(pl: ModuleType, *, schedule: Schedule | None = None, optimizer: Any = None, **overrides: Any) -> Any:
    """A classifier that notes which samples it saw, and what weights.

    Args:
        schedule: makes the ``lr_scheduler`` entry from the optimizer.
        optimizer: makes the optimizer from the parameters; DisTrO by default.
        overrides: methods of the module.
    """

    class Classifier(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))
            self.samples: list[list[int]] = []
            self.losses: list[float] = []
            self.rates: list[float] = []
            self.steps: list[int] = []
            self.trained: list[list[Tensor]] = []
            self.validated: list[list[Tensor]] = []

        def loss(self, batch: Any) -> Tensor:
            _, x, y = batch
            return F.cross_entropy(self.net(x), y)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.samples.append(batch[0].tolist())
            loss = self.loss(batch)
            self.losses.append(loss.item())
            self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            self.steps.append(self.trainer.global_step)
            self.log("loss", loss, on_step=True, on_epoch=True)
            return loss

        def on_train_batch_end(self, *_: Any) -> None:
            self.trained.append(copies(self.parameters()))

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.validated.append(copies(self.parameters()))
            self.log("val_loss", self.loss(batch), sync_dist=True)

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_loss", self.loss(batch))

        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            classes: Tensor = self.net(batch[1]).argmax(-1)
            return classes

        def configure_optimizers(self) -> Any:
            make = optimizer or (lambda parameters: DisTrO(parameters, lr=0.01))
            made = make(self.parameters())
            return made if schedule is None else {"optimizer": made, "lr_scheduler": schedule(made)}

    return type("Classifier", (Classifier,), overrides)()


def make_trainer(pl: ModuleType, folder: Path, strategy: Any, **settings: Any) -> Any:
    arguments = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(strategy=strategy, **{**arguments, **settings})


class Runs:
    """Where sessions connect to while a test runs: quiet runs, made as the test wants them."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}
        self.ports: list[QuietRun] = []

    def connect(self, session: SwarmSession) -> QuietRun:
        config = self.settings.get("config") or session.hosting_config()
        port = QuietRun(config, begins_with=session.state_to_host(config), is_host=session._run is None, **self.of_port)
        self.ports.append(port)
        return port

    def connect_to(self, run: str, *_: Any) -> QuietRun:
        """What looks at a run before its session is made."""
        self.ports.append(QuietRun(self.settings["config"], is_host=False, **self.of_port))
        return self.port

    @property
    def of_port(self) -> dict[str, Any]:
        return {name: value for name, value in self.settings.items() if name != "config"}

    @property
    def port(self) -> QuietRun:
        return self.ports[-1]


def quiet_runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    runs = Runs()
    monkeypatch.setattr(SwarmSession, "open_access", lambda session: runs.connect(session))
    monkeypatch.setattr(run_ahead, "connect_to_run", runs.connect_to)
    return runs
