"""The callback by which a trainer follows its run: the first of them, so that others see the run's numbers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final, Protocol

from transformers import TrainerCallback
from typing_extensions import override

from ...strategy.model.resuming import StartingPoint

__all__ = ["Follower", "FollowsRun", "saved_place", "starting_point"]

PLACE_FILE: Final = "distro_optim.json"
"""In a checkpoint of the trainer's, beside ``trainer_state.json``: where the run was."""

MAX_PLACE_BYTES: Final = 1 << 16
"""Of that file; it has about a hundred. Chosen arbitrarily."""


def saved_place(checkpoint: str | os.PathLike[str]) -> object:
    """What :class:`FollowsRun` has written into a checkpoint; None if there is nothing that can be read."""
    path = Path(checkpoint) / PLACE_FILE
    try:
        if path.stat().st_size > MAX_PLACE_BYTES:
            return None
        place: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return place


class Follower(Protocol):
    """What the callback needs of a trainer."""

    @property
    def trains_in_run(self) -> bool:
        """Whether ``train`` is at work."""

    @property
    def rounds_per_epoch(self) -> int:
        """Rounds in which all peers together go through the dataset once."""

    def join_run(self, state: Any) -> None:
        """Hosts the run or joins it; ``state`` is the trainer's."""

    def end_round(self) -> None:
        """A step is done."""

    def place_of(self, global_step: int) -> StartingPoint | None:
        """Where the run is after ``global_step`` of its steps; None outside of a run."""

    def leave_run(self) -> None:
        """Leaves the run, if we are in it."""


class FollowsRun(TrainerCallback):
    """See the module. ``trainer`` is the one that has this callback."""

    def __init__(self, trainer: Follower) -> None:
        self._trainer = trainer

    @override
    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Hosts or joins the run: the model is on its device, optimizer and schedule are made, nothing is trained."""
        if self._trainer.trains_in_run:
            self._trainer.join_run(state)

    @override
    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self._trainer.trains_in_run:
            state.epoch = state.global_step / self._trainer.rounds_per_epoch
            self._trainer.end_round()

    @override
    def on_epoch_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self._trainer.trains_in_run and state.global_step:
            state.epoch = state.global_step / self._trainer.rounds_per_epoch

    @override
    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Adds to a checkpoint where the run is: ``train(resume_from_checkpoint=...)`` can host it from there."""
        place = self._trainer.place_of(state.global_step)
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if place is None or not state.is_world_process_zero or not folder.is_dir():
            return
        part = folder / f"{PLACE_FILE}.part"
        part.write_text(json.dumps(place.saved()), encoding="utf-8")
        part.replace(folder / PLACE_FILE)

    @override
    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._trainer.leave_run()


def starting_point(place: object, global_step: int) -> StartingPoint | None:
    """Where a run goes on that a checkpoint of the trainer's had trained; None at the beginning."""
    return StartingPoint.of(place, global_step + 1) if global_step else None
