"""Variations of the recipe in the benchmarks: without a change they are the recipe, and each changes something."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

RATES = [0.1, 0.05, 0.1, 0.02, 0.03, 0.01]
RECIPE: dict[str, Any] = {
    "lr": 0.1, "topk": 1, "decay": 0.7, "quantize": True, "overlap": True, "direction": "orthogonal", "update": "rms",
    "chunk": 4,
}  # fmt: skip


@pytest.fixture
def varied(base: ModuleType) -> ModuleType:
    return importlib.import_module("learners.varied")


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))


def squares(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(model(x), y)


def batch(step: int, worker: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(100 * step + worker))
    return x, x[:, :4] * x[:, 4:]


def trained(base: ModuleType, kind: Any, **settings: Any) -> list[Tensor]:
    workers = kind(base.Task("products", net, squares), base.Method("one", **{**RECIPE, **settings}), 2)
    for step, lr in enumerate(RATES):
        workers.step([batch(step, worker) for worker in range(2)], lr)
    return [p.detach().clone() for p in workers.model().parameters()]


def differ(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return any(not torch.allclose(a, b, rtol=0, atol=1e-4) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    "settings",
    [{}, {"momentum": 0.5}, {"ahead": "delta"}, {"chunk": 8, "topk": 3}, {"overlap": False, "decay": 0.3}],
    ids=str,
)
def test_without_a_change_it_is_the_plain_twin(base: ModuleType, varied: ModuleType, settings: dict[str, Any]) -> None:
    class Twins(importlib.import_module("learners.plain").PlainWorkers):  # type: ignore[misc]
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, torch.float32)

    # In time, the variation looks ahead all the same.
    change = base.Variation(times=1.0 if settings.get("overlap", True) else 0.0)
    ours = trained(base, varied.VariedWorkers, variation=change, **settings)
    twin = trained(base, Twins, **settings)
    torch.testing.assert_close(ours, twin, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"times": 2.0}, {"applied_ahead": 1.0}, {"squarings": 3}, {"equal_rows": True}, {"shared": 0.5},
        {"sends_all": True}, {"adds_up": True}, {"orthogonal_after": True}, {"momentum_after": 0.5},
        {"embedding_gain": 1.5}, {"adam_rows": 12}, {"tile_scale": True}, {"by_energy": True}, {"growing_over": 4},
    ],
    ids=str,
)  # fmt: skip
def test_a_change_changes_what_is_learned(base: ModuleType, varied: ModuleType, change: dict[str, Any]) -> None:
    settings = {"chunk": 8, "topk": 8}
    ours = trained(base, varied.VariedWorkers, variation=base.Variation(**change), **settings)
    assert all(weights.isfinite().all() for weights in ours)
    assert differ(ours, trained(base, varied.VariedWorkers, variation=base.Variation(), **settings))


def test_between_two_exchanges_the_shared_weights_stay(base: ModuleType, varied: ModuleType) -> None:
    settings: dict[str, Any] = {"variation": base.Variation(), "overlap": False}
    first = [p.detach() for p in net().parameters()]
    assert not differ(trained(base, varied.VariedWorkers, local_steps=7, **settings), first)
    assert differ(trained(base, varied.VariedWorkers, local_steps=3, **settings), first)


def test_the_direction_has_elements_of_the_size_of_signs(varied: ModuleType) -> None:
    for shape in ((6, 20), (20, 6), (9, 9)):
        direction = varied.orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
        assert direction.shape == shape
        assert 0.6 < float(direction.square().mean().sqrt()) < 1.3


def sent_by(base: ModuleType, varied: ModuleType, topk: int, **changes: Any) -> float:
    method = base.Method("one", variation=base.Variation(**changes), **{**RECIPE, "chunk": 8, "topk": topk})
    workers = varied.VariedWorkers(base.Task("products", net, squares), method, 1)
    workers.step([batch(0, 0)], 0.1)
    return float(workers.sent_per_step())


def test_bytes_are_counted_by_what_is_sent(base: ModuleType, varied: ModuleType) -> None:
    # Of matrices of (12, 8) and (4, 12), and vectors of 12 and 4, in tiles of up to 8 x 8.
    plain = sent_by(base, varied, 2)
    tiles = plain * 8 / (2 * 9)
    assert tiles == int(tiles) > 4
    assert sent_by(base, varied, 2, tile_scale=True) == plain + 2 * tiles
    assert sent_by(base, varied, 2, growing_over=1) == sent_by(base, varied, 3)
    assert sent_by(base, varied, 2, coded=True) < plain
    whole = sent_by(base, varied, 2, by_energy=True)
    assert whole == plain  # as many coefficients, of tensors of at most 256 positions


def test_coefficients_go_where_the_largest_are(base: ModuleType, varied: ModuleType) -> None:
    method = base.Method("one", variation=base.Variation(by_energy=True), **{**RECIPE, "chunk": 4, "topk": 2})
    workers = varied.VariedWorkers(base.Task("products", net, squares), method, 1)
    unsent = torch.zeros(12, 8)
    unsent[:4, :4] = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    message = workers._message(unsent, counts=True)
    assert message.flatten(1).count_nonzero(1).tolist() == [12, 0, 0, 0, 0, 0]


def test_matrices_of_so_many_rows_go_as_adam_would(base: ModuleType, varied: ModuleType) -> None:
    method = base.Method("one", variation=base.Variation(adam_rows=12), **RECIPE)
    workers = varied.VariedWorkers(base.Task("products", net, squares), method, 1)
    adam = torch.zeros(12, 8, requires_grad=True)
    optimizer = torch.optim.Adam([adam], lr=1.0, betas=(0.9, 0.95))
    for step in range(5):
        workers._steps += 1
        gradient = torch.randn(12, 8, generator=torch.Generator().manual_seed(step))
        before, adam.grad = adam.detach().clone(), gradient
        optimizer.step()
        torch.testing.assert_close(workers._direction(0, 0, gradient), before - adam.detach(), rtol=1e-4, atol=1e-6)


def test_methods_of_the_page_have_names_of_their_own(base: ModuleType) -> None:
    settings = importlib.import_module("learners.settings").SETTINGS
    names = [method.name for method in settings["bytes, tried beyond"].methods]
    assert len(names) == len(set(names))
    assert {method.name for method in settings["bytes, beyond"].methods} <= set(names)


def test_results_from_before_there_were_variations_are_found(base: ModuleType) -> None:
    """A run is named by its settings, and those that say what all runs did then say nothing."""
    settings = importlib.import_module("learners.settings")
    results = importlib.import_module("learners.results")
    run = settings.Run(settings.SETTINGS["bytes"], settings.RECIPE, settings.USED, 0)
    assert not {"chunk", "momentum", "ahead", "variation"} & results._told(run)["method"].keys()
    other = settings.Run(settings.SETTINGS["bytes, beyond"], settings.SETTINGS["bytes, beyond"].methods[-1], "", 0)
    assert {"chunk": 16, "momentum": 0.9, "ahead": "delta"}.items() <= results._told(other)["method"].items()
