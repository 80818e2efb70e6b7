"""The package's check of signatures says what that of ``cryptography`` says, also of those that nobody honest makes."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comm.curve import ORDER, Point, add, base, encoded, times, xs
from distro_optim.comm import signing
from distro_optim.comm.iroh import ffi
from distro_optim.comm.iroh.crossing.signatures import signature_check
from distro_optim.comm.signing import SecretKey, is_signed_by, verify_plainly

SECRET, NONCE = 123456789123456789, 987654321987654321
ROUNDS = 8


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    yield
    ffi.restore()
    ffi.accelerate()


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return importlib.import_module("iroh.iroh_ffi")


def of_order_eight() -> Point:
    """A point whose order is eight."""
    for y in range(2, 60):
        for x in xs(y):
            point = times(ORDER, (x, y))
            if times(4, point) != (0, 1):
                return point
    raise AssertionError("there is one")


def signed(data: bytes, key: Point, commitment: Point) -> tuple[bytes, bytes, bytes]:
    """As whoever knows ``SECRET`` and ``NONCE`` can sign for a key and a commitment that are not quite theirs."""
    public, first = encoded(key), encoded(commitment)
    challenge = int.from_bytes(hashlib.sha512(first + public + data).digest(), "little") % ORDER
    return public, data, first + ((NONCE + challenge * SECRET) % ORDER).to_bytes(32, "little")


@pytest.mark.slow
def test_keys_and_commitments_that_are_a_little_off_are_judged_alike(module: Any) -> None:
    check = signature_check(module)
    twist = of_order_eight()
    key, commitment = times(SECRET, base()), times(NONCE, base())
    assert check(*signed(b"honest", key, commitment))
    found = set()
    for number in range(ROUNDS):
        data = bytes([number])
        for keys in range(8):
            for commitments in range(8):
                one = signed(data, add(key, times(keys, twist)), add(commitment, times(commitments, twist)))
                assert check(*one) == verify_plainly(*one)
                found.add((bool(keys), bool(commitments), check(*one)))
    # Each kind is refused, but for that which is as it should be; some of it fits by chance.
    assert {(True, False, False), (False, True, False), (True, True, False), (False, False, True)} <= found
    assert (False, False, False) not in found
    assert (True, True, True) in found


@given(st.binary(min_size=32, max_size=32), st.binary(max_size=64), st.binary(min_size=64, max_size=64))
def test_any_bytes_are_judged_alike(public: bytes, data: bytes, signature: bytes) -> None:
    check = signature_check(importlib.import_module("iroh.iroh_ffi"))
    key = SecretKey(public)
    for one in ((public, data, signature), (key.public, data, signature), (key.public, data, key.sign(data))):
        judgements = set()
        for verifier in (check, verify_plainly):
            signing.use_verifier(verifier)
            judgements.add(is_signed_by.__wrapped__(*one))
        assert len(judgements) == 1


def test_it_is_used_until_it_is_taken_back() -> None:
    ffi.restore()
    assert signing._verifier is verify_plainly
    assert ffi.accelerate().signatures
    assert signing._verifier is not verify_plainly
    ffi.restore()
    assert signing._verifier is verify_plainly


def test_a_package_that_finds_everything_good_is_not_asked(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ffi.restore()
    monkeypatch.setattr(module.EndpointId, "verify", lambda self, data, signature: None)
    state = ffi.accelerate()
    assert not state.signatures
    assert "judged in another way" in state.reason
    assert signing._verifier is verify_plainly


def test_a_package_without_keys_is_not_asked(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ffi.restore()
    monkeypatch.delattr(module, "Signature")
    assert not ffi.accelerate().signatures
    assert signing._verifier is verify_plainly
