"""Where token sequences come from: one small class, :class:`TokenProvider`. No I/O here.

A provider gives the sequences of an interval of data indices, whatever lies behind: files, web servers, a data server,
a mixture of others. What it gives is checked in one place, here, before anything is trained on it.
:mod:`distro_optim.testing.token_data` has the checks that every implementation passes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from ..coordinator.types import BatchId
from ..errors import ConfigurationError, DataUnavailableError, InvalidDataError, OutOfDataError

__all__ = ["IGNORED_LABEL", "MAX_BATCH", "IntArray", "TokenProvider", "TokenSequence"]

IntArray = NDArray[np.int32]

IGNORED_LABEL: Final = -100
"""A label that no loss is computed for, as in transformers and Psyche."""

MAX_BATCH: Final = (1 << 16) - 1
"""Sequences asked for at once: a run's global batch is a 16-bit number (``shared/coordinator/src/coordinator.rs``)."""


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """One sequence. Its arrays may be shared, and must not be written to.

    Attributes:
        input_ids: ``(seq_len,) int32``.
        labels: ``(seq_len,) int32``, not shifted, :data:`IGNORED_LABEL` where nothing is to be learnt; None means the
            tokens themselves.
        position_ids: ``(seq_len,) int32``; None means 0, 1, 2, ...
        sequence_lengths: ``(n,) int32`` of the texts packed into it, which add up to ``seq_len``; None means one text.
    """

    input_ids: IntArray
    labels: IntArray | None = None
    position_ids: IntArray | None = None
    sequence_lengths: IntArray | None = None


class TokenProvider(ABC):
    """Gives token sequences by data index. Blocks while it reads; may be asked from several threads at once.

    Not to be shared between processes: open one in each.

    Args:
        seq_len: tokens of every sequence.
        vocab_size: tokens the model knows; None leaves that unchecked.
    """

    def __init__(self, seq_len: int, *, vocab_size: int | None = None) -> None:
        for name, value in (("seq_len", seq_len), ("vocab_size", vocab_size)):
            if value is not None and value < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {value}", name=name, value=value)
        self.seq_len = seq_len
        self.vocab_size = vocab_size
        self._closed = False

    @property
    @abstractmethod
    def num_sequences(self) -> int | None:
        """How many there are; None if nobody knows or there is no end."""

    @abstractmethod
    def _read(self, batch: BatchId) -> Sequence[TokenSequence]:
        """The sequences of ``batch``, in order. Its size is checked, and what comes back will be.

        Raises:
            DataError: they cannot be fetched.
        """

    def get_samples(self, batch: BatchId) -> list[TokenSequence]:
        """One sequence for each index of ``batch``, in order; the same ones each time.

        Raises:
            ConfigurationError: more than :data:`MAX_BATCH` are asked for.
            OutOfDataError: the data end before ``batch`` does.
            DataUnavailableError: they cannot be fetched now, after all retries; or the provider is closed.
            InvalidDataError: they are there and wrong.
        """
        if self._closed:
            raise DataUnavailableError("this provider of training data is closed")
        size = batch.end - batch.start + 1  # len() refuses what can be this large
        if size > MAX_BATCH:
            raise ConfigurationError(
                f"{batch} asks for {size} sequences at once, a round has at most {MAX_BATCH}", name="batch"
            )
        if not self.has(batch):
            there = self.num_sequences or 0
            raise OutOfDataError(
                f"{batch} lies beyond the training data, which have {there} sequences", num_sequences=there
            )
        samples = list(self._read(batch))
        if len(samples) != len(batch):
            raise InvalidDataError(f"{len(samples)} sequences came for {batch}, which has {len(batch)}")
        for index, sample in enumerate(samples, start=batch.start):
            self._check(index, sample)
        return samples

    def has(self, batch: BatchId) -> bool:
        """Are there sequences for all of these indices?"""
        return self.num_sequences is None or batch.end < self.num_sequences

    def probe(self) -> None:
        """Reads the first sequence and the last, so that data that cannot be trained on are found before training.

        Raises:
            DataError: see :meth:`get_samples`.
        """
        last = (self.num_sequences or 1) - 1
        for index in sorted({0, last}):
            self.get_samples(BatchId(index, index))

    def close(self) -> None:
        """Lets go of files and connections. Calling it again does nothing; nothing is given afterwards."""
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # -- is it what can be trained on? ---------------------------------------------------------------------------------

    def _check(self, index: int, sample: TokenSequence) -> None:
        self._check_length(index, "tokens", sample.input_ids)
        self._check_range(index, sample.input_ids, "token")
        if sample.labels is not None:
            self._check_length(index, "labels", sample.labels)
            self._check_range(index, sample.labels[sample.labels != IGNORED_LABEL], "label")
        if sample.position_ids is not None:
            self._check_length(index, "position ids", sample.position_ids)
            outside = (sample.position_ids < 0) | (sample.position_ids >= self.seq_len)
            if outside.any():
                raise InvalidDataError(
                    f"sequence {index} has the position id {_first(sample.position_ids, outside)}, outside 0 to "
                    f"{self.seq_len - 1}"
                )
        lengths = sample.sequence_lengths
        if lengths is not None and ((lengths < 0).any() or int(lengths.sum(dtype=np.int64)) != self.seq_len):
            # Attention over packed texts takes these for bounds in memory.
            raise InvalidDataError(f"the lengths of the texts in sequence {index} do not add up to {self.seq_len}")

    def _check_length(self, index: int, what: str, values: IntArray) -> None:
        if values.shape != (self.seq_len,):
            raise InvalidDataError(
                f"sequence {index} has {values.size} {what}, but the run's sequences have {self.seq_len}"
            )

    def _check_range(self, index: int, values: IntArray, what: str) -> None:
        outside = values < 0
        if self.vocab_size is not None:
            outside |= values >= self.vocab_size
        if outside.any():
            value = _first(values, outside)
            limit = "2147483647" if self.vocab_size is None else f"the vocabulary of {self.vocab_size}"
            if what == "token":
                value %= 1 << 32  # of four bytes in a file, it has no sign
            raise InvalidDataError(
                f"sequence {index} has the {what} {value}, beyond {limit}: the data were made with another "
                "tokenizer, or with tokens of another width"
            )


def _first(values: NDArray[Any], chosen: NDArray[Any]) -> int:
    return int(values[chosen][0])
