"""A session's checkpoints: what it begins from, and what it saves."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn
from typing_extensions import override

from ...coordinator.types import Coordinator
from ...errors import ConfigurationError
from ...optimizer import DisTrO
from ...verify.calibrate import Limits
from .between_epochs import BetweenEpochs
from .checkpoint import Checkpoint, CheckpointStore
from .identity import ModelIdentity, describe, weights_root
from .named_tensors import NamedTensors
from .trainer import SwarmTrainer

__all__ = ["CheckpointFolder", "CheckpointKeeper", "NoCheckpoints", "OnSaved", "OthersCheckpoints"]

_log = logging.getLogger(__name__)


class OnSaved(Protocol):
    """Told of each checkpoint that is saved; must return at once."""

    def __call__(self, path: Path, *, step: int, run_id: str) -> None: ...


class CheckpointKeeper(ABC):
    """Where the checkpoints of one model come from and go to.

    Attributes:
        audit_limits: gives those of the run that are to be saved, if it has any.
    """

    def __init__(self) -> None:
        self.audit_limits: Callable[[], Limits | None] = lambda: None

    @abstractmethod
    def restore(self) -> Checkpoint | None:
        """Gives the model the weights of the latest checkpoint, if there is one. The momentum stays to be loaded.

        Raises:
            ConfigurationError: it is damaged, or of another model.
        """

    @abstractmethod
    def of_step(self, run_id: str, step: int) -> Checkpoint | None:
        """The run's checkpoint of this very step; None if there is none.

        Raises:
            ConfigurationError: it is damaged.
        """

    @abstractmethod
    def weights(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """What was saved, by the names of the model's tensors.

        Raises:
            ConfigurationError: it is damaged, or of another model.
        """

    @abstractmethod
    def wants(self, step: int) -> bool:
        """Whether a checkpoint of ``step`` would be saved, and not be one that is there already."""

    @abstractmethod
    def save(
        self,
        trainer: SwarmTrainer,
        values: Mapping[str, Tensor],
        *,
        run_id: str,
        identity: ModelIdentity,
        state: Coordinator | None,
    ) -> None:
        """Saves the model.

        Args:
            trainer: has the momentum.
            values: copies of the model's tensors.
            run_id: name of the run.
            identity: what the model is; its step is the checkpoint's.
            state: of the run's coordinator.
        """


class NoCheckpoints(CheckpointKeeper):
    """Saves nothing, and has nothing to begin from."""

    @override
    def restore(self) -> Checkpoint | None:
        return None

    @override
    def of_step(self, run_id: str, step: int) -> Checkpoint | None:
        return None

    @override
    def weights(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        raise ConfigurationError(f"{checkpoint.path} is not to be resumed from", name="resume", value=checkpoint.path)

    @override
    def wants(self, step: int) -> bool:
        return False

    @override
    def save(
        self,
        trainer: SwarmTrainer,
        values: Mapping[str, Tensor],
        *,
        run_id: str,
        identity: ModelIdentity,
        state: Coordinator | None,
    ) -> None:
        pass


class OthersCheckpoints(NoCheckpoints):
    """Those of a process that holds a part of the model that another one saves: it gives its part of the momentum."""

    @override
    def save(
        self,
        trainer: SwarmTrainer,
        values: Mapping[str, Tensor],
        *,
        run_id: str,
        identity: ModelIdentity,
        state: Coordinator | None,
    ) -> None:
        trainer.momentum()

    @override
    def wants(self, step: int) -> bool:
        return True  # it is for the other one to say


class CheckpointFolder(CheckpointKeeper):
    """Checkpoints in a folder. A failure to save is told, not raised: training must not end for it.

    Args:
        store: the folder.
        model: the whole of it.
        tensors: of the model.
        optimizer: of the model.
        tell: told what happens, in words.
        on_saved: told of each checkpoint; None tells nobody.
        between: has what was saved in mid-epoch; None has nothing.
    """

    def __init__(
        self,
        store: CheckpointStore,
        model: nn.Module,
        tensors: NamedTensors,
        optimizer: DisTrO,
        tell: Callable[[str], None],
        *,
        on_saved: OnSaved | None = None,
        between: BetweenEpochs | None = None,
    ) -> None:
        super().__init__()
        self._between = between
        self._store = store
        self._model = model
        self._tensors = tensors
        self._optimizer = optimizer
        self._tell = tell
        self._on_saved = on_saved
        self._latest_step: int | None = None  # saved or restored

    @override
    def restore(self) -> Checkpoint | None:
        checkpoint = self._tensors.holders.decide(self._newest)
        if checkpoint is None:
            self._tell(f"there is no checkpoint in {self._store.directory} yet; starting without one")
            return None
        values = self.weights(checkpoint)
        self._optimizer.undo_lookahead(discard_edits=True)
        self._tensors.load(values)
        self._latest_step = checkpoint.step
        self._tell(f"resuming from {checkpoint.path}")
        return checkpoint

    def _newest(self) -> Checkpoint | None:
        checkpoint = self._store.latest()
        return checkpoint if self._between is None else self._between.newest(checkpoint)

    @override
    def of_step(self, run_id: str, step: int) -> Checkpoint | None:
        return self._tensors.holders.decide(lambda: self._of_step(run_id, step))

    def _of_step(self, run_id: str, step: int) -> Checkpoint | None:
        between = None if self._between is None else self._between.newest(None)
        if between is not None and (between.run_id, between.step) == (run_id, step):
            return between
        return self._store.of_step(step, run_id)

    @override
    def weights(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        ours = describe(self._tensors, self._optimizer, epoch=0, step=0, weights=bytes(32), script_rates=False, data={})
        difference = ours.first_other_tensor(checkpoint.identity)
        if difference is not None:
            raise ConfigurationError(
                f"{checkpoint.path} is of another model: {difference}", name="resume", value=checkpoint.path
            )
        values = self._tensors.holders.read(lambda: checkpoint.weights(self._model, self._tensors))
        if weights_root(self._tensors, values) != checkpoint.identity.weights:
            raise ConfigurationError(
                f"{checkpoint.path} is damaged: its weights have another hash; remove the folder to resume from the "
                "checkpoint before",
                name="resume",
                value=checkpoint.path,
            )
        return values

    @override
    def wants(self, step: int) -> bool:
        return step != self._latest_step

    @override
    def save(
        self,
        trainer: SwarmTrainer,
        values: Mapping[str, Tensor],
        *,
        run_id: str,
        identity: ModelIdentity,
        state: Coordinator | None,
    ) -> None:
        momentum = trainer.momentum()
        try:
            path = self._store.save(
                self._model,
                values,
                momentum,
                run_id=run_id,
                identity=identity,
                state=state,
                audit_limits=self.audit_limits(),
            )
        except OSError as error:
            self._tell(
                f"the checkpoint of step {identity.step} could not be saved in {self._store.directory}: "
                f"{error.strerror or error}; make room there, or let it be written to. Those before are as they "
                "were, and training goes on: the next one is due at the end of the epoch"
            )
            return
        self._latest_step = identity.step
        _log.info("saved %s", path)
        if self._on_saved is not None:
            self._on_saved(path, step=identity.step, run_id=run_id)
