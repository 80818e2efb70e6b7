"""Where an endpoint lives from one start of its program to the next: its key, and the ports on which it listens.

Tickets and address books name an endpoint by both. So whoever hosts a run keeps them beside the run, and a program that
is started again is reached by the ticket of the one before::

    host.key     32 bytes, mode 0600: see :mod:`.keys`
    host.ports   the UDP ports of IPv4 and IPv6, in decimal, one a line; 0 for none
    host.run     the name of the run that was hosted last
    host.banned  public keys that the host has banned, in hexadecimal, one a line; may be edited
    .host.lock   held by the process that lives here

The key is a secret, with which somebody else could host in its place: it is no part of what is published of a folder.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, Final

from ...errors import ConfigurationError
from ..addresses import SocketAddr
from ..signing import PUBLIC_KEY_SIZE, SecretKey
from .keys import load_secret_key
from .lock_file import lock_file

__all__ = ["NodeHome", "Ports"]

MAX_NAME_BYTES: Final = 256
"""More than a run's name has."""

Ports = tuple[int, int]
"""UDP ports of IPv4 and IPv6; 0 where none is known."""

MAX_PORTS_BYTES: Final = 64
"""Two numbers of five digits and their line ends take a fifth of it."""


MAX_BANNED_BYTES: Final = 1 << 20
"""Sixteen thousand keys; a host bans by hand."""


class NodeHome:
    """See the module. Nothing is written before :meth:`key` or :meth:`enter`.

    Args:
        directory: the folder; made if it is not there.
        name: what the files are called.
        key_file: another place for the key; None has it in the folder.
    """

    def __init__(
        self, directory: str | os.PathLike[str], name: str = "host", *, key_file: str | os.PathLike[str] | None = None
    ) -> None:
        self.directory = Path(directory)
        self._key_file = Path(key_file) if key_file is not None else self.directory / f"{name}.key"
        self._ports_file = self.directory / f"{name}.ports"
        self._run_file = self.directory / f"{name}.run"
        self._banned_file = self.directory / f"{name}.banned"
        self._lock_path = self.directory / f".{name}.lock"
        self._lock: IO[bytes] | None = None

    def key(self) -> SecretKey:
        """The key that lives here, made if there is none.

        Raises:
            ConfigurationError: the file is not a key, others may read it, or the folder cannot be written to.
        """
        try:
            return load_secret_key(self._key_file)
        except OSError as error:
            raise self._unusable(error) from None

    def enter(self) -> None:
        """Moves in, until :meth:`close` or the end of the process.

        Raises:
            ConfigurationError: another process lives here, or the folder cannot be written to.
        """
        if self._lock is not None:
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = lock_file(self._lock_path)
        except OSError as error:
            raise self._unusable(error) from None
        if self._lock is None:
            raise ConfigurationError(
                f"another process hosts with the key in {self.directory}, and a key stands for one peer: stop it "
                "first (or close its session, if it is this process), or name another folder",
                name="checkpoint_dir",
                value=str(self.directory),
            )

    def close(self) -> None:
        """Moves out. Calling it again does nothing."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> NodeHome:
        self.enter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # -- ports ---------------------------------------------------------------------------------------------------------

    def ports(self) -> Ports | None:
        """The ports of the last time; None if there was none, or nothing sensible is written there."""
        try:
            with open(self._ports_file, "rb") as file:
                lines = file.read(MAX_PORTS_BYTES).split()
        except OSError:
            return None
        numbers = [int(line) for line in lines if line.isdigit() and int(line) <= 0xFFFF]
        return (numbers[0], numbers[1]) if len(lines) == len(numbers) == 2 and numbers[0] else None

    def keep_ports(self, sockets: Iterable[SocketAddr]) -> None:
        """Writes the ports of ``sockets`` down for the next time. A disk that is full is no reason not to host."""
        ports = {socket.ip.version: socket.port for socket in sockets}
        _replace(self._ports_file, f"{ports.get(4, 0)}\n{ports.get(6, 0)}\n")

    # -- the run -------------------------------------------------------------------------------------------------------

    def run_id(self) -> str | None:
        """The name of the run that was hosted last, for one that is to go on and has saved nothing yet; else None."""
        try:
            with open(self._run_file, "rb") as file:
                return file.read(MAX_NAME_BYTES).decode().strip() or None
        except (OSError, UnicodeDecodeError):
            return None

    def keep_run_id(self, run_id: str) -> None:
        """Writes the name down. A disk that is full is no reason not to host."""
        _replace(self._run_file, f"{run_id}\n")

    # -- who is banned -------------------------------------------------------------------------------------------------

    def banned(self) -> frozenset[bytes]:
        """Public keys that were banned here, and still are.

        Raises:
            ConfigurationError: the file has something else in it.
        """
        try:
            with open(self._banned_file, "rb") as file:
                lines = file.read(MAX_BANNED_BYTES).decode("utf-8", errors="replace").splitlines()
        except OSError:
            return frozenset()
        keys = set()
        for number, line in enumerate(lines, start=1):
            if digits := line.partition("#")[0].strip():
                try:
                    key = bytes.fromhex(digits)
                except ValueError:
                    key = b""
                if len(key) != PUBLIC_KEY_SIZE:
                    raise ConfigurationError(
                        f"{self._banned_file}, line {number}: {digits[:80]!r} is not a key of {2 * PUBLIC_KEY_SIZE} "
                        "hexadecimal digits: remove the line, or put a # before it",
                        name="banned",
                        value=digits,
                    )
                keys.add(key)
        return frozenset(keys)

    def keep_banned(self, keys: Collection[bytes]) -> bool:
        """Writes down who is banned, and returns whether that could be done."""
        return _replace(self._banned_file, "".join(f"{key.hex()}\n" for key in sorted(keys)))

    def _unusable(self, error: OSError) -> ConfigurationError:
        return ConfigurationError(
            f"the key of the host cannot be kept in {self.directory}: {error.strerror or error}; name a folder that "
            "can be written",
            name="checkpoint_dir",
            value=str(self.directory),
        )


def _replace(path: Path, text: str) -> bool:
    partial = path.with_name(path.name + ".tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        return False
    return True
