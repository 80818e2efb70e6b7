"""The files in which a coordinator keeps its run, so that a new process can go on with it.

A folder holds the last few saved steps, each in a file ``<run_id>-step<N>.toml`` in the form of
:mod:`~distro_optim.coordinator.formats.text`. A file is written beside its place and then moved there, so that readers
always find a whole one, even after a power cut. A lock keeps a second server from the same run in the same folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final
from urllib.parse import quote

from ...comm.iroh.lock_file import lock_file
from ...errors import ConfigurationError, ProtocolError
from ..formats.text import from_toml, to_toml
from ..types import Coordinator

__all__ = ["StateStore", "lock_file", "read_state_file", "write_whole"]

KEPT_FILES: Final = 4
"""Saved steps that stay; chosen so that an operator can go back by hand."""

MAX_FILE_BYTES: Final = 64 * 1024 * 1024
"""The largest state has a few megabytes of text."""


def read_state_file(path: str | os.PathLike[str]) -> Coordinator:
    """Reads a ``state.toml``.

    Raises:
        ConfigurationError: there is none, or it is wrong. The message names the file and the field.
    """
    try:
        data = Path(path).read_bytes()
        if len(data) > MAX_FILE_BYTES:
            raise ProtocolError(f"{len(data)} bytes are above the limit of {MAX_FILE_BYTES}")
        return from_toml(Coordinator, data.decode())
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror or error}", name="state", value=path) from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path} is not UTF-8 text", name="state", value=path) from None
    except ProtocolError as error:
        raise ConfigurationError(f"{path}: {error}", name="state", value=path) from None


class StateStore:
    """The saved steps of one run in one folder, locked until :meth:`close`.

    Args:
        directory: the folder; made if it is not there.
        run_id: the run.
        on_saved: told of each file that is written, and of the run's step in it; must return at once.

    Raises:
        ConfigurationError: the folder cannot be used, or another server holds this run in it.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        run_id: str,
        *,
        on_saved: Callable[[Path, int], None] | None = None,
    ) -> None:
        self._directory = Path(directory)
        self._on_saved = on_saved
        self._run_id = run_id
        # A run's name may hold anything; quoted it is a file name on every system.
        self._stem = quote(run_id, safe="")
        if self._directory.exists() and not self._directory.is_dir():
            raise ConfigurationError(
                f"cannot use {directory} to save: it is a file; name a folder", name="save_dir", value=directory
            )
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._lock = lock_file(self._directory / f".{self._stem}.lock")
        except OSError as error:
            raise ConfigurationError(
                f"cannot use {directory} to save: {error.strerror or error}; name a folder that can be written",
                name="save_dir",
                value=directory,
            ) from None
        if self._lock is None:
            raise ConfigurationError(
                f"another server keeps run {run_id!r} in {directory}: stop it first, or name another folder",
                name="save_dir",
                value=directory,
            )
        for leftover in self._directory.glob(f"{self._glob_stem}-step*.toml.tmp"):
            leftover.unlink(missing_ok=True)  # of a server that was killed while it wrote

    @property
    def directory(self) -> Path:
        """The folder."""
        return self._directory

    @property
    def run_id(self) -> str:
        """The run."""
        return self._run_id

    def __enter__(self) -> StateStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Releases the folder to other servers. Calling it again does nothing."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def save(self, state: Coordinator) -> Path:
        """Writes a state and removes the oldest ones. The file is written as a whole or not at all.

        Raises:
            OSError: it could not be written; what was saved before is untouched.
        """
        path = self._directory / f"{self._stem}-step{state.progress.step - 1}.toml"
        write_whole(path, to_toml(state).encode())
        for old in self.files()[:-KEPT_FILES]:
            if old != path:
                old.unlink(missing_ok=True)
        if self._on_saved is not None:
            self._on_saved(path, state.progress.step)
        return path

    def files(self) -> list[Path]:
        """The saved files, the latest step last."""
        steps = {}
        pattern = re.compile(re.escape(self._stem) + r"-step(\d{1,10})\.toml")
        for path in self._directory.iterdir():
            if match := pattern.fullmatch(path.name):
                steps[path] = int(match[1])
        return sorted(steps, key=steps.__getitem__)

    def load(self) -> Coordinator | None:
        """The latest state that was saved, None if there is none.

        Raises:
            ConfigurationError: the latest file is wrong. No older file is used in its place unasked.
        """
        files = self.files()
        if not files:
            return None
        state = read_state_file(files[-1])
        if state.run_id != self._run_id:
            raise ConfigurationError(
                f"{files[-1]} is of run {state.run_id!r}, not {self._run_id!r}", name="save_dir", value=self._directory
            )
        return state

    def to_resume(self, configured: Coordinator, *, resume: bool, advice: str) -> Coordinator | None:
        """The latest saved state if the run is to go on from it; None if it begins with ``configured``.

        Args:
            configured: the state to begin with.
            resume: whether the user wants to go on.
            advice: what the user can do about an error.

        Raises:
            ConfigurationError: beginning would lose what is saved, or see :meth:`load`.
        """
        saved = self.load()
        if saved is None or resume:
            return saved
        if saved.progress.step > configured.progress.step:
            raise ConfigurationError(
                f"{self._directory} holds run {self._run_id!r} at step {saved.progress.step}, after step "
                f"{configured.progress.step} with which it would begin: {advice}",
                name="save_dir",
                value=self._directory,
            )
        return None

    @property
    def _glob_stem(self) -> str:
        return re.sub(r"([*?[])", r"[\1]", self._stem)


def write_whole(path: Path, data: bytes) -> None:
    """Replaces a file as a whole: afterwards, even after a power cut, either the new one or the old one is there.

    Raises:
        OSError: it could not be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    """Makes the move itself permanent; where folders cannot be synced, the system takes care of it."""
    if os.name == "nt":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
