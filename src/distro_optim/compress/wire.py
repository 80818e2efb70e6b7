"""A contribution as bytes, in Psyche's form: what lies in a blob, and what its sender has committed to.

Format: serde's postcard of these structures (PsycheFoundation/psyche ``shared/network/src/serialized_distro.rs``,
``serializable_tensor.rs``, ``serializable_kind.rs``; index widths: ``shared/modeling/src/distro.rs``).

=============================  =====================================================================================
``SerializableTensor``         ``dims`` varint count, zigzag varints; ``kind`` u8; ``requires_grad`` bool; ``data``:
                               variant 0 (elements, row-major, little endian) or 1 (bool, packed 8 to a byte), then a
                               varint length and the bytes
``SerializedDistroResult``     ``sparse_idx``, ``sparse_val``: tensors; ``xshape`` varint count, u16 varints;
                               ``totalk`` u32 varint
``TransmittableDistroResult``  ``step``, ``trainer_nonce`` u32 varints; ``batch_id`` two u64 varints, both inclusive;
                               varint count of results, one per parameter, in the order of the parameters' names
``TransmittableDownload``      varint 0, then a ``TransmittableDistroResult``; variants 1 and 2 share a model
=============================  =====================================================================================

Indices below ``totalk`` take as many bytes as it needs (1, 2, 4 or 8); those of 2 and 4 travel as a uint8 tensor
whose last dimension is 2 or 4 times as long. A tensor about which the sender says nothing has ``k = 0``: both last
dimensions are 0 and the data is empty.

Reading is in two steps. The decoders make views of the input and compare every length with what is there: beside the
views, they allocate at most :data:`ENTRY_OVERHEAD` bytes per result, and never for more than ``max_results``. So a
commitment is checked on the very bytes that came, before a tensor is made of them.
:meth:`SerializedDistroResult.to_tensor` then allocates at most :data:`EXPANSION` bytes per byte of data. We accept
what Psyche's reader accepts (bytes after the end, set bits in the padding of packed signs), so that one odd message
does not split a run, and refuse where it would read out of bounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from ..buffer import Reader, Writer
from ..errors import ConfigurationError, LimitExceededError, ProtocolError
from .plan import TilePlan
from .sign import pack_signs, unpack_signs
from .update import CompressedTensor, CompressedUpdate
from .wire_tensor import (
    KIND_BOOL,
    KIND_INT64,
    KIND_UINT8,
    MAX_DIMS,
    VALUE_DTYPES,
    VALUE_KINDS,
    Bytes,
    SerializableTensor,
    decode_tensor,
    encode_tensor,
    index_width,
    narrow_index,
    widen_index,
)

__all__ = [
    "DEFAULT_MAX_RESULTS",
    "ENTRY_OVERHEAD",
    "EXPANSION",
    "MAX_SIDE",
    "SerializedDistroResult",
    "TransmittableDistroResult",
    "decode_distro_result",
    "decode_download",
    "decode_download_head",
    "decode_transmittable",
    "encode_distro_result",
    "encode_download",
    "encode_download_head",
    "encode_shape",
    "encode_transmittable",
]

_DOWNLOAD_DISTRO_RESULT: Final = 0
"""The variant of ``TransmittableDownload`` that holds a result."""

MAX_SIDE: Final = (1 << 16) - 1
"""``xshape`` is a list of u16."""
_MAX_ELEMENTS: Final = 1 << 48
"""Chosen arbitrarily, below any overflow in torch: elements of one encoded tensor."""

_MIN_RESULT_SIZE: Final = 18
"""Smallest result: two tensors of two dimensions without data (7 bytes each), xshape of two, totalk."""

DEFAULT_MAX_RESULTS: Final = 1 << 16
"""Parameters of the largest model that is decoded unless the caller knows better. Chosen arbitrarily."""
ENTRY_OVERHEAD: Final = 2048
"""Bytes of Python objects per decoded result, generously."""
EXPANSION: Final = 8
"""Bytes allocated per byte of data by ``to_tensor``: a packed sign becomes a byte; an index of 2 or 4 bytes doubles."""


@dataclass(frozen=True, slots=True)
class SerializedDistroResult:
    """One parameter's coefficients as they travel; see :class:`~distro_optim.compress.update.CompressedTensor`."""

    sparse_idx: SerializableTensor
    sparse_val: SerializableTensor
    xshape: tuple[int, ...]
    totalk: int

    @classmethod
    def from_tensor(cls, entry: CompressedTensor) -> SerializedDistroResult:
        """``entry`` with its indices narrowed, ``(..., k)`` to ``(..., k * width) uint8``, and its signs packed.

        Raises:
            ConfigurationError: the wire cannot hold it.
        """
        if max(entry.shape, default=0) > MAX_SIDE:
            raise ConfigurationError(
                f"an encoded tensor of shape {entry.shape} does not fit the wire, which holds up to {MAX_SIDE} tiles "
                "in a row: choose a larger compression_chunk, or tiling='padded'",
                name="compression_chunk",
                value=entry.shape,
            )
        kind = VALUE_KINDS.get(entry.value.dtype)
        if kind is None:
            raise ConfigurationError(f"values of {entry.value.dtype} have no place on the wire", name="value")
        if entry.value.dtype == torch.bool:
            data = pack_signs(entry.value)
        else:
            data = entry.value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
        narrow = narrow_index(entry.index, entry.totalk)
        return cls(
            SerializableTensor(
                tuple(narrow.shape),
                KIND_INT64 if narrow.dtype == torch.int64 else KIND_UINT8,
                narrow.numpy().tobytes(),
            ),
            SerializableTensor(tuple(entry.value.shape), kind, data),
            tuple(entry.shape),
            entry.totalk,
        )

    def to_tensor(self) -> CompressedTensor:
        """The inverse of :meth:`from_tensor`, in memory of its own; ``(..., k)`` indices of uint8, int32 or int64.

        Raises:
            ProtocolError: an index lies outside its tile. (Shapes were checked when this was decoded.)
        """
        size = 8 if self.sparse_idx.kind == KIND_INT64 else 1
        raw = torch.from_numpy(np.frombuffer(self.sparse_idx.data, dtype="<i8" if size == 8 else "u1").copy())
        index = widen_index(raw.view(self.sparse_idx.dims), self.totalk)
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.totalk:
            raise ProtocolError(
                f"indices from {int(index.min())} to {int(index.max())}, a tile has {self.totalk} elements"
            )
        dims, data = self.sparse_val.dims, self.sparse_val.data
        if self.sparse_val.kind == KIND_BOOL:
            value = unpack_signs(memoryview(data), math.prod(dims)).view(dims)
        else:
            dtype = VALUE_DTYPES[self.sparse_val.kind]
            value = (
                torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype, device="cpu")
            )
            value = value.view(dims)
        return CompressedTensor(index, value, self.xshape, self.totalk)


@dataclass(frozen=True, slots=True)
class TransmittableDistroResult:
    """What one peer contributes in one round.

    Attributes:
        step: the coordinator's step.
        trainer_nonce: how many results the sender has made before, since it started.
        batch_id: first and last data index of the interval it trained on, both inclusive.
        distro_results: one per parameter, in the order of the parameters' names.
    """

    step: int
    trainer_nonce: int
    batch_id: tuple[int, int]
    distro_results: tuple[SerializedDistroResult, ...]

    @classmethod
    def from_update(
        cls, update: CompressedUpdate, *, step: int, trainer_nonce: int, batch_id: tuple[int, int]
    ) -> TransmittableDistroResult:
        """``update`` as it travels.

        Raises:
            ConfigurationError: the wire cannot hold it.
        """
        return cls(step, trainer_nonce, batch_id, tuple(map(SerializedDistroResult.from_tensor, update.tensors())))

    def to_update(self, plan: TilePlan, *, finite: bool = True) -> CompressedUpdate:
        """The update it holds, on the receiver's own plan.

        Args:
            plan: of our own model.
            finite: see :meth:`CompressedUpdate.from_tensors`.

        Raises:
            ProtocolError: it does not fit the plan, or names a position twice, or has a value that is not finite and
                must be.
        """
        if len(self.distro_results) != len(plan):
            raise ProtocolError(f"the update has {len(self.distro_results)} tensors, the model has {len(plan)}")
        return CompressedUpdate.from_tensors(plan, [r.to_tensor() for r in self.distro_results], finite=finite)

    def committed_segments(self) -> Iterator[tuple[Bytes, Bytes]]:
        """The bytes that a commitment covers, per result: of the indices, and of the values (packed if bits).

        The commitment is the SHA-256 of step (4 bytes), first and last data index (8 each), all big endian, and these
        in order. Shapes, ``totalk`` and the nonce are not covered.
        """
        for result in self.distro_results:
            yield result.sparse_idx.data, result.sparse_val.data


def encode_distro_result(writer: Writer, result: SerializedDistroResult) -> None:
    """Appends ``SerializedDistroResult``."""
    encode_tensor(writer, result.sparse_idx)
    encode_tensor(writer, result.sparse_val)
    encode_shape(writer, result.xshape, result.totalk)


def encode_shape(writer: Writer, xshape: tuple[int, ...], totalk: int) -> None:
    """Appends the part of ``SerializedDistroResult`` that follows its tensors."""
    writer.push_varint(len(xshape))
    for side in xshape:
        writer.push_varint(side)
    writer.push_varint(totalk)


def decode_distro_result(reader: Reader) -> SerializedDistroResult:
    """Takes a ``SerializedDistroResult`` whose shapes agree with each other.

    Raises:
        ProtocolError: the bytes are not a result, or no tensor could be encoded like that.
    """
    start = reader.pos
    index, value = decode_tensor(reader), decode_tensor(reader)
    xshape = tuple(reader.pull_varint(16) for _ in range(reader.pull_length(limit=MAX_DIMS)))
    totalk = reader.pull_varint(32)
    if len(xshape) < 2 or len(xshape) == 3:
        raise ProtocolError(f"an encoded tensor has 2 dimensions, or 4 and more, not {len(xshape)}", offset=start)
    if math.prod(side or 1 for side in xshape) > _MAX_ELEMENTS:
        raise LimitExceededError(f"an encoded tensor of shape {xshape}", offset=start)
    inner = 1 if len(xshape) == 2 else 2
    rows, tile = xshape[:-inner], math.prod(xshape[-inner:])
    if tile != totalk:
        raise ProtocolError(f"{totalk} elements a tile, but shape {xshape}", offset=start)
    width = index_width(totalk)
    if index.kind != (KIND_INT64 if width == 8 else KIND_UINT8):
        raise ProtocolError(f"indices of kind {index.kind} for {totalk} elements a tile", offset=start)
    if value.kind not in VALUE_DTYPES:
        raise ProtocolError(f"values of kind {value.kind}", offset=start)
    k = value.dims[-1] if value.dims else 0
    if value.dims != (*rows, k) or k > totalk:
        raise ProtocolError(f"values of shape {value.dims} in an encoded tensor of shape {xshape}", offset=start)
    if index.dims != (*rows, k if width == 8 else k * width):
        raise ProtocolError(f"indices of shape {index.dims} for values of shape {value.dims}", offset=start)
    return SerializedDistroResult(index, value, xshape, totalk)


def encode_transmittable(result: TransmittableDistroResult) -> bytes:
    """``TransmittableDistroResult`` as bytes.

    Raises:
        ConfigurationError: a number does not fit its field.
    """
    writer = Writer()
    _push_transmittable(writer, result)
    return writer.finish()


def decode_transmittable(data: Bytes, *, max_results: int = DEFAULT_MAX_RESULTS) -> TransmittableDistroResult:
    """The inverse of :func:`encode_transmittable`; tensors are views of ``data``.

    Args:
        max_results: parameters of the receiver's model.

    Raises:
        ProtocolError: the bytes are not a result.
    """
    return _pull_transmittable(Reader(data), max_results)


def encode_download(result: TransmittableDistroResult) -> bytes:
    """What a blob holds: ``TransmittableDownload`` with a result in it.

    Raises:
        ConfigurationError: a number does not fit its field.
    """
    writer = Writer()
    writer.push_varint(_DOWNLOAD_DISTRO_RESULT)
    _push_transmittable(writer, result)
    return writer.finish()


def encode_download_head(
    writer: Writer, *, step: int, trainer_nonce: int, batch_id: tuple[int, int], count: int
) -> None:
    """Appends the part of a download that comes before its ``count`` results.

    Raises:
        ConfigurationError: a number does not fit its field.
    """
    writer.push_varint(_DOWNLOAD_DISTRO_RESULT)
    _push_head(writer, step, trainer_nonce, batch_id, count)


def decode_download(data: Bytes, *, max_results: int = DEFAULT_MAX_RESULTS) -> TransmittableDistroResult:
    """The inverse of :func:`encode_download`; tensors are views of ``data``.

    Args:
        max_results: parameters of the receiver's model.

    Raises:
        ProtocolError: the bytes are not a download, or hold something other than a result.
    """
    reader = Reader(data)
    _pull_variant(reader)
    return _pull_transmittable(reader, max_results)


def decode_download_head(reader: Reader, *, max_results: int) -> tuple[int, int, tuple[int, int], int]:
    """The inverse of :func:`encode_download_head`: step, nonce, batch and number of results.

    Raises:
        ProtocolError: the bytes are not a download, or hold something other than a result.
    """
    _pull_variant(reader)
    return _pull_head(reader, max_results)


def _pull_variant(reader: Reader) -> None:
    if (variant := reader.pull_varint(32)) != _DOWNLOAD_DISTRO_RESULT:
        raise ProtocolError(f"a download of variant {variant}, a result is variant {_DOWNLOAD_DISTRO_RESULT}", offset=0)


def _push_head(writer: Writer, step: int, trainer_nonce: int, batch_id: tuple[int, int], count: int) -> None:
    start, end = batch_id
    for name, value, bits in (
        ("step", step, 32),
        ("trainer_nonce", trainer_nonce, 32),
        ("batch_id", start, 64),
        ("batch_id", end, 64),
    ):
        if not 0 <= value < 1 << bits:
            raise ConfigurationError(f"{name}={value}: give an unsigned number of {bits} bits", name=name, value=value)
        writer.push_varint(value)
    if start > end:
        raise ConfigurationError(f"batch_id={batch_id}: the first comes before the last", name="batch_id")
    writer.push_varint(count)


def _push_transmittable(writer: Writer, result: TransmittableDistroResult) -> None:
    _push_head(writer, result.step, result.trainer_nonce, result.batch_id, len(result.distro_results))
    for entry in result.distro_results:
        encode_distro_result(writer, entry)


def _pull_head(reader: Reader, max_results: int) -> tuple[int, int, tuple[int, int], int]:
    step, nonce = reader.pull_varint(32), reader.pull_varint(32)
    batch = reader.pull_varint(64), reader.pull_varint(64)
    if batch[0] > batch[1]:
        raise ProtocolError(f"a batch from {batch[0]} to {batch[1]}", field="batch_id", offset=reader.pos)
    return step, nonce, batch, reader.pull_length(item_size=_MIN_RESULT_SIZE, limit=max_results)


def _pull_transmittable(reader: Reader, max_results: int) -> TransmittableDistroResult:
    step, nonce, batch, count = _pull_head(reader, max_results)
    results = []
    for number in range(count):
        try:
            results.append(decode_distro_result(reader))
        except ProtocolError as error:
            error.field = f"distro_results[{number}]"
            raise
    return TransmittableDistroResult(step, nonce, batch, tuple(results))
