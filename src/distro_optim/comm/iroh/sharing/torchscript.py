"""One tensor as the archive that C++ ``torch::save`` writes, without ever running what an archive says.

Psyche's peers send each parameter so (``shared/network/src/p2p_model_sharing.rs``): a zip file with a TorchScript
module that has one attribute, ``0``. Its ``data.pkl`` is a pickle, which is a program; ``torch.load`` and
``torch.jit.load`` would run it, and compile the source code beside it. This reader looks at nothing but ``data.pkl``
and the one data entry it names, and steps through the pickle with an interpreter that knows two dozen instructions,
builds only tuples, strings and numbers, and can call nothing.

::

    <top>/data/0       the elements, little endian
    <top>/data.pkl     __torch__.Module with state {"0": _rebuild_tensor_v2(storage, offset, sizes, strides, ...)}
    <top>/code/...     the class, which C++ readers ask for
    <top>/constants.pkl, version, byteorder

Layout: pytorch ``torch/csrc/jit/serialization/pickler.cpp`` and ``caffe2/serialize/inline_container.cc``; checked
against an archive of C++ ``torch::save`` (torch 2.13), and read back by C++ ``torch::load``.
"""

from __future__ import annotations

import struct
from math import prod
from typing import Final

import torch

from ....errors import ConfigurationError, LimitExceededError, ProtocolError
from ._stored_zip import read_entries, write_entries
from ._tensor_pickle import TensorRecord, read_tensor_record

__all__ = ["MAX_DIMENSIONS", "read_tensor", "write_tensor"]

# Far beyond any parameter; torch itself stops at 64.
MAX_DIMENSIONS: Final = 16
_MAX_PICKLE: Final = 64 * 1024
_ATTRIBUTE: Final = "0"
_TOP: Final = "archive"

# Names of the legacy storage classes, which stand for the dtype in every pickled tensor.
_STORAGES: Final[dict[str, torch.dtype]] = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}
_STORAGE_OF: Final = {dtype: name for name, dtype in _STORAGES.items()}

_SOURCE: Final = b"""class Module(Module):
  __parameters__ = ["0", ]
  __buffers__ = []
  __annotations__ = []
  __annotations__["0"] = Tensor
"""
_NO_CONSTANTS: Final = b"\x80\x02)."
_VERSION: Final = b"3\n"
_BYTE_ORDER: Final = b"little"


def read_tensor(data: bytes | bytearray | memoryview) -> torch.Tensor:
    """The tensor in an archive of C++ ``torch::save(tensor)``, or of ``torch.jit.save`` of a module with one
    parameter or buffer ``"0"``; on the CPU, contiguous, without gradient, not sharing memory with ``data``.

    Allocates at most the size of ``data``.

    Raises:
        ProtocolError: anything else.
    """
    entries = read_entries(data)
    tops = [name[: -len("/data.pkl")] for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(tops) != 1:
        raise ProtocolError("no TorchScript archive: it needs one data.pkl")
    top = tops[0]
    if bytes(entries.get(f"{top}/byteorder", _BYTE_ORDER)) != _BYTE_ORDER:
        raise ProtocolError("the elements are not little endian")
    program = entries[f"{top}/data.pkl"]
    if len(program) > _MAX_PICKLE:
        raise LimitExceededError(f"data.pkl has {len(program)} bytes, at most {_MAX_PICKLE} are read")
    record = read_tensor_record(bytes(program), _ATTRIBUTE)
    elements = entries.get(f"{top}/data/{record.storage.key}")
    if elements is None:
        raise ProtocolError("the elements of the tensor are not in the archive")
    return _tensor(record, elements)


def _tensor(record: TensorRecord, elements: memoryview) -> torch.Tensor:
    kind = record.storage.kind
    dtype = _STORAGES.get(kind.name) if kind.module == "torch" else None
    if dtype is None:
        raise ProtocolError("the type of the elements is not supported")
    if record.storage.count * dtype.itemsize != len(elements):
        raise ProtocolError(f"{record.storage.count} elements are announced, their data has {len(elements)} bytes")
    sizes, strides = record.sizes, record.strides
    if len(sizes) > MAX_DIMENSIONS or len(sizes) != len(strides):
        raise ProtocolError(f"{len(sizes)} dimensions with {len(strides)} strides")
    count = prod(sizes)
    if count == 0:
        return torch.empty(_representable(sizes), dtype=dtype)
    # No more elements than are stored: strides of 0 would let a few bytes pretend to be a huge tensor.
    last = record.offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if count > record.storage.count or last >= record.storage.count:
        raise ProtocolError("the tensor is larger than its elements")
    # A copy: the tensor must be writable and must not keep the archive alive.
    buffer = bytearray(elements)
    if dtype == torch.bool and any(byte > 1 for byte in set(buffer)):
        raise ProtocolError("a bool is 0 or 1")
    flat = torch.frombuffer(buffer, dtype=dtype)
    return flat.as_strided(sizes, strides, record.offset).contiguous()


def _representable(sizes: tuple[int, ...]) -> tuple[int, ...]:
    # An empty tensor may still name huge dimensions, whose product torch computes in 64 bits.
    if prod(size for size in sizes if size) >= 2**62:
        raise ProtocolError("an empty tensor of impossible shape")
    return sizes


def write_tensor(tensor: torch.Tensor) -> bytes:
    """``tensor`` as C++ ``torch::load`` reads it. Equal tensors give equal bytes.

    Raises:
        ConfigurationError: its dtype or number of dimensions is not supported, or it has 4 GiB or more.
    """
    kind = _STORAGE_OF.get(tensor.dtype)
    if kind is None:
        raise ConfigurationError(f"a tensor of {tensor.dtype} cannot be shared", name="tensor", value=tensor.dtype)
    if tensor.dim() > MAX_DIMENSIONS:
        raise ConfigurationError(f"at most {MAX_DIMENSIONS} dimensions, got {tensor.dim()}", name="tensor")
    plain = tensor.detach().to("cpu").contiguous()
    elements = plain.reshape(-1).view(torch.uint8).numpy().data
    return write_entries(
        [
            (f"{_TOP}/data/0", elements),
            (f"{_TOP}/data.pkl", _pickle(kind, tuple(plain.shape), tuple(plain.stride()))),
            (f"{_TOP}/code/__torch__.py", _SOURCE),
            (f"{_TOP}/constants.pkl", _NO_CONSTANTS),
            (f"{_TOP}/version", _VERSION),
            (f"{_TOP}/byteorder", _BYTE_ORDER),
        ]
    )


def _pickle(kind: str, sizes: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    """The program that rebuilds the tensor, instruction for instruction as C++ writes it."""
    attribute = _text(_ATTRIBUTE)
    return b"".join(
        [
            b"\x80\x02c__torch__\nModule\nq\x00)\x81}(",
            attribute,
            b"q\x01ctorch._utils\n_rebuild_tensor_v2\nq\x02((",
            _text("storage"),
            b"q\x03ctorch\n" + kind.encode() + b"\nq\x04h\x01",
            _text("cpu"),
            b"q\x05" + _integer(prod(sizes)) + b"tQq\x06",
            _integer(0),
            b"(" + b"".join(map(_integer, sizes)) + b"t",
            b"(" + b"".join(map(_integer, strides)) + b"t",
            # Not requires_grad; then the hooks, an empty OrderedDict.
            b"\x89ccollections\nOrderedDict\nq\x07)RtRq\x08ubq\t.",
        ]
    )


def _text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    if value < 2**8:
        return b"K" + struct.pack("<B", value)
    if value < 2**16:
        return b"M" + struct.pack("<H", value)
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)
