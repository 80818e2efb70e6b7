"""The promises of :class:`~distro_optim.data.provider.TokenProvider`, as checks to run against any implementation.

Bring a :class:`TokenDataArena`, which opens your provider on data that you know; run each of :data:`CHECKS` with a
fresh one::

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_my_provider(check):
        with MyArena() as arena:
            check(arena)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Self

import numpy as np

from ..coordinator.types import BatchId
from ..data.provider import MAX_BATCH, TokenProvider, TokenSequence
from ..errors import ConfigurationError, DataUnavailableError, InvalidDataError, OutOfDataError

__all__ = ["CHECKS", "TokenDataArena"]

_THREADS: Final = 4


class TokenDataArena(ABC):
    """Data of a known content, behind some provider.

    Attributes:
        seq_len: tokens of a sequence.
        count: sequences; two at least.
        ends: whether a data index of ``count`` or more is refused; otherwise it gives some sequence.
    """

    seq_len: int
    count: int
    ends: bool = True

    @abstractmethod
    def open(self, *, vocab_size: int | None = None) -> TokenProvider:
        """A new provider of the data."""

    @abstractmethod
    def expected(self, index: int) -> list[int]:
        """The tokens of a sequence."""

    def __enter__(self) -> Self:
        return self

    @abstractmethod
    def __exit__(self, *_: object) -> None:
        """Puts everything away."""


def _tokens(samples: list[TokenSequence]) -> list[list[int]]:
    return [sample.input_ids.tolist() for sample in samples]


def every_sequence_is_the_expected_one(arena: TokenDataArena) -> None:
    """One by one, as ``int32``."""
    with arena.open() as provider:
        assert provider.seq_len == arena.seq_len
        assert provider.num_sequences in (None, arena.count)
        for index in range(arena.count):
            (sample,) = provider.get_samples(BatchId(index, index))
            assert sample.input_ids.dtype == np.int32
            assert sample.input_ids.tolist() == arena.expected(index)


def a_batch_is_its_sequences_in_order(arena: TokenDataArena) -> None:
    """Whatever part of the data it is, and however often it is asked for."""
    with arena.open() as provider:
        for start, end in ((0, arena.count - 1), (1, arena.count - 1), (0, arena.count // 2), (0, arena.count - 1)):
            samples = provider.get_samples(BatchId(start, end))
            assert _tokens(samples) == [arena.expected(index) for index in range(start, end + 1)]


def two_openings_give_the_same(arena: TokenDataArena) -> None:
    """The order depends on nothing that another peer does not know."""
    everything = BatchId(0, arena.count - 1)
    with arena.open() as one, arena.open() as other:
        assert _tokens(one.get_samples(everything)) == _tokens(other.get_samples(everything))


def what_a_caller_does_to_its_arrays_is_its_own_affair(arena: TokenDataArena) -> None:
    """They cannot be written to, or it does not show."""
    with arena.open() as provider:
        (sample,) = provider.get_samples(BatchId(0, 0))
        if sample.input_ids.flags.writeable:
            sample.input_ids[:] = 1
        assert _tokens(provider.get_samples(BatchId(0, 0))) == [arena.expected(0)]


def threads_get_what_each_asked_for(arena: TokenDataArena) -> None:
    """One provider, asked by several threads at once."""
    with arena.open() as provider, ThreadPoolExecutor(_THREADS) as threads:
        indices = list(range(arena.count)) * _THREADS
        answers = threads.map(lambda index: provider.get_samples(BatchId(index, index)), indices)
        assert [_tokens(answer) for answer in answers] == [[arena.expected(index)] for index in indices]


def beyond_the_end_nothing_is_made_up(arena: TokenDataArena) -> None:
    """An interval that lies beyond the end, or reaches there, is refused as a whole, if there is an end."""
    with arena.open() as provider:
        for batch in (
            BatchId(arena.count, arena.count),
            BatchId(0, arena.count),
            BatchId(2**64 - 1, 2**64 - 1),
        ):
            if arena.ends:
                assert provider.num_sequences is None or not provider.has(batch)
                _expect_error((OutOfDataError, DataUnavailableError), provider, batch)
            else:
                assert provider.has(batch)
                assert len(provider.get_samples(batch)) == len(batch)
        assert _tokens(provider.get_samples(BatchId(0, 0))) == [arena.expected(0)]


def an_interval_without_end_is_refused_before_anything_is_made(arena: TokenDataArena) -> None:
    """A coordinator that lies cannot make its clients fill their memory."""
    with arena.open() as provider:
        for batch in (BatchId(0, 2**64 - 1), BatchId(0, MAX_BATCH)):
            _expect_error((ConfigurationError, OutOfDataError), provider, batch)


def tokens_beyond_the_vocabulary_are_refused(arena: TokenDataArena) -> None:
    """And said to be so, before training where the first or the last sequence has one."""
    largest = [max(arena.expected(index)) for index in range(arena.count)]
    if max(largest) == 0:
        return
    with arena.open(vocab_size=max(largest) + 1) as provider:
        provider.get_samples(BatchId(0, arena.count - 1))
        provider.probe()
    worst = largest.index(max(largest))
    with arena.open(vocab_size=max(largest)) as provider:
        error = _expect_error((InvalidDataError,), provider, BatchId(worst, worst))
        assert str(max(largest)) in str(error)
        assert "vocabulary" in str(error)


def a_closed_provider_gives_nothing(arena: TokenDataArena) -> None:
    """And says so; closing it again does nothing."""
    provider = arena.open()
    provider.get_samples(BatchId(0, 0))
    provider.close()
    provider.close()
    _expect_error((DataUnavailableError,), provider, BatchId(0, 0))


def _expect_error(kinds: tuple[type[Exception], ...], provider: TokenProvider, batch: BatchId) -> Exception:
    try:
        provider.get_samples(batch)
    except kinds as error:
        return error
    raise AssertionError(f"{batch} was given")


CHECKS: Final[tuple[Callable[[TokenDataArena], None], ...]] = (
    every_sequence_is_the_expected_one,
    a_batch_is_its_sequences_in_order,
    two_openings_give_the_same,
    what_a_caller_does_to_its_arrays_is_its_own_affair,
    threads_get_what_each_asked_for,
    beyond_the_end_nothing_is_made_up,
    an_interval_without_end_is_refused_before_anything_is_made,
    tokens_beyond_the_vocabulary_are_refused,
    a_closed_provider_gives_nothing,
)
"""Every promise."""
