"""Peers that train on different data hold the same weights, to the last bit, after every step."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

from distro_optim import DisTrO, MemoryExchange
from distro_optim.errors import DistroError, ExchangeError
from optimizer.models import EveryShape, all_same_bits, copies, set_gradients

pytestmark = pytest.mark.waiting


OVERLAP = pytest.mark.parametrize("overlap", [False, True], ids=["blocking", "overlap"])


def make(count: int, *, dtype: torch.dtype = torch.float32, **settings: Any) -> list[tuple[EveryShape, DisTrO]]:
    """Peers that start from different weights: the exchange gives all of them the same."""
    models = [EveryShape(dtype, seed=peer) for peer in range(count)]
    return [
        (model, DisTrO(model.parameters(), lr=0.01, exchange=exchange, **settings))
        for model, exchange in zip(models, MemoryExchange.group(count), strict=True)
    ]


def begin(peer: int, model: EveryShape, optimizer: DisTrO, step: int) -> None:
    optimizer.zero_grad()
    model.loss(100 * step + peer).backward()
    optimizer.begin_step()


def assert_equal_weights(models: list[Any], what: object) -> None:
    first = copies(models[0].parameters())
    for model in models[1:]:
        assert all_same_bits(copies(model.parameters()), first), what


@pytest.mark.slow
@OVERLAP
@pytest.mark.parametrize("quantize", [False, True], ids=["values", "signs"])
@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_in_lock_step(overlap: bool, quantize: bool, count: int, dtype: torch.dtype) -> None:
    peers = make(count, overlap=overlap, quantize_1bit=quantize, weight_decay=0.1, dtype=dtype)
    start = copies(peers[0][0].parameters())
    for step in range(12):
        for number, (model, optimizer) in enumerate(peers):
            begin(number, model, optimizer, step)
        for _, optimizer in peers:
            optimizer.finish_step()
        assert_equal_weights([m for m, _ in peers], step)
        if step == 5:
            for _, optimizer in peers:
                optimizer.flush()
            assert_equal_weights([m for m, _ in peers], "flush")
    assert not all_same_bits(copies(peers[0][0].parameters()), start)
    momenta = [optimizer.state[model.head.weight]["delta"] for model, optimizer in peers]
    assert not torch.equal(momenta[0], momenta[1])  # what is decoupled is decoupled


@pytest.mark.slow
@OVERLAP
@pytest.mark.parametrize("closure", [False, True], ids=["plain", "closure"])
def test_in_threads_with_plain_steps_and_the_lookahead_on(overlap: bool, closure: bool) -> None:
    peers = make(3, overlap=overlap)
    seen: dict[int, list[list[torch.Tensor]]] = {0: [], 1: [], 2: []}

    def train(number: int) -> None:
        model, optimizer = peers[number]
        for step in range(10):

            def compute(step: int = step) -> float:
                optimizer.zero_grad()
                loss = model.loss(100 * step + number)
                loss.backward()
                return loss.item()

            if closure:
                optimizer.step(compute)
            else:
                compute()
                optimizer.step()
            optimizer.eval()
            seen[number].append(copies(model.parameters()))
            optimizer.train()

    threads = [threading.Thread(target=train, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen[0]) == 10
    for a, b, c in zip(*seen.values(), strict=True):
        assert all_same_bits(a, b)
        assert all_same_bits(a, c)


def test_the_first_gradient_of_a_closure_is_taken_at_the_weights_that_all_have() -> None:
    peers = make(2)
    assert not all_same_bits(copies(peers[0][0].parameters()), copies(peers[1][0].parameters()))
    seen: dict[int, list[torch.Tensor]] = {}

    def train(number: int) -> None:
        model, optimizer = peers[number]

        def compute() -> float:
            seen.setdefault(number, copies(model.parameters()))
            return 0.0

        optimizer.step(compute)

    threads = [threading.Thread(target=train, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all_same_bits(seen[0], seen[1])


@OVERLAP
def test_a_parameter_that_only_some_peers_use_stays_equal(overlap: bool) -> None:
    """As the expert that only one peer's tokens were routed to, under weight decay."""
    params = [[nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(9, 9))] for _ in range(3)]
    optimizers = [
        DisTrO(p, lr=0.01, weight_decay=0.5, overlap=overlap, exchange=e)
        for p, e in zip(params, MemoryExchange.group(3), strict=True)
    ]
    for step in range(9):
        for number, (mine, optimizer) in enumerate(zip(params, optimizers, strict=True)):
            optimizer.zero_grad()
            set_gradients(mine if step % 3 == number else mine[:1], 100 * step + number)
            optimizer.begin_step()
        for optimizer in optimizers:
            optimizer.finish_step()
        for other in params[1:]:
            assert all_same_bits(copies(other), copies(params[0])), step


@OVERLAP
def test_a_peer_that_has_nothing_to_say_follows_the_others(overlap: bool) -> None:
    peers = make(2, overlap=overlap)
    for step in range(6):
        begin(0, *peers[0], step)
        peers[1][1].zero_grad()
        peers[1][1].begin_step()
        for _, optimizer in peers:
            optimizer.finish_step()
        assert_equal_weights([m for m, _ in peers], step)


@pytest.mark.slow
def test_every_peer_learns_what_only_the_others_data_could_teach_it() -> None:
    """Each peer sees inputs of which only its own quarter is not 0."""
    target = torch.linspace(-1, 1, 16)
    weights = [nn.Parameter(torch.zeros(16)) for _ in range(4)]
    optimizers = [
        DisTrO([w], lr=0.02, compression_decay=0.9, exchange=e)
        for w, e in zip(weights, MemoryExchange.group(4), strict=True)
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        for peer, (weight, optimizer) in enumerate(zip(weights, optimizers, strict=True)):
            x = torch.zeros(32, 16)
            x[:, 4 * peer : 4 * peer + 4] = torch.randn(32, 4, generator=generator)
            optimizer.zero_grad()
            ((x @ weight - x @ target) ** 2).mean().backward()
            optimizer.begin_step()
        for optimizer in optimizers:
            optimizer.finish_step()
    for weight in weights:
        assert (weight - target).abs().max() < 0.25


def test_a_different_model_is_refused_before_anything_is_exchanged() -> None:
    exchanges = MemoryExchange.group(2)
    a = DisTrO([nn.Parameter(torch.ones(4))], exchange=exchanges[0])
    b = DisTrO([nn.Parameter(torch.ones(5))], exchange=exchanges[1])
    a.begin_step()
    with pytest.raises(ExchangeError, match="another model"):
        b.begin_step()


def test_after_the_exchange_has_failed_the_optimizer_can_still_be_saved() -> None:
    peers = make(2)
    for number, (model, optimizer) in enumerate(peers):
        begin(number, model, optimizer, 0)
        optimizer.finish_step()
    model, optimizer = peers[0]
    assert optimizer.exchange is not None
    optimizer.exchange.close()
    with pytest.raises(ExchangeError, match="closed"):
        begin(0, model, optimizer, 1)
    state = optimizer.state_dict()
    alone = EveryShape()
    other = DisTrO(alone.parameters())
    other.load_state_dict(state)
    with pytest.raises(DistroError, match="without begin_step"):
        optimizer.finish_step()
