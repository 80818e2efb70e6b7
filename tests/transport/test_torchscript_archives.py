"""Parameters travel as archives that C++ torch reads and writes, and no archive makes us run anything."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typing_extensions import override

from distro_optim.comm.iroh.sharing._stored_zip import read_entries, write_entries
from distro_optim.comm.iroh.sharing.torchscript import read_tensor, write_tensor
from distro_optim.errors import ConfigurationError, LimitExceededError, ProtocolError

VECTORS = Path(__file__).parent.parent / "vectors" / "torchscript"
DTYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
]
SHAPES = [(), (1,), (0,), (5,), (3, 4), (0, 7), (2, 3, 4), (1, 300, 1), (65_536,), (2, 1, 2, 1, 2)]


def example(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return (
        torch.rand(shape, generator=torch.Generator().manual_seed(1)).mul(2 if dtype is torch.bool else 100).to(dtype)
    )


class Holder(torch.nn.Module):
    def __init__(self, tensor: torch.Tensor, *, buffer: bool) -> None:
        super().__init__()
        if buffer:
            self.register_buffer("0", tensor)
        else:
            self.register_parameter("0", torch.nn.Parameter(tensor))


def jit_saved(tensor: torch.Tensor, *, buffer: bool = True) -> bytes:
    file = io.BytesIO()
    scripted = torch.jit.script(Holder(tensor, buffer=buffer))
    torch.jit.save(scripted, file)
    return file.getvalue()


# torch announces that it will one day drop TorchScript; the archives stay.
pytestmark = [pytest.mark.waiting, pytest.mark.filterwarnings("ignore:.*torch.jit.*")]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bfloat16_2x3", torch.arange(6).reshape(2, 3).to(torch.bfloat16)),
        ("float32_10_requires_grad", torch.arange(10).to(torch.float32)),
        ("float32_scalar", torch.tensor(3.5)),
    ],
)
def test_archives_of_cpp_torch_are_read(name: str, expected: torch.Tensor) -> None:
    tensor = read_tensor((VECTORS / f"{name}.archive").read_bytes())
    assert tensor.dtype == expected.dtype
    assert torch.equal(tensor, expected)
    assert not tensor.requires_grad


@pytest.mark.parametrize("name", ["bfloat16_2x3", "float32_scalar"])
def test_the_program_we_write_is_that_of_cpp_torch_byte_for_byte(name: str) -> None:
    theirs = read_entries((VECTORS / f"{name}.archive").read_bytes())
    ours = read_entries(write_tensor(read_tensor((VECTORS / f"{name}.archive").read_bytes())))
    top = next(iter(theirs)).partition("/")[0]
    for entry in ("data/0", "data.pkl", "code/__torch__.py", "constants.pkl", "version", "byteorder"):
        assert bytes(ours[f"archive/{entry}"]) == bytes(theirs[f"{top}/{entry}"]), entry


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_reads_what_we_write(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        tensor = example(shape, dtype)
        loaded = torch.jit.load(io.BytesIO(write_tensor(tensor))).state_dict()["0"]
        assert loaded.dtype == dtype
        assert torch.equal(loaded, tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_we_read_what_torch_writes(dtype: torch.dtype) -> None:
    for shape in ((), (0,), (3, 4), (1, 300, 1)):
        tensor = example(shape, dtype)
        assert torch.equal(read_tensor(jit_saved(tensor)), tensor)


def test_a_view_and_a_parameter_are_read_as_plain_tensors() -> None:
    tensor = example((4, 6), torch.float32)
    view = tensor.t()[1:4]
    assert torch.equal(read_tensor(jit_saved(view)), view)
    read = read_tensor(jit_saved(tensor, buffer=False))
    assert torch.equal(read, tensor)
    assert read.is_contiguous()
    assert not read.requires_grad


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tensors_survive_the_round_trip(shape: tuple[int, ...]) -> None:
    for dtype in DTYPES:
        tensor = example(shape, dtype)
        read = read_tensor(write_tensor(tensor))
        assert read.dtype == dtype
        assert torch.equal(read, tensor)


def test_equal_tensors_give_equal_bytes_however_they_lie_in_memory() -> None:
    tensor = example((6, 4), torch.bfloat16)
    assert write_tensor(tensor.t()) == write_tensor(tensor.t().contiguous())
    assert write_tensor(tensor.requires_grad_()) == write_tensor(tensor.detach())


def test_the_tensor_read_does_not_share_memory_with_the_bytes() -> None:
    data = bytearray(write_tensor(torch.zeros(4)))
    tensor = read_tensor(data)
    data[:] = b"\xff" * len(data)
    assert torch.equal(tensor, torch.zeros(4))
    tensor += 1


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="complex64"):
        write_tensor(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ConfigurationError, match="dimensions"):
        write_tensor(torch.zeros([1] * 17))


# --- hostile archives ---


def archive(program: bytes, elements: bytes = bytes(12), **more: bytes) -> bytes:
    entries = {"archive/data.pkl": program, "archive/data/0": elements, **more}
    return write_entries(entries.items())


def program(
    *,
    kind: bytes = b"torch\nBFloat16Storage",
    count: bytes = b"K\x06",
    offset: bytes = b"K\x00",
    sizes: bytes = b"(K\x02K\x03t",
    strides: bytes = b"(K\x03K\x01t",
    call: bytes = b"torch._utils\n_rebuild_tensor_v2",
    key: bytes = b"X\x01\x00\x00\x000",
) -> bytes:
    """The program of a 2x3 bfloat16 tensor, with parts replaced."""
    storage = b"(X\x07\x00\x00\x00storagec" + kind + b"\n" + key + b"X\x03\x00\x00\x00cpu" + count + b"tQ"
    tensor = b"c" + call + b"\n(" + storage + offset + sizes + strides + b"\x89ccollections\nOrderedDict\n)RtR"
    return b"\x80\x02c__torch__\nModule\n)\x81}(X\x01\x00\x00\x000" + tensor + b"ub."


def long(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def test_the_program_without_replacements_is_a_tensor() -> None:
    assert read_tensor(archive(program())).shape == (2, 3)


class Evil:
    @override
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return exec, ("raise SystemExit('run by a pickle')",)


ATTACKS = {
    "calls a function": pickle.dumps(Evil(), protocol=2),
    "calls os.system": b"\x80\x02cos\nsystem\n(X\x02\x00\x00\x00idtR.",
    "calls torch.load": program(call=b"torch\nload"),
    "imports a class by NEWOBJ": b"\x80\x02csubprocess\nPopen\n)\x81}b.",
    "old INST": b"\x80\x02(X\x02\x00\x00\x00idios\nsystem\n.",
    "STACK_GLOBAL": b"\x80\x02X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93.",
    "EXT1": b"\x80\x02\x82\x01.",
    "protocol 4": pickle.dumps({"0": 1}, protocol=4),
    "a dictionary": pickle.dumps({"0": 1}, protocol=2),
    "another storage": program(kind=b"torch\nQUInt8Storage"),
    "a storage of another module": program(kind=b"os\nFloatStorage"),
    "more elements than data": program(count=b"K\x07"),
    "fewer elements than data": program(count=b"K\x05"),
    "negative count": program(count=long(-6)),
    "bool for a count": program(count=b"\x88"),
    "sizes beyond the data": program(sizes=b"(K\x02K\x04t"),
    "huge size": program(sizes=b"(" + long(2**62) + b"t", strides=b"(K\x01t"),
    "huge size by stride 0": program(sizes=b"(" + long(2**40) + b"t", strides=b"(K\x00t"),
    "product of sizes overflows": program(sizes=b"(" + long(2**62) * 4 + b"t", strides=b"(K\x00K\x00K\x00K\x00t"),
    "offset beyond the data": program(offset=b"K\x01"),
    "negative offset": program(offset=long(-1)),
    "negative stride": program(strides=b"(" + long(-3) + b"K\x01t"),
    "fewer strides than sizes": program(strides=b"(K\x03t"),
    "sizes are text": program(sizes=b"X\x01\x00\x00\x002"),
    "seventeen dimensions": program(sizes=b"(" + b"K\x01" * 17 + b"t", strides=b"(" + b"K\x01" * 17 + b"t"),
    "empty but impossible": program(sizes=b"(K\x00" + long(2**62) * 3 + b"t", strides=b"(K\x00K\x00K\x00K\x00t"),
    "elements elsewhere": program(key=b"X\x0a\x00\x00\x00../version"),
    "integer of 255 bytes": program(count=b"\x8a\xff" + b"\x01" * 255),
    "string of 4 GiB": b"\x80\x02X\xff\xff\xff\xffab.",
    "name without end": b"\x80\x02c" + b"a" * 60_000,
    "stack of marks": b"\x80\x02" + b"(" * 60_000,
    "endless": b"\x80\x02" + b"N0" * 30_000,
    "many steps": b"\x80\x02N" + b"q\x00" * 30_000 + b".",
    "memo without bound": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "recall of nothing": b"\x80\x02h\x00.",
    "empty stack": b"\x80\x02.",
    "two values": b"\x80\x02NN.",
    "tail": program() + b"N",
    "unhashable key": b"\x80\x02c__torch__\nM\n)\x81}(}Nub.",
    "odd items": b"\x80\x02c__torch__\nM\n)\x81}(Nub.",
    "self-reference": b"\x80\x02c__torch__\nM\n)\x81q\x00}(X\x01\x00\x00\x000h\x00ub.",
    "mark as a value": b"\x80\x02(q\x00.",
    "too long": b"\x80\x02" + b"N" * 70_000,
    "nothing": b"",
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_a_hostile_program_is_refused(attack: bytes) -> None:
    with pytest.raises(ProtocolError):
        read_tensor(archive(attack))


def test_a_bool_that_is_neither_true_nor_false_is_refused() -> None:
    with pytest.raises(ProtocolError, match="bool"):
        read_tensor(archive(program(kind=b"torch\nBoolStorage"), b"\0\1\2\0\0\0"))


def test_big_endian_elements_are_refused() -> None:
    with pytest.raises(ProtocolError, match="endian"):
        read_tensor(archive(program(), **{"archive/byteorder": b"big"}))


def test_two_programs_in_one_archive_are_refused() -> None:
    with pytest.raises(ProtocolError, match=r"one data\.pkl"):
        read_tensor(archive(program(), **{"other/data.pkl": program()}))


def zipped(**options: Any) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        archive.writestr("archive/data.pkl", program())
        archive.writestr("archive/data/0", bytes(12))
    return file.getvalue()


def test_any_writer_of_stored_entries_will_do_but_no_compression() -> None:
    assert read_tensor(zipped()).shape == (2, 3)
    with pytest.raises(ProtocolError, match="compressed"):
        read_tensor(zipped(compression=zipfile.ZIP_DEFLATED))


def test_entries_with_one_name_are_refused() -> None:
    with pytest.raises(ProtocolError, match="same name"):
        read_entries(write_entries([("a", b"1"), ("a", b"2")]))


def test_too_many_entries_are_refused() -> None:
    with pytest.raises(LimitExceededError):
        read_entries(write_entries((str(number), b"") for number in range(65)))


def test_python_reads_the_archives_we_write_and_finds_their_checksums_right() -> None:
    with zipfile.ZipFile(io.BytesIO(write_tensor(example((100, 3), torch.float32)))) as archive:
        assert archive.testzip() is None
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())


def test_elements_lie_where_they_can_be_mapped() -> None:
    data = write_tensor(torch.full((32,), 7, dtype=torch.uint8))
    assert data.index(b"\7" * 32) % 64 == 0


@given(st.binary(max_size=400))
def test_random_bytes_raise_only_protocol_errors(data: bytes) -> None:
    for candidate in (data, archive(data[:200])):
        try:
            read_tensor(candidate)
        except ProtocolError:
            pass


@pytest.mark.slow
@given(st.data())
@settings(max_examples=300)
def test_a_damaged_archive_is_a_tensor_of_bounded_size_or_a_protocol_error(data: st.DataObject) -> None:
    whole = bytearray((VECTORS / "bfloat16_2x3.archive").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([0, 0, 1, 22, 100]))
    try:
        tensor = read_tensor(bytes(whole[: len(whole) - cut]))
    except ProtocolError:
        return
    assert tensor.untyped_storage().nbytes() <= len(whole)


@given(st.lists(st.sampled_from([*b"cXKMJtq()}ubQRN.h", 0x81, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8A]), max_size=60))
def test_random_programs_of_known_instructions_raise_only_protocol_errors(codes: list[int]) -> None:
    try:
        read_tensor(archive(b"\x80\x02" + bytes(codes)))
    except ProtocolError:
        pass
