"""Signatures checked by the ``iroh`` package's Rust, which takes 80 us for one where OpenSSL takes 130 to 150.

It checks as Psyche's clients do, with ``ed25519_dalek::VerifyingKey::verify_strict``. Only public names of the package
are used; still, what it says is tried before it is relied on.
"""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from functools import lru_cache
from types import ModuleType
from typing import Any, Final

from ...signing import SecretKey, Verifier, verify_plainly

__all__ = ["signature_check"]

_TRIAL_SEED: Final = bytes(range(32))
_TRIAL_DATA: Final = (b"", b"\x00", bytes(range(256)) * 2)


def signature_check(module: ModuleType) -> Verifier:
    """A check for :func:`~distro_optim.comm.signing.use_verifier`; raises if ``module`` judges in another way."""
    endpoint_id: Any = module.EndpointId
    signature_type: Any = module.Signature
    error_type: type[Exception] = module.IrohError

    @lru_cache(maxsize=512)
    def key_of(public: bytes) -> Any:
        return endpoint_id.from_bytes(public)

    # Keys that are left would be freed after the package itself.
    atexit.register(key_of.cache_clear)

    def verify(public: bytes, data: bytes, signature: bytes) -> bool:
        try:
            key_of(public).verify(data, signature_type.from_bytes(signature))
        except error_type:
            return False
        return True

    for trial in _trials():
        if verify(*trial) != verify_plainly(*trial):
            raise ValueError("signatures are judged in another way")
    return verify


def _trials() -> Iterator[tuple[bytes, bytes, bytes]]:
    """Good signatures, and the same with a wrong bit in each part."""
    key = SecretKey(_TRIAL_SEED)
    for data in _TRIAL_DATA:
        signature = key.sign(data)
        yield key.public, data, signature
        yield key.public, data + b"\x01", signature
        for place in (0, 31, 32, 63):
            wrong = bytearray(signature)
            wrong[place] ^= 0x10
            yield key.public, data, bytes(wrong)
        for place in (0, 31):
            other = bytearray(key.public)
            other[place] ^= 0x10
            yield bytes(other), data, signature
