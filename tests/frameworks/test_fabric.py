"""Lightning Fabric takes the optimizer as it is, and its wrapper hands on what only this optimizer can do."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from distro_optim import DisTrO
from optimizer.models import EveryShape, all_same_bits, copies, plain_step

pytestmark = [pytest.mark.waiting, pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning")]


def make_fabric(**settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what lightning imports
        from lightning.fabric import Fabric
    return Fabric(accelerator="cpu", devices=1, **settings)


def train(fabric: Any, model: Any, optimizer: Any, steps: range, net: EveryShape) -> None:
    for step in steps:
        optimizer.zero_grad()
        fabric.backward(net.loss(step))
        optimizer.step()


def test_it_trains_as_without_fabric() -> None:
    net, twin = EveryShape(), EveryShape()
    fabric = make_fabric()
    model, optimizer = fabric.setup(net, DisTrO(net.parameters(), lr=0.01), _reapply_compile=False)
    train(fabric, model, optimizer, range(6), net)
    plain = DisTrO(twin.parameters(), lr=0.01)
    for step in range(6):
        plain_step(twin, plain, step)
    assert all_same_bits(copies(net.parameters()), copies(twin.parameters()))


def test_eval_train_and_flush_through_the_wrapper_reach_the_optimizer() -> None:
    net, twin = EveryShape(), EveryShape()
    fabric = make_fabric()
    optimizer, plain = DisTrO(net.parameters(), lr=0.01), DisTrO(twin.parameters(), lr=0.01)
    model, wrapper = fabric.setup(net, optimizer, _reapply_compile=False)
    assert wrapper is not optimizer
    for step in range(6):
        train(fabric, model, wrapper, range(step, step + 1), net)
        plain_step(twin, plain, step)
        wrapper.eval()
        plain.eval()
        assert all_same_bits(copies(net.parameters()), copies(twin.parameters()))
        wrapper.train()
        plain.train()
        if step == 3:
            wrapper.flush()
            plain.flush()
    assert all_same_bits(copies(net.parameters()), copies(twin.parameters()))
    assert wrapper.quarantined == 0


def test_gradients_are_clipped_through_fabric() -> None:
    net = EveryShape()
    fabric = make_fabric()
    model, optimizer = fabric.setup(net, DisTrO(net.parameters(), lr=0.01), _reapply_compile=False)
    fabric.backward(net.loss(0))
    fabric.clip_gradients(model, optimizer, max_norm=1e-3)
    optimizer.step()
    norm = sum(optimizer.state[p]["delta"].square().sum() for p in net.parameters()).sqrt()
    assert norm <= 0.01 * 1e-3 * 1.001


def test_save_and_load_continue_bit_for_bit(tmp_path: Path) -> None:
    runs = []
    fabric = make_fabric()
    for seed in (0, 1):
        net = EveryShape(seed=seed)
        model, optimizer = fabric.setup(net, DisTrO(net.parameters(), lr=0.01), _reapply_compile=False)
        runs.append((net, model, optimizer))
    net, model, optimizer = runs[0]
    train(fabric, model, optimizer, range(4), net)
    fabric.save(tmp_path / "run.ckpt", {"model": model, "optimizer": optimizer})
    train(fabric, model, optimizer, range(4, 8), net)
    other, other_model, other_optimizer = runs[1]
    fabric.load(tmp_path / "run.ckpt", {"model": other_model, "optimizer": other_optimizer})
    train(fabric, other_model, other_optimizer, range(4, 8), other)
    assert all_same_bits(copies(net.parameters()), copies(other.parameters()))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_it_trains_at_every_precision_of_the_cpu(precision: str) -> None:
    fabric = make_fabric(precision=precision)
    net = torch.nn.Linear(8, 1)
    model, optimizer = fabric.setup(net, DisTrO(net.parameters(), lr=0.02), _reapply_compile=False)
    losses = []
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(x) - x[:, :1].to(model(x).dtype)).square().mean()
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
