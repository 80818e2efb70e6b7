"""A contribution in flat bytes, for peers that share the plan: round trips, sizes, and bytes that are none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distro_optim.compress import CompressedUpdate, ParamSpec, TilePlan, make_plan
from distro_optim.compress.flat import decode_flat, encode_flat, flat_size, max_flat_size
from distro_optim.errors import ProtocolError, TruncatedError
from distro_optim.testing.updates import random_update, same_update

CPU = torch.device("cpu")


def planned(*shapes: tuple[int, ...], chunk: int = 8, k: int = 3, dtype: torch.dtype = torch.float32) -> TilePlan:
    return make_plan([ParamSpec(s, dtype, CPU, 0, chunk, k) for s in shapes], "padded")


PLANS = {
    "one byte an index": planned((20, 9), (), (0, 3), (8,)),
    "two bytes an index": planned((40, 40), (40,), chunk=20),
    "four bytes an index": planned((300, 300), chunk=300),
    "bfloat16": planned((20, 9), (5,), dtype=torch.bfloat16),
    "float64": planned((20, 9), (5,), dtype=torch.float64),
    "nothing": planned(),
}
SMALL = PLANS["one byte an index"]


@pytest.mark.parametrize("name", PLANS)
@given(quantized=st.booleans(), present=st.lists(st.booleans(), min_size=4, max_size=4), seed=st.integers(0, 1 << 40))
@settings(max_examples=25, deadline=None)
def test_every_update_survives(name: str, quantized: bool, present: list[bool], seed: int) -> None:
    update = random_update(PLANS[name], quantized=quantized, present=present, seed=seed)
    data = encode_flat(update)
    assert len(data) == flat_size(update.plan, update.present, quantized=update.quantized)
    assert len(data) <= max_flat_size(update.plan, quantized=update.quantized)
    assert same_update(decode_flat(data, update.plan), update)


def test_the_bytes_are_those_of_the_table() -> None:
    update = random_update(planned((8,), k=2), quantized=True)
    update.index[0].copy_(torch.tensor([[5, 1]]))
    update.value[0].copy_(torch.tensor([[False, True]]))
    assert encode_flat(update) == b"\1\1" + update.plan.layout + b"\1" + b"\5\1" + b"\2"


def test_a_sign_and_its_index_take_nine_bits() -> None:
    plan = planned((64, 64), chunk=16, k=8)
    assert max_flat_size(plan, quantized=True) == 35 + 16 * 8 * 9 // 8


@pytest.mark.parametrize("quantized", [True, False])
def test_every_truncation_and_every_extension_is_refused(quantized: bool) -> None:
    data = encode_flat(random_update(SMALL, quantized=quantized))
    for length in range(len(data)):
        with pytest.raises(ProtocolError):
            decode_flat(data[:length], SMALL)
    with pytest.raises(ProtocolError):
        decode_flat(data + b"\0", SMALL)
    with pytest.raises(TruncatedError):
        decode_flat(b"", SMALL)


def test_another_format_flag_or_layout_is_refused() -> None:
    data = encode_flat(random_update(SMALL, quantized=True))
    for position, value in ((0, 2), (1, 2), (2, data[2] ^ 1)):
        with pytest.raises(ProtocolError):
            decode_flat(data[:position] + bytes([value]) + data[position + 1 :], SMALL)
    with pytest.raises(ProtocolError, match="another model"):
        decode_flat(data, PLANS["bfloat16"])


@given(st.binary(max_size=300))
@settings(deadline=None)
def test_arbitrary_bytes_are_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_flat(data, SMALL)
    head = b"\1\1" + SMALL.layout
    try:
        decode_flat(head + data, SMALL).check()
    except ProtocolError:
        pass


@pytest.mark.slow
@given(
    quantized=st.booleans(),
    name=st.sampled_from(sorted(PLANS)),
    flips=st.lists(st.tuples(st.integers(0), st.integers(0, 7)), min_size=1, max_size=4),
)
@settings(max_examples=150, deadline=None)
def test_flipped_bits_make_a_safe_update_or_a_protocol_error(
    name: str, quantized: bool, flips: list[tuple[int, int]]
) -> None:
    plan = PLANS[name]
    data = bytearray(encode_flat(random_update(plan, quantized=quantized)))
    for position, bit in flips:
        data[position % len(data)] ^= 1 << bit
    try:
        arrived = decode_flat(bytes(data), plan)
    except ProtocolError:
        return
    CompressedUpdate.from_tensors(plan, arrived.tensors())  # passes every check
