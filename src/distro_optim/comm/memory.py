"""An exchange between optimizers of one process: for simulation and for tests.

In threads, each peer calls ``optimizer.step()`` as usual. In one thread,
:func:`distro_optim.testing.step_together` takes one step with all of them, in the same order every time.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import timedelta

import torch
from torch import Tensor
from typing_extensions import override

from ..compress import CompressedUpdate, TilePlan
from ..compress.flat import flat_size
from ..errors import ConfigurationError, ExchangeError
from .exchange import DEFAULT_TIMEOUT, Exchange, check_timeout

__all__ = ["MemoryExchange"]


class _Start:
    """What the first peer to start proposes to the others."""

    def __init__(self, plan: TilePlan, params: Sequence[Tensor]) -> None:
        self.layout = plan.layout
        self.weights = [p.detach().clone() for p in params]
        self.seen: set[int] = set()


class _Room:
    """What the peers of one group share, guarded by one condition."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.changed = threading.Condition()
        self.open = [True] * size
        self.starts: dict[int, _Start] = {}  # how often a peer has started -> what was agreed then
        self.updates: dict[int, dict[int, CompressedUpdate]] = {}  # step -> peer -> update
        self.taken: dict[int, set[int]] = {}  # step -> peers that collected it


class MemoryExchange(Exchange):
    """One peer of a group in this process. Make all of them at once with :meth:`group`."""

    def __init__(self, room: _Room, peer: int, timeout: timedelta) -> None:
        self._room = room
        self._peer = peer
        self._timeout = timeout
        self._starts = self._published = self._collected = 0

    @classmethod
    def group(cls, size: int, *, timeout: timedelta = DEFAULT_TIMEOUT) -> list[MemoryExchange]:
        """``size`` connected exchanges.

        Args:
            timeout: how long :meth:`collect` waits for the others.

        Raises:
            ConfigurationError: ``size`` is not a number of peers, or ``timeout`` is not above 0.
        """
        check_timeout(timeout)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigurationError(
                f"size={size!r}: give a whole number of peers, at least 1", name="size", value=size
            )
        room = _Room(size)
        return [cls(room, peer, timeout) for peer in range(size)]

    @property
    @override
    def num_peers(self) -> int:
        return self._room.size

    @property
    def peer(self) -> int:
        """Our number in the group, from 0; updates are collected in this order."""
        return self._peer

    @override
    def start(self, plan: TilePlan, params: Sequence[Tensor]) -> None:
        """See :meth:`Exchange.start`. All peers take the weights of the first one to start."""
        room = self._room
        with room.changed:
            self._require_open()
            number = self._starts
            agreed = room.starts.setdefault(number, _Start(plan, params))
            if agreed.layout != plan.layout:
                raise ExchangeError("a peer trains another model, or with another tiling, top-k or transform")
            with torch.no_grad():
                for param, weight in zip(params, agreed.weights, strict=True):
                    param.copy_(weight)
            self._starts += 1
            agreed.seen.add(self._peer)
            self._forget()

    @override
    def publish(self, update: CompressedUpdate) -> None:
        room = self._room
        with room.changed:
            self._require_open()
            if not self._starts:
                raise ExchangeError("start() before publish()")
            room.updates.setdefault(self._published, {})[self._peer] = update
            self._published += 1
            self.bytes_sent += flat_size(update.plan, update.present, quantized=update.quantized)
            room.changed.notify_all()

    @override
    def collect(self) -> list[CompressedUpdate]:
        room, step = self._room, self._collected
        with room.changed:
            self._require_open()
            if step >= self._published:
                raise ExchangeError("nothing is in flight: publish() before collect()")
            held = room.updates[step]
            if not room.changed.wait_for(
                lambda: not room.open[self._peer] or all(p in held or not room.open[p] for p in range(room.size)),
                self._timeout.total_seconds(),
            ):
                missing = [p for p in range(room.size) if p not in held and room.open[p]]
                raise ExchangeError(
                    f"peers {missing} published nothing for step {step} within {self._timeout}; in one thread, "
                    "drive the optimizers with distro_optim.testing.step_together()"
                )
            self._require_open()
            self._collected += 1
            room.taken.setdefault(step, set()).add(self._peer)
            updates = [held[p] for p in sorted(held)]
            self.bytes_received += sum(
                flat_size(held[p].plan, held[p].present, quantized=held[p].quantized) for p in held if p != self._peer
            )
            self._forget()
            return updates

    @override
    def close(self) -> None:
        room = self._room
        with room.changed:
            room.open[self._peer] = False
            self._forget()
            room.changed.notify_all()

    def _forget(self) -> None:
        """Drops what all peers that are still here have seen: weights to start with, and collected steps."""
        room = self._room
        here = {p for p in range(room.size) if room.open[p]}
        for number in [n for n, start in room.starts.items() if here <= start.seen]:
            del room.starts[number]
        for step in [s for s in room.updates if here <= room.taken.get(s, set())]:
            del room.updates[step]
            room.taken.pop(step, None)

    def _require_open(self) -> None:
        if not self._room.open[self._peer]:
            raise ExchangeError("the exchange is closed")
