"""Where ``distro-optim join`` keeps the model that it trains."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from ..coordinator.server.store import lock_file
from ..errors import ConfigurationError
from ..strategy.model.checkpoint import CheckpointStore
from .options import JoinOptions

__all__ = ["kept_in", "name_of_folder"]

CHECKPOINTS: Final = Path("out/join")
"""Below it each run has a folder, unless another was named."""

MAX_CLIENTS: Final = 64
"""Clients of one run that share a working directory; each has a folder of its own. Chosen arbitrarily."""

MAX_NAME: Final = 64
"""Characters of a run's name in the name of its folder, as runs are named by strangers."""

LOCK: Final = "lock"
"""File in a folder that nobody named, held by the client whose folder it is."""


def name_of_folder(run_id: str) -> str:
    """A run's name as that of a folder on any system; one that must be changed gets a hash to stay unique."""
    name = re.sub(r"[^A-Za-z0-9._-]|^\.|\.$", "_", run_id[:MAX_NAME]) or "_"
    return name if name == run_id else f"{name}~{hashlib.sha256(run_id.encode()).hexdigest()[:8]}"


@contextmanager
def kept_in(options: JoinOptions, run_id: str) -> Iterator[Path | None]:
    """The folder for the checkpoints of a run, which exists and can be written to; None if nothing is to be kept.

    The one that was named; otherwise one below ``out/join``, with the run's name. While another client of the run has
    that, the next one with a number is taken: a folder of checkpoints belongs to one peer. A client that is started
    again has the first free one, so the disk holds ``keep_steps`` checkpoints for each client at a time.

    Raises:
        ConfigurationError: the folder cannot be written to.
    """
    if options.no_checkpoints:
        yield None
        return
    if options.checkpoint_dir is not None:
        CheckpointStore(options.checkpoint_dir, keep=options.keep_steps)  # refuses a folder that it cannot write to
        yield options.checkpoint_dir
        return
    name = name_of_folder(run_id)
    for number in range(1, MAX_CLIENTS + 1):
        folder = CHECKPOINTS / (name if number == 1 else f"{name}~{number}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = lock_file(folder / LOCK)
        except OSError as error:
            raise ConfigurationError(
                f"the model cannot be kept in {folder}: {error.strerror or error}; name a folder that can be written "
                "with --checkpoint-dir, or keep nothing with --no-checkpoints",
                name="checkpoint_dir",
                value=folder,
            ) from None
        if lock is None:
            continue
        with lock:
            CheckpointStore(folder, keep=options.keep_steps)
            yield folder
        return
    raise ConfigurationError(
        f"{MAX_CLIENTS} clients keep the model below {CHECKPOINTS} already; name a folder with --checkpoint-dir",
        name="checkpoint_dir",
        value=CHECKPOINTS,
    )
