"""Commitments: the reference's hash, and that every covered field changes it."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distro_optim.errors import ConfigurationError, ProtocolError
from distro_optim.verify.commitment import Commitment, finished_hash, training_result_hash

ENTRIES = [(bytes([3, 0]), bytes([2]))]


def test_the_hash_of_the_golden_result() -> None:
    expected = "4b0236be5a7bcbef4130e7222fd350e8462b0b75f5ffba61d5ddf36f1d3c2ce7"
    assert training_result_hash(7, 16, 19, ENTRIES).hex() == expected


def test_any_contiguous_buffer_may_hold_the_bytes() -> None:
    arrays = [(np.array([3, 0], dtype=np.uint8).data, bytearray([2]))]
    assert training_result_hash(7, 16, 19, arrays) == training_result_hash(7, 16, 19, ENTRIES)


def test_a_result_without_parameters_commits_to_its_place_only() -> None:
    place = (5).to_bytes(4, "big") + (6).to_bytes(8, "big") + (7).to_bytes(8, "big")
    assert training_result_hash(5, 6, 7, []) == hashlib.sha256(place).digest()


@pytest.mark.parametrize(
    "other",
    [(8, 16, 19, ENTRIES), (7, 15, 19, ENTRIES), (7, 16, 20, ENTRIES), (7, 16, 19, [(bytes([3, 1]), bytes([2]))])],
)
def test_every_covered_field_changes_the_hash(other: tuple[int, int, int, list[tuple[bytes, bytes]]]) -> None:
    assert training_result_hash(*other) != training_result_hash(7, 16, 19, ENTRIES)


@pytest.mark.parametrize("place", [(2**32, 0, 0), (-1, 0, 0), (0, 2**64, 0), (0, 0, -1)])
def test_numbers_that_do_not_fit_their_field_are_refused(place: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigurationError, match="unsigned bits"):
        training_result_hash(*place, [])


def test_a_finished_message_commits_to_its_root() -> None:
    assert finished_hash(bytes(32)) == hashlib.sha256(bytes(32)).digest()
    with pytest.raises(ProtocolError):
        finished_hash(b"short")


@given(st.binary(min_size=96, max_size=96))
def test_ninety_six_bytes_round_trip(data: bytes) -> None:
    commitment = Commitment.from_bytes(data)
    assert commitment.to_bytes() == data
    assert (len(commitment.data_hash), len(commitment.signature)) == (32, 64)


@given(st.binary(max_size=200).filter(lambda data: len(data) != 96))
def test_other_lengths_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="96 bytes"):
        Commitment.from_bytes(memoryview(data))


def test_parts_of_a_wrong_length_are_refused() -> None:
    with pytest.raises(ProtocolError, match="signature"):
        Commitment(bytes(32), bytes(63))
    with pytest.raises(ProtocolError, match="data_hash"):
        Commitment(bytes(31), bytes(64))
