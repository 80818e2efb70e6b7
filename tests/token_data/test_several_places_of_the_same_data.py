"""The same data at several places, of which some are gone, stuck, wrong or lying. All places are scripts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typing_extensions import override

from distro_optim.coordinator.types import BatchId
from distro_optim.data.mirrors.ranking import FIRST_REST, LONGEST_REST, Ranking, Trouble, content_of, most_say
from distro_optim.data.mirrors.source import Closable, Source
from distro_optim.data.mirrors.tokens import MirroredTokens
from distro_optim.data.provider import TokenProvider, TokenSequence
from distro_optim.errors import DataError, DataUnavailableError, InvalidDataError, OutOfDataError

pytestmark = [pytest.mark.waiting]

SEQ_LEN = 3
COUNT = 100
VOCABULARY = 1000

Answer = Callable[[BatchId], list[TokenSequence]]


def honest(batch: BatchId) -> list[TokenSequence]:
    return [sequence(index, index, index) for index in range(batch.start, batch.end + 1)]


def sequence(*tokens: int) -> TokenSequence:
    return TokenSequence(np.array(tokens, np.int32))


def plausible_lie(batch: BatchId) -> list[TokenSequence]:
    return [sequence(7, 7, 7) for _ in range(len(batch))]


def other_lie(batch: BatchId) -> list[TokenSequence]:
    return [sequence(8, 8, 8) for _ in range(len(batch))]


def gone(batch: BatchId) -> list[TokenSequence]:
    raise DataUnavailableError("nobody is there")


def cut_connection(batch: BatchId) -> list[TokenSequence]:
    raise ConnectionResetError("it hung up")


def beyond_the_vocabulary(batch: BatchId) -> list[TokenSequence]:
    return [sequence(1, 2, VOCABULARY) for _ in range(len(batch))]


def too_short(batch: BatchId) -> list[TokenSequence]:
    return [sequence(1, 2) for _ in range(len(batch))]


def too_few(batch: BatchId) -> list[TokenSequence]:
    return honest(batch)[:-1]


def garbage(batch: BatchId) -> list[TokenSequence]:
    raise InvalidDataError("it does not speak the protocol")


class Place(TokenProvider):
    """Answers as its script says: the first answers once each, the last one for ever."""

    def __init__(self, *script: Answer, count: int | None = COUNT) -> None:
        super().__init__(SEQ_LEN, vocab_size=VOCABULARY)
        self.script = list(script)
        self.count = count
        self.asked: list[BatchId] = []
        self.openings = 0
        self.fails_to_open = 0
        self.is_stuck: Future[None] = Future()
        self.released = threading.Event()

    def stuck(self, batch: BatchId) -> list[TokenSequence]:
        """Until somebody closes it."""
        self.is_stuck.set_result(None)
        assert self.released.wait(20)
        raise DataUnavailableError("it was closed")

    def source(self, name: str) -> Source:
        def opener(keep: Callable[[Closable], None]) -> TokenProvider:
            self.openings += 1
            if self.openings <= self.fails_to_open:
                raise DataUnavailableError("no size is told")
            self._closed = False
            return self

        return Source(name, opener)

    @property
    @override
    def num_sequences(self) -> int | None:
        return self.count

    @override
    def _read(self, batch: BatchId) -> list[TokenSequence]:
        self.asked.append(batch)
        return (self.script.pop(0) if len(self.script) > 1 else self.script[0])(batch)

    @override
    def close(self) -> None:
        super().close()
        self.released.set()


class Opened:
    """Places behind one provider. A place that is stuck counts as one whose time is over."""

    def __init__(self, *places: Place, choose: Callable[[int], int] = lambda below: below - 1) -> None:
        self.told: list[str] = []
        self.pauses: list[float] = []
        stuck = [place.is_stuck for place in places]

        def within(future: Future[Any], seconds: float) -> None:
            while not future.done():
                done, _ = wait([future, *stuck], 20, FIRST_COMPLETED)
                assert done
                if future not in done:
                    for one in done:
                        stuck.remove(one)
                    return

        self.tokens = MirroredTokens(
            [place.source(chr(65 + number)) for number, place in enumerate(places)],
            SEQ_LEN,
            vocab_size=VOCABULARY,
            tell=self.told.append,
            choose=choose,
            within=within,
            pause=self.pauses.append,
        )

    def read(self, *indices: int) -> list[int]:
        """The first token of each sequence."""
        return [int(self.tokens.get_samples(BatchId(index, index))[0].input_ids[0]) for index in indices]

    def read_until(self, done: Callable[[], bool]) -> None:
        """Reads as often as it takes another thread to open a place."""
        for number in range(100_000):
            if done():
                return
            assert self.read(number % COUNT) == [number % COUNT]
        raise AssertionError("a place was not used again")

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.tokens.close()


# -- one place is of no use ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (gone, "A gives nothing: nobody is there"),
        (cut_connection, "A gives nothing: it hung up"),
        (beyond_the_vocabulary, "A gives what cannot be the run's data: sequence 1 has the token 1000, beyond"),
        (too_short, "A gives what cannot be the run's data: sequence 1 has 2 tokens"),
        (too_few, "A gives what cannot be the run's data: 0 sequences came"),
        (garbage, "A gives what cannot be the run's data: it does not speak"),
    ],
)
def test_what_one_place_does_not_give_is_read_at_another_and_told_once(bad: Answer, said: str) -> None:
    first, second = Place(bad), Place(honest)
    with Opened(first, second) as opened:
        assert opened.read(*range(1, 60)) == list(range(1, 60))
        assert len(opened.told) == 1
        assert said in opened.told[0]
        assert "asked first, and this one again later" in opened.told[0]
        assert opened.pauses == []
        # It is asked again, and ever more seldom.
        assert 1 < len(first.asked) < 8


def test_a_place_that_comes_back_is_used_again() -> None:
    first, second = Place(gone, honest), Place(honest)
    with Opened(first, second) as opened:
        assert opened.read(*range(2 * FIRST_REST)) == list(range(2 * FIRST_REST))
        asked = len(second.asked)
        assert opened.read(50, 51) == [50, 51]
        assert len(second.asked) == asked
        assert first.asked[-2:] == [BatchId(50, 50), BatchId(51, 51)]


def test_a_place_that_is_stuck_is_dropped_and_opened_again_later() -> None:
    first, second = Place(honest), Place(honest)
    first.script = [first.stuck, honest]
    with Opened(first, second) as opened:
        assert opened.read(1) == [1]
        assert "A gives nothing: it took longer than 20 s" in opened.told[0]
        assert first.released.wait(20)
        opened.read_until(lambda: len(first.asked) > 1)
        assert first.openings == 2
        assert len(opened.told) == 1


def test_a_place_that_cannot_be_opened_is_opened_later() -> None:
    first, second = Place(honest), Place(honest)
    first.fails_to_open = 1
    with Opened(first, second) as opened:
        assert "A gives nothing: no size is told" in opened.told[0]
        opened.read_until(lambda: bool(first.asked))
        assert first.openings == 2


def test_looking_at_the_data_needs_one_place_only() -> None:
    with Opened(Place(gone), Place(honest), Place(too_short)) as opened:
        opened.tokens.probe()
        assert len(opened.told) == 2
        assert opened.tokens.num_sequences == COUNT


# -- all of them are -----------------------------------------------------------------------------------------------


def test_what_no_place_gives_is_asked_for_several_times_and_names_all_of_them() -> None:
    with Opened(Place(gone), Place(garbage)) as opened:
        with pytest.raises(DataUnavailableError, match=r"none of 2 places .* A: nobody is there; B: .*protocol"):
            opened.read(1)
        assert len(opened.pauses) == 3
        with pytest.raises(DataUnavailableError, match="--data-mirror"):
            opened.tokens.probe()


def test_wrong_data_everywhere_are_an_error_at_once() -> None:
    with Opened(Place(too_short), Place(garbage)) as opened:
        with pytest.raises(InvalidDataError, match=r"A: sequence 1 has 2 tokens.*; B: "):
            opened.read(1)
        assert opened.pauses == []


def test_a_place_that_comes_back_between_two_passes_is_enough() -> None:
    with Opened(Place(gone, gone, honest), Place(gone)) as opened:
        assert opened.read(1) == [1]
        assert len(opened.pauses) == 2


def test_the_end_of_the_data_is_their_end_everywhere() -> None:
    with Opened(Place(honest), Place(honest)) as opened, pytest.raises(OutOfDataError):
        opened.read(COUNT)
    with Opened(Place(honest), Place(honest, count=None)) as opened:
        assert opened.read(COUNT) == [COUNT]


def test_no_place_can_be_opened() -> None:
    first, second = Place(honest), Place(honest)
    first.fails_to_open = second.fails_to_open = 99
    with pytest.raises(DataUnavailableError, match="A: no size is told; B: no size is told"):
        Opened(first, second)
    assert first.openings == 4


def test_closing_ends_a_read_that_is_stuck() -> None:
    place = Place(honest)
    place.script = [place.stuck]
    tokens = MirroredTokens([place.source("A")], SEQ_LEN)
    errors: list[DataError] = []

    def work() -> None:
        try:
            tokens.get_samples(BatchId(0, 0))
        except DataError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    place.is_stuck.result(20)
    tokens.close()
    thread.join(20)
    assert not thread.is_alive()
    assert "closed" in str(errors[0])


# -- lies that could be true ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("liar", [0, 1, 2])
def test_of_three_places_the_one_that_lies_is_not_believed(liar: int) -> None:
    places = [Place(plausible_lie if number == liar else honest) for number in range(3)]
    with Opened(*places) as opened:
        assert opened.read(*range(20, 60)) == list(range(20, 60))
        (told,) = opened.told
        assert f"{'ABC'[liar]} gives other data than the rest: its sequence 20 is another than that of " in told


def test_of_five_places_two_that_lie_are_not_believed() -> None:
    script = (plausible_lie, plausible_lie, honest, honest, honest)
    with Opened(*map(Place, script)) as opened:
        assert opened.read(*range(20, 40)) == list(range(20, 40))


def test_where_two_places_differ_the_runs_own_is_believed_and_somebody_told() -> None:
    with Opened(Place(honest), Place(plausible_lie)) as opened:
        assert opened.read(*range(20, 60)) == list(range(20, 60))
        (told,) = opened.told
        assert "is another than that of A, which is believed since it is named first: another place would" in told


def test_a_place_that_begins_to_lie_is_found_out_when_it_is_compared() -> None:
    compared = iter([7, 7, 7, 0, 7, 7, 7, 7])
    draws = lambda below: next(compared) if below == 8 else 0  # noqa: E731
    places = Place(honest, honest, honest, plausible_lie), Place(honest), Place(honest)
    with Opened(*places, choose=draws) as opened:
        # It is compared in its first read, and in the fifth one.
        assert opened.read(20, 21, 22, 23, 24, 25, 26) == [20, 21, 22, 7, 24, 25, 26]
        assert len(opened.told) == 1


def test_one_that_is_believed_and_then_gives_nothing_does_not_silence_the_honest() -> None:
    # The run's own place agrees to be compared, and gives no batch.
    def compared_only(batch: BatchId) -> list[TokenSequence]:
        return plausible_lie(batch) if len(batch) == 1 else gone(batch)

    with Opened(Place(compared_only), Place(honest)) as opened:
        for start in range(10, 90, 4):
            samples = opened.tokens.get_samples(BatchId(start, start + 3))
            assert [int(one.input_ids[0]) for one in samples] == list(range(start, start + 4))


@pytest.mark.parametrize("liar", [0, 1, 2])
def test_how_much_there_is_is_what_most_say(liar: int) -> None:
    places = [Place(honest, count=COUNT + 5 if number == liar else COUNT) for number in range(3)]
    with Opened(*places) as opened:
        assert opened.tokens.num_sequences == COUNT
        assert "it has 105 sequences, and the run's data have 100" in opened.told[0]
        assert opened.read(1, 2) == [1, 2]
        assert places[liar].asked == []
        with pytest.raises(OutOfDataError):
            opened.read(COUNT)


def test_one_that_lies_about_how_much_there_is_and_then_goes_leaves_the_honest_one() -> None:
    with Opened(Place(gone, count=COUNT + 5), Place(honest)) as opened:
        assert opened.tokens.num_sequences == COUNT + 5
        assert opened.read(*range(40)) == list(range(40))
        assert opened.tokens.num_sequences == COUNT


BAD: list[Answer] = [gone, cut_connection, beyond_the_vocabulary, too_short, too_few, garbage]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.sampled_from(BAD), min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_whatever_the_others_do_an_honest_place_is_enough(others: list[list[Answer]], data: st.DataObject) -> None:
    places = [Place(*script, count=data.draw(st.sampled_from([COUNT, COUNT + 1, None]))) for script in others]
    places.insert(data.draw(st.integers(0, len(places))), Place(honest))
    with Opened(*places, choose=Random(data.draw(st.integers(0, 9))).randrange) as opened:
        opened.tokens.probe()
        assert opened.read(*range(12)) == list(range(12))


# -- the order, without any place ----------------------------------------------------------------------------------


def rests(ranking: Ranking, place: int, reads: int) -> int:
    """Of so many reads."""
    count = 0
    for _ in range(reads):
        ranking.begin_read()
        count += ranking.rests(place)
    return count


def test_who_fails_again_and_again_rests_ever_longer_up_to_a_bound() -> None:
    ranking = Ranking(2)
    found = []
    for _ in range(8):
        ranking.failed(0, Trouble.GONE)
        assert ranking.order() == [1, 0]
        found.append(rests(ranking, 0, 1000) + 1)
        assert ranking.order() == [0, 1]
    assert found == [min(FIRST_REST << n, LONGEST_REST) for n in range(8)]
    ranking.failed(0, Trouble.GONE)
    ranking.gave(0)
    assert ranking.order() == [0, 1]


def test_liars_come_after_those_that_are_only_gone() -> None:
    ranking = Ranking(3)
    assert ranking.failed(0, Trouble.DIFFERS)
    assert not ranking.failed(0, Trouble.DIFFERS)
    assert ranking.failed(0, Trouble.WRONG)
    ranking.failed(1, Trouble.GONE)
    assert ranking.order() == [2, 1, 0]


@pytest.mark.parametrize(
    ("said", "truth"), [([1], 1), ([1, 2], 1), ([1, 2, 2], 2), ([2, 1, 1, 2], 2), ([1, 2, 3], 1), ([1, 3, 2, 3], 3)]
)
def test_what_most_say_counts_and_in_a_tie_the_first(said: Iterable[int], truth: int) -> None:
    assert most_say(dict(enumerate(said))) == truth


def test_contents_are_the_same_whether_what_is_usual_is_said_or_not() -> None:
    tokens = np.array([4, 5, 6], np.int32)
    full = TokenSequence(tokens, tokens, np.arange(3, dtype=np.int32), np.array([3], np.int32))
    assert content_of(full) == content_of(TokenSequence(tokens))
    for other in (
        TokenSequence(tokens, np.array([-100, 5, 6], np.int32)),
        TokenSequence(tokens, None, np.array([0, 0, 1], np.int32)),
        TokenSequence(tokens, None, None, np.array([1, 2], np.int32)),
        TokenSequence(np.array([4, 5, 7], np.int32)),
    ):
        assert content_of(other) != content_of(full)
