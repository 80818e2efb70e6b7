"""step(closure): it runs first, with gradients, on the weights that look ahead; its loss is returned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distro_optim import DisTrO
from distro_optim.optim.rules import PUBLISHED
from optimizer.models import EveryShape, all_same_bits, copies, same_bits, set_gradients

MODES = pytest.mark.parametrize("overlap", [False, True], ids=["blocking", "overlap"])


@MODES
def test_the_closure_runs_once_with_gradients_enabled_and_its_loss_is_returned(overlap: bool) -> None:
    param = nn.Parameter(torch.ones(4))
    optimizer = DisTrO([param], overlap=overlap)
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        # A loss is a number for the types of torch.optim, and a tensor in every script.
        loss: object = optimizer.step(closure)  # type: ignore[arg-type]
    assert calls == [True]
    assert isinstance(loss, Tensor)
    assert loss.item() == 4.0


def test_without_a_closure_nothing_is_returned() -> None:
    param = nn.Parameter(torch.ones(4))
    set_gradients([param], 0)
    assert DisTrO([param]).step() is None


@MODES
def test_the_update_comes_from_the_closures_gradient_not_from_a_stale_one(overlap: bool) -> None:
    param = nn.Parameter(torch.zeros(4))
    optimizer = DisTrO([param], lr=0.5, overlap=overlap, quantize_1bit=False, **PUBLISHED)
    param.grad = torch.full((4,), -1e6)

    def closure() -> float:
        param.grad = torch.ones(4)
        return 0.0

    for _ in range(2 if overlap else 1):
        optimizer.step(closure)
    assert torch.equal(param, torch.full((4,), -0.5))


@MODES
def test_a_step_moves_a_weight_by_exactly_the_learning_rate(overlap: bool) -> None:
    param = nn.Parameter(torch.zeros(64, 64))
    optimizer = DisTrO([param], lr=0.25, overlap=overlap, **PUBLISHED)
    for step in range(2):
        set_gradients([param], step, scale=1e4)
        optimizer.step(lambda: 0.0)
    assert set(param.detach().abs().unique().tolist()) <= {0.25, 0.5, 0.0}
    assert param.detach().abs().max() > 0


@pytest.mark.slow
@MODES
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_closure_leaves_the_true_weights_and_an_optimizer_that_goes_on(
    overlap: bool, error: type[BaseException]
) -> None:
    broken, whole = EveryShape(), EveryShape()
    runs = [(model, DisTrO(model.parameters(), lr=0.01, overlap=overlap)) for model in (broken, whole)]

    def closure_of(model: EveryShape, optimizer: DisTrO, step: int, *, fail: bool = False) -> None:
        def closure() -> float:
            optimizer.zero_grad()
            loss = model.loss(step)
            loss.backward()
            if fail:
                raise error("in the middle of it")
            return loss.item()

        optimizer.step(closure)

    for model, optimizer in runs:
        for step in range(3):
            closure_of(model, optimizer, step)
    before = copies(broken.parameters())
    with pytest.raises(error, match="in the middle of it"):
        closure_of(*runs[0], 3, fail=True)
    assert all_same_bits(copies(broken.parameters()), before)
    for model, optimizer in runs:
        for step in range(3, 6):
            closure_of(model, optimizer, step)
    assert all_same_bits(copies(broken.parameters()), copies(whole.parameters()))


def test_with_overlap_the_closure_sees_the_weights_looking_ahead() -> None:
    param = nn.Parameter(torch.zeros(4))
    optimizer = DisTrO([param], lr=0.5, compression_topk=1, **PUBLISHED)
    seen = []

    def closure() -> float:
        seen.append(param.detach().clone())
        param.grad = torch.ones(4)
        return 0.0

    optimizer.step(closure)
    assert torch.equal(seen[0], torch.zeros(4))  # no momentum yet
    optimizer.step(closure)
    assert torch.equal(seen[1], torch.full((4,), -0.5))  # nothing has been applied, but it is coming
    assert torch.equal(param, torch.full((4,), -0.5))


def test_both_styles_can_be_mixed() -> None:
    param = nn.Parameter(torch.zeros(4))
    optimizer = DisTrO([param], lr=0.5, compression_topk=1, **PUBLISHED)

    def closure() -> float:
        param.grad = torch.ones(4)
        return 0.0

    param.grad = torch.ones(4)
    optimizer.step()
    optimizer.step(closure)
    optimizer.step(closure)
    true = param.detach().clone()
    optimizer.step()
    optimizer.eval()
    assert torch.equal(true, torch.full((4,), -1.0))
    assert torch.equal(param, torch.full((4,), -1.5))


@MODES
def test_a_model_as_gradless_as_can_be_still_steps(overlap: bool) -> None:
    param = nn.Parameter(torch.ones(4))
    optimizer = DisTrO([param], overlap=overlap)
    for _ in range(3):
        optimizer.step()
    assert same_bits(param, torch.ones(4))


def test_hooks_of_torch_optim_are_called_around_a_step() -> None:
    param = nn.Parameter(torch.ones(4))
    optimizer = DisTrO([param])
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure() -> float:
        calls.append("closure")
        return 0.0

    optimizer.step(closure)
    assert calls == ["pre", "closure", "post"]
