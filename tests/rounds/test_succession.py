"""Whatever is lost, late or cut off, and whoever forgets everything: there is one history of rounds that counted.

``succession_simulation.py`` goes through all that can happen within bounds. So that it proves something, it has to find
what goes wrong when a rule is left out.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from distro_optim.strategy.rounds.trust.succession import Candidacy, Peer, Roster, Vote, election, goes_on
from rounds import succession_simulation as simulation
from rounds.succession_simulation import Bounds, SplitBrain, begin, explore, walk

A, B, C, D = (bytes([number]) for number in range(4))


@pytest.mark.parametrize(
    ("peers", "bounds"),
    [
        (2, Bounds(terms=2, rounds=2)),
        (2, Bounds(terms=2, rounds=1, rosters=1, restarts=1, candidates=1)),
        pytest.param(3, Bounds(terms=2, rounds=2, candidates=1), marks=pytest.mark.slow),
    ],
)
def test_messages_may_come_at_any_time_or_never(peers: int, bounds: Bounds) -> None:
    states, _ = explore(begin(peers, peers), bounds, 100_000)
    assert states > 500


@pytest.mark.slow
@pytest.mark.parametrize(
    ("peers", "bounds"),
    [
        (3, Bounds(terms=3, rounds=2, candidates=2)),
        (3, Bounds(terms=2, rounds=2, rosters=1, candidates=1)),
        (4, Bounds(terms=2, rounds=2, candidates=1)),
        (5, Bounds(terms=2, rounds=1, candidates=1)),
    ],
)
def test_any_peers_may_be_cut_off_from_any_others(peers: int, bounds: Bounds) -> None:
    states, terms = explore(begin(peers, peers), bounds, 100_000, at_once=True)
    assert states > 100
    assert terms == min(bounds.terms, bounds.rounds)  # rounds of several hosts were counted: somebody did succeed


@pytest.mark.parametrize("seed", range(20))
def test_five_peers_at_random_with_new_voters_and_restarts(seed: int) -> None:
    bounds = Bounds(terms=4, rounds=4, rosters=1, restarts=2)
    walk(begin(5, 3), bounds, 60, random.Random(seed))


BROKEN: dict[str, Any] = {
    "election": lambda roster, candidacy, votes: max(
        (vote for vote in votes if (vote.term, vote.candidate) == (candidacy.term, candidacy.candidate)),
        key=lambda vote: vote.position,
        default=None,
    ),
    "goes_on": lambda roster, present: True,
    "is_followed": lambda old, new, promises: True,
}


@pytest.mark.slow
@pytest.mark.parametrize("rule", BROKEN)
def test_without_a_rule_two_histories_are_found(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, rule, BROKEN[rule])
    bounds = Bounds(terms=2, rounds=2, rosters=1 if rule == "is_followed" else 0, candidates=1)
    with pytest.raises(SplitBrain):
        explore(begin(3, 3), bounds, 100_000, at_once=True)


def test_a_voter_votes_once_in_a_term_and_for_its_own_roster_alone() -> None:
    roster = Roster(1, 0, frozenset({A, B, C}))
    voter = Peer(C, roster, term=1, voted=A)
    voter, vote = voter.vote(Candidacy(2, B, roster.which))
    assert vote == Vote(2, B, roster.which, C, (0, 0))
    assert voter.vote(Candidacy(2, B, roster.which))[1] == vote  # the answer was lost
    assert voter.vote(Candidacy(2, A, roster.which))[1] is None
    assert voter.vote(Candidacy(3, A, (1, 1)))[1] is None
    assert voter.vote(Candidacy(3, D, roster.which))[1] is None
    assert voter.take_round(1, 1, roster, A) == (voter, False)  # the host of before is heard no more
    assert Peer(D).vote(Candidacy(5, B, roster.which)) == (Peer(D), None)  # it has forgotten everything


def test_the_candidate_begins_with_the_newest_state_among_more_than_half() -> None:
    roster = Roster(1, 0, frozenset({A, B, C, D}))
    asked = Candidacy(2, B, roster.which)
    votes = [Vote(2, B, roster.which, voter, (1, number)) for number, voter in enumerate((B, C, D), start=7)]
    assert election(roster, asked, votes[:2]) is None
    assert election(roster, asked, [votes[0]] * 3) is None
    found = election(roster, asked, votes)
    assert found is not None
    assert (found.voter, found.position) == (D, (1, 9))


def test_of_two_halves_the_one_with_the_host_goes_on() -> None:
    roster = Roster(1, 0, frozenset({A, B, C, D}))
    assert goes_on(roster, {A, B})
    assert not goes_on(roster, {A})
    assert goes_on(Roster(1, 0, frozenset({A, B})), {A})  # the other one alone cannot elect itself
