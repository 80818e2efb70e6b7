"""Ed25519 keys and the signed envelope in which peers speak.

Format of :class:`SignedMessage`: PsycheFoundation/psyche, ``shared/network/src/signed_message.rs``: the postcard of
public key (32 bytes), data (varint length and bytes), signature over the data (64 bytes).

Signatures are checked strictly, as Rust's ``ed25519_dalek::VerifyingKey::verify_strict`` does: keys and commitments
of small order are refused, since with them one signature fits many messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from typing_extensions import override

from ..buffer import varint_size
from ..errors import ConfigurationError, ProtocolError
from .postcard import Bytes32, Bytes64, decode, encode

__all__ = [
    "PUBLIC_KEY_SIZE",
    "SECRET_KEY_SIZE",
    "SIGNATURE_SIZE",
    "SecretKey",
    "SignedMessage",
    "Verifier",
    "is_signed_by",
    "public_keys",
    "use_verifier",
    "verify_plainly",
]

SECRET_KEY_SIZE: Final = 32
PUBLIC_KEY_SIZE: Final = 32
SIGNATURE_SIZE: Final = 64

_SMALL_ORDER: Final = frozenset(
    bytes.fromhex(text)
    for text in (
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    )
)
"""The y coordinates of the eight points whose order divides 8, with the two that have a second, unreduced spelling. The
sign of x, the topmost bit, is masked off before looking here. (Values as in libsodium's ed25519_ref10.c; the tests
derive them from the curve.)"""


def public_keys(given: Iterable[bytes | str], *, name: str, hint: str = "") -> frozenset[bytes]:
    """Public keys, as users write them: 32 bytes, or 64 hexadecimal digits.

    Args:
        name: of the argument, for errors.
        hint: that follows what a key is, in an error.

    Raises:
        ConfigurationError: one is no key.
    """
    keys = set()
    for key in given:
        try:
            public = bytes.fromhex(key) if isinstance(key, str) else key
        except ValueError:
            public = b""
        if not isinstance(public, bytes) or len(public) != PUBLIC_KEY_SIZE:
            raise ConfigurationError(
                f"{name} holds {key!r}, which is no public key: each has {PUBLIC_KEY_SIZE} bytes, or "
                f"{2 * PUBLIC_KEY_SIZE} hexadecimal digits{hint}",
                name=name,
                value=key,
            )
        keys.add(public)
    return frozenset(keys)


class SecretKey:
    """An Ed25519 secret key.

    Args:
        seed: its 32 bytes, from a file or from ``os.urandom``.

    Raises:
        ConfigurationError: not 32 bytes.
    """

    __slots__ = ("_key", "_seed", "public")

    def __init__(self, seed: bytes) -> None:
        if len(seed) != SECRET_KEY_SIZE:
            raise ConfigurationError(f"a secret key has {SECRET_KEY_SIZE} bytes, not {len(seed)}", name="seed")
        self._seed = bytes(seed)
        self._key = Ed25519PrivateKey.from_private_bytes(self._seed)
        self.public: Final = self._key.public_key().public_bytes_raw()
        """The public key, 32 bytes: the name of a peer."""

    def to_bytes(self) -> bytes:
        """The seed. Keep it in a file that only its owner can read."""
        return self._seed

    def sign(self, data: bytes) -> bytes:
        """The 64 bytes of the signature over ``data``."""
        return self._key.sign(data)

    @override
    def __repr__(self) -> str:  # a secret must not end in a log
        return f"SecretKey(public={self.public.hex()[:8]}...)"


@lru_cache(maxsize=512)
def is_signed_by(public: bytes, data: bytes, signature: bytes) -> bool:
    """Whether this is a signature over ``data`` by the owner of ``public``; False for anything malformed, too.

    The latest answers are kept: a message is checked before it is passed on, and again where it is taken in.
    """
    if len(public) != PUBLIC_KEY_SIZE or len(signature) != SIGNATURE_SIZE:
        return False
    if _has_small_order(public) or _has_small_order(signature[:32]):
        return False
    return _verifier(public, data, signature)


Verifier = Callable[[bytes, bytes, bytes], bool]
"""Checks a signature: public key, data, signature. It is asked about the right lengths and points of full order only,
and must not raise."""


def verify_plainly(public: bytes, data: bytes, signature: bytes) -> bool:
    """The check of :func:`is_signed_by` by the ``cryptography`` package, which is there wherever this one is."""
    try:
        _key_of(public).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


_verifier: Verifier = verify_plainly


def use_verifier(verifier: Verifier) -> None:
    """Has signatures checked by a faster ``verifier`` from now on, which must say what :func:`verify_plainly` says."""
    global _verifier
    _verifier = verifier


@lru_cache(maxsize=512)
def _key_of(public: bytes) -> Ed25519PublicKey:
    """Made once for each peer that is heard, which takes a fifth of a check; raises ValueError if it is none."""
    return Ed25519PublicKey.from_public_bytes(public)


def _has_small_order(point: bytes) -> bool:
    return point[:31] + bytes([point[31] & 0x7F]) in _SMALL_ORDER


@dataclass(frozen=True)
class SignedMessage:
    """Data and the peer that vouches for it. What :meth:`open` returns is verified; a bare instance need not be.

    Attributes:
        sender: public key.
        data: what was signed.
        signature: over ``data``.
    """

    sender: Bytes32
    data: bytes
    signature: Bytes64

    @classmethod
    def seal(cls, key: SecretKey, data: bytes) -> bytes:
        """The bytes of a signed message with ``data``."""
        return encode(cls(key.public, data, key.sign(data)))

    @staticmethod
    def size_with(data_size: int) -> int:
        """Bytes of a signed message with so many bytes of data."""
        return PUBLIC_KEY_SIZE + varint_size(data_size) + data_size + SIGNATURE_SIZE

    @classmethod
    def read(cls, sealed: bytes | bytearray | memoryview) -> SignedMessage:
        """Reads without verifying. The latest are kept, for the same reason as answers of :func:`is_signed_by`.

        Raises:
            ProtocolError: malformed.
        """
        return _read(bytes(sealed))

    @classmethod
    def open(cls, sealed: bytes | bytearray | memoryview) -> SignedMessage:
        """Reads and verifies.

        Raises:
            ProtocolError: malformed, or the signature is not the sender's.
        """
        message = decode(cls, sealed)
        if not is_signed_by(message.sender, message.data, message.signature):
            raise ProtocolError("the signature does not fit sender and data", field="signature")
        return message


@lru_cache(maxsize=64)
def _read(sealed: bytes) -> SignedMessage:
    return decode(SignedMessage, sealed)
