"""Who votes on the next host of a run: lists of voters that follow one another, as the host says. No I/O.

The part of :mod:`.succeeding` for the time while there is a host. A host proposes a list when others are there than the
present one has; its voters promise not to vote by the old one any more, and with enough promises the new one is good.
Beside the list the host says what it leaves behind (:mod:`.estate`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Final

from ....comm.addresses import EndpointAddr
from ....comm.signing import SecretKey
from .estate import Estate, EstateBook
from .succession import Peer, Promise, Roster, is_followed
from .succession_messages import (
    MAX_VOTERS,
    NEVER,
    EstatePart,
    Here,
    Pledge,
    Proposal,
    Said,
    VoterList,
    key_of,
    open_letter,
    repeat_letter,
    run_mark,
    seal_letter,
)
from .succession_outcomes import Inherit, Outcome, Say

__all__ = ["SUCCESSION_AFTER", "VoterLists"]

SUCCESSION_AFTER: Final = 15.0
"""Seconds for which a host may be silent. Longer than the 10 seconds after which a link counts as broken and a dial."""

_KEPT_ROSTERS: Final = 4
_U32: Final = 0xFFFF_FFFF
_TENTHS: Final = 10


@dataclass
class _Change:
    """The roster that is to follow the present one, the host's letter with it, and those with the promises so far."""

    list: VoterList
    old: Roster
    letter: bytes = b""
    promises: dict[bytes, tuple[Promise, bytes]] = field(default_factory=dict)


class VoterLists:
    """What a host and its voters agree on; see the module, and :class:`~.succeeding.Succession` for the arguments."""

    def __init__(
        self,
        key: SecretKey,
        run_id: str,
        *,
        number: bytes,
        host: bytes | None,
        term: int | None = None,
        after: float = SUCCESSION_AFTER,
    ) -> None:
        self.address = EndpointAddr(key.public)
        self._key = key
        self._run = run_mark(run_id)
        self._me = key.public + number
        self._after = after
        self._peer = Peer(self._me)
        self._host_key = host
        self._host: bytes | None = None  # its name
        self._term = 0  # in which it hosts
        self._order: tuple[bytes, ...] = ()
        self._hosts = term is not None
        self._known: dict[tuple[int, int], Roster] = {}
        self._here: dict[bytes, tuple[Here, float]] = {}  # by key
        self._members: tuple[bytes, ...] = ()
        self.running = False
        self._is_eligible = False
        self._is_over = False
        self._is_host_leaving = False
        self._silence = 0.0
        self._change: _Change | None = None
        self._proof: tuple[bytes, ...] = ()  # promises for the present roster
        self._grounds: tuple[bytes, ...] = ()  # letters by which those who follow know that the present roster is good
        self._old: tuple[int, int] | None = None
        self._wants = False  # to be a voter
        self._resigned: dict[bytes, bytes] = {}  # voters of the present roster that have left, with their letters
        self._due: dict[str, float] = {}
        self._estate = EstateBook()
        self._count = 0
        self._out: list[Outcome] = []
        if term is not None:
            first = VoterList(term, 0, (self._me,), (0, 0))
            self._peer = Peer(self._me, first.roster, term=term, voted=self._me)
            self._host, self._host_key, self._term, self._order = self._me, key.public, term, first.voters

    @property
    def has_left(self) -> bool:
        """Whether we have voted against the host, and no other has been elected yet."""
        return not self._hosts and self._peer.term > self._term

    @property
    def estate(self) -> Estate:
        """What we leave behind as a host, or what the host has left us so far."""
        return self._estate.ours

    def take(self) -> list[Outcome]:
        """What is to be done since the last call."""
        out, self._out = self._out, []
        return out

    def leave_behind(self, estate: Estate) -> None:
        """What whoever hosts after us needs, if we host; it is said to all when it changes."""
        if self._estate.write(estate, self._term):
            self._due.pop("estate", None)
            self._due.pop("proposal", None)

    # -- the host ------------------------------------------------------------------------------------------------------

    def _say_estate(self) -> None:
        number = self._estate.latest[1]
        if not number:
            return  # there is nothing that nobody knows
        parts = self._estate.ours.parts()
        for place, data in enumerate(parts):
            self._say(EstatePart(self._me, self._term, number, place, len(parts), data))

    def _begin_change(self) -> bool:
        """Whether another roster than the present one is proposed now."""
        roster, wanted = self._peer.roster, self._wanted()
        if roster is None or roster.voters == set(wanted):
            return False
        number = roster.number + 1 if roster.term == self._term else 0
        new = VoterList(self._term, number, wanted, self._peer.position)
        self._peer, promise = self._peer.promise(self._term, new.roster, roster, self._me)
        if promise is None:
            return False
        change = self._change = _Change(new, roster)
        letter = self._seal(Pledge(promise.old, promise.new, promise.voter))
        change.promises[self._me] = (promise, letter)
        for voter, left in self._resigned.items():
            change.promises[voter] = (Promise(promise.old, promise.new, voter), left)
        self._out.append(Say(letter))
        self._end_change()
        return self._change is not None

    def _wanted(self) -> tuple[bytes, ...]:
        """Who should vote: we, and the epoch's clients that are not on probation and have said their names."""
        if not self._is_eligible:
            return (self._me,)
        names = [self._here[key][0].name for key in self._members if key in self._here]
        return tuple(dict.fromkeys([self._me, *names]))[:MAX_VOTERS]

    def _hear_pledge(self, said: Pledge, letter: bytes) -> None:
        change, roster = self._change, self._peer.roster
        leaves = said.new == NEVER
        if leaves and roster is not None and said.old == roster.which and said.voter in roster.voters:
            self._resigned[said.voter] = letter
        if leaves and said.voter == self._host and not self._hosts:
            self._is_host_leaving = True  # what still comes of it does not count: nobody need wait
            self._silence = max(self._silence, self._after)
        if change is None or said.old != change.old.which or said.voter not in change.old.voters:
            return
        if leaves or said.new == change.list.roster.which:
            change.promises[said.voter] = (said.promise(change.list.roster.which), letter)
            self._end_change()

    def _end_change(self) -> None:
        """Makes the new roster the present one, once enough have promised it."""
        change = self._change
        if change is None or not is_followed(change.old, change.list.roster, (p for p, _ in change.promises.values())):
            return
        if not self._take_on(change.list):
            return
        promises = tuple(letter for _, letter in change.promises.values())[: MAX_VOTERS // 2 + 1]
        if self._hosts:
            self._old = change.old.which
            self._proof = promises
            self._propose()  # at once: who has not heard of it cannot vote by it
        else:
            self._grounds = (*self._grounds[:1], change.letter, *promises)

    def _take_on(self, new: VoterList) -> bool:
        """``new`` is good; False if we cannot vote by it yet."""
        roster = new.roster
        self._known[roster.which] = roster
        self._known = dict(list(self._known.items())[-_KEPT_ROSTERS:])
        if self._me not in roster.voters:
            self._peer, self._order = replace(self._peer, roster=None, promised=None), ()
        elif self._hosts or (self.running and self._peer.position >= roster.base):
            self._peer, self._order = self._peer.adopt(roster), new.voters
        else:
            return False
        self._change, self._resigned = None, {}
        return True

    def _propose(self) -> None:
        change, roster = self._change, self._peer.roster
        tenths, estate = min(0xFFFF, round(self._after * _TENTHS)), self._estate.latest[1]
        if roster is not None:
            # Also while it is to be followed by another: who has not heard that it is good cannot promise.
            present = VoterList(roster.term, roster.number, self._order, roster.base)
            self._say(Proposal(self._me, self._term, present, self._old, self._proof, tenths, estate))
        if change is not None:
            self._say(Proposal(self._me, self._term, change.list, change.old.which, (), tenths, estate))

    # -- those who follow ----------------------------------------------------------------------------------------------

    def _hear_proposal(self, said: Proposal, letter: bytes) -> None:
        if self._hosts or self.has_left or key_of(said.host) != self._host_key:
            return
        if said.host != self._host:
            if said.term < self._term or (self._host is not None and said.term == self._term):
                return
            # The first that we hear of it; or it was started again, and nobody else had been elected meanwhile.
            self._peer = Peer(self._me, term=said.term, voted=said.host)
            self._host, self._term, self._order, self._known, self._grounds = said.host, said.term, (), {}, ()
            self._is_host_leaving = False
        if said.term != self._term:
            return
        self._after = said.after / _TENTHS
        self._inherit(self._estate.announced((said.term, said.estate)))
        new = said.voters.roster
        if said.old is None or said.promises:
            self._adopt(said, new, letter)
        else:
            self._promise(said, new, letter)
        self._wants = self._me not in new.voters and self._key.public in self._members

    def _hear_estate(self, said: EstatePart) -> None:
        if self._hosts or self.has_left or key_of(said.host) != self._host_key or said.term < self._term:
            return
        self._inherit(self._estate.hear((said.term, said.number), said.place, said.count, said.data))

    def _inherit(self, estate: Estate | None) -> None:
        if estate is not None:
            self._out.append(Inherit(estate))

    def _promise(self, said: Proposal, new: Roster, letter: bytes) -> None:
        """``new`` is to follow: promises it, if we vote by the one before; and counts the others' promises, since the
        host may be gone before it says that there are enough."""
        mine, known = self._peer.roster, None if said.old is None else self._known.get(said.old)
        old = mine if mine is not None and mine.which == said.old else known
        if old is None or new.term != self._term:
            return
        begun = self._change.list.roster.which if self._change is not None else old.which
        if new.which < begun or (mine is not None and new.which <= mine.which):
            return  # what is repeated may be old
        if self._change is None or self._change.list != said.voters:
            self._change = _Change(said.voters, old, letter)
        if mine != old:
            return
        self._peer, promise = self._peer.promise(said.term, new, old, said.host)
        if promise is not None:
            pledge = Pledge(promise.old, promise.new, promise.voter)
            self._change.promises[self._me] = (promise, self._seal(pledge))
            self._say(pledge)
            self._end_change()

    def _adopt(self, said: Proposal, new: Roster, letter: bytes) -> None:
        """``new`` is good: by the promises if we know whose they had to be, else by the word of the host."""
        roster = self._peer.roster
        if roster == new:
            self._grounds = (letter,)  # enough by itself, whatever it was that we believed
            return
        newest = max(self._known, default=(0, 0))  # what is said again, by whomever, changes nothing
        if new.which < newest or (roster is not None and new.which <= roster.which):
            return
        is_good = roster is None or roster.which != said.old or is_followed(roster, new, self._promises(said))
        if is_good and self._take_on(said.voters):
            self._grounds = (letter,)

    def _promises(self, said: Proposal) -> Iterable[Promise]:
        for letter in said.promises:
            _, given = open_letter(self._run, letter)
            if isinstance(given, Pledge):
                yield given.promise(said.voters.roster.which)

    # -- steps ---------------------------------------------------------------------------------------------------------

    def _seal(self, said: Said) -> bytes:
        self._count = (self._count + 1) & _U32
        return seal_letter(self._key, self._run, self._count, said)

    def _say(self, said: Said) -> None:
        self._out.append(Say(self._seal(said)))

    def _repeat_the_host(self) -> None:
        """Says once more what the host has said about who votes: it is silent, and others may not have heard it all.
        A voter that does not know that it is one would be missed for ever."""
        change = self._change
        begun = () if change is None else (change.letter, *(letter for _, letter in change.promises.values()))
        for letter in filter(None, dict.fromkeys((*self._grounds, *begun))):
            self._count = (self._count + 1) & _U32
            self._out.append(Say(repeat_letter(self._count, letter)))

    def _is_due(self, what: str, now: float, every: float) -> bool:
        """Whether ``what`` is to be done now, and not again for ``every`` seconds."""
        if now < self._due.get(what, now):
            return False
        self._due[what] = now + every
        return True
