"""Tensors as they travel in Psyche's form, and the widths of indices; see :mod:`~distro_optim.compress.wire`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from ..buffer import Reader, Writer
from ..errors import ProtocolError

__all__ = [
    "KIND_BOOL",
    "KIND_INT64",
    "KIND_UINT8",
    "MAX_DIMS",
    "VALUE_DTYPES",
    "VALUE_KINDS",
    "Bytes",
    "SerializableTensor",
    "data_size",
    "decode_tensor",
    "encode_tensor",
    "encode_tensor_head",
    "index_width",
    "narrow_index",
    "widen_index",
]

Bytes = bytes | bytearray | memoryview

# torch's ScalarType numbers, for the element types that occur in a result.
KIND_UINT8: Final = 0
KIND_INT64: Final = 4
KIND_BOOL: Final = 11
VALUE_KINDS: Final[dict[torch.dtype, int]] = {
    torch.float16: 5,
    torch.float32: 6,
    torch.float64: 7,
    torch.bool: KIND_BOOL,
    torch.bfloat16: 15,
}
VALUE_DTYPES: Final = {kind: dtype for dtype, kind in VALUE_KINDS.items()}
_ITEM_SIZES: Final = {KIND_UINT8: 1, KIND_INT64: 8} | {kind: d.itemsize for d, kind in VALUE_KINDS.items()}

_FULL: Final = 0  # variants of a tensor's data
_ONE_BIT: Final = 1

MAX_DIMS: Final = 32
"""Chosen arbitrarily, above any model's: an encoded 5-D convolution has 7 dimensions."""


@dataclass(frozen=True, slots=True)
class SerializableTensor:
    """A tensor as it travels.

    Attributes:
        dims: shape.
        kind: element type, a torch ScalarType number: 0 uint8, 4 int64, 5 float16, 6 float32, 7 float64, 11 bool,
            15 bfloat16.
        data: elements in row-major order, little endian; of bools one bit each.
    """

    dims: tuple[int, ...]
    kind: int
    data: Bytes
    requires_grad: bool = False


def encode_tensor(writer: Writer, tensor: SerializableTensor) -> None:
    """Appends ``SerializableTensor``."""
    encode_tensor_head(writer, tensor.dims, tensor.kind, len(tensor.data), requires_grad=tensor.requires_grad)
    writer.push_bytes(tensor.data)


def encode_tensor_head(
    writer: Writer, dims: tuple[int, ...], kind: int, size: int, *, requires_grad: bool = False
) -> None:
    """Appends what of ``SerializableTensor`` comes before its ``size`` bytes of data."""
    writer.push_varint(len(dims))
    for dim in dims:
        writer.push_zigzag(dim)
    writer.push_u8(kind)
    writer.push_bool(requires_grad)
    writer.push_varint(_ONE_BIT if kind == KIND_BOOL else _FULL)
    writer.push_varint(size)


def decode_tensor(reader: Reader) -> SerializableTensor:
    """Takes a ``SerializableTensor``; its data is a view of the input and has the length that its shape asks for.

    Raises:
        ProtocolError: the bytes are not a tensor, or of an element type that does not occur in results.
    """
    dims = []
    for _ in range(reader.pull_length(limit=MAX_DIMS)):
        dim = reader.pull_zigzag()
        if dim < 0:
            raise ProtocolError(f"a dimension of {dim}", offset=reader.pos)
        dims.append(dim)
    kind = reader.pull_u8()
    if kind not in _ITEM_SIZES:
        raise ProtocolError(f"tensors of kind {kind} do not occur in results", offset=reader.pos - 1)
    requires_grad = reader.pull_bool()
    variant = reader.pull_varint(32)
    if variant != (_ONE_BIT if kind == KIND_BOOL else _FULL):
        raise ProtocolError(f"data of variant {variant} in a tensor of kind {kind}", offset=reader.pos)
    data = reader.pull_blob()
    count = math.prod(dims)
    if data_size(count, kind) != len(data):
        raise ProtocolError(f"{len(data)} bytes of data for shape {tuple(dims)} of kind {kind}", offset=reader.pos)
    return SerializableTensor(tuple(dims), kind, data, requires_grad)


def data_size(count: int, kind: int) -> int:
    """Bytes of the data of ``count`` elements."""
    return -(-count // 8) if kind == KIND_BOOL else count * _ITEM_SIZES[kind]


# -- index widths ------------------------------------------------------------------------------------------------------


def index_width(totalk: int) -> int:
    """Bytes of an index below ``totalk``."""
    return 1 if totalk <= 1 << 8 else 2 if totalk <= 1 << 16 else 4 if totalk <= 1 << 32 else 8


def narrow_index(index: Tensor, totalk: int) -> Tensor:
    """``(..., k)`` of any integer type to uint8 ``(..., k * width)`` on the CPU; to int64 where 4 bytes are too few.

    The indices must lie in ``[0, totalk)``.
    """
    width = index_width(totalk)
    if width == 8:
        return index.detach().cpu().to(torch.int64)
    narrow = index.detach().cpu().numpy().astype(f"<u{width}", order="C")
    return torch.from_numpy(narrow.reshape(-1).view("u1").reshape(*index.shape[:-1], index.shape[-1] * width))


def widen_index(data: Tensor, totalk: int) -> Tensor:
    """The inverse of :func:`narrow_index`: ``(..., k * width)`` to ``(..., k)``.

    uint8 of 1 byte per index and int64 stay as they are, 2 bytes become int32, 4 bytes int64.
    """
    width = index_width(totalk)
    if width in (1, 8):
        return data
    wide = data.contiguous().numpy().reshape(-1).view(f"<u{width}").astype(np.int32 if width == 2 else np.int64)
    return torch.from_numpy(wide.reshape(*data.shape[:-1], data.shape[-1] // width))
