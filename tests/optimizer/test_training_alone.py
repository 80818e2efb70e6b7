"""Alone, DeMo takes its step in one pass; it is the step that generate() and apply() take in two."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distro_optim import DisTrO
from distro_optim.optim.state import momentum

SHAPES = [(130, 96), (64, 64), (20, 8, 3, 3), (200,), (7, 100), ()]


def params(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def gradients(step: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step + 1)
    return [torch.randn(s, generator=generator).to(dtype) for s in SHAPES]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [1, 8, 64])
@pytest.mark.parametrize("tiling", ["padded", "divisor"])
def test_one_pass_and_two_passes_agree(tiling: str, k: int, dtype: torch.dtype) -> None:
    settings: dict[str, Any] = {"lr": 1e-2, "compression_topk": k, "weight_decay": 0.1, "tiling": tiling}
    one, two = params(dtype), params(dtype)
    at_once = DisTrO(one, overlap=False, quantize_1bit=False, **settings)
    in_turn = DisTrO(two, overlap=False, quantize_1bit=False, **settings)
    for step in range(4):
        for a, b, grad in zip(one, two, gradients(step, dtype), strict=True):
            a.grad, b.grad = grad, grad.clone()
        at_once.step()
        in_turn.apply([in_turn.generate()])
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(at_once.delta(a), in_turn.delta(b), rtol=1e-4, atol=1e-6)
            differing = (a != b).float().mean()
            assert differing <= 1e-2, "more than signs of rounding noise differ"
            with torch.no_grad():
                b.copy_(a)
                momentum(in_turn.state[b]).copy_(momentum(at_once.state[a]))


def test_a_parameter_without_gradient_stays_where_it_is() -> None:
    mine = params()
    before = [p.detach().clone() for p in mine]
    optimizer = DisTrO(mine, lr=1e-2, overlap=False, quantize_1bit=False, weight_decay=0.1)
    for number, (p, grad) in enumerate(zip(mine, gradients(0), strict=True)):
        p.grad = grad if number % 2 else None
    optimizer.step()
    for number, (p, was) in enumerate(zip(mine, before, strict=True)):
        assert torch.equal(p, was) == (number % 2 == 0)
        assert (number % 2 == 0) or bool(optimizer.delta(p).isfinite().all())
