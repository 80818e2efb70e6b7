"""Parameters of any shape, memory format, dtype and standing: frozen, unused, tied, empty."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from distro_optim import DisTrO, MemoryExchange
from distro_optim.errors import DistroError
from distro_optim.optim.arguments import TORCH_KEEPS_NAMES
from distro_optim.optim.rules import PUBLISHED
from optimizer.models import STEPS, EveryShape, Step, copies, same_bits, set_gradients

SHAPES = [(), (1,), (7,), (4096,), (1, 1), (127, 61), (64, 64), (65, 130), (5, 3, 3, 3), (2, 3, 4, 5, 6), (0,), (3, 0)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("overlap", [False, True], ids=["blocking", "overlap"])
@pytest.mark.parametrize("tiling", ["padded", "divisor"])
@pytest.mark.parametrize("transform", ["dct", "identity"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_every_shape_and_dtype_moves_downhill(overlap: bool, tiling: Any, transform: Any, dtype: torch.dtype) -> None:
    params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in SHAPES]
    optimizer = DisTrO(
        params,
        lr=2**-6,
        overlap=overlap,
        tiling=tiling,
        transform=transform,
        compression_topk=4096,
        quantize_1bit=False,
        **PUBLISHED,
    )
    for _ in range(4):
        for param in params:
            param.grad = param.detach().sign()
        optimizer.step()
    optimizer.eval()
    for shape, param in zip(SHAPES, params, strict=True):
        assert param.dtype == dtype
        assert param.shape == shape
        assert torch.equal(param, torch.full_like(param, 1 - 2**-6 * (3 if overlap else 4))), shape


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_with_all_coefficients_as_values_the_update_is_the_sign_of_the_gradient(shape: tuple[int, ...]) -> None:
    param = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = DisTrO(
        [param], lr=0.5, overlap=False, quantize_1bit=False, compression_topk=4096, arithmetic="float", **PUBLISHED
    )
    set_gradients([param], 1)
    optimizer.step()
    assert param.grad is not None
    assert torch.equal(param, -0.5 * param.grad.sign())
    assert optimizer.delta(param).abs().max().item() < 1e-12 if param.numel() else True


@pytest.mark.slow
@pytest.mark.parametrize("style", STEPS)
def test_memory_format_makes_no_difference(style: str) -> None:
    plain, strange = EveryShape(), EveryShape()
    strange = strange.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # unknown to its types
    strange.head.weight = nn.Parameter(strange.head.weight.detach().t().contiguous().t())
    assert not strange.head.weight.is_contiguous()
    results = []
    for model in (plain, strange):
        params = list(model.parameters())
        optimizer = DisTrO(params, lr=0.01)
        for step in range(8):
            set_gradients(params, step)
            optimizer.step(None if style == "plain" else lambda: 0.0)
        optimizer.eval()
        results.append([p.detach().contiguous() for p in params])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_channels_last_weights_stay_channels_last() -> None:
    conv = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as above
    optimizer = DisTrO(conv.parameters())
    for step in range(3):
        set_gradients(conv.parameters(), step)
        optimizer.step()
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("overlap", [False, True], ids=["blocking", "overlap"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_parameter_without_gradient_is_inert_and_the_others_are_not(overlap: bool, weight_decay: float) -> None:
    used, unused = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
    optimizer = DisTrO([used, unused], overlap=overlap, weight_decay=weight_decay)
    for step in range(4):
        used.grad = torch.ones(8)
        optimizer.step(lambda: 0.0)
        assert same_bits(unused, torch.ones(8)), step
        assert same_bits(optimizer.state[unused]["delta"], torch.zeros(8)), step
    assert not torch.equal(used, torch.ones(8))


@pytest.mark.parametrize("quantize", [False, True], ids=["values", "signs"])
@pytest.mark.parametrize("overlap", [False, True], ids=["blocking", "overlap"])
def test_a_gradient_of_zeros_does_not_move_a_weight(overlap: bool, quantize: bool) -> None:
    used, idle = nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(8, 8))
    optimizer = DisTrO([used, idle], overlap=overlap, quantize_1bit=quantize)
    for step in range(4):
        set_gradients([used], step)
        idle.grad = torch.zeros(8, 8)
        optimizer.step()
    optimizer.eval()
    assert same_bits(idle, torch.ones(8, 8))


def test_as_values_a_tile_without_gradient_does_not_move_in_a_tensor_that_has_one() -> None:
    """As the rows of an embedding that the data never names."""
    table = nn.Parameter(torch.zeros(128, 64))
    optimizer = DisTrO([table], overlap=False, quantize_1bit=False)
    for step in range(3):
        set_gradients([table], step)
        assert table.grad is not None
        table.grad[64:] = 0
        optimizer.step()
    assert same_bits(table[64:], torch.zeros(64, 64))
    assert table[:64].all()


def test_a_warm_up_from_a_learning_rate_of_zero_does_not_move_weights_at_random() -> None:
    """In 1-bit form a delta of zeros, sent as signs, would be applied at the next, positive learning rate."""
    param = nn.Parameter(torch.zeros(8, 8))
    optimizer = DisTrO([param], lr=0.0)
    set_gradients([param], 0)
    optimizer.step(lambda: 0.0)
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step(lambda: 0.0)
    assert same_bits(param, torch.zeros(8, 8))


def test_a_peer_without_a_gradient_takes_part_with_an_entry_that_says_nothing() -> None:
    [exchange] = MemoryExchange.group(1)
    used, unused = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
    optimizer = DisTrO([used, unused], exchange=exchange)
    used.grad = torch.ones(8)
    update = optimizer.generate()
    assert update.present == (True, False)
    entries = update.tensors()
    assert len(entries) == 2
    assert entries[1].index.shape == (1, 0)


def test_a_frozen_parameter_is_inert() -> None:
    model = EveryShape()
    model.head.requires_grad_(False)
    before = model.head.weight.detach().clone()
    optimizer = DisTrO(model.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(4):
        STEPS["closure"](model, optimizer, step)
    assert same_bits(model.head.weight, before)


def test_a_gradient_that_stops_coming_lets_what_was_sent_leave_the_momentum_and_no_more() -> None:
    param = nn.Parameter(torch.zeros(16))
    optimizer = DisTrO([param], quantize_1bit=False, compression_topk=16, compression_decay=0.5)
    set_gradients([param], 0)
    optimizer.step(lambda: 0.0)
    assert optimizer.state[param]["delta"].abs().max() > 0
    param.grad = None
    optimizer.step(lambda: 0.0)
    torch.testing.assert_close(optimizer.state[param]["delta"], torch.zeros(16), atol=1e-7, rtol=0)
    settled = optimizer.state[param]["delta"].clone()
    optimizer.step(lambda: 0.0)
    assert same_bits(optimizer.state[param]["delta"], settled)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_tied_parameter_listed_twice_is_one_parameter(named: bool, grouped: bool) -> None:
    weight, other = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    entries = [("a", weight), ("b", other), ("c", weight)] if named else [weight, other, weight]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = [{"params": entries[:2]}, {"params": entries[2:]}]
        optimizer = DisTrO(groups if grouped else entries, lr=0.5, compression_topk=1, **PUBLISHED)
    assert len(optimizer.plan) == 2
    for param in (weight, other):
        param.grad = torch.ones(4)
    optimizer.step(lambda: 0.0)
    optimizer.step(lambda: 0.0)
    assert torch.equal(weight, torch.full((4,), -0.5))
    if named and TORCH_KEEPS_NAMES:
        assert optimizer.param_groups[0]["param_names"] == ["a", "b"]


def test_tied_modules_are_trained_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert len(DisTrO(model.named_parameters(remove_duplicate=False)).plan) == 3


def test_a_generator_of_parameters_is_read_once() -> None:
    model = EveryShape()
    assert len(DisTrO(p for p in model.parameters()).plan) == len(list(model.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_momentum_of_half_precision_parameters_is_single_precision(dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.ones(8, dtype=dtype))
    optimizer = DisTrO([param], lr=1e-6, compression_decay=1.0, overlap=False, quantize_1bit=False, compression_topk=1)
    state = optimizer.state[param]
    assert state["delta"].dtype == torch.float32
    param.grad = torch.linspace(1, 2, 8).to(dtype)
    optimizer.step()
    assert state["delta"].abs().max() > 0


def test_float64_stays_float64_throughout() -> None:
    param = nn.Parameter(torch.zeros(8, dtype=torch.float64))
    optimizer = DisTrO([param])
    assert {t.dtype for n, t in optimizer.state[param].items() if n in ("delta", "own_value", "weight")} == {
        torch.float64
    }


@pytest.mark.parametrize("style", STEPS.values(), ids=STEPS)
def test_a_model_moved_to_another_dtype_after_construction_trains_on(style: Step) -> None:
    model = EveryShape()
    optimizer = DisTrO(model.parameters(), lr=0.01)
    model.to(torch.bfloat16)
    before = copies(model.parameters())
    for step in range(3):
        style(model, optimizer, step)
    optimizer.eval()
    assert model.head.weight.dtype == torch.bfloat16
    assert not torch.equal(model.head.weight, before[-1])
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_model_moved_to_another_dtype_while_it_looks_ahead_gets_its_true_weights_back() -> None:
    model = EveryShape()
    optimizer = DisTrO(model.parameters(), lr=0.01)
    for step in range(3):
        STEPS["plain"](model, optimizer, step)
    true = [optimizer.state[p]["weight"].clone() for p in model.parameters()]
    model.to(torch.float64)
    optimizer.eval()
    for param, weight in zip(model.parameters(), true, strict=True):
        torch.testing.assert_close(param.detach(), weight.double(), rtol=0, atol=1e-7)


def test_a_parameter_that_changes_its_shape_is_refused_before_anything_is_written() -> None:
    model = EveryShape()
    optimizer = DisTrO(model.parameters())
    STEPS["closure"](model, optimizer, 0)
    model.head.weight.data = torch.zeros(7, 127)
    model.zero_grad()
    with pytest.raises(DistroError, match=r"parameter 7 had shape \(3, 127\) and has \(7, 127\) now"):
        optimizer.step()


def test_a_sparse_gradient_is_refused_with_the_remedy() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = DisTrO(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(DistroError, match="sparse=False"):
        optimizer.step()
