"""Hyper-parameters live in param_groups: schedulers steer them, groups differ in them, groups come later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from distro_optim import DisTrO, MemoryExchange
from distro_optim.errors import ConfigurationError
from distro_optim.optim import planned
from distro_optim.optim.rules import PUBLISHED
from optimizer.models import STEPS, EveryShape, copies, same_bits, set_gradients

SCHEDULERS: dict[str, Callable[[DisTrO], LRScheduler]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 4)),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20, cycle_momentum=False),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=10),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
}


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_sets_the_size_of_every_step(name: str, tensor_lr: bool) -> None:
    param = nn.Parameter(torch.zeros(8, dtype=torch.float64))
    lr = torch.tensor(0.1) if tensor_lr else 0.1
    optimizer = DisTrO([param], lr=lr, overlap=False, quantize_1bit=False, **PUBLISHED)
    scheduler = SCHEDULERS[name](optimizer)
    rates = []
    for step in range(8):
        before = param.detach().clone()
        rate = float(optimizer.param_groups[0]["lr"])
        rates.append(rate)
        set_gradients([param], step)
        optimizer.step()
        moved = (param - before).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, rate))
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        else:
            scheduler.step()
    assert len(set(rates)) > 2


def test_groups_differ_in_every_hyper_parameter() -> None:
    a, b = nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(8, 8))
    optimizer = DisTrO(
        [
            {"params": [a], "lr": 0.5, "compression_topk": 3, "compression_chunk": 4, "compression_decay": 0.5},
            {"params": [b], "weight_decay": 0.5},
        ],
        lr=0.25,
        overlap=False,
        **PUBLISHED,
    )
    before = copies([a, b])
    set_gradients([a, b], 0)
    first = optimizer.generate()
    assert [entry.index.shape for entry in first.tensors()] == [(2, 2, 3), (1, 1, 8)]
    assert same_bits(a, before[0])
    assert same_bits(b, before[1] * (1 - 0.25 * 0.5))
    optimizer.apply([first])
    torch.testing.assert_close((a - before[0]).abs(), torch.full((8, 8), 0.5))
    torch.testing.assert_close((b - before[1] * 0.875).abs(), torch.full((8, 8), 0.25))


def test_the_momentum_of_each_group_decays_at_its_own_rate_which_may_change() -> None:
    a, b = nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(8, 8))
    optimizer = DisTrO([{"params": [a], "compression_decay": 0.5}, {"params": [b]}], lr=0.0)
    for param in (a, b):
        optimizer.state[param]["delta"].fill_(1.0)
        param.grad = torch.ones(8, 8)
    optimizer.param_groups[1]["compression_decay"] = 0.25
    optimizer.generate()
    torch.testing.assert_close(optimizer.state[a]["delta"], torch.full((8, 8), 0.5))
    torch.testing.assert_close(optimizer.state[b]["delta"], torch.full((8, 8), 0.25))


def test_one_group_trains_as_its_parameters_would_alone() -> None:
    together = [nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(70))]
    apart = [nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(70))]
    settings: list[dict[str, Any]] = [{"lr": 0.5, "compression_topk": 2}, {"lr": 0.125, "compression_chunk": 16}]
    joint = DisTrO([{"params": [p], **s} for p, s in zip(together, settings, strict=True)])
    single = [DisTrO([p], **s) for p, s in zip(apart, settings, strict=True)]
    for step in range(5):
        set_gradients(together, step)
        set_gradients(apart, step)
        for optimizer in (joint, *single):
            optimizer.step()
    for a, b in zip(together, apart, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize(("name", "value"), [("compression_topk", 5), ("compression_chunk", 32)])
def test_a_tiling_changed_in_mid_run_is_refused_rather_than_ignored(name: str, value: int) -> None:
    param = nn.Parameter(torch.ones(64, 64))
    optimizer = DisTrO([param])
    set_gradients([param], 0)
    optimizer.step()
    optimizer.param_groups[0][name] = value
    with pytest.raises(ConfigurationError, match=f"{name}={value}.*began with"):
        optimizer.step()


def test_state_exists_from_construction_for_every_parameter() -> None:
    model = EveryShape()
    optimizer = DisTrO(model.parameters())
    for param in model.parameters():
        state = optimizer.state[param]
        assert set(state) >= {"delta", "quarantined", "own_index", "own_value", "weight"}
        assert state["delta"].shape == param.shape
        assert same_bits(state["weight"], param)
        assert not any(state[key].any() for key in ("delta", "quarantined", "own_value"))


def test_without_overlap_there_is_no_third_copy_of_the_weights() -> None:
    model = EveryShape()
    optimizer = DisTrO(model.parameters(), overlap=False, **PUBLISHED)
    assert {key for p in model.parameters() for key in optimizer.state[p]} == {"delta", "quarantined"}


@pytest.mark.slow
@pytest.mark.parametrize("style", STEPS)
@pytest.mark.parametrize("overlap", [False, True], ids=["blocking", "overlap"])
def test_a_group_added_in_mid_run_has_state_at_once_and_trains_without_disturbing_the_others(
    overlap: bool, style: str
) -> None:
    grown, alone = EveryShape(), EveryShape()
    late = nn.Parameter(torch.zeros(5, 5))
    growing = DisTrO(grown.parameters(), lr=0.01, overlap=overlap)
    lonely = DisTrO(alone.parameters(), lr=0.01, overlap=overlap)
    for step in range(3):
        STEPS[style](grown, growing, step)
        STEPS[style](alone, lonely, step)
    # With overlap an update is on its way now, and in the plain style the weights look ahead.
    growing.add_param_group({"params": late, "lr": 0.5, "compression_topk": 1})
    assert same_bits(growing.delta(late), torch.zeros(5, 5))
    late.grad = torch.ones(5, 5)
    for step in range(3, 6):
        late.grad = torch.ones(5, 5)
        late.requires_grad_(False)  # spares it zero_grad()'s None
        model_grad = late.grad
        if style == "plain":
            growing.zero_grad()
            grown.loss(step).backward()
            late.grad = model_grad
            growing.step()
        else:

            def closure(step: int = step, gradient: torch.Tensor = model_grad) -> float:
                growing.zero_grad()
                loss = grown.loss(step)
                loss.backward()
                late.grad = gradient
                return loss.item()

            growing.step(closure)
        STEPS[style](alone, lonely, step)
    growing.eval()
    lonely.eval()
    for a, b in zip(grown.parameters(), alone.parameters(), strict=True):
        assert same_bits(a, b)
    steps_applied = 2 if overlap else 3
    assert torch.equal(late, torch.full((5, 5), -0.5 * steps_applied))


@pytest.mark.slow
def test_a_group_can_be_added_while_peers_have_an_update_in_flight() -> None:
    models = [EveryShape(), EveryShape()]
    late = [nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(5))]
    optimizers = [
        DisTrO(m.parameters(), lr=0.01, exchange=e) for m, e in zip(models, MemoryExchange.group(2), strict=True)
    ]
    for step in range(6):
        if step == 3:
            for optimizer, param in zip(optimizers, late, strict=True):
                optimizer.add_param_group({"params": [param]})
        for peer, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            model.loss(10 * step + peer).backward()
            set_gradients([late[peer]], 10 * step + peer)
            optimizer.begin_step()
        for optimizer in optimizers:
            optimizer.finish_step()
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert same_bits(a, b)
    assert same_bits(late[0], late[1])
    assert late[0].any()


def test_a_refused_group_leaves_everything_as_it_was() -> None:
    model = EveryShape()
    optimizer = DisTrO(model.parameters(), lr=0.01)
    for step in range(3):
        STEPS["plain"](model, optimizer, step)
    before = copies(model.parameters())
    for group in ({"params": [model.scale]}, {"params": [nn.Parameter(torch.zeros(3))], "lr": -1.0}, {"params": ["x"]}):
        with pytest.raises((ValueError, TypeError)):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    for param, weight in zip(model.parameters(), before, strict=True):
        assert same_bits(param, weight)
    STEPS["plain"](model, optimizer, 3)


def test_a_group_may_be_empty_until_it_is_not() -> None:
    optimizer = DisTrO([{"params": []}, {"params": [nn.Parameter(torch.ones(2))]}])
    set_gradients(optimizer.param_groups[1]["params"], 0)
    optimizer.step()
    assert len(optimizer.plan) == 1


def test_parameters_are_looked_through_for_shards_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def is_sharded(param: object) -> bool:
        asked.append(param)
        return False

    monkeypatch.setattr(planned, "is_sharded", is_sharded)
    params = [torch.zeros(4, 4) for _ in range(3)]
    optimizer = DisTrO(params[:2], lr=0.1)
    for _ in range(2):
        asked.clear()
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        asked.clear()
        optimizer.step()
        optimizer.eval()
        optimizer.train()
        assert not asked
        if len(optimizer.param_groups) == 1:
            optimizer.add_param_group({"params": params[2:]})
            assert any(one is params[2] for one in asked)
