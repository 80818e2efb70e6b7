"""A contribution in Psyche's bytes: exact vectors, round trips, and whatever strangers may send instead."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
import torch
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distro_optim.buffer import Reader, Writer
from distro_optim.compress import CompressedTensor, CompressedUpdate, ParamSpec, make_plan
from distro_optim.compress.wire import (
    ENTRY_OVERHEAD,
    EXPANSION,
    SerializedDistroResult,
    TransmittableDistroResult,
    decode_distro_result,
    decode_download,
    decode_transmittable,
    encode_distro_result,
    encode_download,
    encode_transmittable,
)
from distro_optim.compress.wire_tensor import (
    SerializableTensor,
    decode_tensor,
    encode_tensor,
    narrow_index,
    widen_index,
)
from distro_optim.errors import ConfigurationError, LimitExceededError, ProtocolError, TruncatedError
from distro_optim.testing.updates import random_update
from distro_optim.verify.commitment import training_result_hash

CPU = torch.device("cpu")

# One vector of 8 elements in one tile, of which coefficients 3 and 0 are sent: 1.0 and -2.0.
VALUES = CompressedTensor(
    torch.tensor([[3, 0]], dtype=torch.int32), torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16), (1, 8), 8
)
SIGNS = CompressedTensor(VALUES.index, torch.tensor([[False, True]]), (1, 8), 8)
VALUES_HEX = "0202040000000203000202040f000004803f00c002010808"
SIGNS_HEX = "0202040000000203000202040b0001010202010808"
DOWNLOAD_HEX = "0007021013010202040000000203000202040b0001010202010808"
DOWNLOAD_BLAKE3 = "f3adff931096c81f8bfc4ed091fc58cf865072bc9764fe00a83e880a7ed6f46c"  # the name of its blob
DOWNLOAD = TransmittableDistroResult(7, 2, (16, 19), (SerializedDistroResult.from_tensor(SIGNS),))


def result_bytes(entry: CompressedTensor) -> bytes:
    writer = Writer()
    encode_distro_result(writer, SerializedDistroResult.from_tensor(entry))
    return writer.finish()


def tensor_bytes(dims: list[int], kind: int, variant: int, data: bytes, *, length: int | None = None) -> bytes:
    writer = Writer()
    writer.push_varint(len(dims))
    for dim in dims:
        writer.push_zigzag(dim)
    writer.push_u8(kind)
    writer.push_bool(False)
    writer.push_varint(variant)
    writer.push_varint(len(data) if length is None else length)
    writer.push_bytes(data)
    return writer.finish()


def joined(index: bytes, value: bytes, xshape: list[int], totalk: int) -> bytes:
    writer = Writer()
    writer.push_bytes(index)
    writer.push_bytes(value)
    writer.push_varint(len(xshape))
    for side in xshape:
        writer.push_varint(side)
    writer.push_varint(totalk)
    return writer.finish()


def assert_same_entry(ours: CompressedTensor, theirs: CompressedTensor) -> None:
    assert ours.shape == theirs.shape
    assert ours.totalk == theirs.totalk
    assert torch.equal(ours.index.long(), theirs.index.long())
    assert ours.value.dtype == theirs.value.dtype
    assert torch.equal(ours.value, theirs.value)


# ---------------------------------------------------------------- vectors


def test_values_of_two_coefficients_have_the_known_bytes() -> None:
    assert result_bytes(VALUES).hex() == VALUES_HEX


def test_signs_of_two_coefficients_have_the_known_bytes() -> None:
    assert result_bytes(SIGNS).hex() == SIGNS_HEX


def test_the_known_bytes_are_read_as_what_they_mean() -> None:
    for entry, data in ((VALUES, VALUES_HEX), (SIGNS, SIGNS_HEX)):
        assert_same_entry(decode_distro_result(Reader(bytes.fromhex(data))).to_tensor(), entry)


def test_a_download_has_the_known_bytes() -> None:
    assert encode_download(DOWNLOAD).hex() == DOWNLOAD_HEX
    assert blake3(encode_download(DOWNLOAD)).hexdigest() == DOWNLOAD_BLAKE3
    assert encode_transmittable(DOWNLOAD).hex() == DOWNLOAD_HEX[2:]
    assert decode_download(bytes.fromhex(DOWNLOAD_HEX)) == DOWNLOAD
    assert decode_transmittable(bytes.fromhex(DOWNLOAD_HEX[2:])) == DOWNLOAD


def test_the_committed_segments_hash_to_the_known_commitment() -> None:
    received = decode_download(bytes.fromhex(DOWNLOAD_HEX))
    digest = training_result_hash(received.step, *received.batch_id, received.committed_segments())
    assert digest.hex() == "4b0236be5a7bcbef4130e7222fd350e8462b0b75f5ffba61d5ddf36f1d3c2ce7"


def test_indices_below_65536_travel_as_two_bytes_little_endian() -> None:
    narrow = narrow_index(torch.tensor([[1, 300, 4095]]), 4096)
    assert narrow.dtype == torch.uint8
    assert bytes(narrow.flatten().tolist()).hex() == "01002c01ff0f"


@pytest.mark.parametrize(
    ("totalk", "width", "dtype"),
    [
        (1, 1, torch.uint8),
        (256, 1, torch.uint8),
        (257, 2, torch.uint8),
        (65536, 2, torch.uint8),
        (65537, 4, torch.uint8),
        (1 << 32, 4, torch.uint8),
        ((1 << 32) + 1, 1, torch.int64),
    ],
)
def test_an_index_takes_the_bytes_its_tile_needs(totalk: int, width: int, dtype: torch.dtype) -> None:
    index = torch.tensor([[0, totalk - 1, totalk // 2]])
    narrow = narrow_index(index, totalk)
    assert narrow.shape == (1, 3 * width)
    assert narrow.dtype == dtype
    assert torch.equal(widen_index(narrow, totalk).long(), index)


# ---------------------------------------------------------------- round trips

PLANS: list[list[tuple[tuple[int, ...], torch.dtype]]] = [
    [((), torch.float32), ((17,), torch.float32)],
    [((64, 48), torch.bfloat16), ((5, 3, 3, 3), torch.float32), ((0, 4), torch.float32), ((130,), torch.float64)],
    [((200, 130), torch.float16)],
]


@st.composite
def updates(draw: st.DrawFn) -> CompressedUpdate:
    """Any update that a peer can make: shapes, tilings, top-k, signs or values, tensors left out."""
    chunk, topk = draw(st.sampled_from([(4, 3), (64, 8), (300, 5)]))
    specs = [ParamSpec(shape, dtype, CPU, 0, chunk, topk) for shape, dtype in draw(st.sampled_from(PLANS))]
    plan = make_plan(specs, draw(st.sampled_from(["divisor", "padded"])))
    present = draw(st.lists(st.booleans(), min_size=len(plan), max_size=len(plan)))
    return random_update(plan, quantized=draw(st.booleans()), present=present, seed=draw(st.integers(0)))


@pytest.mark.slow
@given(
    update=updates(), step=st.integers(0, 2**32 - 1), nonce=st.integers(0, 2**32 - 1), batch=st.integers(0, 2**64 - 1)
)
@settings(max_examples=60, deadline=None)
def test_every_update_survives_the_wire(update: CompressedUpdate, step: int, nonce: int, batch: int) -> None:
    sent = TransmittableDistroResult.from_update(update, step=step, trainer_nonce=nonce, batch_id=(batch, batch))
    data = encode_download(sent)
    received = decode_download(data)
    assert received == sent
    assert encode_download(received) == data
    assert (received.step, received.trainer_nonce, received.batch_id) == (step, nonce, (batch, batch))
    arrived = received.to_update(update.plan)
    assert arrived.present == update.present
    for ours, theirs in zip(arrived.tensors(), update.tensors(), strict=True):
        assert_same_entry(ours, theirs)


def test_a_tensor_left_out_travels_as_an_entry_without_coefficients() -> None:
    plan = make_plan([ParamSpec((64, 128), torch.float32, CPU, 0, 64, 8)], "padded")
    (entry,) = TransmittableDistroResult.from_update(
        CompressedUpdate.empty(plan, quantized=True), step=0, trainer_nonce=0, batch_id=(0, 0)
    ).distro_results
    assert entry.xshape == (1, 2, 64, 64)
    assert entry.sparse_idx == SerializableTensor((1, 2, 0), 0, b"")
    assert entry.sparse_val == SerializableTensor((1, 2, 0), 11, b"")


def test_more_than_65535_tiles_in_a_row_are_refused_with_advice() -> None:
    entry = CompressedTensor(torch.zeros(65536, 1, dtype=torch.int32), torch.zeros(65536, 1), (65536, 1), 1)
    with pytest.raises(ConfigurationError, match=r"65535 tiles.*compression_chunk"):
        SerializedDistroResult.from_tensor(entry)


def test_values_of_a_type_without_a_number_are_refused() -> None:
    entry = CompressedTensor(torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int16), (1, 1), 1)
    with pytest.raises(ConfigurationError, match="int16"):
        SerializedDistroResult.from_tensor(entry)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("step", (1 << 32, 0, (0, 0))),
        ("step", (-1, 0, (0, 0))),
        ("trainer_nonce", (0, 1 << 32, (0, 0))),
        ("batch_id", (0, 0, (0, 1 << 64))),
        ("batch_id", (0, 0, (2, 1))),
    ],
)
def test_a_number_that_does_not_fit_its_field_is_refused(name: str, fields: tuple[int, int, tuple[int, int]]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        encode_transmittable(TransmittableDistroResult(*fields, ()))
    assert caught.value.name == name


# ---------------------------------------------------------------- what strangers send

GOOD_INDEX = tensor_bytes([1, 2], 0, 0, b"\3\0")
GOOD_VALUE = tensor_bytes([1, 2], 11, 1, b"\2")
HUGE = (1 << 63) - 1

# Each is one attack: bytes that announce what they do not hold, or what no honest peer could mean.
HOSTILE_RESULTS: dict[str, bytes] = {
    "a negative dimension": joined(tensor_bytes([-1, -2], 0, 0, b"\3\0"), GOOD_VALUE, [1, 8], 8),
    "dimensions whose product overflows 64 bits": joined(
        tensor_bytes([1 << 32, 1 << 32], 0, 0, b"\3\0"), GOOD_VALUE, [1, 8], 8
    ),
    "the largest dimension": joined(tensor_bytes([HUGE], 0, 0, b""), GOOD_VALUE, [1, 8], 8),
    "huge dimensions made empty by a zero": joined(
        tensor_bytes([HUGE, HUGE, 0], 0, 0, b""), tensor_bytes([HUGE, HUGE, 0], 11, 1, b""), [1, 8], 8
    ),
    "a huge shape made empty by k = 0": joined(
        tensor_bytes([65535] * 4 + [0], 0, 0, b""),
        tensor_bytes([65535] * 4 + [0], 11, 1, b""),
        [65535] * 4 + [1, 8],
        8,
    ),
    "more dimensions than a tensor has": joined(
        tensor_bytes([1] * 33, 0, 0, b"\3"), tensor_bytes([1] * 33, 11, 1, b"\2"), [1] * 32 + [2, 4], 8
    ),
    "no dimensions": joined(tensor_bytes([], 0, 0, b"\0"), tensor_bytes([], 11, 1, b"\0"), [], 1),
    "a scalar of indices": joined(tensor_bytes([], 0, 0, b"\0"), GOOD_VALUE, [1, 8], 8),
    "an encoded shape of three dimensions": joined(
        tensor_bytes([1, 2], 0, 0, b"\3\0"), tensor_bytes([1, 2], 11, 1, b"\2"), [1, 2, 4], 8
    ),
    "too little data": joined(tensor_bytes([1, 2], 0, 0, b"\3"), GOOD_VALUE, [1, 8], 8),
    "too much data": joined(tensor_bytes([1, 2], 0, 0, b"\3\0\0"), GOOD_VALUE, [1, 8], 8),
    "too few packed signs": joined(GOOD_INDEX, tensor_bytes([1, 2], 11, 1, b""), [1, 8], 8),
    "bools that are not packed": joined(GOOD_INDEX, tensor_bytes([1, 2], 11, 0, b"\0\1"), [1, 8], 8),
    "packed bits of floats": joined(GOOD_INDEX, tensor_bytes([1, 2], 6, 1, b"\2"), [1, 8], 8),
    "an unknown variant": joined(tensor_bytes([1, 2], 0, 2, b"\3\0"), GOOD_VALUE, [1, 8], 8),
    "an unknown kind": joined(tensor_bytes([1, 2], 37, 0, b"\3\0"), GOOD_VALUE, [1, 8], 8),
    "complex values": joined(GOOD_INDEX, tensor_bytes([1, 2], 9, 0, bytes(16)), [1, 8], 8),
    "whole numbers for values": joined(GOOD_INDEX, tensor_bytes([1, 2], 4, 0, bytes(16)), [1, 8], 8),
    "bools for indices": joined(tensor_bytes([1, 2], 11, 1, b"\2"), GOOD_VALUE, [1, 8], 8),
    "wide indices of a small tile": joined(tensor_bytes([1, 2], 4, 0, bytes(16)), GOOD_VALUE, [1, 8], 8),
    "narrow indices of a large tile": joined(GOOD_INDEX, GOOD_VALUE, [1, 300], 300),
    "another totalk than the shape's": joined(GOOD_INDEX, GOOD_VALUE, [1, 8], 9),
    "another number of tiles than the shape's": joined(GOOD_INDEX, GOOD_VALUE, [2, 8], 8),
    "fewer values than indices": joined(GOOD_INDEX, tensor_bytes([1, 1], 11, 1, b"\0"), [1, 8], 8),
    "more coefficients than a tile has elements": joined(
        tensor_bytes([1, 3], 0, 0, bytes(3)), tensor_bytes([1, 3], 11, 1, b"\0"), [1, 2], 2
    ),
    "a side above 65535": joined(GOOD_INDEX, GOOD_VALUE, [1, 65536], 65536),
    "a totalk above 32 bits": joined(GOOD_INDEX, GOOD_VALUE, [1, 8], 1 << 32),
    "a bool that is 2": bytes.fromhex(SIGNS_HEX.replace("0202040000", "0202040002", 1)),
}


@pytest.mark.parametrize("attack", HOSTILE_RESULTS)
def test_no_result_is_made_of(attack: str) -> None:
    with pytest.raises(ProtocolError):
        decode_distro_result(Reader(HOSTILE_RESULTS[attack]))


def test_the_attacks_differ_from_an_honest_result_only_where_they_say() -> None:
    assert joined(GOOD_INDEX, GOOD_VALUE, [1, 8], 8).hex() == SIGNS_HEX


def test_an_index_beyond_its_tile_becomes_no_tensor() -> None:
    result = decode_distro_result(Reader(joined(tensor_bytes([1, 2], 0, 0, b"\3\10"), GOOD_VALUE, [1, 8], 8)))
    with pytest.raises(ProtocolError, match="indices from 3 to 8, a tile has 8"):
        result.to_tensor()


def test_set_bits_in_the_padding_of_packed_signs_change_nothing_but_the_commitment() -> None:
    odd = decode_distro_result(Reader(joined(GOOD_INDEX, tensor_bytes([1, 2], 11, 1, b"\xfe"), [1, 8], 8)))
    assert_same_entry(odd.to_tensor(), SIGNS)
    assert bytes(odd.sparse_val.data) == b"\xfe"


def test_bytes_after_the_end_are_passed_over_as_psyche_does() -> None:
    assert decode_download(bytes.fromhex(DOWNLOAD_HEX) + b"more") == DOWNLOAD


@pytest.mark.parametrize("variant", ["01", "02", "03", "ffffffff0f"])
def test_a_download_of_something_else_is_no_result(variant: str) -> None:
    with pytest.raises(ProtocolError, match="variant"):
        decode_download(bytes.fromhex(variant + DOWNLOAD_HEX[2:]))


def test_a_batch_that_ends_before_it_starts_is_refused() -> None:
    with pytest.raises(ProtocolError, match="from 16 to 15"):
        decode_download(bytes.fromhex(DOWNLOAD_HEX.replace("1013", "100f", 1)))


def test_an_error_says_which_result_is_wrong() -> None:
    good, bad = bytes.fromhex(SIGNS_HEX), HOSTILE_RESULTS["too little data"]
    with pytest.raises(ProtocolError) as caught:
        decode_transmittable(bytes.fromhex("07021013") + b"\2" + good + bad)
    assert caught.value.field == "distro_results[1]"


def test_more_results_than_the_model_has_parameters_are_refused_before_the_first() -> None:
    data = bytes.fromhex("07021013") + b"\3" + bytes.fromhex(SIGNS_HEX) * 3
    assert len(decode_transmittable(data, max_results=3).distro_results) == 3
    with pytest.raises(LimitExceededError, match="at most 2"):
        decode_transmittable(data, max_results=2)


def test_every_truncation_is_noticed() -> None:
    for data in (bytes.fromhex(DOWNLOAD_HEX), encode_download(TransmittableDistroResult(0, 0, (0, 0), ()))):
        for length in range(len(data)):
            with pytest.raises(TruncatedError):
                decode_download(data[:length])


@pytest.mark.parametrize("length", [1 << 7, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_a_length_beyond_the_input_allocates_nothing(length: int) -> None:
    count = Writer()
    count.push_varint(length)
    attacks = [
        bytes.fromhex("0007021013") + count.finish(),  # results
        bytes.fromhex("000702101301") + count.finish(),  # dimensions
        bytes.fromhex("000702101301") + tensor_bytes([1, 2], 0, 0, b"\3\0", length=length),  # data
        bytes.fromhex("000702101301") + GOOD_INDEX + GOOD_VALUE + count.finish(),  # sides
    ]
    for attack in attacks:
        peak, error = peak_of(attack)
        assert isinstance(error, ProtocolError)
        assert peak < 64 * 1024


def peak_of(data: bytes) -> tuple[int, ProtocolError | None]:
    """Bytes that Python and numpy allocate at most at a time while ``data`` is decoded to tensors."""
    tracemalloc.start()
    error = None
    try:
        entries = [entry.to_tensor() for entry in decode_download(data).distro_results]
        del entries
    except ProtocolError as caught:
        error = caught
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak, error


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("chunk", [16, 64, 300])
def test_decoding_allocates_no_more_than_it_says(chunk: int, quantized: bool) -> None:
    plan = make_plan([ParamSpec((1200, 1200), torch.float32, CPU, 0, chunk, 64)], "padded")
    update = random_update(plan, quantized=quantized)
    data = encode_download(TransmittableDistroResult.from_update(update, step=0, trainer_nonce=0, batch_id=(0, 0)))
    peak, error = peak_of(data)
    assert error is None
    assert len(data) < peak <= EXPANSION * len(data) + ENTRY_OVERHEAD


@pytest.mark.slow
def test_the_smallest_results_take_no_more_memory_each_than_it_says() -> None:
    smallest = joined(tensor_bytes([0, 0], 0, 0, b""), tensor_bytes([0, 0], 11, 1, b""), [0, 1], 1)
    assert len(smallest) == 18
    count = Writer()
    count.push_varint(2_000)
    data = bytes.fromhex("0007021013") + count.finish() + smallest * 2_000
    tracemalloc.start()
    result = decode_download(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(result.distro_results) == 2_000
    assert peak < 2_000 * ENTRY_OVERHEAD


def check_anything(data: bytes) -> None:
    """Decodes ``data`` to the end; ProtocolError is all that may go wrong."""
    for decode in (decode_download, decode_transmittable):
        try:
            entries = [entry.to_tensor() for entry in decode(data, max_results=64).distro_results]
        except ProtocolError:
            continue
        for entry in entries:
            assert entry.index.shape == entry.value.shape
            assert not entry.index.numel() or int(entry.index.max()) < entry.totalk
    try:
        decoded = decode_tensor(Reader(data))
    except ProtocolError:
        return
    writer = Writer()
    encode_tensor(writer, decoded)
    assert decode_tensor(Reader(writer.finish())) == decoded


@pytest.mark.slow
@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_arbitrary_bytes_are_a_result_or_a_protocol_error(data: bytes) -> None:
    check_anything(data)
    check_anything(b"\0" + data)


@pytest.mark.slow
@given(tail=st.binary(max_size=60), start=st.integers(0, len(DOWNLOAD_HEX) // 2))
@settings(max_examples=300, deadline=None)
def test_an_honest_beginning_with_any_end_is_a_result_or_a_protocol_error(tail: bytes, start: int) -> None:
    check_anything(bytes.fromhex(DOWNLOAD_HEX)[:start] + tail)


@pytest.mark.slow
@given(update=updates(), flips=st.lists(st.tuples(st.integers(0), st.integers(0, 7)), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_flipped_bits_make_another_update_or_a_protocol_error(
    update: CompressedUpdate, flips: list[tuple[int, int]]
) -> None:
    sent = TransmittableDistroResult.from_update(update, step=1, trainer_nonce=1, batch_id=(1, 9))
    data = bytearray(encode_download(sent))
    for position, bit in flips:
        data[position % len(data)] ^= 1 << bit
    check_anything(bytes(data))
    try:
        arrived = decode_download(bytes(data), max_results=len(update.plan)).to_update(update.plan)
    except ProtocolError:
        return
    arrived.check()  # what gets through is safe to apply


def test_a_result_for_another_model_is_refused_by_the_plan() -> None:
    plan = make_plan([ParamSpec((8,), torch.float32, CPU, 0, 8, 2)], "divisor")
    assert DOWNLOAD.to_update(plan).present == (True,)
    others: list[Any] = [[], [((16,), 2)], [((8,), 3)], [((8,), 2), ((8,), 2)]]
    for shapes in others:
        other = make_plan([ParamSpec(shape, torch.float32, CPU, 0, 8, k) for shape, k in shapes], "divisor")
        with pytest.raises(ProtocolError):
            DOWNLOAD.to_update(other)
