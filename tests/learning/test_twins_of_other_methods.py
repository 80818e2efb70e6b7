"""The twins of DiLoCo and SparseLoCo in the benchmarks do what their papers say, on a line through points."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

RATES = [0.1, 0.05, 0.1, 0.02, 0.03, 0.01]
H = 3


@pytest.fixture
def diloco(base: ModuleType) -> ModuleType:
    return importlib.import_module("learners.diloco")


@pytest.fixture
def sparse(base: ModuleType) -> ModuleType:
    return importlib.import_module("learners.sparse_loco")


def line() -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(5, 2)


def squares(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(model(x), y)


def batch(step: int, worker: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + worker)
    x = torch.randn(8, 5, generator=generator)
    return x, x[:, :2] * 3 - x[:, 3:] + 1


def make(base: ModuleType, kind: Any, workers: int, **settings: Any) -> Any:
    return kind(base.Task("line", line, squares), base.Method("twin", lr=0.1, local_steps=H, **settings), workers)


def train(twin: Any, workers: int, rates: list[float] = RATES) -> list[Tensor]:
    for step, lr in enumerate(rates):
        twin.step([batch(step, worker) for worker in range(workers)], lr)
    return [p.detach().clone() for p in twin.model().parameters()]


# -- DiLoCo ------------------------------------------------------------------------------------------------------------


def test_workers_train_alone_and_everybody_steps_by_nesterovs_momentum_of_the_mean(
    base: ModuleType, diloco: ModuleType
) -> None:
    found = train(make(base, diloco.DiLoCoWorkers, 2, outer_lr=0.7, outer_momentum=0.9), 2)
    shared, own = line(), [line(), line()]
    outer = torch.optim.SGD(shared.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    inner = [torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0) for model in own]
    for step, lr in enumerate(RATES):
        for worker, (model, optimizer) in enumerate(zip(own, inner, strict=True)):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            squares(model, *batch(step, worker)).backward()
            optimizer.step()
        if (step + 1) % H == 0:
            for weight, *theirs in zip(shared.parameters(), *(model.parameters() for model in own), strict=True):
                weight.grad = torch.stack([(weight - t).detach().bfloat16().float() for t in theirs]).mean(0)
            outer.step()
            for model in own:
                model.load_state_dict(shared.state_dict())
    torch.testing.assert_close(found, [p.detach() for p in shared.parameters()], rtol=1e-6, atol=1e-6)


def test_between_two_exchanges_the_shared_weights_stay(base: ModuleType, diloco: ModuleType) -> None:
    twin = make(base, diloco.DiLoCoWorkers, 2, outer_lr=0.7, outer_momentum=0.9)
    assert all(torch.equal(a, b) for a, b in zip(train(twin, 2, RATES[: H - 1]), line().parameters(), strict=True))
    assert twin.sent_per_step() == 0


def test_four_bits_are_a_sign_and_the_nearest_of_eight_powers_of_two_below_the_largest(diloco: ModuleType) -> None:
    x = torch.tensor([2.0, 1.6, -1.4, 1.0, 0.6, -0.52, 0.002, -0.0])
    expected = torch.tensor([2.0, 2.0, -1.0, 1.0, 0.5, -0.5, 2 / 128, 2 / 128])
    assert torch.equal(diloco.power_of_two(x), expected)
    assert diloco.power_of_two(torch.zeros(3)).abs().max() < 1e-30


@pytest.mark.parametrize(("bits", "sent"), [(0, 12 * 2), (4, 12 / 2 + 2 * 4)])
def test_bytes_are_those_of_all_weights_at_each_exchange(
    base: ModuleType, diloco: ModuleType, bits: int, sent: float
) -> None:
    twin = make(base, diloco.DiLoCoWorkers, 3, outer_lr=0.7, outer_momentum=0.9, bits=bits)
    train(twin, 3)
    assert twin.sent_per_step() == sent / H


# -- SparseLoCo --------------------------------------------------------------------------------------------------------


def test_of_a_chunk_the_largest_are_sent_each_as_a_sign_and_one_of_two_means(sparse: ModuleType) -> None:
    x = torch.tensor([[4.0, -3.0, 0.25], [1.0, -0.5, 0.0]])
    assert torch.equal(sparse.largest_in_two_bits(x, 3), torch.tensor([[3.5, -3.5, 0], [1, 0, 0]]))
    assert torch.equal(sparse.largest_in_two_bits(x, 1), torch.tensor([[4.0, 0, 0], [0, 0, 0]]))


def test_chunks_of_4096_are_chosen_from_one_by_one(sparse: ModuleType) -> None:
    x = torch.zeros(4096 + 10)
    x[:5], x[4096:4099] = 8.0, 0.5
    sent = sparse.largest_in_two_bits(x, 2)
    assert (sent[:4096] == 8).sum() == 2
    assert (sent[4096:] == 0.5).sum() == 2


@pytest.mark.parametrize(
    ("elements", "bits"),
    [(4096, 150 * 14 + 32), (3 * 4096, 3 * (150 * 14 + 32)), (128, 128 * 2 + 32), (4097, 2 * (150 * 14 + 32))],
)
def test_a_position_takes_twelve_bits_unless_everything_is_sent(sparse: ModuleType, elements: int, bits: int) -> None:
    assert sparse.bits_sent(elements, 150) == bits


def test_what_is_not_sent_is_remembered_and_nothing_is_lost(base: ModuleType, sparse: ModuleType) -> None:
    twin = make(base, sparse.SparseLoCoWorkers, 2, topk=2, decay=1.0, outer_lr=1.0)
    moved: list[list[Tensor]] = []
    exchange = twin._exchange

    def watched(each: list[list[Tensor]]) -> None:
        moved.append([torch.stack(one).mean(0) for one in zip(*each, strict=True)])
        exchange(each)

    twin._exchange = watched
    weights = train(twin, 2)
    unsent = [torch.stack(one).mean(0) for one in zip(*twin._unsent, strict=True)]
    total = [first + second for first, second in zip(*moved, strict=True)]
    expected = [start - come + left for start, come, left in zip(line().parameters(), total, unsent, strict=True)]
    torch.testing.assert_close(weights, [e.detach() for e in expected], rtol=1e-5, atol=1e-6)
    assert all(left.any() for left in unsent)


# -- both --------------------------------------------------------------------------------------------------------------


def squares_left(twin: Any, lr: float) -> float:
    """After 150 steps, of those before them."""
    before = squares(twin.model(), *batch(0, 9)).item()
    train(twin, 2, [lr * (1 - step / 150) for step in range(150)])
    return squares(twin.model(), *batch(0, 9)).item() / before


def test_both_learn_the_line(base: ModuleType, diloco: ModuleType, sparse: ModuleType) -> None:
    # At a higher rate Nesterov's momentum swings to and fro over so short a way.
    assert squares_left(make(base, diloco.DiLoCoWorkers, 2, outer_lr=0.7, outer_momentum=0.9, bits=4), 0.02) < 0.05
    assert squares_left(make(base, sparse.SparseLoCoWorkers, 2, outer_lr=1.0, topk=3, decay=0.95), 0.1) < 0.05
