"""Without overlap the momentum of a matrix of whole tiles is kept as its coefficients, and is the same momentum."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from distro_optim import DisTrO
from distro_optim.compress import from_coefficients, tile_grid, to_coefficients
from distro_optim.compress.tiling import Tiling
from distro_optim.errors import ConfigurationError
from distro_optim.optim.rules import PUBLISHED
from optimizer.models import same_bits

SETTINGS: dict[str, Any] = {"lr": 1e-2, "compression_topk": 4, "compression_chunk": 16, "overlap": False}


def with_gradient(param: torch.nn.Parameter, step: int) -> torch.nn.Parameter:
    param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step)).to(param.dtype)
    return param


def trained(shape: tuple[int, ...], steps: int = 3, **settings: Any) -> tuple[torch.nn.Parameter, DisTrO]:
    param = torch.nn.Parameter(torch.zeros(shape))
    optimizer = DisTrO([param], **{**SETTINGS, **settings})
    for step in range(steps):
        with_gradient(param, step)
        optimizer.step()
    return param, optimizer


@pytest.mark.parametrize(
    ("shape", "settings", "form"),
    [
        ((32, 48), {}, "coefficients"),
        ((32, 10), {}, "coefficients"),
        ((32, 48), {"overlap": True}, "delta"),  # the lookahead needs its sign
        ((32, 48), {"transform": "identity"}, "delta"),
        ((32, 47), {}, "delta"),  # a tile reaches beyond
        ((32, 47), {"tiling": "divisor"}, "coefficients"),
        ((48,), {}, "delta"),
        ((8, 4, 16, 16), {"tiling": "divisor"}, "delta"),
        ((0, 16), {}, "delta"),
    ],
)
def test_which_form_a_parameter_has(shape: tuple[int, ...], settings: dict[str, Any], form: str) -> None:
    param, optimizer = trained(shape, **settings)
    assert {"delta", "coefficients"} & set(optimizer.state[param]) == {form}
    assert optimizer.delta(param).shape == shape
    if form == "delta":
        assert same_bits(optimizer.delta(param), optimizer.state[param]["delta"])


@pytest.mark.parametrize("tiling", ["padded", "divisor"])
@pytest.mark.parametrize("shape", [(32, 48), (16, 10), (1, 16), (7, 3)])
def test_a_tensor_comes_back_from_its_coefficients(shape: tuple[int, ...], tiling: Tiling) -> None:
    grid = tile_grid(shape, 16, tiling)
    tensor = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    coefficients = to_coefficients(tensor, grid)
    assert coefficients.shape == (grid.tiles, grid.h, grid.w)
    torch.testing.assert_close(from_coefficients(coefficients, grid), tensor)
    torch.testing.assert_close(coefficients.norm(), tensor.norm())


def test_a_tile_is_where_it_belongs() -> None:
    tensor = torch.zeros(32, 48)
    tensor[16:, 16:32] = 1.0
    coefficients = to_coefficients(tensor, tile_grid((32, 48), 16, "padded"))
    expected = torch.zeros(6, 16, 16)
    expected[4, 0, 0] = 16.0
    torch.testing.assert_close(coefficients, expected)


@pytest.mark.parametrize("quantize", [False, True])
def test_nothing_is_left_of_what_was_sent(quantize: bool) -> None:
    param, optimizer = trained((32, 48), quantize_1bit=quantize)
    update = optimizer.generate()
    [index] = update.index
    left = optimizer.state[param]["coefficients"].view(6, -1)
    assert not left.gather(1, index.long()).any()
    assert left.count_nonzero() == left.numel() - index.numel()


def test_what_rounding_to_the_dtype_sent_takes_away_is_left() -> None:
    param = torch.nn.Parameter(torch.zeros(16, 16, dtype=torch.bfloat16))
    optimizer = DisTrO([param], **{**SETTINGS, "compression_topk": 256, "quantize_1bit": False}, **PUBLISHED)
    with_gradient(param, 0)
    update = optimizer.generate()
    assert param.grad is not None
    sent = torch.zeros(256).scatter_(0, update.index[0][0].long(), update.value[0][0].float()).view(1, 16, 16)
    went_in = 1e-2 * to_coefficients(param.grad.float(), optimizer.plan.grids[0])
    assert bool((sent != went_in).any())
    torch.testing.assert_close(optimizer.state[param]["coefficients"], went_in - sent, rtol=0, atol=1e-8)


def test_matrices_and_tensors_of_more_dimensions_have_each_their_form() -> None:
    """Their tiles are of one shape, but not of one batch."""
    shapes = [(16, 16), (2, 16, 16), (32, 16)]
    together = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    apart = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizers = [DisTrO(params, tiling="divisor", **SETTINGS) for params in (together, *([p] for p in apart))]
    for step in range(3):
        for number, (a, b) in enumerate(zip(together, apart, strict=True)):
            with_gradient(a, 10 * step + number)
            with_gradient(b, 10 * step + number)
        for optimizer in optimizers:
            optimizer.step()
    assert ["coefficients" in optimizers[0].state[p] for p in together] == [True, False, True]
    for a, b in zip(together, apart, strict=True):
        assert same_bits(a, b)


def test_a_matrix_without_a_gradient_keeps_its_coefficients() -> None:
    params = [torch.nn.Parameter(torch.zeros(16, 16)) for _ in range(3)]
    optimizer = DisTrO(params, **SETTINGS)
    for number, param in enumerate(params):
        with_gradient(param, number)
    optimizer.step()
    before = optimizer.state[params[1]]["coefficients"].clone()
    params[1].grad = None
    update = optimizer.generate()
    assert update.present == (True, False, True)
    assert same_bits(optimizer.state[params[1]]["coefficients"], before)


@pytest.mark.parametrize("saved_overlap", [False, True])
def test_the_other_form_is_loaded_too(saved_overlap: bool) -> None:
    param, optimizer = trained((32, 48), overlap=saved_overlap)
    optimizer.flush()
    other = torch.nn.Parameter(param.detach().clone())
    loading = DisTrO([other], **{**SETTINGS, "overlap": not saved_overlap})
    loading.load_state_dict(optimizer.state_dict())
    assert ("coefficients" in loading.state[other]) == saved_overlap
    assert loading.delta(other).abs().max() > 0
    torch.testing.assert_close(loading.delta(other), optimizer.delta(param))
    with_gradient(other, 9)
    loading.step()


@pytest.mark.parametrize("shape", [(3, 3), (1, 16, 16), (6, 16, 8)])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("key", ["delta", "coefficients"])
def test_momentum_of_another_shape_is_refused_in_either_form(shape: tuple[int, ...], overlap: bool, key: str) -> None:
    param, optimizer = trained((32, 48), overlap=overlap)
    before = optimizer.delta(param)
    saved = copy.deepcopy(optimizer.state_dict())
    for form in ("delta", "coefficients"):
        saved["state"][0].pop(form, None)
    saved["state"][0][key] = torch.zeros(shape)
    with pytest.raises(ConfigurationError, match=r"parameter 0 has shape"):
        optimizer.load_state_dict(saved)
    assert same_bits(optimizer.delta(param), before)


def test_other_settings_leave_the_momentum_as_it_is() -> None:
    param, optimizer = trained((32, 48))
    before = optimizer.delta(param)
    optimizer.reconfigure(tiling="divisor", quantize_1bit=True, compression_chunk=8, compression_topk=2)
    assert optimizer.state[param]["coefficients"].shape == (24, 8, 8)
    torch.testing.assert_close(optimizer.delta(param), before)
    with_gradient(param, 9)
    optimizer.step()


def test_a_reset_forgets_either_form() -> None:
    matrix, odd = torch.nn.Parameter(torch.zeros(32, 48)), torch.nn.Parameter(torch.zeros(5, 17))
    optimizer = DisTrO([matrix, odd], **SETTINGS)
    for param in (matrix, odd):
        with_gradient(param, 0)
    optimizer.step()
    assert all(optimizer.delta(p).any() for p in (matrix, odd))
    optimizer.reset()
    assert not any(optimizer.delta(p).any() for p in (matrix, odd))


def test_the_momentum_of_a_stranger_is_refused() -> None:
    _, optimizer = trained((32, 48))
    with pytest.raises(ConfigurationError, match="not one of the optimizer's parameters"):
        optimizer.delta(torch.zeros(32, 48))
