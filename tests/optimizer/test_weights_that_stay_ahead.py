"""Weights that look ahead from one step to the next, for an engine that takes both in one pass: the same bits.

The engine here is a plain twin of the kernels: it says that it merges ahead and defers, and does it step by step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typing_extensions import override

from distro_optim import DisTrO
from distro_optim.comm.exchange import LocalExchange
from distro_optim.compress import CompressedUpdate
from distro_optim.compress.engine import BlockEngine, Intake
from distro_optim.compress.engine.shifting import shifted as shift_by
from distro_optim.errors import ExchangeError
from distro_optim.optim import planned
from distro_optim.optim.rules import PUBLISHED
from optimizer.models import EveryShape, set_gradients

Loop = Callable[[DisTrO, list[nn.Parameter], Callable[[], None]], None]


class AheadEngine(BlockEngine):
    """Blocks of torch behind the two capabilities of kernels.

    Attributes:
        passes: how often it merged ahead.
        taken: how often it was told by the device what is finite.
    """

    passes = taken = 0

    @property
    @override
    def merges_ahead(self) -> bool:
        return True

    @property
    @override
    def defers(self) -> bool:
        return True

    @override
    def finite(self, grads: Sequence[Tensor | None]) -> Tensor:
        return torch.tensor([g is not None and bool(g.isfinite().all()) for g in grads], dtype=torch.int32)

    @override
    def extract(self, intake: Intake) -> CompressedUpdate:
        type(self).taken += intake.usable is not None
        self._momenta = intake.momenta
        return super().extract(intake.settled())

    @override
    def merge_ahead(
        self,
        updates: Sequence[CompressedUpdate],
        weights: Sequence[Tensor],
        shifted: Sequence[Tensor | None],
        *,
        lr: Sequence[float],
        ahead_lr: Sequence[float],
    ) -> bool:
        self.merge(updates, weights, lr=lr)
        for spec, weight, ahead, delta in zip(self.plan.specs, weights, shifted, self._momenta, strict=True):
            if ahead is not None:
                shift_by(ahead.copy_(weight), delta, ahead_lr[spec.group], False)
        type(self).passes += 1
        return True


def in_a_loop(optimizer: DisTrO, params: list[nn.Parameter], look: Callable[[], None]) -> None:
    for step in range(5):
        set_gradients(params, step)
        if step == 2:
            params[0].grad = None
            params[-2].grad.view(-1)[0] = torch.nan  # type: ignore[union-attr]
        optimizer.step()
        look()


def with_evaluations(optimizer: DisTrO, params: list[nn.Parameter], look: Callable[[], None]) -> None:
    for step in range(5):
        set_gradients(params, step)
        optimizer.step()
        if step % 2:
            optimizer.eval()
            look()
            optimizer.train()
        look()


def with_a_call_of_train_before_each_step(
    optimizer: DisTrO, params: list[nn.Parameter], look: Callable[[], None]
) -> None:
    for step in range(4):
        optimizer.train()
        look()
        set_gradients(params, step)
        optimizer.step()
        look()


def with_weights_that_are_written_to(optimizer: DisTrO, params: list[nn.Parameter], look: Callable[[], None]) -> None:
    for step in range(5):
        set_gradients(params, step)
        if step == 2:
            with torch.no_grad():
                params[0].view(-1)[0] = 3.0
        if step == 3:
            params[-1].data.fill_(0.5)  # a small one, behind autograd's back
        optimizer.step()
        look()


def with_a_schedule_and_a_frozen_one(optimizer: DisTrO, params: list[nn.Parameter], look: Callable[[], None]) -> None:
    for step in range(6):
        params[2].requires_grad_(step not in (2, 3))
        set_gradients(params, step)
        optimizer.param_groups[0]["lr"] = 0.01 / (1 + step)
        optimizer.step()
        look()


def with_peers_that_are_late(optimizer: DisTrO, params: list[nn.Parameter], look: Callable[[], None]) -> None:
    exchange = Late()
    optimizer.exchange = exchange
    for step in range(5):
        set_gradients(params, step)
        exchange.late = step == 3
        if exchange.late:
            with pytest.raises(ExchangeError):
                optimizer.step()
            assert not optimizer.param_groups[0]["looks_ahead"]
        else:
            optimizer.step()
        look()


class Late(LocalExchange):
    """Whose updates do not come in time, sometimes."""

    late = False

    @override
    def collect(self) -> list[CompressedUpdate]:
        if self.late:
            raise ExchangeError("too late")
        return super().collect()


def saved_and_loaded(optimizer: DisTrO, params: list[nn.Parameter], look: Callable[[], None]) -> None:
    in_a_loop(optimizer, params, look)
    saved = copy.deepcopy(optimizer.state_dict())
    in_a_loop(optimizer, params, look)
    optimizer.load_state_dict(saved)
    look()
    in_a_loop(optimizer, params, look)


LOOPS: list[tuple[Loop, int]] = [
    (in_a_loop, 4),
    (with_evaluations, 4),
    (with_a_call_of_train_before_each_step, 0),
    (with_weights_that_are_written_to, 2),
    (with_a_schedule_and_a_frozen_one, 3),
    (with_peers_that_are_late, 2),
    (saved_and_loaded, 13),
]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1], ids=["", "with weight decay"])
@pytest.mark.parametrize(("loop", "passes"), LOOPS, ids=lambda value: getattr(value, "__name__", ""))
def test_weights_are_those_of_passes_of_their_own(
    monkeypatch: pytest.MonkeyPatch, loop: Loop, passes: int, weight_decay: float
) -> None:
    def trained() -> tuple[list[Tensor], int]:
        torch.manual_seed(0)
        params = [
            *EveryShape(torch.float32).parameters(),
            nn.Parameter(torch.ones(90, 70)),
            nn.Parameter(torch.ones(3)),
        ]
        optimizer = DisTrO(params, lr=0.01, weight_decay=weight_decay, **PUBLISHED)
        seen: list[Tensor] = []

        def look() -> None:
            seen.extend(param.detach().clone() for param in params)
            if optimizer.param_groups[0]["looks_ahead"]:
                seen.extend(optimizer.state[param]["weight"].clone() for param in params)

        loop(optimizer, params, look)
        optimizer.flush()
        look()
        return seen, optimizer.quarantined

    expected = trained()

    def ahead(name: str, plan: Any, transform: str, share: Any, workers: int) -> AheadEngine:
        return AheadEngine(plan, transform, share, workers)

    monkeypatch.setattr(planned, "make_engine", ahead)
    monkeypatch.setattr(AheadEngine, "passes", 0)
    monkeypatch.setattr(AheadEngine, "taken", 0)
    seen, quarantined = trained()
    assert len(seen) == len(expected[0])
    assert all(map(torch.equal, seen, expected[0]))
    assert quarantined == expected[1]
    assert AheadEngine.passes == passes
    assert (AheadEngine.taken > 0) == (weight_decay == 0)
