"""Tried as a new user would: a convolutional net, a tiny GPT and a model with a scalar parameter learn in seconds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from distro_optim import DisTrO
from optimizer.models import TinyGPT, TinyResNet

pytestmark = pytest.mark.slow

SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "DeMo": {"overlap": False, "quantize_1bit": False, "compression_topk": 32, "tiling": "divisor"},
    "blocking signs": {"overlap": False},
    "plain top-k": {"transform": "identity", "compression_topk": 512},
}


@pytest.fixture(autouse=True)
def _same_weights_every_time() -> None:
    torch.manual_seed(0)


def shapes(count: int) -> tuple[Tensor, Tensor]:
    """Noisy 12 x 12 pictures: of a horizontal, a vertical, a diagonal line, or of none."""
    y = torch.arange(count) % 4
    x = 0.3 * torch.randn(count, 1, 12, 12)
    for number, kind in enumerate(y.tolist()):
        at = int(torch.randint(2, 10, ()))
        if kind == 0:
            x[number, 0, at, :] += 1
        elif kind == 1:
            x[number, 0, :, at] += 1
        elif kind == 2:
            x[number, 0] += torch.diag(torch.ones(12))
    return x, y


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_residual_convolutional_net_learns_to_tell_shapes_apart(settings: dict[str, Any]) -> None:
    model = TinyResNet()
    optimizer = DisTrO(model.parameters(), lr=2e-3, **settings)
    x, y = shapes(256)
    for step in range(60):
        batch = torch.arange(32 * step, 32 * step + 32) % 256
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    optimizer.eval()
    model.eval()
    x, y = shapes(128)
    with torch.no_grad():
        accuracy = (model(x).argmax(1) == y).float().mean().item()
    assert accuracy > 0.8


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [*((s, torch.float32) for s in SETTINGS.values()), ({}, torch.bfloat16)],
    ids=[*SETTINGS, "bfloat16"],
)
def test_a_tiny_gpt_learns_to_count(settings: dict[str, Any], dtype: torch.dtype) -> None:
    model = TinyGPT().to(dtype)
    optimizer = DisTrO(model.parameters(), lr=2e-2, **settings)
    losses = []
    for _ in range(80):
        start = torch.randint(31, (16, 1))
        tokens = (start + 3 * torch.arange(17)) % 31
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(31), abs=0.5)
    assert sum(losses[-5:]) / 5 < 0.6


class Temperature(nn.Module):
    """A classifier of which only the temperature of the softmax is to be learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(0.0))

    @override
    def forward(self, x: Tensor) -> Tensor:
        return x * self.log_scale.exp()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_scalar_parameter_finds_its_value(settings: dict[str, Any]) -> None:
    model = Temperature()
    optimizer = DisTrO(model.parameters(), lr=0.05, compression_decay=0.9, **settings)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=150)
    for _ in range(150):
        x = torch.randn(256, 5)
        y = torch.distributions.Categorical(logits=3.0 * x).sample()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        scheduler.step()
    optimizer.eval()
    assert model.log_scale.exp().item() == pytest.approx(3.0, rel=0.15)
