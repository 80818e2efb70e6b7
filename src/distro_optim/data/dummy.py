"""Sequences of zeros, for trying a run out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from typing_extensions import override

from ..coordinator.types import BatchId
from .provider import TokenProvider, TokenSequence

__all__ = ["DUMMY_SEQ_LEN", "DummyTokens"]

DUMMY_SEQ_LEN: Final = 2048
"""Tokens of a sequence in Psyche's client, whatever the run's ``max_seq_len`` (``shared/client/src/state/init.rs``)."""


class DummyTokens(TokenProvider):
    """Zeros without end. Source: PsycheFoundation/psyche, ``shared/data-provider/src/dummy.rs``.

    Args:
        seq_len: tokens of a sequence.
        num_sequences: where they end, if they do.
    """

    def __init__(self, seq_len: int = DUMMY_SEQ_LEN, num_sequences: int | None = None) -> None:
        super().__init__(seq_len)
        self._num_sequences = num_sequences

    @property
    @override
    def num_sequences(self) -> int | None:
        return self._num_sequences

    @override
    def _read(self, batch: BatchId) -> Sequence[TokenSequence]:
        return [TokenSequence(np.zeros(self.seq_len, np.int32)) for _ in range(len(batch))]
