"""What copies one checkpoint elsewhere: a command in a process of its own, or fsspec."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from shutil import which
from typing import IO, Any, Final

from typing_extensions import override

from ...errors import ConfigurationError, MissingDependencyError
from ...words import shown
from ..upload import Saved, Upload, filled_in

__all__ = ["Carrier", "CommandCarrier", "StoreCarrier", "UploadFailed", "carrier_of"]

_TAIL_BYTES: Final = 2000
"""Of what a command prints, the end is kept, for the reason of a failure."""

_REASON: Final = 200
"""Characters of a reason that are shown."""

_END_SECONDS: Final = 5.0
"""Between asking a command to end and making it."""

_LAST: Final = "distro_optim.json"
"""File of a checkpoint that is written last, here as on the disk: where it is, all is."""


class UploadFailed(Exception):
    """One attempt; the text says why, printable and short."""


class Carrier(ABC):
    """Copies one thing at a time."""

    @abstractmethod
    def carry(self, saved: Saved) -> None:
        """Copies; blocks until that is done.

        Raises:
            UploadFailed: it did not arrive, or :meth:`cancel` was called.
        """

    @abstractmethod
    def cancel(self) -> None:
        """Ends what is under way, and whatever is asked for later. From any thread."""


def carrier_of(upload: Upload) -> Carrier:
    """The one that was asked for.

    Raises:
        ConfigurationError: there is no such command, or no such kind of store.
        MissingDependencyError: a package is missing; says which.
    """
    if (url := upload.url) is not None:
        return StoreCarrier(url, timeout_seconds=upload.timeout_seconds)
    return CommandCarrier(upload.command, timeout_seconds=upload.timeout_seconds)


class CommandCarrier(Carrier):
    """A command, in a process group of its own: Ctrl-C in the terminal is for the training, which then says what to do.

    Args:
        command: its arguments, with placeholders.
        timeout_seconds: after which it is ended.

    Raises:
        ConfigurationError: there is no such command.
    """

    def __init__(self, command: Sequence[str], *, timeout_seconds: float) -> None:
        if which(command[0]) is None:
            raise ConfigurationError(
                f"upload: there is no command {command[0]!r} here; install it, or give its path",
                name="upload",
                value=command,
            )
        self._command = command
        self._timeout = timeout_seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._cancelled = False

    @override
    def carry(self, saved: Saved) -> None:
        own_group: dict[str, Any] = {"start_new_session": True}
        if os.name == "nt":
            own_group = {"creationflags": 0x200}  # CREATE_NEW_PROCESS_GROUP
        with self._lock:
            if self._cancelled:
                raise UploadFailed("it was given up")
            try:
                process = subprocess.Popen(
                    filled_in(self._command, saved),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    **own_group,
                )
            except (OSError, ValueError) as error:  # the latter for a null byte in a stranger's name
                raise UploadFailed(shown(f"{self._command[0]} could not be started: {error}", _REASON)) from None
            self._process = process
        tail = _Tail(process.stdout)
        try:
            status = process.wait(self._timeout)
        except subprocess.TimeoutExpired:
            _end(process)
            raise UploadFailed(f"{self._name} was not done after {self._timeout:g} s") from None
        finally:
            with self._lock:
                self._process = None
        if status != 0:
            said = tail.last_line()
            raise UploadFailed(f"{self._name} ended with status {status}{': ' if said else ''}{said}")

    @override
    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True
            process = self._process
        if process is not None:
            _end(process)

    @property
    def _name(self) -> str:
        return shown(Path(self._command[0]).name)


class _Tail:
    """The end of what a process prints, read as it comes so that it never has to wait."""

    def __init__(self, stream: IO[bytes] | None) -> None:
        self._end = b""
        self._thread = threading.Thread(target=self._read, args=(stream,), name="distro-optim-upload-says", daemon=True)
        self._thread.start()

    def _read(self, stream: IO[bytes] | None) -> None:
        if stream is None:
            return
        with stream:
            while chunk := os.read(stream.fileno(), 1 << 16):
                self._end = (self._end + chunk)[-_TAIL_BYTES:]

    def last_line(self) -> str:
        # Something that the command has started and left may hold the pipe open.
        self._thread.join(1.0)
        lines = [line for line in self._end.decode("utf-8", "replace").splitlines() if line.strip()]
        return shown(lines[-1].strip(), _REASON) if lines else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and those that it has started."""
    if os.name == "nt":
        process.kill()
        process.wait()
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):
            return
        try:
            process.wait(_END_SECONDS)
            return
        except subprocess.TimeoutExpired:
            continue


class StoreCarrier(Carrier):
    """A store that fsspec knows: ``s3://``, ``gs://``, ``az://``, ``sftp://``, ``file://``.

    Each checkpoint becomes a folder of its own name below the URL. Its last file is the one that is written last on the
    disk as well, so who finds that one finds all of it.

    Args:
        url: of the folder above.
        timeout_seconds: looked at between two files.

    Raises:
        ConfigurationError: there is no such kind of store, or the URL cannot be.
        MissingDependencyError: the package of the store is missing.
    """

    def __init__(self, url: str, *, timeout_seconds: float) -> None:
        self._url = url
        self._timeout = timeout_seconds
        self._cancelled = threading.Event()
        self._files, self._root = _open_store(url)

    @override
    def carry(self, saved: Saved) -> None:
        ends = time.monotonic() + self._timeout
        try:
            target = f"{self._root}/{saved.name}"
            if saved.path.is_file():
                self._files.makedirs(self._root, exist_ok=True)
                self._put(saved.path, target, ends)
                return
            files = sorted(path for path in saved.path.rglob("*") if path.is_file())
            if not files:
                raise UploadFailed(f"{saved.path.name} is gone")
            for path in sorted(files, key=lambda path: path.name == _LAST):
                place = f"{target}/{path.relative_to(saved.path).as_posix()}"
                self._files.makedirs(place.rpartition("/")[0], exist_ok=True)
                self._put(path, place, ends)
        except UploadFailed:
            raise
        except Exception as error:  # every store has exceptions of its own
            raise UploadFailed(shown(f"{type(error).__name__}: {error}", _REASON)) from None

    def _put(self, path: Path, place: str, ends: float) -> None:
        if self._cancelled.is_set():
            raise UploadFailed("it was given up")
        if time.monotonic() >= ends:
            raise UploadFailed(f"it was not done after {self._timeout:g} s")
        self._files.put_file(str(path), place)

    @override
    def cancel(self) -> None:
        self._cancelled.set()


def _open_store(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it."""
    try:
        import fsspec  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        raise MissingDependencyError(f"uploads to {url} need fsspec: pip install fsspec") from None
    try:
        files, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise MissingDependencyError(
            f"uploads to {shown(url)} need a package that is not installed: {_how_to_install(url, error)}"
        ) from None
    except Exception as error:  # of the store's own; without a key some raise here
        raise ConfigurationError(
            f"upload={shown(url)}: {shown(f'{type(error).__name__}: {error}', _REASON)}", name="upload", value=url
        ) from None
    return files, str(root).rstrip("/")


_PACKAGES: Final = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "sftp": "paramiko",
    "ssh": "paramiko",
    "smb": "smbprotocol",
    "webdav": "webdav4[fsspec]",
}
"""What brings fsspec the stores that it does not have itself."""


def _how_to_install(url: str, error: ImportError) -> str:
    package = _PACKAGES.get(url.partition("://")[0].lower())
    return f"pip install {package}" if package is not None else shown(str(error), _REASON)
