"""All that can happen when a run changes its host: every order, every loss and every delay of messages, within bounds.

A message that was sent lies there for ever: it may be taken at any time later, several times, or never. So a partition
is nothing special: messages across it are not taken. A peer that is started again has forgotten everything and is
somebody else. What was counted (a round in which enough voters were) must be a single history.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from distro_optim.strategy.rounds.trust.succession import (
    Candidacy,
    Peer,
    Promise,
    Roster,
    Vote,
    election,
    goes_on,
    is_followed,
)

Chain = tuple[tuple[int, bytes], ...]
"""A history: for each round that was counted or tried, its term and host."""


@dataclass(frozen=True)
class Round:
    """A round that a host has begun."""

    term: int
    number: int
    roster: Roster
    host: bytes
    chain: Chain


@dataclass(frozen=True)
class Hosting:
    """Somebody hosts."""

    term: int
    roster: Roster
    chain: Chain
    begun: Round | None = None
    proposed: Roster | None = None


@dataclass(frozen=True)
class State:
    """All there is. ``chains`` and ``hosts`` go by the peers' names."""

    peers: tuple[Peer, ...]
    chains: tuple[Chain, ...]
    hosts: tuple[Hosting | None, ...]
    candidacies: frozenset[Candidacy] = frozenset()
    votes: frozenset[tuple[Vote, Chain]] = frozenset()
    rounds: frozenset[Round] = frozenset()
    reports: frozenset[tuple[Round, bytes]] = frozenset()
    proposals: frozenset[tuple[Roster, Roster, bytes, Chain]] = frozenset()
    promises: frozenset[Promise] = frozenset()
    good: frozenset[tuple[Roster, Chain]] = frozenset()
    counted: Chain = ()
    restarts: int = 0


@dataclass(frozen=True)
class Bounds:
    """How far to go: the last term, rounds of a history, changes of roster in a term, restarts; peers of the lowest
    numbers that stand for election."""

    terms: int = 3
    rounds: int = 2
    rosters: int = 0
    restarts: int = 0
    candidates: int = 5


class SplitBrain(AssertionError):
    """Two histories were counted."""


def begin(peers: int, voters: int) -> State:
    """Peer 0 hosts; the first ``voters`` vote."""
    names = [bytes([number, 0]) for number in range(peers)]
    roster = Roster(1, 0, frozenset(names[:voters]))
    made = tuple(
        Peer(name, roster if name in roster.voters else None, term=1, voted=names[0] if name == names[0] else None)
        for name in names
    )
    hosts: tuple[Hosting | None, ...] = (Hosting(1, roster, ()), *[None] * (peers - 1))
    return State(made, ((),) * peers, hosts)


def _put(items: tuple, place: int, item: object) -> tuple:  # type: ignore[type-arg]
    return (*items[:place], item, *items[place + 1 :])


def steps(state: State, bounds: Bounds) -> Iterator[State]:
    """Everything that can happen next."""
    for place, peer in enumerate(state.peers):
        yield from _campaign(state, bounds, place, peer)
        yield from _listen(state, place, peer)
        if (hosting := state.hosts[place]) is not None:
            yield from _host(state, bounds, place, peer, hosting)
        if state.restarts < bounds.restarts:
            blank = Peer(bytes([peer.me[0], peer.me[1] + 1]))
            yield replace(
                state,
                peers=_put(state.peers, place, blank),
                chains=_put(state.chains, place, ()),
                hosts=_put(state.hosts, place, None),
                restarts=state.restarts + 1,
            )


def _campaign(state: State, bounds: Bounds, place: int, peer: Peer) -> Iterator[State]:
    stands = place <= bounds.candidates and peer.may_vote and state.hosts[place] is None
    if stands and peer.roster is not None and peer.term < bounds.terms:
        mine = Candidacy(peer.term + 1, peer.me, peer.roster.which)
        if mine not in state.candidacies:
            yield replace(state, candidacies=state.candidacies | {mine})
    for candidacy in state.candidacies:
        if candidacy.candidate != peer.me or peer.roster is None:
            continue
        ballots = dict(state.votes)
        newest = election(peer.roster, candidacy, ballots)
        hosting = state.hosts[place]
        if newest is None or peer.term != candidacy.term or (hosting is not None and hosting.term >= candidacy.term):
            continue
        begins = Hosting(candidacy.term, peer.roster, ballots[newest])
        yield replace(state, hosts=_put(state.hosts, place, begins))


def _listen(state: State, place: int, peer: Peer) -> Iterator[State]:
    for candidacy in state.candidacies:
        after, vote = peer.vote(candidacy)
        if vote is not None and (vote, state.chains[place]) not in state.votes:
            yield replace(
                state, peers=_put(state.peers, place, after), votes=state.votes | {(vote, state.chains[place])}
            )
    for round_ in state.rounds:
        after, counts = peer.take_round(round_.term, round_.number, round_.roster, round_.host)
        if after is peer or (after == peer and (not counts or (round_, peer.me) in state.reports)):
            continue
        newer = after.position == (round_.term, round_.number)
        yield replace(
            state,
            peers=_put(state.peers, place, after),
            chains=_put(state.chains, place, round_.chain) if newer else state.chains,
            reports=state.reports | {(round_, peer.me)} if counts else state.reports,
        )
    for new, old, host, _ in state.proposals:
        after, promise = peer.promise(new.term, new, old, host)
        if promise is not None and promise not in state.promises:
            yield replace(state, peers=_put(state.peers, place, after), promises=state.promises | {promise})
    for new, chain in state.good:
        after = peer.adopt(new)
        if after != peer:
            newer = peer.position < new.base
            yield replace(
                state,
                peers=_put(state.peers, place, after),
                chains=_put(state.chains, place, chain) if newer else state.chains,
            )


def _host(state: State, bounds: Bounds, place: int, peer: Peer, hosting: Hosting) -> Iterator[State]:
    if peer.term > hosting.term:
        yield replace(state, hosts=_put(state.hosts, place, None))  # it has heard of a later one, and stops
        return
    if hosting.begun is None and hosting.proposed is None and len(hosting.chain) < bounds.rounds:
        chain = (*hosting.chain, (hosting.term, peer.me))
        begun = Round(hosting.term, len(chain), hosting.roster, peer.me, chain)
        yield replace(
            state, hosts=_put(state.hosts, place, replace(hosting, begun=begun)), rounds=state.rounds | {begun}
        )
    if hosting.begun is not None:
        begun = hosting.begun
        present = {voter for round_, voter in state.reports if round_ == begun}
        if peer.me in present and goes_on(hosting.roster, present):
            longer, shorter = sorted((begun.chain, state.counted), key=len, reverse=True)
            if longer[: len(shorter)] != shorter:
                raise SplitBrain(f"{begun.chain} was counted after {state.counted}")
            ended = replace(hosting, chain=begun.chain, begun=None)
            yield replace(state, hosts=_put(state.hosts, place, ended), counted=longer)
    yield from _change_roster(state, bounds, place, peer, hosting)


def _change_roster(state: State, bounds: Bounds, place: int, peer: Peer, hosting: Hosting) -> Iterator[State]:
    old = hosting.roster
    if hosting.proposed is None:
        if hosting.begun is not None or old.number >= bounds.rosters or peer.roster != old:
            return
        base = (hosting.chain[-1][0], len(hosting.chain)) if hosting.chain else (0, 0)
        everybody = [other.me for other in state.peers]
        for number in range(1 << len(everybody)):
            voters = frozenset(name for bit, name in enumerate(everybody) if number >> bit & 1)
            if peer.me in voters and voters != old.voters:
                new = Roster(hosting.term, old.number + 1, voters, base)
                yield replace(
                    state,
                    hosts=_put(state.hosts, place, replace(hosting, proposed=new)),
                    proposals=state.proposals | {(new, old, peer.me, hosting.chain)},
                )
        return
    if is_followed(old, hosting.proposed, state.promises):
        changed = replace(hosting, roster=hosting.proposed, proposed=None)
        yield replace(
            state,
            peers=_put(state.peers, place, peer.adopt(hosting.proposed)),
            hosts=_put(state.hosts, place, changed),
            good=state.good | {(hosting.proposed, hosting.chain)},
        )


def leaps(state: State, bounds: Bounds) -> Iterator[State]:
    """What can happen next if messages come at once or never: for every set of peers that can be reached just then."""
    names = [peer.me for peer in state.peers]
    for number in range(1 << len(names)):
        reached = {name for bit, name in enumerate(names) if number >> bit & 1}
        for place, peer in enumerate(state.peers):
            if peer.me not in reached:
                continue
            inputs = [*_campaign(state, bounds, place, peer)]
            hosting = state.hosts[place]
            if hosting is not None:
                inputs += _host(state, bounds, place, peer, hosting)
            for asked in inputs:
                yield _settled(asked, bounds, place, reached)
    if state.restarts < bounds.restarts:
        everything = replace(bounds, terms=0, rounds=0, rosters=0)
        yield from (after for after in steps(state, everything) if after.restarts > state.restarts)


def _settled(state: State, bounds: Bounds, place: int, reached: set[bytes]) -> State:
    """All that were reached answer, what follows from the answers is done, and no message is left."""
    for listener, name in enumerate(peer.me for peer in state.peers):
        if name in reached:
            while (after := next(_listen(state, listener, state.peers[listener]), None)) is not None:
                state = after
    no_more = replace(bounds, terms=0, rounds=0, rosters=0)
    peer, hosting = state.peers[place], state.hosts[place]
    outcome = list(_campaign(state, no_more, place, peer))
    if hosting is not None and not outcome:
        outcome = list(_host(state, no_more, place, peer, hosting))
    if outcome:
        state = outcome[0]
        for listener, name in enumerate(peer.me for peer in state.peers):
            if name in reached and state.good:
                while (after := next(_listen(state, listener, state.peers[listener]), None)) is not None:
                    state = after
    hosts = tuple(None if one is None else replace(one, begun=None) for one in state.hosts)
    nothing: frozenset[Any] = frozenset()
    return replace(
        state, hosts=hosts, candidacies=nothing, votes=nothing, rounds=nothing, reports=nothing, proposals=nothing
    )


def explore(start: State, bounds: Bounds, limit: int, *, at_once: bool = False) -> tuple[int, int]:
    """Goes through every state that can be reached; gives how many there are, and the longest history counted.

    Raises:
        SplitBrain: two histories were counted.
        AssertionError: there are more than ``limit`` states.
    """
    seen, left, longest = {start}, [start], 0
    while left:
        state = left.pop()
        longest = max(longest, len({term for term, _ in state.counted}))
        for after in leaps(state, bounds) if at_once else steps(state, bounds):
            if after not in seen:
                seen.add(after)
                left.append(after)
        assert len(seen) <= limit
    return len(seen), longest


def walk(start: State, bounds: Bounds, length: int, draw: random.Random) -> State:
    """One way through it, at random."""
    state = start
    for _ in range(length):
        after = list(steps(state, bounds))
        if not after:
            break
        state = draw.choice(after)
    return state
