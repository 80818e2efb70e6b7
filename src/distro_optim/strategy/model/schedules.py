"""Learning-rate schedulers of the script at the step of the run, whenever we came into it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Final

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ...coordinator.types import CoordinatorProgress
from ...errors import ConfigurationError

__all__ = ["FIRST_STEP", "FollowingSchedulers"]

FIRST_STEP: Final = CoordinatorProgress().step
"""With this step a run begins; a scheduler that was just made stands there."""


class FollowingSchedulers:
    """Calls ``step()`` of schedulers until they stand at the step that is asked for; also back, from their beginning.

    Args:
        schedulers: as they were made, or restored from a checkpoint of an earlier step.

    Raises:
        ConfigurationError: a scheduler that depends on more than the step.
    """

    def __init__(self, schedulers: Sequence[Any]) -> None:
        for scheduler in schedulers:
            if isinstance(scheduler, ReduceLROnPlateau) or not isinstance(scheduler, LRScheduler):
                raise ConfigurationError(
                    f"{type(scheduler).__name__} cannot follow a run: what it looks at differs between peers, and they "
                    "must have equal learning rates; use a schedule of the step, such as LambdaLR or OneCycleLR",
                    name="schedulers",
                    value=scheduler,
                )
        self._schedulers: list[LRScheduler] = list(schedulers)
        # Deep: a SequentialLR hands out the states of those in it as they are.
        self._beginnings = [copy.deepcopy(scheduler.state_dict()) for scheduler in self._schedulers]
        self._rates = [[group["lr"] for group in s.optimizer.param_groups] for s in self._schedulers]

    def __call__(self, step: int) -> None:
        """Sets the learning rates to those of the run's ``step``."""
        wanted = step - FIRST_STEP
        for scheduler, beginning, rates in zip(self._schedulers, self._beginnings, self._rates, strict=True):
            if scheduler.last_epoch > wanted:
                scheduler.load_state_dict(copy.deepcopy(beginning))
                for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate
            # A scheduler warns if it sees no steps of its optimizer; rounds take them by other names.
            scheduler.optimizer._opt_called = True  # type: ignore[attr-defined]
            while scheduler.last_epoch < wanted:
                scheduler.step()
