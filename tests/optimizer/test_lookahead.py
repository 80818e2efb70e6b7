"""Looking ahead: on and off to the last bit, out of the way of evaluation, and of what users write themselves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from distro_optim import DisTrO
from distro_optim.errors import DistroError
from distro_optim.optim.rules import PUBLISHED
from optimizer.models import (
    STEPS,
    EveryShape,
    all_same_bits,
    closure_step,
    copies,
    plain_step,
    same_bits,
    set_gradients,
)


def looking_ahead(size: int = 4096, dtype: torch.dtype = torch.float32) -> tuple[nn.Parameter, DisTrO, torch.Tensor]:
    """A parameter that looks ahead, its optimizer, and its true weights."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(size).to(dtype))
    optimizer = DisTrO([param], lr=0.01, **PUBLISHED)
    for step in range(3):
        set_gradients([param], step)
        optimizer.step()
    true = optimizer.state[param]["weight"].clone()
    assert not torch.equal(param, true)
    return param, optimizer, true


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_hundreds_of_steps_plain_and_with_closure_agree_to_the_last_bit(dtype: torch.dtype) -> None:
    """Adding the shift back instead of copying would lose a bit here and there, and the two would part."""
    torch.manual_seed(0)
    start = torch.randn(65, 66).to(dtype)
    results = []
    for style in ("plain", "closure"):
        param = nn.Parameter(start.clone())
        optimizer = DisTrO([param], lr=3e-3, weight_decay=0.01)
        for step in range(300):
            # At the true weights both would see the same gradient; so it does not depend on the weights here.
            set_gradients([param], step)
            optimizer.step(None if style == "plain" else lambda: 0.0)
        optimizer.eval()
        results.append(param)
    assert same_bits(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_and_off_is_exact(dtype: torch.dtype) -> None:
    param, optimizer, true = looking_ahead(dtype=dtype)
    for _ in range(200):
        optimizer.undo_lookahead()
        assert same_bits(param, true)
        optimizer.lookahead()
        assert not torch.equal(param, true)


def test_looking_ahead_twice_shifts_once() -> None:
    param, optimizer, true = looking_ahead()
    ahead = param.detach().clone()
    optimizer.lookahead()
    assert same_bits(param, ahead)
    optimizer.undo_lookahead()
    optimizer.undo_lookahead()
    assert same_bits(param, true)


def test_the_shift_is_the_sign_of_delta_times_the_learning_rate() -> None:
    param, optimizer, true = looking_ahead()
    optimizer.undo_lookahead()
    optimizer.lookahead(0.125)
    assert torch.equal(param, true - 0.125 * optimizer.state[param]["delta"].sign())


@pytest.mark.slow
@pytest.mark.parametrize("style", STEPS)
def test_eval_and_train_do_not_disturb_a_run(style: str) -> None:
    visited, left_alone = EveryShape(), EveryShape()
    a, b = DisTrO(visited.parameters(), lr=0.01), DisTrO(left_alone.parameters(), lr=0.01)
    for step in range(8):
        STEPS[style](visited, a, step)
        STEPS[style](left_alone, b, step)
        a.eval()
        a.eval()
        with torch.no_grad():
            visited.loss(step)
        a.train()
        a.train()
        assert all_same_bits(copies(visited.parameters()), copies(left_alone.parameters()))


def test_a_loop_that_calls_train_before_every_gradient_has_true_weights_between_steps() -> None:
    asked, plain = EveryShape(), EveryShape()
    a, b = DisTrO(asked.parameters(), lr=0.01), DisTrO(plain.parameters(), lr=0.01)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in (a, b)]
    for step in range(6):
        a.train()
        a.train()  # as where gradients are accumulated
        assert all_same_bits(copies(asked.parameters()), copies(plain.parameters()))
        plain_step(asked, a, step)
        plain_step(plain, b, step)
        for schedule in schedules:
            schedule.step()
        if step == 3:
            a.eval()
        b.undo_lookahead()
        assert all_same_bits(copies(asked.parameters()), copies(plain.parameters()))
        b._look_ahead_again()
        assert not all_same_bits(copies(asked.parameters()), copies(plain.parameters()))


def test_such_a_loop_goes_on_from_what_was_saved() -> None:
    whole, resumed = EveryShape(), EveryShape()
    a = DisTrO(whole.parameters(), lr=0.01)
    for step in range(6):
        if step == 3:
            resumed.load_state_dict(whole.state_dict())
            b = DisTrO(resumed.parameters(), lr=0.01)
            b.load_state_dict(a.state_dict())
        a.train()
        plain_step(whole, a, step)
        if step >= 3:
            b.train()
            plain_step(resumed, b, step)
            assert all_same_bits(copies(whole.parameters()), copies(resumed.parameters()))


def test_a_loop_that_calls_train_once_looks_ahead_from_its_second_step_on() -> None:
    model = EveryShape()
    optimizer = DisTrO(model.parameters(), lr=0.01)
    optimizer.train()
    for step in range(3):
        plain_step(model, optimizer, step)
        assert optimizer.param_groups[0]["looks_ahead"] == (step > 0)
    optimizer.train()
    plain_step(model, optimizer, 3)
    assert optimizer.param_groups[0]["looks_ahead"]


@pytest.mark.slow
def test_eval_shows_the_weights_that_a_closure_leaves() -> None:
    plain, closured = EveryShape(), EveryShape()
    a, b = DisTrO(plain.parameters(), lr=0.01), DisTrO(closured.parameters(), lr=0.01)
    for step in range(6):
        plain_step(plain, a, step)
        closure_step(closured, b, step)
    a.eval()
    assert all_same_bits(copies(plain.parameters()), copies(closured.parameters()))


def test_a_step_in_evaluation_mode_is_refused_and_changes_nothing() -> None:
    model = EveryShape()
    optimizer = DisTrO(model.parameters())
    plain_step(model, optimizer, 0)
    optimizer.eval()
    before = copies(model.parameters())
    for step in (optimizer.step, lambda: optimizer.step(lambda: 0.0), optimizer.begin_step):
        with pytest.raises(DistroError, match=r"optimizer\.train\(\)"):
            step()
    assert all_same_bits(copies(model.parameters()), before)
    optimizer.train()
    plain_step(model, optimizer, 1)


def test_without_overlap_eval_and_train_are_there_and_lookahead_says_what_it_is_for() -> None:
    model = EveryShape()
    optimizer = DisTrO(model.parameters(), overlap=False)
    plain_step(model, optimizer, 0)
    before = copies(model.parameters())
    optimizer.eval()
    optimizer.train()
    assert all_same_bits(copies(model.parameters()), before)
    with pytest.raises(DistroError, match="overlap=True"):
        optimizer.lookahead()


@pytest.mark.parametrize("size", [100, 4096], ids=["small", "large"])
def test_weights_loaded_while_looking_ahead_are_kept(size: int) -> None:
    param, optimizer, _ = looking_ahead(size)
    loaded = torch.randn(size)
    with torch.no_grad():
        param.copy_(loaded)
    optimizer.undo_lookahead()
    assert same_bits(param, loaded)


@pytest.mark.parametrize("size", [100, 4096], ids=["small", "large"])
def test_a_checkpoint_of_shifted_weights_loaded_back_is_undone_to_the_true_ones(size: int) -> None:
    param, optimizer, true = looking_ahead(size)
    saved = param.detach().clone()
    with torch.no_grad():
        param.copy_(saved)
    optimizer.undo_lookahead()
    assert same_bits(param, true)


@pytest.mark.parametrize("size", [100, 4096], ids=["small", "large"])
def test_clipping_while_looking_ahead_clips_and_everything_else_goes_back(size: int) -> None:
    param, optimizer, true = looking_ahead(size)
    with torch.no_grad():
        clipped = param.abs() > 1.0
        param.clamp_(-1.0, 1.0)
    assert clipped.any()
    optimizer.undo_lookahead()
    assert torch.equal(param[clipped].abs(), torch.ones(int(clipped.sum())))
    assert same_bits(param[~clipped], true[~clipped])


def test_a_logit_scale_clipped_through_data_as_in_clip_stays_clipped() -> None:
    scale = nn.Parameter(torch.tensor(math.log(99.0)))
    optimizer = DisTrO([scale], lr=0.1)
    for _ in range(10):
        scale.grad = torch.tensor(-1.0)
        optimizer.step()
        scale.data.clamp_(max=math.log(100.0))
    optimizer.eval()
    assert scale.item() <= math.log(100.0) + 1e-6


def test_flush_applies_what_is_on_its_way_and_leaves_true_weights() -> None:
    flushed, longer = nn.Parameter(torch.zeros(40, 40)), nn.Parameter(torch.zeros(40, 40))
    a, b = DisTrO([flushed]), DisTrO([longer])
    for step in range(4):
        set_gradients([flushed], step)
        set_gradients([longer], step)
        a.step()
        b.step()
    a.flush()
    longer.grad = None
    b.step(lambda: 0.0)
    assert same_bits(flushed, longer)
    after = flushed.detach().clone()
    a.flush()
    assert same_bits(flushed, after)
    set_gradients([flushed], 4)
    a.step()
    a.eval()
    assert same_bits(flushed, after)  # one step is on its way again


def test_reset_forgets_the_momentum_and_keeps_the_weights() -> None:
    param, optimizer, true = looking_ahead()
    optimizer.reset()
    assert same_bits(param, true)
    assert not optimizer.state[param]["delta"].any()
    assert not optimizer.state[param]["own_value"].any()
    set_gradients([param], 9)
    optimizer.step()
    assert optimizer.state[param]["delta"].any()
