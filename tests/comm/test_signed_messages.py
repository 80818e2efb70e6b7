"""Signatures: whose they are, and what may not pass for one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comm.curve import ORDER, P, times, xs
from distro_optim.comm import signing
from distro_optim.comm.signing import SecretKey, SignedMessage, is_signed_by
from distro_optim.errors import ConfigurationError, ProtocolError

KEY = SecretKey(bytes(range(32)))
OTHER = SecretKey(bytes(31) + b"\x01")


def test_public_keys_are_those_of_psyche() -> None:
    assert KEY.public.hex() == "03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8"
    assert OTHER.public.hex() == "4cb5abf6ad79fbf5abbccafcc269d85cd2651ed4b885b5869f241aedf0a5ba29"


def test_a_sealed_message_opens_with_its_sender() -> None:
    sealed = SignedMessage.seal(KEY, b"hello")
    assert sealed[:32] == KEY.public
    assert sealed[32:38] == b"\x05hello"
    assert len(sealed) == 32 + 6 + 64
    message = SignedMessage.open(sealed)
    assert (message.sender, message.data) == (KEY.public, b"hello")


@pytest.mark.slow
@given(st.binary(max_size=40), st.integers(0, 10**9))
def test_any_flipped_bit_is_noticed(data: bytes, where: int) -> None:
    sealed = bytearray(SignedMessage.seal(KEY, data))
    bit = where % (8 * len(sealed))
    sealed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ProtocolError):
        SignedMessage.open(sealed)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_only_protocol_errors(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        SignedMessage.open(data)


def test_a_signature_of_another_key_is_refused() -> None:
    assert is_signed_by(KEY.public, b"x", KEY.sign(b"x"))
    assert not is_signed_by(OTHER.public, b"x", KEY.sign(b"x"))
    assert not is_signed_by(KEY.public, b"y", KEY.sign(b"x"))
    assert not is_signed_by(KEY.public[:-1], b"x", KEY.sign(b"x"))


def test_a_signature_with_the_group_order_added_is_refused() -> None:
    """The same signature in a second spelling would let a message pass twice as two."""
    signature = KEY.sign(b"x")
    scalar = int.from_bytes(signature[32:], "little") + ORDER
    assert not is_signed_by(KEY.public, b"x", signature[:32] + scalar.to_bytes(32, "little"))


def test_the_key_that_signs_everything_is_refused() -> None:
    """The neutral element as key and as commitment, with a zero scalar, satisfies the plain equation for any data."""
    neutral = (1).to_bytes(32, "little")
    assert not is_signed_by(neutral, b"anything", neutral + bytes(32))


@pytest.mark.slow
def test_the_refused_points_are_those_whose_order_divides_eight() -> None:
    points = {(x, y) for y in _small_order_ys() for x in xs(y)}
    assert len(points) == 8
    assert all(times(8, point) == (0, 1) for point in points)
    reduced = {y for _, y in points}
    spellings = {y.to_bytes(32, "little") for y in reduced | {y + P for y in reduced if y + P < 2**255}}
    assert spellings == signing._SMALL_ORDER


def test_a_key_keeps_its_secret_out_of_logs() -> None:
    assert KEY.to_bytes().hex()[:8] not in repr(KEY)
    with pytest.raises(ConfigurationError):
        SecretKey(bytes(31))


def _small_order_ys() -> set[int]:
    # Cleared of its prime-order part, a point falls on one of the eight; a few of them yield all.
    found: set[int] = set()
    for y in range(2, 60):
        for x in xs(y):
            found.add(times(ORDER, (x, y))[1])
        if len(found) == 5:  # as many as eight points on such a curve have: 1, -1, 0, and two of order eight
            break
    return found
