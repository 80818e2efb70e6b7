"""Our momentum of the last steps, committed to after each of them and shown where it is asked for, beside the training.

After a step has generated its update, the momentum rests until the next one does: then another thread copies it, and
hashes the copy. The thread that trains waits for nothing but the copy, and only where a round is shorter than that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from torch import Tensor

from ....compress import TilePlan
from ....verify.momentum import Snapshot
from ....verify.opening import encode_opening, make_opening
from ..still_weights import on_the_host, ready_events
from ..weights_hash import SideJobs

__all__ = ["KEPT_STEPS", "MomentumKeeper"]

KEPT_STEPS: Final = 3
"""Momenta that are kept: audits are drawn two rounds after a step, and are about what was before it, too."""


class MomentumKeeper:
    """See the module. Its methods belong to the thread that trains.

    Args:
        committed: told a step, the root of the momentum after it, and its decays; in the other thread.
        opened: told a step and what is to be sent; in the other thread.
    """

    def __init__(
        self,
        committed: Callable[[int, bytes, Sequence[float]], None],
        opened: Callable[[int, bytes], None],
    ) -> None:
        self._committed = committed
        self._opened = opened
        self._jobs = SideJobs("distro-optim-momentum")
        self._copying = 0
        self._kept: dict[int, Snapshot] = {}  # belongs to the other thread, but for reads between rounds

    def commit(self, step: int, plan: TilePlan, momenta: Sequence[Tensor], decays: Sequence[float]) -> None:
        """The momentum is that after ``step`` now, until :meth:`before_change`.

        Args:
            step: that was trained.
            plan: of the optimizer.
            momenta: one per tensor of the plan; read in the other thread.
            decays: of the momentum, one for each parameter group.
        """
        ready = ready_events(momenta)

        def copy() -> None:
            retired = [self._kept.pop(old) for old in sorted(self._kept) if old <= step - KEPT_STEPS]
            tensors = [on_the_host(momentum, ready) for momentum in momenta]
            self._kept[step] = Snapshot(plan, tensors, in_place_of=retired[0] if retired else None)

        def tell() -> None:
            if (snapshot := self._kept.get(step)) is not None:
                self._committed(step, snapshot.root, tuple(decays))

        self._copying = self._jobs.add(copy)
        self._jobs.add(tell)

    def before_change(self) -> None:
        """The momentum is about to change."""
        self._jobs.wait(self._copying)

    def open(self, step: int, leaves: Sequence[int]) -> None:
        """Shows leaves of the momentum before ``step`` and after it, if both are here."""

        def show() -> None:
            pair = self.pair(step)
            if pair is not None:
                self._opened(step, encode_opening(make_opening(step, leaves, *pair), pair[1].plan))

        self._jobs.add(show)

    def pair(self, step: int) -> tuple[Snapshot, Snapshot] | None:
        """The momentum before ``step`` and after it, if both are here."""
        before, after = self._kept.get(step - 1), self._kept.get(step)
        if before is None or after is None or before.plan.layout != after.plan.layout:
            return None
        return before, after

    def wait(self) -> None:
        """Returns when all that was asked for is done."""
        self._jobs.wait_for_all()

    def forget(self) -> None:
        """The momentum was replaced: what it was before is of no use."""
        self._jobs.stop()
        self._kept.clear()
