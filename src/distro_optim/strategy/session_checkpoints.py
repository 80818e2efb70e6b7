"""The checkpoints of a session, and what lies and happens beside them: one folder for each process of a machine,
uploads, the ticket of the run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from torch import nn

from ..errors import ConfigurationError
from ..optimizer import DisTrO
from .environment import TICKET_NAME, write_ticket
from .model.between_epochs import BetweenEpochs
from .model.checkpoint import CheckpointStore
from .model.checkpoint_keeper import CheckpointFolder, CheckpointKeeper, NoCheckpoints, OthersCheckpoints
from .model.checkpoint_place import CheckpointPlace
from .model.named_tensors import NamedTensors
from .network.upload_queue import UploadCounts
from .network.uploads import Uploads
from .options import SessionOptions
from .ranks.local_ranks import LocalRanks, by_leader
from .upload import read_upload

__all__ = ["SessionCheckpoints"]


class SessionCheckpoints:
    """See the module. Belongs to the training thread, but for :attr:`counts`.

    Args:
        options: of the session, complete.
        ranks: the processes that are this peer; None if it is this one alone.
        clock: says when something is to be saved in mid-epoch; seconds that only grow.
        tell: told what a person should know.

    Attributes:
        between: what the process that speaks for the peer saves in mid-epoch; None before :meth:`open`, and where
            nothing is saved so.
        kept: what was opened; saves nothing before :meth:`open`.
    """

    def __init__(
        self,
        options: SessionOptions,
        ranks: LocalRanks | None,
        *,
        clock: Callable[[], float],
        tell: Callable[[str], None],
    ) -> None:
        self._options = options
        self._ranks = ranks
        self._speaks = ranks is None or ranks.leads
        self._clock = clock
        self._tell = tell
        self._place: CheckpointPlace | None = None
        self._uploads: Uploads | None = None
        self._ticket: str | None = None
        self.between: BetweenEpochs | None = None
        self.kept: CheckpointKeeper = NoCheckpoints()

    @property
    def directory(self) -> Path | None:
        """The folder that this process has for itself; None before :meth:`open`, and where there is none."""
        return self._place.directory if self._place is not None else None

    @property
    def uploads(self) -> bool:
        """Whether what is saved is uploaded."""
        return self._uploads is not None

    @property
    def counts(self) -> UploadCounts:
        """What became of the uploads. For any thread."""
        return self._uploads.counts if self._uploads is not None else UploadCounts()

    def open(self, model: nn.Module, tensors: NamedTensors, optimizer: DisTrO) -> None:
        """Takes the folder, and puts right what is wrong there.

        Raises:
            ConfigurationError: it cannot be written to, or ``upload`` is not understood.
        """
        folder = self._options["checkpoint_dir"]
        if folder is None:
            return
        upload = read_upload(self._options["upload"])
        if upload is not None and self._speaks:
            self._uploads = Uploads(upload)
        store = self._store(Path(folder))
        if self._speaks and self._options["port"] is None:
            self.between = BetweenEpochs(store.directory, model, self._clock, self._tell)
        self.kept = CheckpointFolder(
            store,
            model,
            tensors,
            optimizer,
            self._tell,
            on_saved=self._uploads.submit if self._uploads is not None else None,
            between=self.between,
        )

    def keeper(self, tensors: NamedTensors) -> CheckpointKeeper:
        """What this process saves the model with: of several that are one peer, only one saves it whole."""
        if self._speaks:
            return self.kept
        together = tensors.holders.several and self._options["checkpoint_dir"] is not None
        return OthersCheckpoints() if together else NoCheckpoints()

    def keep_ticket(self, ticket: str | None, file: Path | None) -> None:
        """Lays the run's ticket beside the checkpoints, for ``distro-optim ticket``; it changes with the host.

        Args:
            ticket: None if there is none yet.
            file: where else it is written.
        """
        folder = self._options["checkpoint_dir"]
        if ticket is None or ticket == self._ticket or not self._speaks:
            return
        paths = [*([] if folder is None else [Path(folder) / TICKET_NAME]), *([] if file is None else [file])]
        with suppress(ConfigurationError):  # the disk is full: the next one is tried again
            for path in paths:
                write_ticket(path, ticket)
            self._ticket = ticket

    def tell_of_uploads(self) -> None:
        """Says what became of them since it was said last."""
        for text in self._uploads.take_news() if self._uploads is not None else ():
            self._tell(text)

    def finish_uploads(self) -> None:
        """Waits for what is still to be uploaded, as long as ``upload`` says."""
        if self._uploads is not None:
            self._uploads.close(self._tell)

    def release(self) -> None:
        """Another process may have the folder. May be called again."""
        if self._place is not None:
            self._place.release()

    def _store(self, folder: Path) -> CheckpointStore:
        uploads = self._uploads

        def make() -> CheckpointStore:
            return CheckpointStore(
                self._take(folder),
                keep=self._options["keep_checkpoints"],
                keep_every=self._options["keep_every"],
                held=uploads.holds if uploads is not None else None,
            )

        # One of several processes puts right what is wrong there, before the others look.
        return by_leader(self._ranks, make) or CheckpointStore(folder, writes=False)

    def _take(self, folder: Path) -> Path:
        """Where to save: in ``folder``, but for processes that would get in each other's way."""
        if self._ranks is not None:
            return folder  # every process of a peer resumes from the same one
        self._place = CheckpointPlace.take(folder)
        if self._place.directory != folder:
            self._tell(
                f"another process on this machine saves checkpoints in {folder}: this one has {self._place.directory}"
            )
        return self._place.directory
