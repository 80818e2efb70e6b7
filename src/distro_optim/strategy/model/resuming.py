"""A run that was interrupted, as its host begins it again."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Self

from ...coordinator.rules.steps import is_prompt, last_trained_step, next_data_index
from ...coordinator.types import Coordinator, CoordinatorProgress, RunState
from ..config import RunConfig
from ..rounds.trust.saved_step import SavedStep, with_standing
from .checkpoint import Checkpoint

__all__ = ["StartingPoint", "other_dataset", "saved_step", "state_to_resume"]

_RUN_ID_BYTES: Final = 4
"""Of randomness in the name of a run that got none."""


@dataclass(frozen=True, kw_only=True)
class StartingPoint:
    """Where the run of a framework's own checkpoint goes on; plain values, which such a checkpoint can hold.

    Attributes:
        run_id: its name, from which the order of the data follows; None draws one.
        step: the first to be trained.
        data_index: the first of that step; None counts as many for each step before.
        dataset_size: samples there were; None if nobody knows.
    """

    run_id: str | None
    step: int
    data_index: int | None
    dataset_size: int | None = None

    @classmethod
    def of(cls, saved: object, step: int) -> Self:
        """What :meth:`saved` returned; anything else, as of a checkpoint from before the run, says nothing."""
        fields: Mapping[str, Any] = saved if isinstance(saved, Mapping) else {}
        run_id, data_index, size = fields.get("run_id"), fields.get("data_index"), fields.get("dataset_size")
        return cls(
            run_id=run_id if isinstance(run_id, str) else None,
            step=step,
            data_index=data_index if isinstance(data_index, int) and data_index >= 0 else None,
            dataset_size=size if isinstance(size, int) and size > 0 else None,
        )

    def saved(self) -> dict[str, str | int | None]:
        """To be saved beside the step."""
        return {"run_id": self.run_id, "data_index": self.data_index, "dataset_size": self.dataset_size}

    def state(self, config: RunConfig) -> Coordinator:
        """The coordinator's state there, under the settings of ``config``, which is complete."""
        state = config.coordinator_state(self.run_id or f"run-{secrets.token_hex(_RUN_ID_BYTES)}")
        data_index = self.data_index
        if data_index is None:
            data_index = (self.step - 1) * state.config.global_batch_size_end
        return replace(state, progress=CoordinatorProgress(step=self.step, epoch_start_data_index=data_index))


def state_to_resume(checkpoint: Checkpoint | None, config: RunConfig) -> Coordinator | None:
    """The state from which a host goes on after ``checkpoint``, under the settings of ``config``.

    The run keeps its name, unless ``config`` has another, its step and its place in the data. None if there is no
    checkpoint, or none with a state.
    """
    if checkpoint is None or checkpoint.state is None:
        return None
    before = checkpoint.state
    if config.total_steps is None:
        config = config.training_up_to(last_trained_step(before.config))
    if config.global_batch_size is None:
        config = replace(config, global_batch_size=before.config.global_batch_size_end)
    state = config.coordinator_state(checkpoint.run_id)
    return replace(
        state,
        progress=CoordinatorProgress(
            epoch=before.progress.epoch + 1, step=checkpoint.step, epoch_start_data_index=_next_data_index(before)
        ),
    )


def saved_step(checkpoint: Checkpoint | None) -> SavedStep | None:
    """Where the run of ``checkpoint`` goes on; None if there is none, or none with a state."""
    if checkpoint is None or checkpoint.state is None:
        return None
    before = checkpoint.state
    return SavedStep(
        checkpoint.run_id, before.progress.epoch + 1, checkpoint.step, _next_data_index(before), with_standing(before)
    )


def other_dataset(before: int | None, size: int | None) -> str | None:
    """What a person should know if the dataset of a run that goes on has changed; None if nobody knows of a change.

    Args:
        before: its samples when the run was saved; None if nobody knows.
        size: its samples now; likewise.
    """
    if before is None or size is None or before == size:
        return None
    return (
        f"the dataset has {size} samples, and had {before} when the run was saved: the order of the samples is another "
        "from here on, so in the pass that is under way some are trained twice or not at all"
    )


def _next_data_index(state: Coordinator) -> int:
    """The first sample that the weights of a checkpoint, saved under ``state``, have not seen."""
    match state.run_state:
        case RunState.COOLDOWN:
            return next_data_index(state)
        case RunState.ROUND_TRAIN | RunState.ROUND_WITNESS:
            # Those of a prompt run lack the results of the round before, which nobody can apply any more.
            return next_data_index(state) if is_prompt(state) else state.current_round.data_index
        case _:
            return state.progress.epoch_start_data_index
