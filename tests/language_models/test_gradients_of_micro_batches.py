"""Gradients of micro-batches are added in float32 and rounded once, whichever loop drives them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distro_optim.models.accumulation import Fp32GradientAccumulator, train_batch
from distro_optim.models.batches import TokenBatch
from distro_optim.models.causal_lm import CausalLM
from language_models.small import LLAMA, sentences


def gradients(model: CausalLM) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.sorted_parameters().items():
        assert parameter.grad is not None
        found[name] = parameter.grad.clone()
    return found


def test_a_thousand_small_gradients_are_not_lost_in_bfloat16() -> None:
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    accumulator = Fp32GradientAccumulator([parameter])
    parameter.grad = torch.ones(3, dtype=torch.bfloat16)
    accumulator.add()
    for _ in range(1000):
        parameter.grad = torch.full((3,), 1e-3, dtype=torch.bfloat16)
        accumulator.add()
        assert parameter.grad is None
    accumulator.apply()
    assert parameter.grad is not None
    assert parameter.grad.dtype == torch.bfloat16
    torch.testing.assert_close(parameter.grad.float(), torch.full((3,), 2.0), rtol=0.01, atol=0)


def test_what_is_handed_over_is_scaled_added_to_what_is_there_and_forgotten() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        parameter = nn.Parameter(torch.zeros(2, dtype=dtype))
        accumulator = Fp32GradientAccumulator([parameter])
        for start in (1.0, 3.0):
            parameter.grad = torch.full((2,), start, dtype=dtype)
            accumulator.add()
        parameter.grad = torch.ones(2, dtype=dtype)
        accumulator.apply(0.5)
        assert parameter.grad.tolist() == [3.0, 3.0]
        accumulator.apply()
        assert parameter.grad.tolist() == [3.0, 3.0]
        parameter.grad = torch.full((2,), 7.0, dtype=dtype)
        accumulator.add()
        accumulator.apply()
        assert parameter.grad is not None
        assert parameter.grad.tolist() == [7.0, 7.0]


def test_a_parameter_without_a_gradient_keeps_none() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    accumulator = Fp32GradientAccumulator([parameter])
    accumulator.add()
    accumulator.apply()
    assert parameter.grad is None


@pytest.mark.slow
def test_micro_batches_of_one_size_give_the_gradient_of_the_whole_batch() -> None:
    whole, parts = (CausalLM(LLAMA, "HfLlama", dtype=torch.float32) for _ in range(2))
    batch = sentences(8)
    losses = [train_batch(whole, batch), train_batch(parts, batch, micro_batch_size=2)]
    assert losses[0] is not None
    assert losses[1] is not None
    torch.testing.assert_close(losses[0], losses[1])
    for a, b in zip(gradients(whole).values(), gradients(parts).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_micro_batches_of_uneven_sizes_count_alike_as_in_psyche() -> None:
    model = CausalLM(LLAMA, "HfLlama", dtype=torch.float32)
    batch = TokenBatch(sentences(5))
    parts = batch.micro_batches(2)
    assert [len(part) for part in parts] == [2, 2, 1]
    loss = train_batch(model, batch, micro_batch_size=2)
    assert loss is not None
    means = [model(part).loss.detach() for part in parts]
    torch.testing.assert_close(loss, torch.stack(means).mean())


@pytest.mark.slow
def test_bfloat16_micro_batches_are_rounded_once() -> None:
    model = CausalLM(LLAMA, "HfLlama")
    parts = TokenBatch(sentences(8)).micro_batches(2)
    exact: dict[str, Tensor] = {}
    for part in parts:
        model.zero_grad()
        model(part, loss_scale=len(parts)).loss.backward()
        for name, gradient in gradients(model).items():
            exact[name] = exact.get(name, torch.zeros(())) + gradient.float()
    train_batch(model, sentences(8), micro_batch_size=2)
    for name, gradient in gradients(model).items():
        assert gradient.dtype == torch.bfloat16
        assert torch.equal(gradient, exact[name].bfloat16()), name


@pytest.mark.slow
def test_gradients_of_a_batch_before_are_not_part_of_the_next() -> None:
    model = CausalLM(LLAMA, "HfLlama", dtype=torch.float32)
    train_batch(model, sentences(4, seed=1), micro_batch_size=2)
    train_batch(model, sentences(4, seed=2), micro_batch_size=2)
    second = gradients(model)
    fresh = CausalLM(LLAMA, "HfLlama", dtype=torch.float32)
    train_batch(fresh, sentences(4, seed=2), micro_batch_size=2)
    assert all(torch.equal(second[name], gradient) for name, gradient in gradients(fresh).items())


def test_a_cancelled_batch_stops_at_the_next_micro_batch_and_leaves_nothing_behind() -> None:
    model = CausalLM(LLAMA, "HfLlama", dtype=torch.float32)
    accumulator = Fp32GradientAccumulator(model.parameters())
    asked: list[bool] = []

    def cancelled() -> bool:
        asked.append(len(asked) >= 2)
        return asked[-1]

    batch = sentences(8)
    assert train_batch(model, batch, micro_batch_size=2, accumulator=accumulator, cancelled=cancelled) is None
    assert asked == [False, False, True]
    train_batch(model, batch, micro_batch_size=2, accumulator=accumulator)
    again = CausalLM(LLAMA, "HfLlama", dtype=torch.float32)
    train_batch(again, batch, micro_batch_size=2)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model).values(), gradients(again).values(), strict=True))


@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_a_loss_that_is_no_number_is_left_out_of_the_sum(micro_batch_size: int | None) -> None:
    model = CausalLM(LLAMA, "HfLlama", dtype=torch.float32)
    labels = sentences(2)
    labels[1] = -100
    batch = TokenBatch(sentences(2), labels)
    loss = train_batch(model, batch, micro_batch_size=micro_batch_size)
    assert loss is not None
    assert loss.isfinite()
    wanted = model(TokenBatch(sentences(2)[:1])).loss.detach() / (1 if micro_batch_size is None else 2)
    torch.testing.assert_close(loss, wanted)
