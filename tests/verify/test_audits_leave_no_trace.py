"""Gradients on the side: training goes on bit by bit as if nobody had audited."""

# ruff: noqa: NPY002 - the generator that scripts draw from without naming one is what is tested

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typing_extensions import override

from distro_optim import DisTrO
from distro_optim.errors import ConfigurationError
from distro_optim.optim.rules import PUBLISHED
from distro_optim.verify.quiet import quiet_gradients, untouched


class Everything(nn.Module):
    """All that leaves traces: norms, dropout, counters, caches, generators, tied and normalised weights, an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.5)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        with pytest.warns(FutureWarning):
            self.scaled = torch.nn.utils.weight_norm(nn.Linear(16, 16))
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))
        self.out = nn.Linear(16, 11, bias=False)
        self.out.weight = self.embed.weight
        self.calls = 0
        self.cache: Tensor | None = None
        self.generator = torch.Generator().manual_seed(3)

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        x = self.embed(tokens)
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        x = self.drop(x) + float(torch.rand((), generator=self.generator)) * random.random() * np.random.rand()
        with torch.autocast("cpu", enabled=False):  # not every CPU has one in bfloat16
            x, _ = self.lstm(x.float())
        seen = x.detach().mean(0)
        self.cache = seen if self.cache is None else self.cache * 0.5 + seen
        answer: Tensor = self.out(self.spectral(self.scaled(torch.tanh(x))))
        return answer


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens)
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.roll(-1, 1).flatten())


def train(*, audited: bool) -> dict[str, Any]:
    """Six steps; everything that they leave behind."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = Everything()
    optimizer = DisTrO(model.parameters(), lr=1e-2, **PUBLISHED)
    heard: list[str] = []
    model.register_forward_hook(lambda *_: heard.append("forward"))
    model.lstm.register_full_backward_pre_hook(lambda *_: heard.append("backward"))
    model.embed.weight.register_post_accumulate_grad_hook(lambda _: heard.append("gradient"))
    everywhere = nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: heard.append(type(module).__name__)
    )
    parameters = dict(model.named_parameters())
    losses, audits = [], 0
    try:
        for step in range(6):
            tokens = torch.randint(11, (4, 7))
            loss = loss_of(model, tokens)
            loss.backward()
            if audited and step % 2:
                others = [torch.arange(14).view(2, 7) % 11, torch.arange(21).view(3, 7) % 11]
                there = {name: torch.zeros_like(p) + 0.01 for name, p in parameters.items() if name == "embed.weight"}
                found = quiet_gradients(model, parameters, lambda b: loss_of(model, b), others, weights=there)
                assert all(g is not None and bool(g.any()) for g in found[0][:1])
                audits += 1
            losses.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
    finally:
        everywhere.remove()
    assert audits == (3 if audited else 0)
    return {
        "losses": losses,
        "weights": model.state_dict(),
        "optimizer": optimizer.state_dict()["state"],
        "plain": (model.calls, model.cache, model.training, model.drop.training, model.scaled.weight.detach()),
        "heard": heard,
        "torch": torch.get_rng_state(),
        "own": model.generator.get_state(),
        "python": random.random(),
        "numpy": np.random.rand(),
        "autocast": (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
        ),
        "tied": model.out.weight is model.embed.weight,
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_training_is_the_same_bit_by_bit() -> None:
    without, with_audits = train(audited=False), train(audited=True)
    assert without["heard"].count("gradient") == 6
    for part, value in without.items():
        assert same(value, with_audits[part]), part


def test_everything_is_as_it_was_where_the_loss_function_fails() -> None:
    model = Everything()
    before = {part: dict(part.__dict__) for part in model.modules()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()

    def fail(tokens: Tensor) -> Tensor:
        loss_of(model, tokens)
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        quiet_gradients(model, dict(model.named_parameters()), fail, [torch.zeros(1, 7, dtype=torch.long)])
    for part, attributes in before.items():
        assert part.__dict__.keys() == attributes.keys()
        assert all(part.__dict__[name] is value for name, value in attributes.items())
    assert same(model.state_dict(), weights)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_dropout_is_off_unless_it_is_wanted() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    for wanted in (False, True):
        with untouched(model, dict(model.named_parameters()), dropout=wanted):
            assert model[1].training is wanted
            assert model[0].training
        assert model[1].training


def test_weights_of_the_step_are_computed_with_whatever_the_parameters_hold() -> None:
    model = nn.Linear(3, 1, bias=False)
    parameters = dict(model.named_parameters())
    weights = {"weight": torch.full((1, 3), 2.0)}
    data = torch.tensor([[1.0, 2.0, 3.0]])
    [[found]] = quiet_gradients(model, parameters, lambda b: model(b).square().sum(), [data], weights=weights)
    assert torch.equal(found, 2 * 12.0 * data)  # type: ignore[arg-type]
    assert not torch.equal(model.weight, weights["weight"])
    assert model.weight.grad is None


def test_what_cannot_be_audited_with_is_told() -> None:
    model, other = nn.Linear(3, 1), nn.Linear(3, 1)
    parameters, data = dict(model.named_parameters()), torch.ones(1, 3)
    with pytest.raises(ConfigurationError, match="bias is not a parameter"):
        quiet_gradients(model, {"bias": other.bias}, lambda b: model(b).sum(), [data])
    with pytest.raises(ConfigurationError, match="no parameter nobody"):
        quiet_gradients(model, parameters, lambda b: model(b).sum(), [data], weights={"nobody": data})
    with pytest.raises(ConfigurationError, match="have shape"):
        quiet_gradients(model, parameters, lambda b: model(b).sum(), [data], weights={"bias": data})
    with pytest.raises(ConfigurationError, match="call the model itself"):
        quiet_gradients(model, parameters, lambda b: b.sum(), [data])
