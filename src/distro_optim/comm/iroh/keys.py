"""A node's identity: an Ed25519 secret key of 32 bytes, given, kept in a file, or made afresh.

The public key is the endpoint id, by which peers dial. A key file holds the 32 raw bytes, as Psyche's
``--identity-secret-key-path`` reads them (``shared/client/src/cli.rs``); 64 hexadecimal digits are read as well.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from ...errors import ConfigurationError
from ..signing import SECRET_KEY_SIZE, SecretKey

__all__ = ["generate_secret_key", "load_secret_key"]

# Nobody but the owner may read or write a secret key.
_OWNER_ONLY: Final = 0o600
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO


def generate_secret_key() -> SecretKey:
    """A key of fresh random bytes from the operating system."""
    return SecretKey(os.urandom(SECRET_KEY_SIZE))


def load_secret_key(path: str | os.PathLike[str]) -> SecretKey:
    """The key in the file ``path``; if there is none, a fresh one is written there with mode 0600.

    Two processes that start at the same moment get the same key: the file appears whole or not at all, and the
    second one reads what the first wrote.

    Raises:
        ConfigurationError: the file is not a key, or others may read it.
        OSError: it cannot be read or created.
    """
    target = Path(path)
    try:
        return SecretKey(_read(target))
    except FileNotFoundError:
        pass
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = generate_secret_key()
    partial = target.with_name(f"{target.name}.{os.getpid()}.{os.urandom(4).hex()}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _OWNER_ONLY)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(fresh.to_bytes())
            file.flush()
            os.fsync(file.fileno())
        try:
            # A hard link fails if the name is taken, where a rename would silently replace the other's key.
            os.link(partial, target)
        except FileExistsError:
            return SecretKey(_read(target))
        except OSError:  # a file system without hard links, such as exFAT
            _write_new(target, fresh.to_bytes())
    finally:
        partial.unlink()
    return fresh


def _write_new(path: Path, data: bytes) -> None:
    """Writes a file that nobody else has made meanwhile.

    Raises:
        OSError: somebody has, or it cannot be written.
    """
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _OWNER_ONLY), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if os.name == "posix" and mode & _OTHERS:
            raise ConfigurationError(
                f"others can read the secret key {path} (mode {stat.S_IMODE(mode):04o}); run: chmod 600 {path}",
                name="secret_key",
                value=str(path),
            )
        # One byte more than the longest accepted form: hex digits and a line end.
        raw = file.read(2 * SECRET_KEY_SIZE + 3)
    if len(raw) == SECRET_KEY_SIZE:
        return raw
    try:
        decoded = bytes.fromhex(raw.decode("ascii").strip())
    except ValueError:
        decoded = b""
    if len(decoded) != SECRET_KEY_SIZE:
        raise ConfigurationError(
            f"{path} is not a secret key: {SECRET_KEY_SIZE} bytes or {2 * SECRET_KEY_SIZE} hexadecimal digits are "
            f"expected; move it away to get a fresh key",
            name="secret_key",
            value=str(path),
        )
    return decoded
