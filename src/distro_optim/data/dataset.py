"""Token sequences as a PyTorch data set, and how they become a batch.

A data set's index is a run's data index, so that the code that assigns those, such as a strategy, only has to sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from ..coordinator.types import BatchId
from ..errors import ConfigurationError
from .provider import MAX_BATCH, IntArray, TokenProvider, TokenSequence

__all__ = ["TokenDataset", "collate_tokens"]

ENDLESS: Final = 1 << 31
"""Sequences of a provider that knows no end, where PyTorch wants a number."""


class TokenDataset(Dataset[TokenSequence]):
    """The sequences of a provider by data index. Several at once are asked for at once.

    Attributes:
        by_data_index: True, which tells a strategy that an index here is a run's data index.

    Args:
        provider: gives them; not closed with the data set.
        num_sequences: how many there are to be; by default as many as the provider has, or :data:`ENDLESS`.
    """

    by_data_index: Final = True

    def __init__(self, provider: TokenProvider, num_sequences: int | None = None) -> None:
        if num_sequences is None:
            num_sequences = ENDLESS if provider.num_sequences is None else provider.num_sequences
        if num_sequences < 1:
            raise ConfigurationError(f"num_sequences must be at least 1, got {num_sequences}", name="num_sequences")
        self.provider = provider
        self._length = num_sequences

    def __len__(self) -> int:
        return self._length

    @override
    def __getitem__(self, index: int) -> TokenSequence:
        """
        Raises:
            IndexError: beyond the length.
            DataError: the sequence cannot be fetched.
        """
        if not 0 <= index < self._length:
            raise IndexError(f"index {index} is beyond the {self._length} sequences")
        return self.provider.get_samples(BatchId(index, index))[0]

    def __getitems__(self, indices: Sequence[int]) -> list[TokenSequence]:
        """Those of a batch; PyTorch's loader asks in this way where it can."""
        samples: list[TokenSequence] = []
        for start, end in _intervals(indices):
            samples += self.provider.get_samples(BatchId(start, end))
        return samples


def _intervals(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of indices that follow each other."""
    found: list[tuple[int, int]] = []
    for index in indices:
        if found and index == found[-1][1] + 1 and index - found[-1][0] < MAX_BATCH:
            found[-1] = (found[-1][0], index)
        else:
            found.append((index, index))
    return found


def collate_tokens(samples: Sequence[TokenSequence]) -> dict[str, Tensor]:
    """A batch of ``B`` sequences of ``T`` tokens, as Psyche makes one (``shared/modeling/src/trainer.rs``).

    ====================  ==================  ======================================================================
    ``input_ids``         ``(B, T)`` int64
    ``labels``            ``(B, T)`` int64    ``input_ids`` where none are given; not shifted, the model does that
    ``position_ids``      ``(B, T)`` int64    if every sequence has them
    ``sequence_lengths``  ``(B, n)`` int32    if every sequence has them, filled up with 0
    ====================  ==================  ======================================================================

    As in Psyche, what not every sequence has is left out, labels among them.
    """
    batch = {"input_ids": _stacked([sample.input_ids for sample in samples])}
    labels = [sample.labels for sample in samples if sample.labels is not None]
    batch["labels"] = _stacked(labels) if len(labels) == len(samples) else batch["input_ids"].clone()
    positions = [sample.position_ids for sample in samples if sample.position_ids is not None]
    if len(positions) == len(samples):
        batch["position_ids"] = _stacked(positions)
    lengths = [sample.sequence_lengths for sample in samples if sample.sequence_lengths is not None]
    if len(lengths) == len(samples):
        filled = np.zeros((len(lengths), max(len(one) for one in lengths)), np.int32)
        for row, one in zip(filled, lengths, strict=True):
            row[: len(one)] = one
        batch["sequence_lengths"] = torch.from_numpy(filled)
    return batch


def _stacked(rows: Sequence[IntArray]) -> Tensor:
    return torch.from_numpy(np.stack(rows).astype(np.int64))
