"""``torch.set_default_device`` decides where a script makes its tensors, and nothing about a step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from distro_optim import DisTrO
from distro_optim.optim.rules import PUBLISHED
from torch_settings import default_device


@pytest.fixture
def _made_nowhere() -> Iterator[None]:
    with default_device("meta"):
        yield


def trained(model: nn.Module, **settings: Any) -> tuple[torch.Tensor, ...]:
    optimizer = DisTrO(model.parameters(), lr=0.01, weight_decay=0.1, **settings, **PUBLISHED)
    x = torch.linspace(-1, 1, 4 * 20, device="cpu").view(4, 20)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.flush()
    return tuple(parameter.detach() for parameter in model.parameters())


@pytest.mark.parametrize("arithmetic", ["exact", "float", "psyche"])
@pytest.mark.parametrize("quantize_1bit", [False, True])
def test_a_default_device_without_memory_changes_no_bit(
    arithmetic: str, quantize_1bit: bool, request: pytest.FixtureRequest
) -> None:
    settings: dict[str, Any] = {"arithmetic": arithmetic, "quantize_1bit": quantize_1bit}
    model = nn.Linear(20, 30)
    other = copy.deepcopy(model)
    expected = trained(model, **settings)
    request.getfixturevalue("_made_nowhere")
    assert all(a.equal(b) for a, b in zip(trained(other, **settings), expected, strict=True))
