"""A session's checkpoints: what it begins from, and what it saves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from ...coordinator.types import Coordinator
from ...errors import ConfigurationError
from .checkpoint import Checkpoint, CheckpointStore
from .identity import ModelIdentity, describe, weights_root
from .trainer import SwarmTrainer

__all__ = ["CheckpointKeeper"]

_log = logging.getLogger(__name__)


class CheckpointKeeper:
    """Restores and saves one model. A failure to save is told, not raised: training must not end for it.

    Args:
        store: the folder.
        model: the whole of it.
        tell: told what happens, in words.

    Attributes:
        saved_step: of the last checkpoint, saved or restored; None if there is none.
    """

    def __init__(self, store: CheckpointStore, model: nn.Module, tell: Callable[[str], None]) -> None:
        self.saved_step: int | None = None
        self._store = store
        self._model = model
        self._tell = tell

    def restore(self, trainer: SwarmTrainer) -> Checkpoint | None:
        """Loads the weights of the latest checkpoint, if there is one. The momentum stays to be loaded.

        Raises:
            ConfigurationError: it is damaged, or of another model.
        """
        checkpoint = self._store.latest()
        if checkpoint is None:
            self._tell(f"there is no checkpoint in {self._store.directory} yet; beginning anew")
            return None
        trainer.load(self.weights(checkpoint, trainer))
        self.saved_step = checkpoint.step
        self._tell(f"resuming from {checkpoint.path}")
        return checkpoint

    def of_step(self, run_id: str, step: int) -> Checkpoint | None:
        """The run's checkpoint of this very step; None if there is none.

        Raises:
            ConfigurationError: it is damaged.
        """
        checkpoint = self._store.of_step(step)
        return checkpoint if checkpoint is not None and checkpoint.run_id == run_id else None

    def weights(self, checkpoint: Checkpoint, trainer: SwarmTrainer) -> dict[str, Tensor]:
        """What was saved, by the names of the trainer's tensors.

        Raises:
            ConfigurationError: it is damaged, or of another model.
        """
        ours = describe(
            trainer.tensors, trainer.optimizer, epoch=0, step=0, weights=bytes(32), script_rates=False, data={}
        )
        difference = ours.first_other_tensor(checkpoint.identity)
        if difference is not None:
            raise ConfigurationError(
                f"{checkpoint.path} is of another model: {difference}", name="resume", value=checkpoint.path
            )
        values = checkpoint.weights(self._model, trainer.tensors)
        if weights_root(trainer.tensors, values) != checkpoint.identity.weights:
            raise ConfigurationError(
                f"{checkpoint.path} is damaged: its weights have another hash; remove the folder to resume from the "
                "checkpoint before",
                name="resume",
                value=checkpoint.path,
            )
        return values

    def save(
        self,
        trainer: SwarmTrainer,
        values: Mapping[str, Tensor],
        *,
        run_id: str,
        identity: ModelIdentity,
        state: Coordinator | None,
    ) -> None:
        """Saves the model, whose tensors' copies are ``values``."""
        try:
            path = self._store.save(
                self._model, values, trainer.momentum(), run_id=run_id, identity=identity, state=state
            )
        except OSError as error:
            self._tell(
                f"the checkpoint of step {identity.step} could not be saved in {self._store.directory}: "
                f"{error.strerror or error}; make room there, or let it be written to. Those before are as they "
                "were, and training goes on: the next one is due at the end of the epoch"
            )
            return
        self.saved_step = identity.step
        _log.info("saved %s", path)
