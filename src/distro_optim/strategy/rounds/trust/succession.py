"""Who hosts a run when its host is gone: terms, votes, and lists of voters that follow one another. No I/O.

It is the part that must not be wrong, with its proof: ``tests/rounds/test_succession.py`` goes through all that can
happen among up to five peers. When these rules are used, :mod:`.succeeding` decides.

A host hosts in a *term*. Each epoch has a *roster*: the voters, signed by the host of the term. These rules make two
hosts at a time impossible, whatever is lost, late, or cut off from whom:

1. A voter votes once in a term, for a candidate that has its very roster, and takes nothing of an earlier term any
   more. More than half of a roster elect.
2. The host goes on with a round only if at most half of the voters are missing from it. So whoever is elected has the
   vote of somebody who was in every round that counted, and begins with the newest state among its voters.
3. A roster is followed by another once so many voters of the old one have promised not to vote by it any more that
   those who have not are at most half. Only with these promises is the new one good, for old and new voters alike. It
   says which round they begin with, which they have loaded by then.
4. A peer that has forgotten everything (its process was started again) has no roster and another name: it neither votes
   nor counts in rounds until it is in a new one. So a name is a key with a number that is drawn at each start.

Of two halves that are cut off from each other the one with the host goes on; with three parts perhaps none does, and
all wait. That is the price.

All messages are signed by those who say them; here, their signatures are checked already.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

__all__ = ["Candidacy", "Peer", "Promise", "Roster", "Vote", "election", "goes_on", "is_followed"]

Position = tuple[int, int]
"""Term and number of a round; the later one is larger."""


@dataclass(frozen=True)
class Roster:
    """Who votes, from one epoch on.

    Attributes:
        term, number: of the host that made it, and which of its rosters it is; of two, the later one is larger.
        voters: public keys.
        base: the last round before; everybody who votes by this roster has what came of it.
    """

    term: int
    number: int
    voters: frozenset[bytes]
    base: Position = (0, 0)

    @property
    def which(self) -> tuple[int, int]:
        """Names it."""
        return self.term, self.number


@dataclass(frozen=True)
class Candidacy:
    """Somebody asks to be voted for."""

    term: int
    candidate: bytes
    roster: tuple[int, int]


@dataclass(frozen=True)
class Vote:
    """A voter votes, and says how far it is."""

    term: int
    candidate: bytes
    roster: tuple[int, int]
    voter: bytes
    position: Position


@dataclass(frozen=True)
class Promise:
    """A voter of roster ``old`` will not vote by it any more, but by ``new``, once that is good."""

    old: tuple[int, int]
    new: tuple[int, int]
    voter: bytes


@dataclass(frozen=True)
class Peer:
    """What one peer has to remember. Each of its methods returns the peer as it is afterwards.

    Attributes:
        me: public key.
        roster: by which it votes; None if it has none.
        promised: the roster that it has promised to vote by; None if the present one holds.
        term: the latest it knows of, of which it has heard the host, or has voted in it.
        voted: for whom in that term; None for nobody.
        position: the last round it was in.
    """

    me: bytes
    roster: Roster | None = None
    promised: tuple[int, int] | None = None
    term: int = 0
    voted: bytes | None = None
    position: Position = (0, 0)

    @property
    def may_vote(self) -> bool:
        """Whether its vote counts for anything."""
        return self.roster is not None and self.promised is None and self.me in self.roster.voters

    def vote(self, asked: Candidacy) -> tuple[Peer, Vote | None]:
        """Answers a candidacy; None refuses it."""
        roster = self.roster
        if roster is None or not self.may_vote or asked.roster != roster.which or asked.candidate not in roster.voters:
            return self, None
        is_new = asked.term > self.term
        if not is_new and not (asked.term == self.term and self.voted == asked.candidate):
            return self, None
        after = replace(self, term=asked.term, voted=asked.candidate)
        return after, Vote(asked.term, asked.candidate, roster.which, self.me, self.position)

    def follow(self, term: int, roster: Roster, host: bytes) -> Peer | None:
        """The host of ``term``, elected by or the maker of ``roster``, speaks; None if it is heard no more.

        That it was elected is proven: by the votes, or as the host of the first term by its key.
        """
        if term < self.term or (term == self.term and self.voted not in (None, host)):
            return None
        after = self if term == self.term and self.voted == host else replace(self, term=term, voted=host)
        if self.promised is not None and self.roster == roster and term > self.promised[0]:
            # More than half have voted by the present roster since: the promised one can never become good.
            after = replace(after, promised=None)
        return after

    def take_round(self, term: int, number: int, roster: Roster, host: bytes) -> tuple[Peer, bool]:
        """A round of the host of ``term``: the peer is in it, or it is refused; and whether it counts as a voter."""
        after = self.follow(term, roster, host)
        if after is None:
            return self, False
        counts = after.roster == roster and self.me in roster.voters
        return replace(after, position=max(after.position, (term, number))), counts

    def promise(self, term: int, new: Roster, old: Roster, host: bytes) -> tuple[Peer, Promise | None]:
        """The host of ``term`` wants ``new`` to follow ``old``; None refuses it."""
        after = self.follow(term, old, host)
        if after is None or after.roster != old or self.me not in old.voters or new.which <= old.which:
            return self, None
        if new.term != term or after.promised not in (None, new.which):
            return self, None
        return replace(after, promised=new.which), Promise(old.which, new.which, self.me)

    def adopt(self, new: Roster) -> Peer:
        """``new`` is good, as the promises show (see :func:`is_followed`), and its weights are loaded here."""
        if self.me not in new.voters or (self.roster is not None and new.which <= self.roster.which):
            return self
        if new.term < self.term:
            return self  # a later host is known, and may have been elected by the roster before
        voted = self.voted if new.term == self.term else None
        return replace(
            self, roster=new, promised=None, term=new.term, voted=voted, position=max(self.position, new.base)
        )


def election(roster: Roster, candidacy: Candidacy, votes: Iterable[Vote]) -> Vote | None:
    """The vote of the one whose state the candidate takes on, if more than half have voted for it; else None."""
    counted = {
        vote.voter: vote
        for vote in votes
        if (vote.term, vote.candidate, vote.roster) == (candidacy.term, candidacy.candidate, roster.which)
        and candidacy.roster == roster.which
        and vote.voter in roster.voters
    }
    if 2 * len(counted) <= len(roster.voters):
        return None
    return max(counted.values(), key=lambda vote: (vote.position, vote.voter))


def goes_on(roster: Roster, present: Collection[bytes]) -> bool:
    """Whether a round counts that these voters, the host among them, were in: no others can elect somebody."""
    return 2 * len(roster.voters.difference(present)) <= len(roster.voters)


def is_followed(old: Roster, new: Roster, promises: Iterable[Promise]) -> bool:
    """Whether ``new`` is good: so many voters of ``old`` have promised it that the rest cannot elect anybody."""
    given = {promise.voter for promise in promises if (promise.old, promise.new) == (old.which, new.which)}
    return goes_on(old, given)
