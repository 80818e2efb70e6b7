"""The cursors: what is pushed is pulled, and no bytes can make a reader do anything but raise ProtocolError."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distro_optim.buffer import Reader, Writer, varint_size
from distro_optim.errors import LimitExceededError, ProtocolError, TruncatedError

U64 = st.integers(0, 2**64 - 1)
I64 = st.integers(-(2**63), 2**63 - 1)


@pytest.mark.slow
@given(U64)
def test_varint_round_trip(value: int) -> None:
    w = Writer()
    w.push_varint(value)
    r = Reader(w.finish())
    assert r.pull_varint() == value
    r.expect_end()


@pytest.mark.slow
@given(I64)
def test_zigzag_round_trip(value: int) -> None:
    w = Writer()
    w.push_zigzag(value)
    assert Reader(w.finish()).pull_zigzag() == value


@pytest.mark.parametrize(
    ("value", "encoded"),
    [(0, "00"), (127, "7f"), (128, "8001"), (300, "ac02"), (2**64 - 1, "ff" * 9 + "01")],
)
def test_varint_bytes(value: int, encoded: str) -> None:
    w = Writer()
    w.push_varint(value)
    assert w.finish().hex() == encoded
    assert varint_size(value) == len(bytes.fromhex(encoded))


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
def test_varint_above_its_width_is_refused(bits: int) -> None:
    w = Writer()
    w.push_varint(2**bits)
    with pytest.raises(ProtocolError):
        Reader(w.finish()).pull_varint(bits)


def test_endless_varint_is_refused_early() -> None:
    r = Reader(b"\x80" * 10_000)
    with pytest.raises(ProtocolError, match="longer than 64 bits"):
        r.pull_varint()
    assert r.pos <= 10


def test_fixed_numbers_round_trip() -> None:
    w = Writer()
    w.push_u8(255)
    w.push_bool(True)
    w.push_bool(False)
    w.push_u16(65535)
    w.push_u16(1)
    w.push_u32(1)
    w.push_u32(2**32 - 1)
    w.push_bytes(b"raw")
    w.push_blob(b"abc")
    r = Reader(w.finish())
    assert r.pull_u8() == 255
    assert r.pull_bool() is True
    assert r.pull_bool() is False
    assert r.pull_u16() == 65535
    assert r.pull_u16() == 1
    assert r.pull_u32() == 1
    assert r.pull_u32() == 2**32 - 1
    assert bytes(r.pull_bytes(3)) == b"raw"
    assert bytes(r.pull_blob()) == b"abc"
    r.expect_end()


def test_a_huge_declared_length_allocates_nothing() -> None:
    w = Writer()
    w.push_varint(2**64 - 1)
    with pytest.raises(TruncatedError):
        Reader(w.finish()).pull_blob()
    with pytest.raises(LimitExceededError):
        Reader(w.finish()).pull_blob(limit=10)


def test_trailing_bytes_are_reported_with_their_offset() -> None:
    r = Reader(b"\x01\x02")
    r.pull_u8()
    with pytest.raises(ProtocolError, match="1 bytes follow") as caught:
        r.expect_end()
    assert caught.value.offset == 1


@pytest.mark.slow
@given(
    st.binary(max_size=64),
    st.lists(st.sampled_from(["u8", "bool", "u16", "u32", "varint", "zigzag", "blob"])),
)
def test_arbitrary_bytes_raise_only_protocol_errors(data: bytes, pulls: list[str]) -> None:
    r = Reader(data)
    for pull in pulls:
        try:
            getattr(r, f"pull_{pull}")()
        except ProtocolError:
            break
        assert 0 <= r.pos <= len(data)
