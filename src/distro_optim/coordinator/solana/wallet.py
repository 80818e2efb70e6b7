"""Wallet files, and the key by which a wallet's owner is known among the peers.

A wallet is the file that Solana's tools write: a JSON list of 64 numbers, the secret key and the public key. It pays
and signs transactions, and nothing else. Peers talk under another key, which Psyche (PsycheFoundation/psyche,
``solana-client/src/main.rs``) derives from the run's name and the wallet, so that it is the same after a restart.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from solders.keypair import Keypair

from ...errors import ConfigurationError
from ..solana_options import DEFAULT_WALLET

__all__ = ["RAW_WALLET", "derive_peer_secret", "find_wallet", "new_wallet", "parse_wallet", "read_wallet"]

_log = logging.getLogger(__name__)

RAW_WALLET: Final = "RAW_WALLET_PRIVATE_KEY"
"""The variable in which the containers of Psyche's client get the text of a wallet."""

SECRET_BYTES: Final = 32
WALLET_BYTES: Final = 64

MAX_WALLET_FILE: Final = 4096
"""Bytes of a file that is read as a wallet; 64 numbers take less than 400."""


def new_wallet() -> Keypair:
    """Keys that nobody had before."""
    return Keypair()


def find_wallet(path: str | Path, environment: Mapping[str, str] | None = None) -> Keypair:
    """The keys of a user: in the file that was named, else in the variable of Psyche's containers, else where
    ``solana-keygen`` writes them.

    Args:
        path: of the file; the default one stands for none.
        environment: None takes that of the process.

    Raises:
        ConfigurationError: see :func:`read_wallet` and :func:`parse_wallet`.
    """
    text = (os.environ if environment is None else environment).get(RAW_WALLET)
    if text and Path(path) == Path(DEFAULT_WALLET):
        return parse_wallet(text, name=f"what stands in {RAW_WALLET}")
    return read_wallet(path)


def read_wallet(path: str | Path) -> Keypair:
    """The keys in a wallet file.

    Raises:
        ConfigurationError: it cannot be read, others can read it, or it is no wallet.
    """
    file = Path(path).expanduser()
    try:
        with open(file, "rb") as handle:
            mode = stat.S_IMODE(os.fstat(handle.fileno()).st_mode)
            data = handle.read(MAX_WALLET_FILE + 1)
    except OSError as error:
        raise ConfigurationError(
            f"the wallet {file} cannot be read: {error.strerror or error}", name="wallet", value=str(file)
        ) from None
    if os.name == "posix" and mode & (stat.S_IRGRP | stat.S_IROTH | stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigurationError(
            f"the wallet {file} can be read or changed by others on this machine: chmod 600 {file}",
            name="wallet",
            value=str(file),
        )
    if len(data) > MAX_WALLET_FILE:
        raise ConfigurationError(f"{file} is too large for a wallet", name="wallet", value=str(file))
    return parse_wallet(data.decode(errors="replace"), name=str(file))


def parse_wallet(text: str, *, name: str = "the wallet") -> Keypair:
    """The keys in the text of a wallet: a JSON list of 64 numbers, or 64 bytes in base58.

    Raises:
        ConfigurationError: it is neither, or the public key is not that of the secret one.
    """
    stripped = text.strip()
    try:
        if stripped.startswith("["):
            numbers = json.loads(stripped)
            if len(numbers) != WALLET_BYTES or not all(type(n) is int and 0 <= n < 256 for n in numbers):
                raise ValueError("64 numbers from 0 to 255 are needed")
            return Keypair.from_bytes(bytes(numbers))
        return Keypair.from_base58_string(stripped)
    except BaseException as error:  # solders panics on some inputs, and a panic is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        # The text itself is a secret: it must not get into a message.
        raise ConfigurationError(
            f"{name} is no wallet: a JSON list of 64 numbers is needed, as solana-keygen writes it", name="wallet"
        ) from None


def derive_peer_secret(run_id: str, wallet: Keypair) -> bytes:
    """The secret key, 32 bytes, under which peers of a run know the wallet's owner.

    It is the start of the ChaCha20 key stream whose key is the SHA-256 of the run's name and the wallet's secret.
    """
    seed = hashlib.sha256(run_id.encode() + bytes(wallet)[:SECRET_BYTES]).digest()
    stream = Cipher(ChaCha20(seed, bytes(16)), mode=None).encryptor()
    return stream.update(bytes(SECRET_BYTES))
