"""A host's checkpoints in mid-epoch: what a run falls back to when its host is killed, or its machine loses power.

Checkpoints are otherwise saved at the end of an epoch, which can be ten minutes off. A host whose process dies would
throw away all rounds since then, although the others have them, since its weights count. So it saves now and then
between, in a folder of its own beside the others, where only the latest stays: these are not for keeping.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from torch import Tensor, nn

from ...coordinator.types import Coordinator
from ...errors import ConfigurationError
from ...verify.calibrate import Limits
from .checkpoint import Checkpoint, CheckpointStore
from .identity import ModelIdentity
from .trainer import SwarmTrainer

__all__ = ["BetweenEpochs"]

FOLDER: Final = "between-epochs"
"""In the folder of checkpoints."""

SECONDS: Final = 60.0
"""At least so long between two; so much training is lost at most, if saving is quick. Chosen arbitrarily."""

SHARE: Final = 0.02
"""Of the time at most is spent with saving, during which the host does not train: one that takes two seconds is
repeated after a hundred."""

_log = logging.getLogger(__name__)


class BetweenEpochs:
    """Saves now and then.

    Args:
        directory: the folder of checkpoints.
        model: the whole of it.
        clock: monotonic seconds.
        tell: told what goes wrong, in words.

    Attributes:
        audit_limits: gives those of the run that are to be saved, if it has any.
    """

    def __init__(
        self,
        directory: Path,
        model: nn.Module,
        clock: Callable[[], float],
        tell: Callable[[str], None],
    ) -> None:
        self.directory = directory / FOLDER
        self._model = model
        self._clock = clock
        self._tell = tell
        self._due = clock() + SECONDS
        self._store: CheckpointStore | None = None
        self.audit_limits: Callable[[], Limits | None] = lambda: None

    @property
    def is_due(self) -> bool:
        """Whether it is time to save."""
        return self._clock() >= self._due

    def save(
        self,
        trainer: SwarmTrainer,
        values: Mapping[str, Tensor],
        *,
        run_id: str,
        identity: ModelIdentity,
        state: Coordinator | None,
    ) -> None:
        """As :meth:`.CheckpointKeeper.save`. What goes wrong is told, and tried again the next time."""
        began = self._clock()
        momentum = trainer.momentum()  # before anything can fail: other processes may have their part of it
        try:
            if self._store is None:
                self._store = CheckpointStore(self.directory, keep=1)
            path = self._store.save(
                self._model,
                values,
                momentum,
                run_id=run_id,
                identity=identity,
                state=state,
                audit_limits=self.audit_limits(),
            )
            _log.info("saved %s", path)
        except (OSError, ConfigurationError) as error:
            self._tell(
                f"step {identity.step} could not be saved in {self.directory}: {error}; training goes on, and if this "
                "process is killed, the run falls back to the end of the epoch before"
            )
        now = self._clock()
        self._due = now + max(SECONDS, (now - began) / SHARE)

    def newest(self, other: Checkpoint | None) -> Checkpoint | None:
        """The one that is saved here if it is of a later step of the same run than ``other``; else ``other``.

        One that is damaged is told, and done without.
        """
        if not self.directory.is_dir():
            return other
        try:
            saved = CheckpointStore(self.directory, keep=1).latest()
        except ConfigurationError as error:
            self._tell(f"what was saved in mid-epoch cannot be used: {error}")
            return other
        if saved is None or (other is not None and (saved.run_id != other.run_id or saved.step <= other.step)):
            return other
        return saved
