"""Values as single bits: True is negative, eight to a byte, least significant first."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distro_optim.compress.sign import pack_signs, signs_to_values, unpack_signs, values_to_signs
from distro_optim.errors import ProtocolError


def test_five_bits_are_packed_least_significant_first() -> None:
    assert pack_signs(torch.tensor([False, True, False, True, False])).hex() == "0a"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_sign_is_the_sign_bit(dtype: torch.dtype) -> None:
    value = torch.tensor([1.0, -1.0, 0.0, -0.0, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    assert values_to_signs(value).tolist() == [False, True, False, True, False, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_negative_sign_becomes_minus_one(dtype: torch.dtype) -> None:
    values = signs_to_values(torch.tensor([[True, False]]), dtype)
    assert values.tolist() == [[-1.0, 1.0]]
    assert values.dtype == dtype


@pytest.mark.slow
@given(st.lists(st.booleans(), max_size=70))
def test_signs_survive_packing_and_are_packed_as_numpy_does(bits: list[bool]) -> None:
    data = pack_signs(torch.tensor(bits, dtype=torch.bool))
    assert data == np.packbits(np.array(bits, dtype=bool), bitorder="little").tobytes()
    assert unpack_signs(data, len(bits)).tolist() == bits


@pytest.mark.slow
@given(data=st.binary(max_size=20), count=st.integers(0, 200))
def test_signs_are_unpacked_from_exactly_the_bytes_they_take(data: bytes, count: int) -> None:
    if len(data) == -(-count // 8):
        assert len(unpack_signs(data, count)) == count
    else:
        with pytest.raises(ProtocolError):
            unpack_signs(data, count)
