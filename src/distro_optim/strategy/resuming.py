"""A run that was interrupted, as its host begins it again."""

from __future__ import annotations

from dataclasses import replace

from ..coordinator.types import Coordinator, CoordinatorProgress, RunState
from .checkpoint import Checkpoint
from .config import RunConfig

__all__ = ["state_to_resume"]


def state_to_resume(checkpoint: Checkpoint | None, config: RunConfig) -> Coordinator | None:
    """The state from which a host goes on after ``checkpoint``, under the settings of ``config``.

    The run keeps its name, unless ``config`` has another, its step and its place in the data. None if there is no
    checkpoint, or none with a state.
    """
    if checkpoint is None or checkpoint.state is None:
        return None
    before = checkpoint.state
    if config.total_steps is None:
        config = replace(config, total_steps=before.config.total_steps)
    if config.global_batch_size is None:
        config = replace(config, global_batch_size=before.config.global_batch_size_end)
    state = config.coordinator_state(checkpoint.run_id)
    in_round = before.run_state in (RunState.ROUND_TRAIN, RunState.ROUND_WITNESS)
    after = before.current_round.data_index + (before.config.global_batch_size_end if not in_round else 0)
    return replace(
        state,
        progress=CoordinatorProgress(
            epoch=before.progress.epoch + 1,
            step=checkpoint.step,
            epoch_start_data_index=max(after, before.progress.epoch_start_data_index),
        ),
    )
