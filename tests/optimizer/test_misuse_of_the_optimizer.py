"""What goes wrong in other optimizers' silence, or would make peers differ for good, is said, or does no harm."""

from __future__ import annotations

import re
import warnings
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import nn

from distro_optim import DisTrO, MemoryExchange
from distro_optim.errors import ConfigurationError, DistroError, ExchangeError
from distro_optim.optim.rules import PUBLISHED
from distro_optim.testing import step_together

SETTINGS: dict[str, Any] = {"lr": 1e-2, "compression_topk": 4, "compression_chunk": 8}


def parameter(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def with_gradient(param: nn.Parameter, seed: int) -> nn.Parameter:
    param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed))
    return param


def pair(**settings: Any) -> tuple[list[nn.Parameter], list[DisTrO]]:
    params = [parameter(64, 64) for _ in range(2)]
    exchanges = MemoryExchange.group(2)
    optimizers = [DisTrO([p], exchange=e, **{**SETTINGS, **settings}) for p, e in zip(params, exchanges, strict=True)]
    return params, optimizers


def take_step(params: list[nn.Parameter], optimizers: list[DisTrO], step: int) -> None:
    for number, param in enumerate(params):
        with_gradient(param, 10 * step + number)
    step_together(optimizers)


def test_peers_that_clip_what_looks_ahead_are_told_where_to_do_it() -> None:
    params, optimizers = pair()
    take_step(params, optimizers, 0)
    take_step(params, optimizers, 1)
    for param in params:
        with torch.no_grad():
            param.clamp_(-1, 1)
    with pytest.raises(DistroError, match=r"between optimizer.eval\(\) and optimizer.train\(\)"):
        take_step(params, optimizers, 2)


def test_there_peers_that_clip_stay_equal() -> None:
    params, optimizers = pair()
    for step in range(6):
        take_step(params, optimizers, step)
        for param, optimizer in zip(params, optimizers, strict=True):
            optimizer.eval()
            with torch.no_grad():
                param.clamp_(-1, 1)
            optimizer.train()
    for optimizer in optimizers:
        optimizer.eval()
    assert torch.equal(*params)
    assert params[0].abs().max() <= 1


def test_peers_that_load_a_checkpoint_stay_equal() -> None:
    params, optimizers = pair()
    take_step(params, optimizers, 0)
    take_step(params, optimizers, 1)
    loaded = parameter(64, 64, seed=7).detach()
    for param in params:
        with torch.no_grad():
            param.copy_(loaded)
    take_step(params, optimizers, 2)
    for optimizer in optimizers:
        optimizer.eval()
    assert torch.equal(*params)


def test_peers_with_other_transforms_do_not_train_together() -> None:
    exchanges = MemoryExchange.group(2)
    params = [parameter(16, 16) for _ in range(2)]
    transforms: list[Any] = ["dct", "identity"]
    optimizers = [
        DisTrO([p], exchange=e, transform=t, **SETTINGS) for p, e, t in zip(params, exchanges, transforms, strict=True)
    ]
    with pytest.raises(ExchangeError):
        take_step(params, optimizers, 0)


def test_what_is_frozen_does_not_look_ahead() -> None:
    param = parameter(16, 16)
    optimizer = DisTrO([param], **SETTINGS)
    for step in range(3):
        with_gradient(param, step)
        optimizer.step()
    param.requires_grad_(False)
    param.grad = None
    optimizer.eval()
    before = param.clone()
    optimizer.train()
    assert torch.equal(param, before)
    param.requires_grad_(True)
    optimizer.eval()
    assert torch.equal(param, before)


@pytest.mark.parametrize("shape", [(70, 70), (100,)])
def test_a_state_of_other_tiles_is_refused_where_it_is_loaded(shape: tuple[int, ...]) -> None:
    param, other = parameter(*shape), parameter(*shape)
    settings = {"lr": 1e-2, "compression_topk": 4, "compression_chunk": 64}
    saved = DisTrO([param], tiling="padded", **settings, **PUBLISHED)  # type: ignore[arg-type]
    for step in range(4):
        with_gradient(param, step)
        saved.step()
    loading = DisTrO([other], tiling="divisor", **settings, **PUBLISHED)  # type: ignore[arg-type]
    before = loading.state[other]["delta"].clone()
    with pytest.raises(ConfigurationError, match=r"tiling|shape"):
        loading.load_state_dict(saved.state_dict())
    assert torch.equal(loading.state[other]["delta"], before)


def test_momentum_that_is_not_finite_begins_anew() -> None:
    param = parameter(16, 16)
    optimizer = DisTrO([param], overlap=False, **SETTINGS)
    saved = optimizer.state_dict()
    saved["state"][0]["coefficients"] = torch.full((4, 8, 8), torch.nan)
    with pytest.warns(UserWarning, match="coefficients of parameter 0 is not finite"):
        optimizer.load_state_dict(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with_gradient(param, 0)
        optimizer.step()
    assert param.isfinite().all()


@pytest.mark.parametrize("lr", [float("nan"), float("inf"), None, "0.1"])
def test_a_learning_rate_that_is_none_spoils_nothing(lr: Any) -> None:
    param = with_gradient(parameter(16, 16), 0)
    optimizer = DisTrO([param], **SETTINGS)
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(ConfigurationError, match="lr="):
        optimizer.step()
    assert optimizer.state[param]["delta"].isfinite().all()
    optimizer.param_groups[0]["lr"] = 1e-2
    optimizer.step()


def test_a_state_that_is_saved_in_inference_mode_can_go_on() -> None:
    param = parameter(16, 16)
    optimizer = DisTrO([param], **SETTINGS)
    with torch.inference_mode():
        saved = optimizer.state_dict()
        optimizer.load_state_dict(saved)
    for step in range(3):
        with_gradient(param, step)
        optimizer.step()
    assert not optimizer.state[param]["delta"].is_inference()


@pytest.mark.parametrize(
    ("params", "error", "advice"),
    [
        ([{"params": nn.Linear(2, 2)}], TypeError, "module.parameters()"),
        ([{"params": None}], TypeError, "module.parameters()"),
        ([(nn.Parameter(torch.zeros(2)),)], TypeError, "tuples of name and tensor"),
        (list(nn.LazyLinear(2).parameters()), ConfigurationError, "after a forward pass"),
    ],
)
def test_parameters_that_are_none_are_named(params: Any, error: type[Exception], advice: str) -> None:
    with pytest.raises(error, match=re.escape(advice)):
        DisTrO(params)


@pytest.mark.parametrize("size", ["2", 2.5, None, True, 0])
def test_a_group_of_no_number_of_peers_is_refused(size: Any) -> None:
    with pytest.raises(ConfigurationError, match="give a whole number of peers"):
        MemoryExchange.group(size)


@pytest.mark.parametrize("timeout", [5, None, timedelta()])
def test_a_time_that_is_none_is_refused_before_anybody_waits(timeout: Any) -> None:
    with pytest.raises(ConfigurationError, match="timedelta"):
        MemoryExchange.group(2, timeout=timeout)


def test_the_checkpoint_of_one_peer_serves_all() -> None:
    """As of a script that saves on rank 0 only: the others' momentum is lost, and nothing else."""
    params, optimizers = pair()
    for step in range(4):
        take_step(params, optimizers, step)
    weights, saved = params[0].detach().clone(), optimizers[0].state_dict()
    params, optimizers = pair()
    for param, optimizer in zip(params, optimizers, strict=True):
        with torch.no_grad():
            param.copy_(weights)
        optimizer.load_state_dict(saved)
    for step in range(4, 8):
        take_step(params, optimizers, step)
    for optimizer in optimizers:
        optimizer.eval()
    assert torch.equal(*params)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_state_that_somebody_cleared_begins_anew(overlap: bool) -> None:
    param = with_gradient(parameter(16, 16), 0)
    optimizer = DisTrO([param], overlap=overlap, **SETTINGS)
    optimizer.step(lambda: 0.0)
    optimizer.state.clear()
    assert not optimizer.delta(param).any()
    with_gradient(param, 1)
    optimizer.step(lambda: 0.0)
    assert optimizer.delta(param).any()


def test_true_weights_that_were_cleared_are_missed_at_once() -> None:
    param = with_gradient(parameter(16, 16), 0)
    optimizer = DisTrO([param], overlap=True, **SETTINGS)
    optimizer.step()
    optimizer.state.clear()
    with pytest.raises(DistroError, match="cleared while the weights looked ahead"):
        optimizer.step()
