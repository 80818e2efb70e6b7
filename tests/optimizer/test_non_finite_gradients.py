"""A gradient that is not finite is left out, tensor by tensor, and counted; momentum never becomes NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from distro_optim import DisTrO, MemoryExchange
from distro_optim.compress.engine.looking import finite_in_parts
from distro_optim.compress.profile import CPU
from distro_optim.optim.rules import PUBLISHED
from optimizer.models import same_bits, set_gradients

OVERLAP = pytest.mark.parametrize("overlap", [False, True], ids=["blocking", "overlap"])
QUANTIZE = pytest.mark.parametrize("quantize", [False, True], ids=["values", "signs"])
BAD = pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])


@OVERLAP
@QUANTIZE
@BAD
def test_one_bad_element_quarantines_its_tensor_for_one_step_and_no_other(
    overlap: bool, quantize: bool, bad: float
) -> None:
    hit, spared = nn.Parameter(torch.zeros(70, 70)), nn.Parameter(torch.zeros(70, 70))
    twin = nn.Parameter(torch.zeros(70, 70))
    optimizer = DisTrO([hit, spared], lr=0.01, overlap=overlap, quantize_1bit=quantize)
    untouched = DisTrO([twin], lr=0.01, overlap=overlap, quantize_1bit=quantize)
    momentum = None
    for step in range(8):
        set_gradients([hit, spared], step)
        assert hit.grad is not None
        assert spared.grad is not None
        twin.grad = spared.grad.clone()
        if step == 3:
            hit.grad[40, 3] = bad
        optimizer.step(lambda: 0.0)
        untouched.step(lambda: 0.0)
        if step == 3 and not overlap:
            assert momentum is not None
            assert same_bits(optimizer.state[hit]["delta"], momentum)
        momentum = optimizer.state[hit]["delta"].clone()
        assert momentum.isfinite().all()
        assert int(optimizer.state[hit]["quarantined"]) == (1 if step >= 3 else 0)
        assert int(optimizer.state[spared]["quarantined"]) == 0
    assert optimizer.quarantined == 1
    assert same_bits(spared, twin)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 3e19, None], ids=str)
def test_large_gradients_are_looked_at_in_parts_without_kernels(
    bad: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor may squares be infinite."""
    monkeypatch.setenv("DISTRO_OPTIM_FAST", "0")
    size = CPU.block_elements + 131
    whole = torch.full((size,), 1e-3)
    parts: list[int] = []

    def share(work: Callable[[Any, int], None], jobs: Sequence[Any]) -> None:
        parts.append(len(jobs))
        for job in jobs:
            work(job, 0)

    for place in (0, size // 2, size - 1):
        if bad is not None:
            whole[place] = bad
        grads = [None, whole, torch.zeros(0, 3), torch.tensor([1.0, math.nan]), torch.ones(90, 90)]
        found = finite_in_parts(grads, share)
        assert found is not None
        assert found[1:].tolist() == [bad is None, 1, 0, 1]
        whole[place] = 1e-3
    assert min(parts) == 3
    assert finite_in_parts([whole[: size // 2]], share) is None  # small ones are torch's


@OVERLAP
def test_the_quarantined_parameter_goes_on_moving_afterwards(overlap: bool) -> None:
    param = nn.Parameter(torch.zeros(70, 70))
    optimizer = DisTrO([param], lr=0.01, overlap=overlap)
    set_gradients([param], 0)
    assert param.grad is not None
    param.grad[0, 0] = math.inf
    optimizer.step(lambda: 0.0)
    optimizer.step(lambda: 0.0)
    still = param.detach().clone()
    for step in range(1, 4):
        set_gradients([param], step)
        optimizer.step(lambda: 0.0)
    assert optimizer.quarantined == 2
    assert not still.any()
    assert (param != still).float().mean() > 0.25
    assert param.isfinite().all()


def test_a_quarantined_weight_stays_where_it_is_even_with_weight_decay() -> None:
    param = nn.Parameter(torch.ones(4))
    optimizer = DisTrO([param], lr=0.1, weight_decay=0.1, overlap=False)
    param.grad = torch.full((4,), math.nan)
    optimizer.step()
    assert same_bits(param, torch.ones(4))


@OVERLAP
@QUANTIZE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_huge_finite_gradients_never_make_momentum_or_weights_non_finite(
    overlap: bool, quantize: bool, dtype: torch.dtype
) -> None:
    param = nn.Parameter(torch.zeros(70, 70, dtype=dtype))
    optimizer = DisTrO([param], lr=1.0, overlap=overlap, quantize_1bit=quantize, compression_decay=1.0)
    largest = torch.finfo(dtype).max
    for size in (1.0, largest**0.25, largest**0.5, largest / 70**2, largest / 2, largest):
        for sign in (1, 1, -1):
            param.grad = torch.full_like(param, sign * size)
            param.grad[::2] *= 0.5
            optimizer.step(lambda: 0.0)
            assert optimizer.state[param]["delta"].isfinite().all(), size
            assert param.isfinite().all()
    set_gradients([param], 0)
    before = param.detach().clone()
    optimizer.step(lambda: 0.0)
    optimizer.step(lambda: 0.0)
    assert not torch.equal(param, before)


def test_a_float16_coefficient_beyond_its_range_is_clamped_not_sent_as_infinity() -> None:
    param = nn.Parameter(torch.zeros(64, 64, dtype=torch.float16))
    optimizer = DisTrO([param], lr=1.0, overlap=False, quantize_1bit=False, **PUBLISHED)
    param.grad = torch.full_like(param, 60000.0)  # its first coefficient is 64 * 60000
    update = optimizer.generate()
    assert all(value.isfinite().all() for value in update.value)
    assert update.value[0].max() == torch.finfo(torch.float16).max
    update.check()
    # What was cut off is not lost: it stays in the momentum.
    assert optimizer.delta(param).mean() > 58000


@OVERLAP
def test_peers_stay_equal_when_one_of_them_has_a_bad_gradient_and_weights_decay(overlap: bool) -> None:
    """A weight that decays on the peers with a gradient must decay on the one without."""
    params = [nn.Parameter(torch.ones(9, 9)), nn.Parameter(torch.ones(9, 9))]
    optimizers = [
        DisTrO([p], lr=0.05, weight_decay=0.5, overlap=overlap, exchange=e)
        for p, e in zip(params, MemoryExchange.group(2), strict=True)
    ]
    for step in range(6):
        for peer, (param, optimizer) in enumerate(zip(params, optimizers, strict=True)):
            set_gradients([param], 100 * step + peer)
            assert param.grad is not None
            if step == 2 and peer == 1:
                param.grad[0, 0] = math.nan
            if step == 4 and peer == 0:
                param.grad = None
            optimizer.begin_step()
        for optimizer in optimizers:
            optimizer.finish_step()
        assert same_bits(params[0], params[1]), step
    assert [o.quarantined for o in optimizers] == [0, 1]


def test_the_counter_survives_a_checkpoint() -> None:
    param = nn.Parameter(torch.ones(4))
    optimizer = DisTrO([param])
    param.grad = torch.full((4,), math.nan)
    optimizer.step()
    other = DisTrO([nn.Parameter(torch.ones(4))])
    other.load_state_dict(optimizer.state_dict())
    assert other.quarantined == 1
