"""Loops that are written without this optimizer in mind: scalers, compiled models, accumulation, averaged weights."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from typing_extensions import override

from distro_optim import DisTrO, MemoryExchange
from distro_optim.optim.rules import PUBLISHED
from optimizer.models import EveryShape, TinyGPT, all_same_bits, copies, plain_step, same_bits, set_gradients

pytestmark = pytest.mark.waiting


def test_accumulated_gradients_are_one_larger_batch() -> None:
    parts, whole = nn.Linear(6, 3), nn.Linear(6, 3)
    whole.load_state_dict(parts.state_dict())
    a, b = DisTrO(parts.parameters(), lr=0.01), DisTrO(whole.parameters(), lr=0.01)
    for step in range(5):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        a.zero_grad()
        for half in x.chunk(2):
            (parts(half).square().mean() / 2).backward()
        a.step()
        b.zero_grad()
        whole(x).square().mean().backward()
        b.step()
    for p, q in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a.state[p]["delta"], b.state[q]["delta"])


def test_a_loop_like_hugging_faces_trainer_calls_train_clips_evaluates_and_saves() -> None:
    """transformers' Trainer calls optimizer.train() before each step and optimizer.eval() before evaluation."""
    visited, plain = EveryShape(), EveryShape()
    a, b = DisTrO(visited.parameters(), lr=0.01), DisTrO(plain.parameters(), lr=0.01)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)) for o in (a, b)]
    for step in range(8):
        for model, optimizer in ((visited, a), (plain, b)):
            optimizer.train()
            model.loss(step).backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            model.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
        if step % 3 == 2:
            a.eval()
            a.state_dict()
        # Evaluated or not, between steps the weights are the true ones: what is saved there is.
        assert not any(optimizer.param_groups[0]["looks_ahead"] for optimizer in (a, b))
        assert all_same_bits(copies(visited.parameters()), copies(plain.parameters()))
    a.train()
    b.train()
    assert all_same_bits(copies(visited.parameters()), copies(plain.parameters()))
    assert a.param_groups[0]["looks_ahead"]


def test_averaged_weights_in_evaluation_mode_average_the_true_ones() -> None:
    model = EveryShape()
    optimizer = DisTrO(model.parameters(), lr=0.01)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    expected = copies(model.parameters())
    for step in range(6):
        plain_step(model, optimizer, step)
        optimizer.eval()
        average.update_parameters(model)
        for mean, param, count in zip(expected, model.parameters(), [step] * len(expected), strict=True):
            mean.copy_(param.detach()) if count == 0 else mean.lerp_(param.detach(), 0.5)
        optimizer.train()
    for mean, param in zip(expected, average.module.parameters(), strict=True):
        torch.testing.assert_close(mean, param.detach())


def scaled_step(model: EveryShape, optimizer: DisTrO, scaler: torch.amp.GradScaler, step: int, *, bad: bool) -> None:
    optimizer.zero_grad()
    scaler.scale(model.loss(step)).backward()
    if bad:
        assert model.conv.weight.grad is not None
        model.conv.weight.grad[0, 0, 0, 0] = math.inf
    scaler.step(optimizer)
    scaler.update()


def test_under_a_grad_scaler_an_overflow_skips_the_step_and_halves_the_scale() -> None:
    model, twin = EveryShape(), EveryShape()
    optimizer, plain = DisTrO(model.parameters(), lr=0.01), DisTrO(twin.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=1024.0)
    for step in range(6):
        scaled_step(model, optimizer, scaler, step, bad=step == 3)
        if step != 3:
            plain_step(twin, plain, step)
        assert scaler.get_scale() == (1024.0 if step < 3 else 512.0)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(optimizer.state[p]["delta"], plain.state[q]["delta"])
    assert optimizer.quarantined == 0


def test_gradients_unscaled_by_hand_and_clipped_are_not_unscaled_again() -> None:
    model = EveryShape()
    optimizer = DisTrO(
        model.parameters(), lr=0.5, overlap=False, quantize_1bit=False, compression_topk=4096, **PUBLISHED
    )
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    scaler.scale(model.loss(0)).backward()
    scaler.unscale_(optimizer)
    clip_grad_norm_(model.parameters(), 1e-2)
    clipped = [p.grad.clone() if p.grad is not None else None for p in model.parameters()]
    before = copies(model.parameters())
    scaler.step(optimizer)
    scaler.update()
    for param, grad, old in zip(model.parameters(), clipped, before, strict=True):
        if grad is not None and param.ndim >= 2 and param.numel():
            assert ((param - old).sign() == -grad.sign()).float().mean() > 0.99


@pytest.mark.parametrize("unscale", [False, True], ids=["implicit", "unscaled by hand"])
def test_with_peers_an_overflow_on_one_of_them_is_an_empty_contribution_and_nobody_waits(unscale: bool) -> None:
    models = [EveryShape(), EveryShape()]
    twins = [EveryShape(), EveryShape()]
    scalers = [torch.amp.GradScaler("cpu", enabled=True, init_scale=1024.0) for _ in models]
    optimizers = [
        HalfStep(m.parameters(), lr=0.01, exchange=e) for m, e in zip(models, MemoryExchange.group(2), strict=True)
    ]
    plain = [DisTrO(m.parameters(), lr=0.01, exchange=e) for m, e in zip(twins, MemoryExchange.group(2), strict=True)]
    for step in range(6):
        for peer in range(2):
            bad = step == 3 and peer == 1
            optimizers[peer].zero_grad()
            scalers[peer].scale(models[peer].loss(10 * step + peer)).backward()
            if bad:
                models[peer].conv.weight.grad[0, 0, 0, 0] = math.inf  # type: ignore[index]
            if unscale:
                scalers[peer].unscale_(optimizers[peer])
            scalers[peer].step(optimizers[peer])
            scalers[peer].update()
            plain[peer].zero_grad()
            if not bad:
                twins[peer].loss(10 * step + peer).backward()
            plain[peer].begin_step()
        for optimizer in (*optimizers, *plain):
            optimizer.finish_step()
        assert all_same_bits(copies(models[0].parameters()), copies(models[1].parameters())), step
    assert [o.quarantined for o in optimizers] == [0, 1]
    assert [s.get_scale() for s in scalers] == [1024.0, 512.0]
    for p, q in zip(models[1].parameters(), twins[1].parameters(), strict=True):
        torch.testing.assert_close(optimizers[1].state[p]["delta"], plain[1].state[q]["delta"])


class HalfStep(DisTrO):
    """step() does the first half only, for peers in one thread."""

    @override
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        self.begin_step()


@pytest.fixture
def compiler() -> Iterator[None]:
    if sys.platform == "win32" or not (shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")):
        pytest.skip("torch.compile needs a C++ compiler")
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_model_sees_every_update() -> None:
    eager, compiled = TinyGPT(), TinyGPT()
    compiled.load_state_dict(eager.state_dict())
    forward: Any = torch.compile(compiled, backend="aot_eager")
    a, b = DisTrO(eager.parameters(), lr=0.01), DisTrO(forward.parameters(), lr=0.01)
    tokens = torch.randint(31, (2, 16), generator=torch.Generator().manual_seed(0))

    def loss(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    for _ in range(5):
        losses = []
        for model, optimizer in ((eager, a), (forward, b)):
            optimizer.zero_grad()
            value = loss(model)
            value.backward()
            optimizer.step()
            losses.append(value.detach())
        torch.testing.assert_close(losses[0], losses[1], rtol=0.02, atol=0.02)
    assert losses[1] < math.log(31) - 0.1


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("what", ["the step", "a function that takes it"])
def test_a_compiled_step_is_a_step(what: str) -> None:
    """By inductor, which computes other weights if it is let."""
    eager, compiled = EveryShape(), EveryShape()
    a, b = DisTrO(eager.parameters(), lr=0.01), DisTrO(compiled.parameters(), lr=0.01)

    def take() -> None:
        b.step()

    step: Any = torch.compile(b.step if what == "the step" else take)
    for number in range(4):
        plain_step(eager, a, number)
        compiled.zero_grad()
        compiled.loss(number).backward()
        step()
        assert all_same_bits(copies(compiled.parameters()), copies(eager.parameters())), number


def test_two_optimizers_of_one_model_do_not_get_in_each_others_way() -> None:
    together, apart = EveryShape(), EveryShape()
    head, rest = [together.head.weight], [p for n, p in together.named_parameters() if n != "head.weight"]
    optimizers = [DisTrO(head, lr=0.01), DisTrO(rest, lr=0.01)]
    single = DisTrO(apart.parameters(), lr=0.01)
    for step in range(5):
        together.zero_grad()
        together.loss(step).backward()
        for optimizer in optimizers:
            optimizer.step()
        plain_step(apart, single, step)
    assert all_same_bits(copies(together.parameters()), copies(apart.parameters()))


def test_gradients_kept_by_the_user_are_not_written_to() -> None:
    model = EveryShape()
    optimizer = DisTrO(model.parameters(), weight_decay=0.1)
    set_gradients(model.parameters(), 0)
    kept = [p.grad for p in model.parameters()]
    before = [g.clone() for g in kept if g is not None]
    optimizer.step()
    assert all(same_bits(g, b) for g, b in zip(kept, before, strict=True) if g is not None)
    assert all(p.grad is g for p, g in zip(model.parameters(), kept, strict=True))
