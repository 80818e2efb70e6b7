"""What happens to weights beside the merge is exact too, in forms that give the same bits on every device.

Each test computes what must come out by numpy or by whole numbers, and shows that the form that other backends may use
gives something else for the same weights: a change to that form would fail here.
"""

from __future__ import annotations

import copy

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from compress.exact_cases import rounded_to_bfloat16
from distro_optim import DisTrO, MemoryExchange
from distro_optim.compress import CompressedUpdate
from distro_optim.errors import ConfigurationError
from distro_optim.optim.rules import PUBLISHED
from distro_optim.optim.weight_decay import shrink

from .models import set_gradients

HALVES = [torch.bfloat16, torch.float16]
LR = 1e-3


def made_up_weights(count: int, dtype: torch.dtype) -> Tensor:
    generator = np.random.Generator(np.random.PCG64(0))
    return torch.tensor(generator.integers(-(1 << 20), 1 << 20, count) * 2.0**-23).to(dtype)


def half_of(exact: npt.NDArray[np.float32], dtype: torch.dtype) -> Tensor:
    return rounded_to_bfloat16(exact) if dtype == torch.bfloat16 else torch.from_numpy(exact.astype(np.float16))


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype", HALVES)
def test_the_step_of_a_16_bit_weight_is_taken_in_float32(dtype: torch.dtype) -> None:
    param = nn.Parameter(made_up_weights(64 * 64, dtype).view(64, 64))
    before = param.detach().clone()
    optimizer = DisTrO([param], lr=LR, compression_topk=8, **PUBLISHED)
    set_gradients([param], 1)
    update = optimizer.generate()
    sign = optimizer.decode([update])[0].sign()
    optimizer.apply([update])
    exact = before.float().numpy() - np.float32(LR) * sign.numpy()
    assert same_bits(param.detach(), half_of(exact, dtype))
    rounded_first = before.clone().add_(sign.to(dtype), alpha=-float(torch.tensor(LR, dtype=dtype)))
    assert not same_bits(rounded_first, param.detach()), "a CPU rounds the rate to the type of the signs"


def test_the_step_of_a_float32_weight_does_not_depend_on_fused_operations() -> None:
    param = nn.Parameter(made_up_weights(64 * 64, torch.float32).view(64, 64))
    before = param.detach().clone()
    optimizer = DisTrO([param], lr=0.1, compression_topk=8, quantize_1bit=False, **PUBLISHED)
    set_gradients([param], 1)
    update = optimizer.generate()
    decoded = optimizer.decode([update])[0]
    optimizer.apply([update])
    twice_rounded = before.numpy() - np.float32(0.1) * decoded.sign().numpy()
    once_rounded = (before.double() - float(np.float32(0.1)) * decoded.sign().double()).float()
    assert same_bits(param.detach(), torch.from_numpy(twice_rounded))
    assert same_bits(param.detach(), once_rounded)
    # With other factors than -1, 0 and 1 it would: that is why the sign is taken before.
    other = decoded * 0.7
    unfused = torch.from_numpy(before.numpy() - np.float32(0.1) * other.numpy())
    fused = (before.double() - float(np.float32(0.1)) * other.double()).float()
    assert not same_bits(unfused, fused)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("contiguous", [True, False])
def test_weight_decay_multiplies_in_float32_and_rounds_once(dtype: torch.dtype, contiguous: bool) -> None:
    factor = 0.951
    weight = made_up_weights(90 * 90, dtype).view(90, 90)
    param = weight.clone() if contiguous else weight.t().clone(memory_format=torch.contiguous_format).t()
    exact = weight.float().numpy() * np.float32(factor)
    shrink(param, factor)
    right = torch.from_numpy(exact) if dtype == torch.float32 else half_of(exact, dtype)
    assert param.is_contiguous() == contiguous
    assert same_bits(param.contiguous(), right)
    factor_first = weight * torch.tensor(factor, dtype=dtype)
    if dtype != torch.float32:
        assert not same_bits(factor_first, right)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_optimizer_decays_16_bit_weights_in_that_form(dtype: torch.dtype) -> None:
    param = nn.Parameter(made_up_weights(64 * 64, dtype).view(64, 64))
    exact = param.detach().float().numpy() * np.float32(1 - LR * 49)
    optimizer = DisTrO([param], lr=LR, weight_decay=49)
    twin = DisTrO([nn.Parameter(param.detach().clone())], lr=LR, weight_decay=49)
    twin.decay_weights()
    set_gradients([param], 1)
    optimizer.generate()
    assert same_bits(param.detach(), half_of(exact, dtype))
    assert same_bits(twin.param_groups[0]["params"][0].detach(), param.detach())


def test_decay_and_step_are_two_roundings_not_one() -> None:
    param = nn.Parameter(made_up_weights(64 * 64, torch.float32).view(64, 64))
    before = param.detach().clone()
    optimizer = DisTrO([param], lr=LR, weight_decay=0.1, compression_topk=8, **PUBLISHED)
    set_gradients([param], 1)
    update = optimizer.generate()
    sign = optimizer.decode([update])[0].sign().numpy()
    optimizer.apply([update])
    factor, rate = np.float32(1 - LR * 0.1), np.float32(LR)
    separate = (before.numpy() * factor) - rate * sign
    in_one = (before.double().numpy() * float(factor) - float(rate) * sign).astype(np.float32)
    assert same_bits(param.detach(), torch.from_numpy(separate))
    assert not same_bits(torch.from_numpy(separate), torch.from_numpy(in_one)), "as a compiler would fuse them"


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_the_lookahead_is_taken_back_by_copies(dtype: torch.dtype) -> None:
    param = nn.Parameter(made_up_weights(64 * 64, dtype).view(64, 64))
    optimizer = DisTrO([param], lr=LR)
    set_gradients([param], 1)
    optimizer.generate()
    before = param.detach().clone()
    optimizer.lookahead()
    shifted = param.detach().clone()
    optimizer.undo_lookahead()
    assert same_bits(param.detach(), before)
    added_back = (shifted.float() + LR * optimizer.delta(param).sign()).to(dtype)
    assert not same_bits(added_back, before)


# -- two definitions never meet ----------------------------------------------------------------------------------------


def test_exact_is_the_default_and_a_copy_keeps_it() -> None:
    optimizer = DisTrO([nn.Parameter(torch.zeros(8, 8))])
    assert optimizer.arithmetic == optimizer.plan.arithmetic == "exact"
    other = DisTrO([nn.Parameter(torch.zeros(8, 8))], arithmetic="float")
    assert copy.deepcopy(other).arithmetic == "float"
    assert other.plan.layout != optimizer.plan.layout


def test_an_unknown_arithmetic_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="arithmetic='exakt': give one of exact, float"):
        DisTrO([nn.Parameter(torch.zeros(8, 8))], arithmetic="exakt")  # type: ignore[arg-type]


def test_an_update_for_another_arithmetic_is_refused_in_one_sentence() -> None:
    exact = DisTrO([nn.Parameter(torch.zeros(8, 8))])
    other = DisTrO([nn.Parameter(torch.zeros(8, 8))], arithmetic="float")
    update = CompressedUpdate.empty(other.plan, quantized=True)
    with pytest.raises(ConfigurationError, match="made for arithmetic='float', this optimizer merges by 'exact'"):
        exact.apply([update])


def test_a_state_with_another_arithmetic_is_refused_and_nothing_is_changed() -> None:
    param = nn.Parameter(torch.ones(8, 8))
    other = DisTrO([param], arithmetic="float", compression_decay=0.5)
    exact = DisTrO([nn.Parameter(torch.ones(8, 8))], compression_decay=0.9)
    with pytest.raises(ConfigurationError, match="was made with arithmetic='float', this optimizer has 'exact'"):
        exact.load_state_dict(other.state_dict())
    assert exact.param_groups[0]["compression_decay"] == 0.9
    assert exact.param_groups[0]["arithmetic"] == "exact"


def test_a_state_that_names_no_arithmetic_can_be_loaded() -> None:
    older = DisTrO([nn.Parameter(torch.ones(8, 8))], arithmetic="float").state_dict()
    for group in older["param_groups"]:
        del group["arithmetic"]
    exact = DisTrO([nn.Parameter(torch.ones(8, 8))])
    exact.load_state_dict(older)
    assert exact.param_groups[0]["arithmetic"] == "exact"


@pytest.mark.parametrize("quantize", [True, False])
def test_peers_that_take_the_updates_in_other_orders_end_equal(quantize: bool) -> None:
    params = [nn.Parameter(made_up_weights(96 * 80, torch.float32).view(96, 80)) for _ in range(3)]
    exchanges = MemoryExchange.group(3)
    peers = [DisTrO([p], lr=LR, exchange=e, quantize_1bit=quantize) for p, e in zip(params, exchanges, strict=True)]
    for step in range(5):
        for number, param in enumerate(params):
            set_gradients([param], 10 * step + number)
        updates = [peer.generate() for peer in peers]
        for number, peer in enumerate(peers):
            peer.apply([*updates[number:], *updates[:number]])
    assert same_bits(params[0].detach(), params[1].detach())
    assert same_bits(params[0].detach(), params[2].detach())


@pytest.mark.parametrize("shape", [(64, 64), (70, 33), (5,)])
def test_alone_and_at_once_the_step_is_the_same(shape: tuple[int, ...]) -> None:
    """A peer that is alone takes its step while it generates it: by the same definition."""
    weights = made_up_weights(int(torch.Size(shape).numel()), torch.float32).view(shape)
    params = [nn.Parameter(weights.clone()) for _ in range(2)]
    at_once, in_two = (DisTrO([p], lr=LR, overlap=False, quantize_1bit=False) for p in params)
    for step in range(3):
        for param in params:
            set_gradients([param], step)
        at_once.step()
        in_two.apply([in_two.generate()])
    assert same_bits(params[0].detach(), params[1].detach())
