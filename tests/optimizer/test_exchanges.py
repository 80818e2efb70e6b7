"""Every exchange keeps the contract; and what each of them does besides."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import timedelta
from functools import partial

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from distro_optim import DisTrO, Exchange, MemoryExchange
from distro_optim.comm.exchange import LocalExchange
from distro_optim.compress import CompressedUpdate, ParamSpec, TilePlan, make_plan
from distro_optim.errors import ConfigurationError, ExchangeError
from distro_optim.testing.exchange import check_exchange
from distro_optim.testing.lockstep import step_together
from distro_optim.testing.updates import random_update, same_update
from optimizer.models import EveryShape

pytestmark = pytest.mark.waiting


PLAN = make_plan([ParamSpec((6, 6), torch.float32, torch.device("cpu"), 0, 4, 2)], "padded")
SOON = timedelta(milliseconds=50)


def weights() -> list[Tensor]:
    return [torch.zeros(6, 6)]


@pytest.mark.slow
def test_memory_keeps_the_contract() -> None:
    check_exchange(MemoryExchange.group)


def test_a_peer_alone_keeps_the_contract() -> None:
    check_exchange(lambda size: [LocalExchange()], sizes=[1])


class Mutilated(MemoryExchange):
    """A memory exchange that breaks the contract in one way."""

    fault: str

    @override
    def start(self, plan: TilePlan, params: Sequence[Tensor]) -> None:
        own = [p.clone() for p in params]
        super().start(plan, params)
        if self.fault == "everybody keeps its weights":
            for param, keep in zip(params, own, strict=True):
                param.copy_(keep)

    @override
    def publish(self, update: CompressedUpdate) -> None:
        if self.fault == "absent tensors speak":
            update = CompressedUpdate(
                update.plan, update.index, update.value, tuple(h is not None for h in update.plan.home)
            )
        super().publish(update)

    @override
    def collect(self) -> list[CompressedUpdate]:
        updates = super().collect()
        if self.fault == "every peer has its own order":
            return updates[self.peer :] + updates[: self.peer]
        if self.fault == "the last update is lost":
            return updates[:-1]
        if self.fault == "a bit falls over":
            updates[0].index[0][0, 0] ^= 1
        if self.fault == "nothing is counted":
            self.bytes_received = 0
        return updates

    @override
    def close(self) -> None:
        if self.fault != "closing does nothing":
            super().close()


@pytest.mark.parametrize(
    "fault",
    [
        "everybody keeps its weights",
        "absent tensors speak",
        "every peer has its own order",
        "the last update is lost",
        "a bit falls over",
        "nothing is counted",
        "closing does nothing",
    ],
)
def test_the_suite_finds_out_when(fault: str) -> None:
    def make(size: int) -> list[Exchange]:
        group = Mutilated.group(size, timeout=SOON)
        for exchange in group:
            assert isinstance(exchange, Mutilated)
            exchange.fault = fault
        return list(group)

    with pytest.raises(AssertionError):
        check_exchange(make, sizes=[2])


# ---------------------------------------------------------------- memory


def test_waiting_in_vain_names_who_is_missing_and_what_to_do() -> None:
    first, second = MemoryExchange.group(2, timeout=SOON)
    for exchange in (first, second):
        exchange.start(PLAN, weights())
    first.publish(random_update(PLAN, quantized=True))
    with pytest.raises(ExchangeError, match=r"peers \[1\] .* step 0 .*step_together"):
        first.collect()


def test_a_waiting_peer_is_released_when_the_missing_one_leaves() -> None:
    first, second = MemoryExchange.group(2)
    for exchange in (first, second):
        exchange.start(PLAN, weights())
    update = random_update(PLAN, quantized=True)
    first.publish(update)
    collected: list[CompressedUpdate] = []
    waiting = threading.Thread(target=lambda: collected.extend(first.collect()), daemon=True)
    waiting.start()
    second.close()
    waiting.join(30)
    assert len(collected) == 1
    assert same_update(collected[0], update)


def test_what_everybody_has_collected_is_forgotten() -> None:
    group = MemoryExchange.group(3)
    for exchange in group:
        exchange.start(PLAN, weights())
    for step in range(5):
        for exchange in group:
            exchange.publish(random_update(PLAN, quantized=True, seed=step))
        for exchange in group[:2]:
            exchange.collect()
    assert len(group[0]._room.updates) == 5
    group[2].close()
    assert not group[0]._room.updates


def test_weights_to_start_with_are_forgotten_when_a_peer_leaves_without_starting() -> None:
    group = MemoryExchange.group(3)
    for exchange in group[:2]:
        exchange.start(PLAN, weights())
    assert group[0]._room.starts
    group[2].close()
    assert not group[0]._room.starts


@pytest.mark.parametrize("size", [0, -1])
def test_a_group_of_nobody_is_refused(size: int) -> None:
    with pytest.raises(ConfigurationError, match="at least 1"):
        MemoryExchange.group(size)


# ---------------------------------------------------------------- in lock-step


def peers(count: int, *, overlap: bool) -> tuple[list[EveryShape], list[DisTrO]]:
    models = [EveryShape(seed=peer) for peer in range(count)]
    group = MemoryExchange.group(count, timeout=timedelta(seconds=30))
    return models, [
        DisTrO(m.parameters(), lr=0.01, overlap=overlap, exchange=e) for m, e in zip(models, group, strict=True)
    ]


def same_weights(models: Sequence[EveryShape]) -> bool:
    return all(all(map(torch.equal, models[0].state_dict().values(), m.state_dict().values())) for m in models[1:])


def backward(model: EveryShape, optimizer: DisTrO, batch: int) -> float:
    optimizer.zero_grad()
    loss = model.loss(batch)
    loss.backward()
    return loss.item()


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("closures", [False, True])
def test_steps_together_are_steps_in_threads(closures: bool, overlap: bool) -> None:
    def batch(peer: int, step: int) -> int:
        return 3 * step + peer

    models, optimizers = peers(3, overlap=overlap)
    threaded, theirs = peers(3, overlap=overlap)
    # Whoever starts first gives its weights: let it be the first peer, as it is in lock-step.
    for model in threaded[1:]:
        model.load_state_dict(threaded[0].state_dict())
    started = threading.Barrier(3)

    def run(peer: int) -> None:
        model, optimizer = threaded[peer], theirs[peer]
        for step in range(4):
            started.wait(30)
            if closures:
                optimizer.step(partial(backward, model, optimizer, batch(peer, step)))
            else:
                backward(model, optimizer, batch(peer, step))
                optimizer.step()
        optimizer.eval()

    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    for step in range(4):
        if closures:
            calls = [
                partial(backward, model, optimizer, batch(peer, step))
                for peer, (model, optimizer) in enumerate(zip(models, optimizers, strict=True))
            ]
            losses = step_together(optimizers, calls)
            assert all(isinstance(loss, float) for loss in losses)
        else:
            for peer, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
                backward(model, optimizer, batch(peer, step))
            assert step_together(optimizers) == [None] * 3
    for optimizer in optimizers:
        optimizer.eval()
    threads = [threading.Thread(target=run, args=(peer,), daemon=True) for peer in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert same_weights(models)
    assert same_weights([models[0], *threaded])


def test_closures_and_optimizers_come_in_pairs() -> None:
    _, optimizers = peers(2, overlap=False)
    with pytest.raises(ValueError, match="1 closures for 2"):
        step_together(optimizers, [lambda: 0.0])
