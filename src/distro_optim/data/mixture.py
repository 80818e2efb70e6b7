"""A weighted mixture of other providers; :mod:`.mixture_index` has the order."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from typing_extensions import override

from ..coordinator.model import DontShuffle, Shuffle
from ..coordinator.types import BatchId
from ..errors import ConfigurationError
from .mixture_index import MixtureIndex
from .provider import TokenProvider, TokenSequence

__all__ = ["WeightedTokens"]

_log = logging.getLogger(__name__)


class WeightedTokens(TokenProvider):
    """Samples of several providers in the proportions of their weights. The members are asked at the same time.

    Beyond the end every index is the first sample of the first member, as in Psyche; a warning tells it once.

    Args:
        members: the providers, of one sequence length and each with an end; closed with the mixture.
        weights: their shares, of any sum; None for their lengths.
        shuffle: the order.
        vocab_size: tokens the model knows; None leaves that unchecked.

    Raises:
        ConfigurationError: the members or the weights make no mixture.
    """

    def __init__(
        self,
        members: Sequence[TokenProvider],
        weights: Sequence[float] | None = None,
        shuffle: Shuffle = DontShuffle(),  # noqa: B008 - immutable
        *,
        vocab_size: int | None = None,
    ) -> None:
        if not members:
            raise ConfigurationError("a mixture needs at least one member", name="members")
        super().__init__(members[0].seq_len, vocab_size=vocab_size)
        sizes = []
        for number, member in enumerate(members):
            if member.seq_len != self.seq_len:
                raise ConfigurationError(
                    f"member {number} of the mixture has sequences of {member.seq_len} tokens, member 0 of "
                    f"{self.seq_len}: give all the same length",
                    name="members",
                )
            if member.num_sequences is None:
                raise ConfigurationError(f"member {number} of the mixture has no known end", name="members")
            sizes.append(member.num_sequences)
        self._members = list(members)
        self._index = MixtureIndex(sizes, weights, shuffle)
        self._lock = threading.Lock()
        self._warned = False
        self._threads = ThreadPoolExecutor(len(members) if len(members) < 8 else 8, thread_name_prefix="mixture")

    @property
    @override
    def num_sequences(self) -> int:
        return len(self._index)

    @override
    def has(self, batch: BatchId) -> bool:
        return True

    @override
    def close(self) -> None:
        super().close()
        for member in self._members:
            member.close()
        self._threads.shutdown(cancel_futures=True)

    @override
    def _read(self, batch: BatchId) -> Sequence[TokenSequence]:
        if batch.end >= len(self._index) and not self._warned:
            self._warned = True
            _log.warning("%s lies beyond the mixture's %d samples; its first one is repeated", batch, len(self._index))
        with self._lock:
            requests = self._index.requests(batch)
        samples: dict[int, TokenSequence] = {}
        answers = self._threads.map(lambda request: self._members[request.member].get_samples(request.batch), requests)
        for request, answer in zip(requests, answers, strict=True):
            samples.update(zip(request.positions, answer, strict=True))
        return [samples[position] for position in range(len(batch))]
