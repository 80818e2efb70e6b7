"""Encodes our results, and reads those of peers: against what was announced, and against our own model. No I/O.

Psyche compares the commitment and hands the rest to its trainers, where a wrong shape ends the process
(``shared/client/src/state/steps.rs``). Here nothing that does not fit gets past this file. The decision depends on the
bytes, the plan and the kind of run alone, so all peers of a run decide the same.

Values that are no numbers, or infinite, are refused in a run of our own kind, where a single one of them would cancel
what all others contribute to its tile. In a run of Psyche's they are taken, as its clients do: their momentum starts
from memory that was not cleared, so honest ones send them round after round.

Every peer sends a result in every round, and the training thread has to wait while Python reads it. A result with a
known layout takes a shortcut (:mod:`~distro_optim.compress.wire_bulk`); the general codec stays the authority.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ...compress import CompressedUpdate, TilePlan
from ...compress.wire import TransmittableDistroResult, decode_download, encode_download
from ...compress.wire_bulk import BulkDownload, decode_bulk_download, encode_bulk_download
from ...coordinator.types import BatchId
from ...errors import InvalidResultError, ProtocolError
from ...verify.commitment import training_result_hash

__all__ = [
    "EncodedResult",
    "ReceivedResult",
    "commitment_hash",
    "encode_any_result",
    "encode_own_result",
    "encode_result",
    "max_result_size",
    "read_any_result",
    "read_result",
]

_HEADER_BYTES: Final = 64
"""More than the varints of step, nonce, batch and count take."""

_ENTRY_BYTES: Final = 320
"""Two tensors with at most 9 dimensions of 10 bytes each, the encoded shape, lengths and kinds."""

_MAX_INDEX_BYTES: Final = 8

_MAX_VALUE_BYTES: Final = 4
"""A client of Psyche's that shards its model keeps it in the precision of its file, which may be float32, and sends
such values to peers that have bfloat16."""


@dataclass(frozen=True)
class ReceivedResult:
    """A result that fits our model.

    Attributes:
        trainer_nonce: how often its sender had trained before.
        update: the contribution, on our plan.
        num_bytes: that it has on the wire.
    """

    trainer_nonce: int
    update: CompressedUpdate
    num_bytes: int = 0


def max_result_size(plan: TilePlan) -> int:
    """The most bytes that an honest result on this plan has."""
    return plan.derived(_max_result_size)


def _max_result_size(plan: TilePlan) -> int:
    values = sum(
        grid.tiles * k * (_MAX_INDEX_BYTES + max(spec.dtype.itemsize, _MAX_VALUE_BYTES))
        for grid, k, spec in zip(plan.grids, plan.topk, plan.specs, strict=True)
    )
    return _HEADER_BYTES + len(plan) * _ENTRY_BYTES + values


def encode_result(update: CompressedUpdate, *, step: int, trainer_nonce: int, batch: BatchId) -> tuple[bytes, bytes]:
    """The blob of a result, and the hash of 32 bytes to commit to."""
    batch_id = batch.start, batch.end
    bulk = encode_bulk_download(update, step=step, trainer_nonce=trainer_nonce, batch_id=batch_id)
    if bulk is not None:
        blob, download = bulk
        return blob, commitment_hash(download)
    return encode_any_result(update, step=step, trainer_nonce=trainer_nonce, batch=batch)


def encode_any_result(
    update: CompressedUpdate, *, step: int, trainer_nonce: int, batch: BatchId
) -> tuple[bytes, bytes]:
    """The plain twin of :func:`encode_result`: tensor by tensor."""
    batch_id = batch.start, batch.end
    result = TransmittableDistroResult.from_update(update, step=step, trainer_nonce=trainer_nonce, batch_id=batch_id)
    return encode_download(result), commitment_hash(result)


@dataclass(frozen=True)
class EncodedResult:
    """A result of our own, as it is sent.

    Attributes:
        step: of the round in which it was made.
        blob: its bytes.
        data_hash: to commit to.
        result: what peers will read from these bytes, and so what we apply, too.
    """

    step: int
    blob: bytes
    data_hash: bytes
    result: ReceivedResult


def encode_own_result(
    update: CompressedUpdate, *, step: int, trainer_nonce: int, batch: BatchId, plan: TilePlan
) -> EncodedResult:
    """Encodes a result and reads it back. May run in any thread while nothing changes ``update``.

    Raises:
        ProtocolError: no peer could use it.
    """
    batch_id = batch.start, batch.end
    bulk = encode_bulk_download(update, step=step, trainer_nonce=trainer_nonce, batch_id=batch_id)
    if bulk is None:
        blob, data_hash = encode_any_result(update, step=step, trainer_nonce=trainer_nonce, batch=batch)
    else:
        blob, download = bulk
        data_hash = commitment_hash(download)
        # Its form need not be checked: it was taken from the layout that it would be compared with.
        own = download.to_update() if update.plan is plan else None
        if own is not None:
            return EncodedResult(step, blob, data_hash, ReceivedResult(trainer_nonce, own, len(blob)))
    result = read_result(blob, step=step, batch=batch, data_hash=data_hash, plan=plan)
    return EncodedResult(step, blob, data_hash, result)


def commitment_hash(result: TransmittableDistroResult | BulkDownload) -> bytes:
    """The hash of 32 bytes that the announcement of a result commits to."""
    return training_result_hash(result.step, *result.batch_id, result.committed_segments())


def read_result(
    data: bytes, *, step: int, batch: BatchId, data_hash: bytes, plan: TilePlan, finite: bool = True
) -> ReceivedResult:
    """The result in a blob that was announced for ``step`` and ``batch`` under ``data_hash``.

    Args:
        data: the blob.
        step: as announced, like the next two.
        batch: of the data.
        data_hash: what the sender has committed to.
        plan: of our own model.
        finite: whether values that are no numbers, or infinite, are refused.

    Raises:
        InvalidResultError: it keeps the commitment, but does not fit the plan.
        ProtocolError: it is not what was announced.
    """
    _check_size(data, plan)
    bulk = decode_bulk_download(data, plan)
    if bulk is not None:
        _check_announced(bulk, step=step, batch=batch, data_hash=data_hash)
        update = bulk.to_update(finite=finite)
        if update is not None:
            return ReceivedResult(bulk.trainer_nonce, update, len(data))
    return read_any_result(data, step=step, batch=batch, data_hash=data_hash, plan=plan, finite=finite)


def read_any_result(
    data: bytes, *, step: int, batch: BatchId, data_hash: bytes, plan: TilePlan, finite: bool = True
) -> ReceivedResult:
    """The plain twin of :func:`read_result`, which calls it wherever something is unusual or wrong.

    Raises:
        InvalidResultError, ProtocolError: as there.
    """
    _check_size(data, plan)
    result = decode_download(data, max_results=max(1, len(plan)))
    _check_announced(result, step=step, batch=batch, data_hash=data_hash)
    try:
        return ReceivedResult(result.trainer_nonce, result.to_update(plan, finite=finite), len(data))
    except ProtocolError as error:
        raise InvalidResultError(str(error)) from error


def _check_size(data: bytes, plan: TilePlan) -> None:
    if len(data) > max_result_size(plan):
        raise ProtocolError(f"the result has {len(data)} bytes, this model's have at most {max_result_size(plan)}")


def _check_announced(
    result: TransmittableDistroResult | BulkDownload, *, step: int, batch: BatchId, data_hash: bytes
) -> None:
    if result.step != step or result.batch_id != (batch.start, batch.end):
        raise ProtocolError(
            f"the result is of step {result.step}, batch {result.batch_id}, but was announced for {step}, {batch}"
        )
    if commitment_hash(result) != data_hash:
        raise ProtocolError("the data do not have the announced hash")
