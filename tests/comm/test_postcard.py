"""serde's postcard: what is declared is what travels, and no bytes can do more than raise ProtocolError."""

from __future__ import annotations

import contextlib
import enum
import math
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from typing import Annotated, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distro_optim.buffer import Reader, Writer
from distro_optim.comm import postcard
from distro_optim.comm.postcard import (
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    MAX_NESTING,
    U8,
    U16,
    U32,
    U64,
    Bytes32,
    Err,
    Fixed,
    Limit,
    Ok,
    Via,
    decode,
    encode,
)
from distro_optim.comm.postcard.codecs import varint
from distro_optim.comm.postcard.decoded_values import HEAD, MAX_DECODED, MAX_DECODED_BYTES, DecodedValues
from distro_optim.comm.postcard.varints import decode_few
from distro_optim.errors import ConfigurationError, LimitExceededError, ProtocolError, TruncatedError


class Committee(enum.Enum):
    TIE_BREAKER = "tie breaker"
    VERIFIER = "verifier"
    TRAINER = "trainer"


@dataclass(frozen=True)
class BatchId:
    start: U64
    end: U64


@dataclass(frozen=True)
class Proof:
    committee: Committee
    position: U64
    index: U64


@dataclass(frozen=True)
class Repo:
    repo_id: Annotated[str, Limit(64)]
    revision: Annotated[str, Limit(64)] | None = None


@dataclass(frozen=True)
class Ephemeral:
    pass


@dataclass(frozen=True)
class Dummy:
    repo: Repo


@dataclass(frozen=True)
class Hub:
    repo: Repo


Checkpoint = Ephemeral | Dummy | Hub


@dataclass(frozen=True)
class Shapes:
    small: I8
    ratio: F32
    key: Bytes32
    pair: tuple[U8, bool]
    words: Annotated[tuple[U64, ...], Fixed(2)]
    names: dict[str, U16]
    items: Annotated[list[BatchId], Limit(4)]
    checkpoint: Checkpoint | None


@dataclass(frozen=True)
class Tree:
    value: U8
    children: tuple[Tree, ...] = ()


@dataclass(frozen=True)
class Metadata:
    step: U32
    tokens_per_sec: F32
    bandwidth_per_sec: F32
    loss: F32
    evals: Annotated[tuple[tuple[str, F32], ...], Limit(8)]
    prompt_results: Annotated[tuple[I32, ...], Limit(16)]
    prompt_index: U8
    efficency: F32


@pytest.mark.parametrize(
    ("declared", "value", "expected"),
    [
        (U8, 200, "c8"),
        (I8, -1, "ff"),
        (U16, 300, "ac02"),
        (U64, 2**64 - 1, "ff" * 9 + "01"),
        (I16, -1, "01"),
        (I32, 300, "d804"),
        (I64, -(2**63), "ff" * 9 + "01"),
        (F32, 1.5, "0000c03f"),
        (F64, -2.0, "00000000000000c0"),
        (bool, True, "01"),
        (str, "test", "0474657374"),
        (bytes, b"\x00\xff", "0200ff"),
        (Annotated[bytes, Fixed(3)], b"abc", "616263"),
        (list[U8], [1, 2], "020102"),
        (tuple[U8, ...], (1, 2), "020102"),
        (Annotated[tuple[U8, ...], Fixed(2)], (1, 2), "0102"),
        (tuple[U8, bool], (7, False), "0700"),
        (dict[U8, str], {1: "a", 2: "b"}, "0201016102 0162"),
        (U8 | None, None, "00"),
        (U8 | None, 5, "0105"),
        (None, None, ""),
        (Committee, Committee.TRAINER, "02"),
        (Ok[U8] | Err[str], Ok(9), "0009"),
        (Ok[U8] | Err[str], Err("x"), "010178"),
        # Psyche's own bytes, made by its crates
        (BatchId, BatchId(128, 300), "8001ac02"),
        (Checkpoint, Hub(Repo("a/b", "main")), "0203612f6201046d61696e"),
        (tuple[tuple[Bytes32, Bytes32, Proof], ...], ((b"\t" * 32, b"\t" * 32, Proof(Committee.TRAINER, 1, 130)),),
         "01" + "09" * 64 + "02018201"),
        (
            Metadata,
            Metadata(7, 1.5, 0.0, math.inf, (("arc_easy", 0.25),), (1, -1, 300), 2, 0.5),
            "070000c03f000000000000807f01086172635f656173790000803e030201d804020000003f",
        ),
    ],
)  # fmt: skip
def test_values_have_the_bytes_that_rust_gives_them(declared: Any, value: object, expected: str) -> None:
    data = bytes.fromhex(expected)
    assert encode(value, declared) == data
    assert decode(declared, data) == value


def test_a_tensor_of_psyche_round_trips() -> None:
    """client.md A: index tensor u8 [[3, 0]] and value tensor bf16 [[1, -2]] in one result."""

    @dataclass(frozen=True)
    class Full:
        data: bytes

    @dataclass(frozen=True)
    class OneBit:
        data: bytes

    tensor = make_dataclass(
        "Tensor",
        [("dims", tuple[I64, ...]), ("kind", U8), ("requires_grad", bool), ("data", Full | OneBit)],
        frozen=True,
    )
    result = make_dataclass(
        "Result", [("idx", tensor), ("val", tensor), ("xshape", tuple[U16, ...]), ("totalk", U32)], frozen=True
    )
    value = result(
        tensor((1, 2), 0, False, Full(b"\x03\x00")),
        tensor((1, 2), 15, False, Full(bytes.fromhex("803f00c0"))),
        (1, 8),
        8,
    )
    data = bytes.fromhex("0202040000000203000202040f000004803f00c002010808")
    assert encode(value) == data
    assert decode(result, data) == value


# -- any declaration -----------------------------------------------------------------------------------------------

_INTS: dict[Any, st.SearchStrategy[Any]] = {}
for _bits, _unsigned, _signed in ((8, U8, I8), (16, U16, I16), (32, U32, I32), (64, U64, I64)):
    _INTS[_unsigned] = st.integers(0, 2**_bits - 1)
    _INTS[_signed] = st.integers(-(2 ** (_bits - 1)), 2 ** (_bits - 1) - 1)

Declared = tuple[Any, st.SearchStrategy[Any]]  # an annotation and the values it can hold

_LEAVES: list[Declared] = [
    *_INTS.items(),
    (F32, st.floats(width=32, allow_nan=False)),
    (F64, st.floats(allow_nan=False)),
    (bool, st.booleans()),
    (str, st.text(max_size=8)),
    (bytes, st.binary(max_size=8)),
    (Annotated[bytes, Fixed(5)], st.binary(min_size=5, max_size=5)),
    (Committee, st.sampled_from(Committee)),
]


def _struct_of(parts: list[Declared]) -> Declared:
    cls = make_dataclass("Struct", [(f"f{i}", part[0]) for i, part in enumerate(parts)], frozen=True)
    return cls, st.tuples(*(part[1] for part in parts)).map(lambda values: cls(*values))


def _enum_of(parts: list[Declared]) -> Declared:
    variants = [make_dataclass(f"V{i}", [("value", part[0])], frozen=True) for i, part in enumerate(parts)]
    declared: Any = variants[0]
    for variant in variants[1:]:
        declared = declared | variant
    return declared, st.one_of([part[1].map(variant) for variant, part in zip(variants, parts, strict=True)])


def _option_of(part: Declared) -> Declared:
    some, values = _struct_of([part])
    return some | None, st.none() | values


def _map_of(part: Declared) -> Declared:
    return dict.__class_getitem__((str, part[0])), st.dictionaries(st.text(max_size=2), part[1], max_size=3)


def _tuple_of(parts: tuple[Declared, Declared]) -> Declared:
    return tuple[tuple(part[0] for part in parts)], st.tuples(*(part[1] for part in parts))  # type: ignore[misc]


def _holders(inner: st.SearchStrategy[Declared]) -> st.SearchStrategy[Declared]:
    return st.one_of(
        inner.map(_option_of),
        inner.map(lambda d: (list.__class_getitem__(d[0]), st.lists(d[1], max_size=3))),
        inner.map(lambda d: (Annotated[tuple.__class_getitem__((d[0], ...)), Fixed(2)], st.tuples(d[1], d[1]))),
        inner.map(
            lambda d: (dict.__class_getitem__((str, d[0])), st.dictionaries(st.text(max_size=2), d[1], max_size=3))
        ),
        st.lists(inner, min_size=1, max_size=3).map(_struct_of),
        st.lists(inner, min_size=2, max_size=3).map(_enum_of),
        st.tuples(inner, inner).map(_tuple_of),
    )


# Classes are made on the fly, and hypothesis builds its table of characters at the first text.
slow_to_draw = settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)

DECLARATIONS = st.recursive(st.sampled_from(_LEAVES), _holders, max_leaves=6)


@pytest.mark.slow
@slow_to_draw
@given(DECLARATIONS, st.data())
def test_any_value_of_any_declaration_round_trips(declared: Declared, data: st.DataObject) -> None:
    annotation, values = declared
    codec = postcard.codec(annotation)
    value = data.draw(values)
    encoded = codec.encode(value)
    assert len(encoded) >= codec.min_size
    assert codec.decode(encoded) == value


@pytest.mark.slow
@slow_to_draw
@given(DECLARATIONS, st.data())
def test_a_value_cut_anywhere_is_reported_as_truncated(declared: Declared, data: st.DataObject) -> None:
    annotation, values = declared
    codec = postcard.codec(annotation)
    encoded = codec.encode(data.draw(values))
    if encoded:
        with pytest.raises(TruncatedError):
            codec.decode(encoded[: data.draw(st.integers(0, len(encoded) - 1))])


@pytest.mark.slow
@slow_to_draw
@given(DECLARATIONS, st.binary(max_size=200))
def test_arbitrary_bytes_raise_only_protocol_errors(declared: Declared, data: bytes) -> None:
    codec = postcard.codec(declared[0])
    try:
        value = codec.decode(data, allow_trailing=True)
    except ProtocolError:
        return
    # Varints have several forms, so only values must survive, not bytes. A NaN is not equal to itself.
    again = codec.encode(value)
    assert codec.encode(codec.decode(again)) == again


@pytest.mark.slow
@given(st.data())
def test_flipped_bits_raise_only_protocol_errors(data: st.DataObject) -> None:
    encoded = bytearray(encode(SHAPES))
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(ProtocolError):
        decode(Shapes, encoded)


SHAPES = Shapes(-3, 0.5, bytes(32), (1, True), (2**64 - 1, 0), {"a": 1}, [BatchId(1, 2)], Hub(Repo("r")))


# -- what is wrong is named ----------------------------------------------------------------------------------------


def test_an_error_names_the_path_and_the_offset() -> None:
    data = encode(SHAPES)
    assert data.endswith(b"\x01r\x00")
    with pytest.raises(ProtocolError, match="not UTF-8") as caught:
        decode(Shapes, data[:-3] + b"\x01\xff\x00")
    assert caught.value.field == "checkpoint.Hub.repo.repo_id"
    assert caught.value.offset == len(data) - 3


def test_an_error_in_a_list_names_the_index() -> None:
    data = encode([Proof(Committee.TRAINER, 0, 0), Proof(Committee.TRAINER, 0, 0)], list[Proof])
    wrong = data[:4] + b"\x03" + data[5:]
    with pytest.raises(ProtocolError, match="Committee has no variant 3, only 0 to 2") as caught:
        decode(list[Proof], wrong)
    assert caught.value.field == "[1].committee"
    assert caught.value.offset == 4


def test_a_value_that_does_not_fit_its_declaration_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"items\[1\]\.end: -1 does not fit in u64") as caught:
        encode(Shapes(0, 0.0, bytes(32), (0, False), (0, 0), {}, [BatchId(0, 0), BatchId(0, -1)], None))
    assert caught.value.name == "items[1].end"


@pytest.mark.parametrize(
    ("declared", "value"),
    [
        (U8, 256),
        (I8, -129),
        (U32, 2**32),
        (I32, 2**31),
        (F32, 1e300),
        (Annotated[str, Limit(2)], "abc"),
        (Annotated[bytes, Fixed(2)], b"abc"),
        (Annotated[list[U8], Limit(1)], [1, 2]),
        (Annotated[list[U8], Fixed(1)], [1, 2]),
        (tuple[U8, U8], (1,)),
        (str, "\ud800"),
        (Committee, "trainer"),
        (Checkpoint, BatchId(0, 0)),
        (Checkpoint, Hub("repo")),  # type: ignore[arg-type]
    ],
)
def test_values_outside_their_declaration_are_refused(declared: Any, value: object) -> None:
    with pytest.raises(ConfigurationError):
        encode(value, declared)


@pytest.mark.parametrize("declared", [int, float, object, list[int], U8 | U16, list[None]])
def test_a_declaration_without_a_wire_form_is_refused(declared: Any) -> None:
    with pytest.raises(TypeError):
        postcard.codec(declared)


def test_an_integer_enum_whose_numbers_are_not_its_positions_is_refused() -> None:
    kind = enum.IntEnum("kind", {"ONE": 1, "TWO": 2})
    with pytest.raises(TypeError, match="stands at position 0"):
        postcard.codec(kind)


# -- many numbers at once ------------------------------------------------------------------------------------------

WIDE = [(declared, values) for declared, values in _INTS.items() if declared not in (U8, I8)]


def one_by_one(declared: Any, values: list[int]) -> bytes:
    """The plain form: a count, and each number by its own codec."""
    writer = Writer()
    writer.push_varint(len(values))
    for value in values:
        postcard.push(writer, value, declared)
    return writer.finish()


@pytest.mark.slow
@given(st.sampled_from(WIDE), st.data())
def test_many_numbers_are_written_and_read_as_one_by_one(wide: Declared, data: st.DataObject) -> None:
    declared, values = wide
    few = data.draw(st.lists(values, min_size=1, max_size=20))
    numbers = few * data.draw(st.sampled_from([1, 10, 256]))
    encoded = one_by_one(declared, numbers)
    listed = list.__class_getitem__(declared)
    assert encode(numbers, listed) == encoded
    assert decode(listed, encoded) == numbers
    assert all(type(number) is int for number in decode(listed, encoded))


@pytest.mark.parametrize(
    "declared", [declared for declared, _ in WIDE], ids=lambda declared: str(declared.__metadata__)
)
def test_more_numbers_than_are_worked_on_at_a_time_round_trip(declared: Any) -> None:
    numbers = [number % 60_000 if declared is not I16 else number % 30_000 - 15_000 for number in range(40_000)]
    listed = list.__class_getitem__(declared)
    assert decode(listed, encode(numbers, listed)) == numbers
    assert encode(numbers, listed) == one_by_one(declared, numbers)


@pytest.mark.slow
@given(st.sampled_from(WIDE), st.integers(0, 99), st.binary(max_size=12), st.integers(0, 400))
def test_a_wrong_number_among_many_is_found_as_one_by_one(wide: Declared, index: int, wrong: bytes, cut: int) -> None:
    declared, _ = wide
    numbers = [one_by_one(declared, [number])[1:] for number in range(100)] * 3
    numbers[index] = wrong
    data = b"\xac\x02" + b"".join(numbers)
    data = data[: len(data) - cut] if cut < 100 else data
    plain = Annotated[tuple[declared, ...], Fixed(300)]  # type: ignore[valid-type]

    def outcome(work: Callable[[], Any]) -> Any:
        try:
            return list(work())
        except ProtocolError as error:
            return error.message, error.field

    many = outcome(lambda: decode(list.__class_getitem__(declared), data, allow_trailing=True))
    each = outcome(lambda: decode(plain, data[2:], allow_trailing=True))
    if isinstance(each, tuple) and len(data) < 302:
        assert isinstance(many, tuple)  # the count alone tells that they cannot all be there
    else:
        assert many == each


@pytest.mark.parametrize("wrong", [-1, 2**32, 1.5, "1", None, True])
def test_a_value_among_many_that_is_no_such_number_is_not_bent_into_one(wrong: Any) -> None:
    numbers = [*range(300), wrong]
    if wrong is True:
        assert encode(numbers, list[U32]) == one_by_one(U32, [*range(300), 1])
    else:
        with pytest.raises((ConfigurationError, TypeError)):
            encode(numbers, list[U32])


# -- attacks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("declared", [str, bytes, list[U64], dict[U8, U8], tuple[Hub, ...]])
def test_a_declared_length_of_2_to_the_64_allocates_nothing(declared: Any) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(TruncatedError):
            decode(declared, b"\xff" * 9 + b"\x01" + bytes(100))
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_count_above_its_limit_is_refused_before_the_items_are_read() -> None:
    with pytest.raises(LimitExceededError):
        decode(Annotated[list[U8], Limit(4)], b"\x05" + bytes(5))


def test_a_count_is_compared_with_the_least_that_its_items_take() -> None:
    """100 keys of 32 bytes cannot be in 1000 bytes, so none is read."""
    with pytest.raises(TruncatedError, match="100 items are announced"):
        decode(list[Bytes32], b"\x64" + bytes(1000))


def test_items_without_bytes_cannot_be_counted_for_ever() -> None:
    with pytest.raises(LimitExceededError):
        decode(Annotated[list[Ephemeral], Limit(10)], b"\xff" * 9 + b"\x01")


def test_nesting_is_bounded() -> None:
    deep = b"\x00\x01" * 100_000 + b"\x00\x00"
    with pytest.raises(LimitExceededError, match="nests deeper"):
        decode(Tree, deep)
    tree = Tree(0)
    for _ in range(MAX_NESTING):
        tree = Tree(0, (tree,))
    assert decode(Tree, encode(tree)) == tree
    with pytest.raises(ConfigurationError, match="nests deeper"):
        encode(Tree(0, (tree,)))


def test_trailing_bytes_are_refused_unless_asked_for() -> None:
    with pytest.raises(ProtocolError, match="1 bytes follow"):
        decode(BatchId, b"\x01\x02\x03")
    assert decode(BatchId, b"\x01\x02\x03", allow_trailing=True) == BatchId(1, 2)


def test_a_bool_or_an_option_is_only_0_or_1() -> None:
    for declared in (bool, U8 | None):
        with pytest.raises(ProtocolError):
            decode(declared, b"\x02\x00")


def test_what_a_class_refuses_in_its_constructor_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError, match="backwards") as caught:
        decode(list[Ordered], b"\x01\x05\x04")
    assert caught.value.field == "[0]"


@dataclass(frozen=True)
class Ordered:
    start: U8
    end: U8

    def __post_init__(self) -> None:
        if self.start > self.end:
            raise ValueError("the interval runs backwards")


# -- the rest of the interface -------------------------------------------------------------------------------------


def test_push_and_pull_take_one_value_each() -> None:
    writer = Writer()
    postcard.push(writer, BatchId(1, 2))
    postcard.push(writer, "x", str)
    reader = Reader(writer.finish())
    assert postcard.pull(reader, BatchId) == BatchId(1, 2)
    assert postcard.pull(reader, str) == "x"
    reader.expect_end()


@dataclass(frozen=True)
class Flag:
    """Travels as one byte, 0 or 1, whatever it was given."""

    on: bool
    __postcard__ = Via(U8, lambda flag: int(flag.on), lambda byte: Flag(byte != 0))


def test_a_class_can_travel_as_another_type() -> None:
    assert encode([Flag(True), Flag(False)], list[Flag]) == b"\x02\x01\x00"
    assert decode(list[Flag], b"\x01\x07") == [Flag(True)]
    big_endian = Annotated[
        int, Via(Annotated[bytes, Fixed(2)], lambda n: struct.pack(">H", n), lambda b: struct.unpack(">H", b)[0])
    ]
    assert encode(258, big_endian) == b"\x01\x02"
    assert decode(big_endian, b"\x01\x02") == 258


@dataclass(frozen=True)
class Kept:
    value: U64
    reads: list[int] = field(default_factory=list, compare=False)

    __postcard__ = Via(U64, lambda kept: kept.reads.append(1) or kept.value, lambda value: Kept(value))


@dataclass(frozen=True)
class Holder:
    kept: Kept
    __postcard_cached__ = True


def test_a_cached_class_is_encoded_once() -> None:
    holder = Holder(Kept(300))
    assert encode(holder) == encode(holder) == b"\xac\x02"
    assert holder.kept.reads == [1]
    assert holder == Holder(Kept(300))


@dataclass(frozen=True)
class Report:
    number: U32
    text: Annotated[bytes, Limit(200)]
    __postcard_cached__ = True


def test_a_cached_class_is_decoded_once_and_only_for_equal_bytes() -> None:
    first, other = Report(1, b"a" * 100), Report(1, b"a" * 99 + b"b")
    assert decode(Report, encode(first)) is decode(Report, encode(first))
    assert decode(Report, encode(other)) == other  # although it begins alike
    assert decode(Report, encode(first)) == first
    pair = decode(tuple[Report, Report], encode((first, other), tuple[Report, Report]))
    assert pair == (first, other)
    with pytest.raises(ProtocolError):
        decode(Report, encode(first)[:-1])
    with pytest.raises(ProtocolError):
        decode(Report, encode(first) + b"more")
    assert decode(Report, encode(Report(2, b""))) is not decode(Report, encode(Report(2, b"")))  # too short to be kept


def test_decoded_values_are_bounded() -> None:
    known = DecodedValues()
    for number in range(2 * MAX_DECODED):
        known.remember(number.to_bytes(HEAD, "big"), number)
        assert len(known._known) <= MAX_DECODED
    assert known.pull(Reader(number.to_bytes(HEAD, "big") + b"more")) == number
    assert known.pull(Reader(b"")) is None


def test_decoded_values_take_a_bounded_number_of_bytes() -> None:
    known = DecodedValues(head=8)
    for number in range(100):
        data = number.to_bytes(8, "big") + bytes(MAX_DECODED_BYTES // 10)
        known.remember(data, number)
        assert sum(len(kept) for kept, _ in known._known.values()) <= MAX_DECODED_BYTES
        assert known.pull(Reader(data)) == number
    known.remember(b"short", 1)
    assert known.pull(Reader(b"short")) is None


def read_singly(data: bytes, count: int, bits: int) -> tuple[list[int], int] | None:
    reader = Reader(data)
    try:
        return [reader.pull_varint(bits) for _ in range(count)], reader.pos
    except ProtocolError:
        return None


@given(st.data(), st.sampled_from([16, 32, 64]))
def test_a_few_varints_at_once_are_read_as_one_by_one(draw: st.DataObject, bits: int) -> None:
    values = draw.draw(st.lists(st.integers(0, 2 ** (bits + 1)) | st.integers(0, 300), max_size=40))
    whole = b"".join(varint(value) for value in values)
    data = draw.draw(st.sampled_from([whole, whole[:-1], whole[: len(whole) // 2]]) | st.binary(max_size=60))
    count = draw.draw(st.sampled_from([len(values), max(0, len(values) - 1)]) | st.integers(0, 70))
    found = decode_few(memoryview(data), count, bits)
    assert (found and (list(found[0]), found[1])) == read_singly(data, count, bits)


@pytest.mark.parametrize("data", [b"\x80" * 9 + b"\x01", b"\x80" * 9 + b"\x02", b"\x80" * 10 + b"\x00", b"\xff" * 5000])
def test_the_longest_varints_are_read_alike(data: bytes) -> None:
    found = decode_few(memoryview(data), 1, 64)
    assert (found and (list(found[0]), found[1])) == read_singly(data, 1, 64)
