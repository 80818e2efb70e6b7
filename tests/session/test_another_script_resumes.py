"""A script that was changed between two runs goes on from its checkpoint, or says which change stands in the way."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distro_optim import DisTrO
from distro_optim.errors import ConfigurationError
from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.model.checkpoint import Checkpoint, CheckpointStore
from distro_optim.strategy.model.checkpoint_keeper import CheckpointFolder
from distro_optim.strategy.model.identity import FORMAT
from distro_optim.strategy.model.named_tensors import NamedTensors
from distro_optim.strategy.model.resuming import state_to_resume

from .scripts import Net, new_model, new_optimizer
from .test_checkpoints import Peer


class Renamed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.rarely = self.sometimes
        del self.sometimes


class Frozen(Net):
    def __init__(self) -> None:
        super().__init__()
        self.first.bias.requires_grad_(False)


class Norm(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(10)


def restored(folder: Path, model: nn.Module, optimizer: DisTrO | None = None) -> Checkpoint:
    optimizer = optimizer if optimizer is not None else new_optimizer(model)
    store, tensors = CheckpointStore(folder), NamedTensors.of(model, optimizer)
    checkpoint = CheckpointFolder(store, model, tensors, optimizer, lambda text: None).restore()
    assert checkpoint is not None
    return checkpoint


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda: new_model(kind=Renamed), "only one side has is rarely in the model and sometimes in the checkpoint"),
        (lambda: new_model(kind=Frozen), "kind of first.bias is frozen in the model and trained in the checkpoint"),
        (lambda: new_model(kind=Norm), "only one side has is nothing in the model and norm.running_mean, "),
        (
            lambda: new_model(dtype=torch.bfloat16),
            "dtype of tied is bfloat16 in the model and float32 in the checkpoint",
        ),
    ],
    ids=["a renamed parameter", "a frozen parameter", "another norm", "another dtype"],
)
def test_another_model_is_told_by_its_first_difference(
    model: Callable[[], nn.Module], says: str, tmp_path: Path
) -> None:
    Peer().save(CheckpointStore(tmp_path))
    with pytest.raises(ConfigurationError, match=f"is of another model: .*({says})"):
        restored(tmp_path, model())


@pytest.mark.parametrize(
    "changed",
    [{"lr": 5.0}, {"weight_decay": 0.0}, {"compression_topk": 2}, {"compression_decay": 0.5}, {"arithmetic": "float"}],
    ids=lambda changed: next(iter(changed)),
)
def test_other_settings_of_the_optimizer_are_the_new_ones(changed: dict[str, Any], tmp_path: Path) -> None:
    peer, model = Peer(), new_model(seed=8)
    peer.save(CheckpointStore(tmp_path))
    optimizer = new_optimizer(model, **changed)
    checkpoint = restored(tmp_path, model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), peer.model.parameters(), strict=True))
    assert checkpoint.momentum().keys() == peer.trainer.momentum().keys()
    for name, value in changed.items():
        assert getattr(optimizer, name, optimizer.param_groups[0].get(name)) == value


def test_a_host_goes_on_at_its_sample_with_another_batch_another_schedule_and_another_end(tmp_path: Path) -> None:
    before = RunConfig(total_steps=50, global_batch_size=8).coordinator_state("friends")
    before = replace(before, progress=replace(before.progress, step=40, epoch_start_data_index=312))
    Peer().save(CheckpointStore(tmp_path), step=40, state=before)
    checkpoint = restored(tmp_path, new_model(seed=8))
    after = state_to_resume(checkpoint, RunConfig(total_steps=70, global_batch_size=12))
    assert after is not None
    assert (after.progress.step, after.progress.epoch_start_data_index) == (40, 312)
    assert after.config.global_batch_size_end == 12
    assert after.config.total_steps > before.config.total_steps
    unsaid = state_to_resume(checkpoint, RunConfig())
    assert unsaid is not None
    assert unsaid.config.global_batch_size_end == 8


@pytest.mark.parametrize("number", [1, FORMAT + 1])
def test_a_checkpoint_of_another_version_is_not_called_damaged(number: int, tmp_path: Path) -> None:
    path = Peer().save(CheckpointStore(tmp_path)) / "distro_optim.json"
    about = json.loads(path.read_text())
    about["model"]["distro_optim"] |= {"format": number, "version": "0.0.7\x1b[2J"}
    path.write_text(json.dumps(about))
    says = f"was saved by distro_optim 0.0.7?[2J in format {number}, and distro_optim "
    with pytest.raises(ConfigurationError, match=re.escape(says)) as caught:
        restored(tmp_path, new_model())
    assert "damaged" not in str(caught.value)
    assert "load model.safetensors from there" in str(caught.value)
