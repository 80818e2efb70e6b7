"""Lightning's counters and learning-rate schedules, set to where the run stands.

Lightning counts what it has done itself. A peer that joins at step 500, or that missed a few rounds, has done less than
the run has, but ``max_steps``, ``global_step`` in the names of checkpoints, the x axis of loggers and every schedule
mean the run's step. So before each round the counters are set to it. They are internals of Lightning's loops, the same
in 2.4 to 2.6 under both of its names; nothing but this module touches them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ...errors import ConfigurationError

__all__ = [
    "RunLimits",
    "ScheduleFollower",
    "align_counters",
    "end_training",
    "make_room_beside",
    "rounds_in_epoch",
    "rounds_within",
    "whole_epoch_shown",
    "whole_peers",
]


WIDE_TERMINAL: Final = 120
"""Columns in which rich's bar of 40 and the numbers beside it have room."""

NARROW_BAR: Final = 10
"""Columns of the bar in narrower ones; of 80 it leaves enough for a loss and the number of peers."""


def rounds_in_epoch(trainer: Any) -> int:
    """Batches of an epoch as Lightning will run it, ``limit_train_batches`` included."""
    return max(1, int(trainer.num_training_batches))


def align_counters(trainer: Any, step: int) -> None:
    """Makes Lightning believe that it has done the run's steps before ``step``, counted from 1.

    To be called before an epoch begins, or while a batch is fetched.
    """
    loop = trainer.fit_loop
    done = step - 1
    epoch, position = divmod(done, rounds_in_epoch(trainer))
    _set(loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total, done)
    _set(loop.epoch_loop.batch_progress.total, done)
    _set(loop.epoch_loop.batch_progress.current, position)
    loop.epoch_loop._batches_that_stepped = done
    if loop._data_fetcher is not None:
        loop._data_fetcher.fetched = position
    for tracker in (loop.epoch_progress.total, loop.epoch_progress.current):
        begun = tracker.ready - tracker.completed  # 1 within an epoch, 0 between two
        _set(tracker, epoch)
        tracker.ready += begun
        tracker.started += begun


def end_training(trainer: Any) -> None:
    """Lets ``fit`` come to its end after the present batch, whatever minimum the script asks for."""
    trainer.fit_loop.min_epochs = 0
    trainer.fit_loop.epoch_loop.min_steps = None
    trainer.should_stop = True


def rounds_within(length: int, limit: int | float | None) -> int:
    """Batches of an epoch, as Lightning will count them: ``length`` and its ``limit_train_batches``."""
    if isinstance(limit, float):
        return max(1, int(length * limit))
    return max(1, length if limit is None else min(length, limit))


class RunLimits:
    """While a script is set up, the trainer's ``max_steps`` and ``max_epochs`` are those of the run.

    So whatever a script makes of them, and of ``estimated_stepping_batches``, is the same on all peers. When training
    begins, they are the script's own again: a peer may leave before the run ends.

    Args:
        trainer: whose.
        last_step: the last step that the run trains; None if that is for the script to say.
    """

    def __init__(self, trainer: Any, last_step: int | None) -> None:
        self._loop = trainer.fit_loop
        self._last_step = last_step
        self._before = self._loop.epoch_loop.max_steps, self._loop.max_epochs
        if last_step is not None:
            self._loop.epoch_loop.max_steps = last_step

    def rounds_known(self, rounds_in_epoch: int) -> None:
        """The rounds of an epoch are known, and with them the run's epochs."""
        max_steps, max_epochs = self._before
        if self._last_step is None or max_epochs in (None, -1):
            return
        own = max_epochs * rounds_in_epoch
        if self._last_step != (own if max_steps == -1 else min(own, max_steps)):
            self._loop.max_epochs = -(-self._last_step // rounds_in_epoch)

    def remove(self) -> None:
        """Gives the script its own back."""
        self._loop.epoch_loop.max_steps, self._loop.max_epochs = self._before


@contextmanager
def whole_epoch_shown(trainer: Any, last_step: int) -> Iterator[None]:
    """Lets a progress bar that asks how long the epoch is, and how many there are, count all of the run's.

    By itself it would count the steps that are left, as if an epoch always began with its first batch.

    Args:
        trainer: whose epoch begins.
        last_step: the last step that the run trains.
    """
    loop, rounds = trainer.fit_loop, rounds_in_epoch(trainer)
    before = loop.max_epochs, loop.max_batches
    if trainer.max_steps != -1:
        last_step = min(last_step, trainer.max_steps)
    if loop.max_epochs not in (None, -1):
        last_step = min(last_step, loop.max_epochs * rounds)
    loop.max_epochs = max(1, -(-last_step // rounds))
    loop.max_batches = max(1, min(rounds, last_step - trainer.current_epoch * rounds))
    try:
        yield
    finally:
        loop.max_epochs, loop.max_batches = before


def whole_peers(metrics: dict[str, Any]) -> dict[str, Any]:
    """Numbers for a progress bar, with the peers as people count them, and not as ``2.000``."""
    peers = metrics.get("peers")
    return {**metrics, "peers": f"{peers:.0f}"} if isinstance(peers, float) else metrics


def make_room_beside(bar: Any) -> None:
    """In a narrow terminal, rich's bar is as wide as half of it, and the numbers beside it break into lines.

    Args:
        bar: any callback; one that draws no such bar is left alone.
    """
    progress: Any = getattr(bar, "progress", None)
    console = getattr(progress, "console", None)
    if console is None or console.width >= WIDE_TERMINAL:
        return
    for column in progress.columns:
        if isinstance(getattr(column, "bar_width", None), int):
            column.bar_width = min(column.bar_width, NARROW_BAR)


class ScheduleFollower:
    """Steps Lightning's schedulers as often as the run's step says, also backwards.

    Args:
        configs: Lightning's ``lr_scheduler_configs``.
        optimizer: theirs.
        advance: steps a scheduler once, as Lightning would: through the module's hook.

    Raises:
        ConfigurationError: a schedule that depends on more than the step, so that peers would disagree on it.
    """

    def __init__(self, configs: Sequence[Any], optimizer: Optimizer, advance: Callable[[Any], None]) -> None:
        self._advance = advance
        self._optimizer = optimizer
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._configs = [config for config in configs if _position(config.scheduler) is not None]
        for config in configs:
            if config.reduce_on_plateau or isinstance(config.scheduler, ReduceLROnPlateau):
                raise ConfigurationError(
                    "ReduceLROnPlateau would give each peer its own learning rate, and their weights would drift "
                    "apart: use a schedule that depends on the step alone, such as CosineAnnealingLR",
                    name="lr_scheduler",
                    value=config.scheduler,
                )
        self._states = [copy.deepcopy(config.scheduler.state_dict()) for config in self._configs]

    def follow(self, done: int, rounds_in_epoch: int) -> None:
        """Brings the schedulers to where they are after ``done`` steps of the run."""
        wanted = [_times_stepped(config, done, rounds_in_epoch) for config in self._configs]
        places = [_position(config.scheduler) for config in self._configs]
        if any(place > want for place, want in zip(places, wanted, strict=True)):
            self._rewind()
        # What torch's warning about the order of steps goes by. Here the order is ours.
        self._optimizer._opt_called = True  # type: ignore[attr-defined]
        for config, want in zip(self._configs, wanted, strict=True):
            while (place := _position(config.scheduler)) < want:
                self._advance(config.scheduler)
                if _position(config.scheduler) <= place:
                    break  # one that counts in its own way: left to Lightning

    def _rewind(self) -> None:
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate
        for config, state in zip(self._configs, self._states, strict=True):
            config.scheduler.load_state_dict(copy.deepcopy(state))


def _times_stepped(config: Any, done: int, length: int) -> int:
    """How often Lightning steps a scheduler in ``done`` steps: it starts counting the frequency again in each epoch."""
    epochs, rest = divmod(done, length)
    if config.interval == "epoch":
        return int(epochs // config.frequency)
    return int(epochs * (length // config.frequency) + rest // config.frequency)


def _position(scheduler: Any) -> Any:
    """Steps a scheduler has made; None if it does not say."""
    while not hasattr(scheduler, "last_epoch") and getattr(scheduler, "_schedulers", None):
        scheduler = scheduler._schedulers[0]  # ChainedScheduler
    place = getattr(scheduler, "last_epoch", None)
    return place if isinstance(place, int) else None


def _set(tracker: Any, value: int) -> None:
    for name in ("ready", "started", "processed", "completed"):
        if hasattr(tracker, name):
            setattr(tracker, name, value)
