"""A provider that reads the same data from several places; :mod:`.ranking` has the order.

Each read is asked of one place. One that gives nothing in time, or what cannot be trained on, is told of once, put last
for a while, and the next one is asked. One sequence is compared with what the other places give: in the first read
from a place, in the first after it failed, and now and then, unforeseeably for it.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from typing_extensions import override

from ...comm.backoff import BackoffPolicy
from ...coordinator.types import BatchId
from ...errors import ConfigurationError, DataError, DataUnavailableError, InvalidDataError, OutOfDataError
from ...words import shown
from ..provider import TokenProvider, TokenSequence
from .ranking import Ranking, Trouble, content_of, most_say
from .source import Source

__all__ = ["MirrorPatience", "MirroredTokens"]

T = TypeVar("T")

COMPARED_ONE_IN: Final = 8
"""Reads of which one sequence is compared. A place that lies in a share s of its sequences is found out after about 8/s
reads, for one sequence more in eight reads from each other place."""

SLOWEST: Final = 64 * 1024
"""Bytes per second, beside the seconds of each read; as of web servers."""

_TOKEN_BYTES: Final = 4

_MAX_REASON: Final = 400
"""Characters of what is said of a place."""

_CLOSED: Final = "this provider of training data is closed"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MirrorPatience:
    """How long several places are waited for.

    Attributes:
        passes: how often all of them are asked until a read fails; each time with twice the time.
        read_seconds: for a place to give what a read asks for, besides its bytes at 64 KiB/s.
        open_seconds: for a place to be opened: sizes of files are asked for, and sequences are shuffled.
        waits: between passes.
    """

    passes: int = 4
    read_seconds: float = 20.0
    open_seconds: float = 60.0
    waits: BackoffPolicy = field(default_factory=lambda: BackoffPolicy(first=1.0, longest=10.0))


class MirroredTokens(TokenProvider):
    """The sequences that several places have. One read is under way at a time.

    As many sequences count as most places say that can be reached, and in a tie as the first one says.

    Args:
        sources: the places, the run's own first; closed with the provider.
        seq_len: tokens of a sequence.
        vocab_size: tokens the model knows; None leaves that unchecked.
        patience: how long, and how often.
        tell: told, once of each kind, what is wrong with a place; by default a warning is logged.
        choose: draws a number below the given one, which places cannot foresee.
        within: waits until a place is done, or for some seconds.
        pause: waits for some seconds, between passes; by default until :meth:`close` at most.

    Raises:
        DataUnavailableError: none of the places can be opened now.
        InvalidDataError: all of them are wrong.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        seq_len: int,
        *,
        vocab_size: int | None = None,
        patience: MirrorPatience | None = None,
        tell: Callable[[str], None] | None = None,
        choose: Callable[[int], int] = secrets.randbelow,
        within: Callable[[Future[Any], float], object] | None = None,
        pause: Callable[[float], object] | None = None,
    ) -> None:
        super().__init__(seq_len, vocab_size=vocab_size)
        if not sources:
            raise ConfigurationError("there must be at least one place of training data", name="sources")
        self._sources = list(sources)
        self._ranking = Ranking(len(sources))
        self._patience = patience or MirrorPatience()
        self._tell = tell or _log.warning
        self._choose = choose
        self._ended: Future[None] = Future()
        self._within = within or (lambda future, seconds: wait([future, self._ended], seconds, FIRST_COMPLETED))
        self._pause = pause or (lambda seconds: wait([self._ended], seconds))
        self._conductor = ThreadPoolExecutor(1, thread_name_prefix="token mirrors")
        # One that is stuck keeps its thread until it notices that it was dropped.
        self._threads = ThreadPoolExecutor(4 * len(sources), thread_name_prefix="token mirror")
        try:
            self._conduct(self._open_all)
        except BaseException:
            self.close()
            raise

    @property
    @override
    def num_sequences(self) -> int | None:
        return self._ranking.length()

    @override
    def has(self, batch: BatchId) -> bool:
        opened = [
            source.provider
            for place, source in enumerate(self._sources)
            if source.provider is not None and self._ranking.fits(place)
        ]
        return not opened or any(provider.has(batch) for provider in opened)

    @override
    def probe(self) -> None:
        """Whether one place at least has data that can be trained on; compares those that are there."""
        self._conduct(self._probe_all)

    @override
    def close(self) -> None:
        super().close()
        if not self._ended.done():
            self._ended.set_result(None)
        for source in self._sources:
            source.close()
        self._conductor.shutdown(cancel_futures=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    @override
    def _read(self, batch: BatchId) -> Sequence[TokenSequence]:
        return self._conduct(lambda: self._patiently(lambda seconds, errors: self._read_once(batch, seconds, errors)))

    def _conduct(self, work: Callable[[], T]) -> T:
        """Does one thing at a time, whatever threads ask."""
        try:
            return self._conductor.submit(work).result()
        except (CancelledError, RuntimeError):
            if self._ended.done():
                raise DataUnavailableError(_CLOSED) from None
            raise

    # -- what is done in the conductor's thread ------------------------------------------------------------------------

    def _open_all(self) -> None:
        def attempt(seconds: float, errors: dict[int, Exception]) -> bool | None:
            self._begin_openings(range(len(self._sources)))
            opened = [place for place in range(len(self._sources)) if self._is_open(place, errors, seconds)]
            for place in opened:
                self._fits(place, errors)
            return True if opened else None

        self._patiently(attempt)

    def _probe_all(self) -> None:
        def attempt(seconds: float, errors: dict[int, Exception]) -> bool | None:
            answers = self._ask_all(
                [place for place in self._ranking.order() if self._is_open(place, errors, seconds)],
                lambda provider: provider.probe(),
                seconds,
                errors,
            )
            return True if [place for place in answers if self._fits(place, errors)] else None

        self._patiently(attempt)
        # A data server gives to members of an epoch only, which we need not be yet.
        places = [place for place in self._usable() if self._provider(place).num_sequences is not None]
        last = (self.num_sequences or 1) - 1
        for index in sorted({0, last}):
            self._compare(index, places, {})

    def _read_once(
        self, batch: BatchId, seconds: float, errors: dict[int, Exception]
    ) -> Sequence[TokenSequence] | None:
        """One pass over all places but those that gave wrong data for this read already."""
        self._ranking.begin_read()
        places = range(len(self._sources))
        self._begin_openings(place for place in places if not self._ranking.rests(place))
        for place in places:
            opening = self._sources[place].opening
            if opening is not None and opening.done():
                self._is_open(place, {}, seconds)
        left = {place for place in places if not isinstance(errors.get(place), _FINAL)}
        seconds += len(batch) * self.seq_len * _TOKEN_BYTES / SLOWEST
        while left:
            place = min(left, key=self._order().index)
            left.remove(place)
            if not self._is_open(place, errors, seconds) or not self._fits(place, errors):
                continue
            answers = self._ask_all([place], lambda provider: self._checked(provider, batch), seconds, errors)
            if place in answers and self._agrees(place, batch, answers[place], errors):
                return answers[place]
        return None

    def _agrees(
        self, place: int, batch: BatchId, samples: Sequence[TokenSequence], errors: dict[int, Exception]
    ) -> bool:
        """Whether a place is believed. Compares one sequence, if it is time to."""
        others = [other for other in self._usable() if other != place]
        fresh = not all(map(self._ranking.is_compared, [place, *others]))
        if others and (fresh or self._choose(COMPARED_ONE_IN) == 0):
            number = self._choose(len(batch))
            differing = self._compare(batch.start + number, others, {place: content_of(samples[number])})
            if place in differing:
                errors[place] = differing[place]
                return False
        self._ranking.gave(place)
        return True

    def _compare(
        self, index: int, places: Sequence[int], said: dict[int, tuple[bytes, ...]]
    ) -> Mapping[int, Exception]:
        """Asks places for one sequence; returns those that are not believed. What ``said`` has is not asked again."""
        batch = BatchId(index, index)
        seconds = self._patience.read_seconds
        answers = self._ask_all(places, lambda provider: self._checked(provider, batch), seconds, {})
        said = said | {place: content_of(samples[0]) for place, samples in answers.items()}
        if len(said) < 2:
            return {}
        truth = most_say(said)
        honest = [place for place in said if said[place] == truth]
        differing: dict[int, Exception] = {}
        for place in said:
            if place in honest:
                self._ranking.agreed(place)
                if place in answers:
                    self._ranking.gave(place)
                continue
            names = " and ".join(self._sources[other].name for other in sorted(honest))
            reason = f"its sequence {index} is another than that of {names}"
            if 2 * len(honest) <= len(said):
                reason += ", which is believed since it is named first: another place would tell who is right"
            # Not an InvalidDataError: where those that are believed give nothing after all, this one is asked again.
            differing[place] = DataUnavailableError(reason)
            self._failed(place, Trouble.DIFFERS, differing[place])
        return differing

    # -- places --------------------------------------------------------------------------------------------------------

    def _order(self) -> list[int]:
        """All places, those first that are open, and of these the best."""
        return sorted(self._ranking.order(), key=lambda place: self._sources[place].opening is not None)

    def _usable(self) -> list[int]:
        """Places that can be asked now without waiting for anybody, best first."""
        return [
            place
            for place in self._ranking.order()
            if self._sources[place].provider is not None
            and self._sources[place].opening is None
            and not self._ranking.rests(place)
            and self._ranking.fits(place)
        ]

    def _provider(self, place: int) -> TokenProvider:
        provider = self._sources[place].provider
        if provider is None:
            raise DataUnavailableError(_CLOSED)
        return provider

    def _begin_openings(self, places: Iterable[int]) -> None:
        for place in places:
            if self._sources[place].provider is None:
                self._sources[place].begin_opening(self._threads)

    def _is_open(self, place: int, errors: dict[int, Exception], seconds: float) -> bool:
        """Whether a place is open, which is waited for."""
        source = self._sources[place]
        opening = source.opening
        if opening is None:
            if source.provider is not None:
                return True
            opening = source.begin_opening(self._threads)
        # Time grows from pass to pass as that of reads does.
        limit = self._patience.open_seconds * max(1.0, seconds / self._patience.read_seconds)
        provider = self._result(place, opening, limit, errors)
        source.opening = None
        if provider is None:
            return False
        self._ranking.says_length(place, provider.num_sequences)
        return True

    def _fits(self, place: int, errors: dict[int, Exception]) -> bool:
        """Whether a place has as much as the others."""
        if self._ranking.fits(place):
            return True
        theirs, ours = self._provider(place).num_sequences, self._ranking.length()
        errors[place] = DataUnavailableError(f"it has {theirs} sequences, and the run's data have {ours}")
        self._failed(place, Trouble.DIFFERS, errors[place])
        return False

    def _ask_all(
        self,
        places: Sequence[int],
        what: Callable[[TokenProvider], T],
        seconds: float,
        errors: dict[int, Exception],
    ) -> dict[int, T]:
        """The answers of those that gave one, by place; why the others did not goes to ``errors``."""
        asked = {place: self._threads.submit(_Answer.of, what, self._provider(place)) for place in places}
        answers = {place: self._result(place, future, seconds, errors) for place, future in asked.items()}
        return {place: answer.value for place, answer in answers.items() if answer is not None}

    def _checked(self, provider: TokenProvider, batch: BatchId) -> list[TokenSequence]:
        """What a place gives, held to what is wanted here, whatever it was opened with."""
        samples = provider.get_samples(batch)
        for index, sample in enumerate(samples, start=batch.start):
            self._check(index, sample)
        return samples

    def _result(self, place: int, future: Future[T], seconds: float, errors: dict[int, Exception]) -> T | None:
        self._within(future, seconds)
        if self._ended.done():
            raise DataUnavailableError(_CLOSED)
        try:
            if not future.done():
                self._sources[place].drop(self._threads)
                raise DataUnavailableError(f"it took longer than {seconds:.0f} s")
            return future.result()
        except OutOfDataError as error:
            errors[place] = error
        except (InvalidDataError, ConfigurationError) as error:
            errors[place] = error
            self._failed(place, Trouble.WRONG, error)
        except (DataError, OSError) as error:
            errors[place] = error
            self._failed(place, Trouble.GONE, error)
        return None

    def _failed(self, place: int, trouble: Trouble, error: Exception) -> None:
        if self._ranking.failed(place, trouble):
            self._tell(
                f"training data: {self._sources[place].name} {trouble.value}: {self._reason(place, error)}. Other "
                "places are asked first, and this one again later"
            )

    def _reason(self, place: int, error: Exception) -> str:
        """What is wrong with a place, without its name, which stands before it."""
        text = (str(error) or type(error).__name__).removeprefix(f"{self._sources[place].name.removeprefix('the ')}: ")
        return shown(text, _MAX_REASON)

    def _patiently(self, attempt: Callable[[float, dict[int, Exception]], T | None]) -> T:
        """Does something until it gives something, in several passes.

        Raises:
            DataError: it never does, or every place is wrong.
        """
        errors: dict[int, Exception] = {}
        for number in range(self._patience.passes):
            if number:
                self._pause(self._patience.waits.delay(number, self._choose(1 << 16) / (1 << 16)))
            result = attempt(self._patience.read_seconds * 2**number, errors)
            if result is not None:
                return result
            if all(isinstance(errors.get(place), _FINAL) for place in range(len(self._sources))):
                break
        raise self._of_all(errors)

    def _of_all(self, errors: Mapping[int, Exception]) -> DataError:
        reasons = "; ".join(
            f"{self._sources[place].name}: {self._reason(place, errors[place])}" for place in sorted(errors)
        )
        text = f"none of {len(self._sources)} places gives the training data: {reasons}"
        kinds = list(errors.values())
        if all(isinstance(error, OutOfDataError) for error in kinds):
            return OutOfDataError(text, num_sequences=self.num_sequences or 0)
        if all(isinstance(error, _FINAL) for error in kinds):
            return InvalidDataError(text)
        return DataUnavailableError(f"{text}. Name another place with --data-mirror")


_FINAL: Final = (InvalidDataError, ConfigurationError, OutOfDataError)
"""What asking again does not change."""


@dataclass(frozen=True)
class _Answer:
    """Of a place, which may be None."""

    value: Any

    @classmethod
    def of(cls, what: Callable[[TokenProvider], Any], provider: TokenProvider) -> _Answer:
        return cls(what(provider))
