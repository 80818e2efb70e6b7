"""Peers are asked at once who has the model: one that is gone, slow, empty-handed or a liar delays nobody for long."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from distro_optim.comm.iroh.sharing import search as sharing_search
from distro_optim.comm.iroh.sharing.search import MAX_USELESS, Found, find_sharers
from distro_optim.comm.model_exchange import Patience
from distro_optim.errors import ExchangeError, ModelMismatchError, NotSharedError, PeerUnreachableError, ProtocolError

pytestmark = pytest.mark.waiting


ALICE, BOB, CAROL, DAVE = (bytes([number]) * 32 for number in range(1, 5))
NOTHING = NotSharedError("not yet", reason="ModelConfigNotInitialized")
UNREACHABLE = PeerUnreachableError("it does not answer")
USELESS = ProtocolError("another model")
Behaviour = Callable[[int], Any]

never: Behaviour = lambda turn: asyncio.Event()  # noqa: E731 - silent for ever


def always(outcome: Any) -> Behaviour:
    return lambda turn: outcome


def after(turns: int, outcome: Any) -> Behaviour:
    """Nothing to share at first."""
    return lambda turn: outcome if turn > turns else NOTHING


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing_search, "_FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(sharing_search, "_MAX_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(sharing_search, "GRACE_SECONDS", 0.05)
    monkeypatch.setattr(sharing_search, "SHORT_SECONDS", 0.05)


class Room:
    """Peers that do what they are told, and how often each was asked."""

    def __init__(self, **peers: Behaviour) -> None:
        names = {"alice": ALICE, "bob": BOB, "carol": CAROL, "dave": DAVE}
        self.peers = {names[name]: behaviour for name, behaviour in peers.items()}
        self.asked: Counter[bytes] = Counter()
        self.cancelled: Counter[bytes] = Counter()

    async def ask(self, peer: bytes) -> str:
        self.asked[peer] += 1
        outcome = self.peers[peer](self.asked[peer])
        await asyncio.sleep(0)
        if isinstance(outcome, asyncio.Event):
            try:
                await outcome.wait()
            finally:
                self.cancelled[peer] += 1
        if isinstance(outcome, Exception):
            raise outcome
        return str(outcome)

    def find(self, patience: Patience, seconds: float = 20.0) -> Found[str]:
        async def bounded() -> Found[str]:
            ask: Callable[[bytes], Awaitable[str]] = self.ask
            return await asyncio.wait_for(find_sharers(ask, self.peers, patience=patience, seconds=seconds), 20.0)

        return asyncio.run(bounded())


@pytest.mark.parametrize("patience", Patience)
def test_one_that_never_answers_is_not_waited_for(patience: Patience) -> None:
    room = Room(alice=never, bob=always("model"))
    assert room.find(patience) == Found("model", (BOB,), (ALICE,))
    assert room.cancelled[ALICE] == 1


def test_those_that_have_nothing_yet_are_asked_again_beside_one_that_never_answers() -> None:
    room = Room(alice=never, bob=after(5, "model"))
    assert room.find(Patience.LONG).answer == "model"
    assert room.asked == {ALICE: 1, BOB: 6}


def test_of_those_that_have_it_all_with_the_same_are_named_and_the_best_counts() -> None:
    room = Room(bob=always("other"), alice=always("ours"), carol=always("ours"), dave=always(NOTHING))
    room.peers = dict(sorted(room.peers.items()))
    found = room.find(Patience.LONG)
    assert found == Found("ours", (ALICE, CAROL), (BOB, DAVE))


def test_once_asks_each_once() -> None:
    room = Room(alice=always(UNREACHABLE), bob=always(NOTHING), carol=always(USELESS))
    with pytest.raises(ExchangeError, match="no peer shares the model"):
        room.find(Patience.ONCE)
    assert room.asked == {ALICE: 1, BOB: 1, CAROL: 1}


def test_once_does_not_wait_for_the_silent_where_most_have_nothing() -> None:
    room = Room(alice=never, bob=always(NOTHING), carol=always(NOTHING))
    with pytest.raises(ExchangeError, match="not yet"):
        room.find(Patience.ONCE)


def test_short_patience_is_over_when_most_have_nothing() -> None:
    room = Room(alice=never, bob=always(NOTHING), carol=always(NOTHING))
    with pytest.raises(ExchangeError, match="not yet"):
        room.find(Patience.SHORT)
    assert room.asked[BOB] > 1


def test_short_patience_lasts_where_most_cannot_be_reached() -> None:
    # We may be cut off, and they may have it.
    room = Room(
        alice=always(UNREACHABLE), bob=always(NOTHING), carol=lambda turn: "model" if turn > 80 else UNREACHABLE
    )
    assert room.find(Patience.SHORT).answer == "model"


@pytest.mark.parametrize("patience", [Patience.SHORT, Patience.LONG])
def test_no_patience_outlasts_its_seconds(patience: Patience) -> None:
    room = Room(alice=never, bob=never, carol=always(NOTHING))
    with pytest.raises(ExchangeError, match="not yet"):
        room.find(patience, seconds=0.1)


def test_one_liar_is_asked_a_few_times_only_while_others_may_still_have_it() -> None:
    room = Room(alice=always(USELESS), bob=after(40, "model"))
    assert room.find(Patience.LONG).answer == "model"
    assert room.asked[ALICE] == MAX_USELESS


def test_where_all_who_answer_are_of_no_use_the_search_is_over() -> None:
    room = Room(alice=always(USELESS), bob=always(UNREACHABLE))
    with pytest.raises(ExchangeError, match="no peer shares the model"):
        room.find(Patience.LONG)


def test_another_kind_of_error_ends_the_search() -> None:
    mismatch = ModelMismatchError("the run trains something else", what="lr", ours=1, theirs=2)
    room = Room(alice=always(NOTHING), bob=always(mismatch))
    with pytest.raises(ModelMismatchError):
        room.find(Patience.LONG)


def test_nobody_is_asked_twice_at_a_time_or_named_twice() -> None:
    room = Room(alice=always("model"))
    found = asyncio.run(find_sharers(room.ask, [ALICE, ALICE]))
    assert found == Found("model", (ALICE,), ())
    assert room.asked == {ALICE: 1}
