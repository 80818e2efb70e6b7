"""One peer's part in keeping a run hosted: who votes, whether the host is silent, who follows it. No I/O.

Messages, the coordinator's states and the time go in; what is to be said and done comes out. The rules that must not be
wrong are those of :mod:`.succession`; here is when they are used::

    the host          says every 5 seconds who votes; when that changes, the voters of before promise first
    host silent       everybody says every 2 seconds that it is there, how far it is, and that it hears no host
    ... for 15 s      if more than half of the voters say so, the one that is furthest, and of those the first of the
                      list, stands for election; who is asked votes if it hears no host and is not further itself
    elected           it hosts from its own state, and shows the votes to all, who move to it
    no majority       everybody waits, and says so; who has not voted goes back to its host as soon as that is heard

Whether a host may end a round is :meth:`Succession.may_go_on`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

from ....comm.addresses import EndpointAddr
from ....comm.signing import PUBLIC_KEY_SIZE, SecretKey
from ....coordinator.rules.probation import on_probation
from ....coordinator.types import MAX_NUM_WITNESSES, ClientState, Coordinator, RunState
from ....errors import ProtocolError
from .succession import Candidacy, Peer, Roster, Vote, election, goes_on
from .succession_messages import (
    MAX_VOTERS,
    NEVER,
    NUMBER_SIZE,
    Ballot,
    Elected,
    EstatePart,
    Here,
    Pledge,
    Proposal,
    Stands,
    key_of,
    letter_in,
    open_letter,
)
from .succession_outcomes import HOSTS_NOW, Follow, Leave, TakeOver, Tell
from .succession_words import others_are_gone, too_few_in_reach, without_a_vote, without_the_estate
from .voter_lists import SUCCESSION_AFTER, VoterLists

__all__ = ["SUCCESSION_AFTER", "Succession", "position_in"]

HOST_SECONDS: Final = 5.0
"""Between two times that the host says who votes. Chosen so that it costs next to nothing."""

ESTATE_SECONDS: Final = 30.0
"""Between two times that the host says what it leaves behind, for those that have not heard it. Chosen arbitrarily."""

HERE_SECONDS: Final = 2.0
"""Between two times that a peer says that it is there; shorter if hosts may be silent for less than 8 seconds."""

STEP_SECONDS: Final = 1.0
"""Of silence between two looks at most: if more time went by, it is we who slept."""

CAMPAIGN_SECONDS: Final = 4.0
"""For the votes to come. Chosen above the time that gossip takes to heal."""

RANK_SECONDS: Final = 1.5
"""By which each candidate lets those before it go first."""

CHALLENGE_SECONDS: Final = 10.0
"""Between two times that a host stands because a voter has left it, which costs all others a new link. Chosen
arbitrarily."""

TELL_SECONDS: Final = 15.0
"""Between two times that a peer says why it waits."""

_STEP_BITS: Final = 34
_PHASES: Final = {RunState.WARMUP: 1, RunState.ROUND_TRAIN: 2, RunState.ROUND_WITNESS: 2, RunState.COOLDOWN: 3}


@dataclass
class _Campaign:
    """We stand for election; the votes by the voters' names, each with the letter that proves it."""

    asked: Candidacy
    until: float
    votes: dict[bytes, tuple[Vote, bytes]] = field(default_factory=dict)


def position_in(state: Coordinator) -> int:
    """How far a run is, as a number that never falls under one host: epoch, step and phase."""
    progress = state.progress
    return (progress.epoch << _STEP_BITS) + (progress.step << 2) + _PHASES.get(state.run_state, 0)


class Succession(VoterLists):
    """See the module. Take what is to be done with :meth:`take` after each input.

    Args:
        key: ours.
        run_id: the run.
        number: 8 bytes, drawn at this start of the program.
        host: public key of the host that we were told of; None if we do not know it: then we only look on.
        term: the term in which we host; None if we do not.
        after: seconds for which a host may be silent; a host's counts for all.
        may_host: whether we stand for election.

    Attributes:
        address: where others reach us.
        running: whether we have the run's weights.
    """

    def __init__(
        self,
        key: SecretKey,
        run_id: str,
        *,
        number: bytes,
        host: bytes | None,
        term: int | None = None,
        after: float = SUCCESSION_AFTER,
        may_host: bool = True,
    ) -> None:
        super().__init__(key, run_id, number=number, host=host, term=term, after=after)
        self._may_host = may_host
        self._blocked = False
        self._at: float | None = None
        self._campaign: _Campaign | None = None
        self._elected: Elected | None = None
        self._wait_until = 0.0  # somebody stands for election
        self._rumours: dict[bytes, tuple[bytes, int]] = {}
        self._handed: tuple[Ballot, bytes] | None = None  # the vote of a host that leaves, for us
        self._heir: Vote | None = None  # our own, as a host that leaves

    # -- what there is to know -----------------------------------------------------------------------------------------

    @property
    def hosts(self) -> bool:
        """Whether we host."""
        return self._hosts

    @property
    def term(self) -> int:
        """In which the host hosts; 0 if none has said so."""
        return self._term

    @property
    def host(self) -> bytes | None:
        """Its public key; None while there is none, or we do not know it."""
        return None if self.has_left else self._host_key

    @property
    def voters(self) -> tuple[bytes, ...]:
        """Public keys of the roster by which we vote, in the order in which they may host; empty if we do not vote."""
        return tuple(map(key_of, self._order)) if self._peer.may_vote else ()

    @property
    def silence(self) -> float:
        """Seconds for which the host has not been heard of; of a host, those for which it may not go on."""
        return self._silence

    @property
    def wants_to_know(self) -> bool:
        """Whether others should be asked who hosts, since we hear no host, or could not go on as one."""
        return not self._is_over and (self.has_left or self._silence >= self._after / 2 or self._is_left_alone)

    @property
    def _is_left_alone(self) -> bool:
        """Whether we host so few of the voters that the others may have elected somebody, as while we slept."""
        roster = self._peer.roster
        if not self._hosts or roster is None:
            return False
        present = {name for name in roster.voters if name == self._me or key_of(name) in self._members}
        return not goes_on(roster, present | self._resigned.keys())

    # -- inputs --------------------------------------------------------------------------------------------------------

    def see(self, state: Coordinator) -> bool:
        """A state of the host's coordinator; False if it is not to be taken."""
        if self.has_left:
            return False
        newcomers = on_probation(state)
        before = self._members
        self._members = tuple(
            client.id.p2p_identity
            for place, client in enumerate(state.epoch_state.clients)
            if client.state is ClientState.HEALTHY and place not in newcomers
        )
        if self._members != before:
            self._due.pop("proposal", None)
            self._due.pop("estate", None)
        # Where only some report on a round, nobody knows whether the others were in it.
        self._is_eligible = state.config.witness_nodes == 0 and len(self._members) <= MAX_NUM_WITNESSES
        self._is_over = self._is_over or state.run_state is RunState.FINISHED
        position = (self._term, position_in(state))
        if self._host is None or self._peer.roster is None:
            self._peer = replace(self._peer, position=max(self._peer.position, position))
        else:
            self._peer, _ = self._peer.take_round(*position, self._peer.roster, self._host)
        return True

    def lead(self, host: bytes) -> None:
        """This is the host's public key, as we were told before anything else."""
        self._host_key = host

    def heard(self) -> None:
        """Bytes of the host's coordinator have come."""
        if not (self._hosts or self.has_left or self._is_host_leaving):
            self._silence = 0.0

    def resign(self) -> None:
        """We leave: without us, and without waiting for us, the others may go on. A host votes for one of them first,
        as without its vote a run of two has no majority."""
        roster = self._peer.roster
        if roster is not None and self._peer.may_vote and not self._is_over:
            heirs = [name for name in self._order if name != self._me and name not in self._resigned]
            if self._hosts and heirs:
                self._peer, self._heir = self._peer.vote(Candidacy(self._peer.term + 1, heirs[0], roster.which))
            self._peer = replace(self._peer, roster=None)
            if self._heir is None:
                self._say(Pledge(roster.which, NEVER, self._me))
            else:
                self.hand_over()
        self._is_over = True

    @property
    def is_handing_over(self) -> bool:
        """Whether we have left as a host, and the one that we voted for has not said yet that it hosts now."""
        return self._heir is not None

    def hand_over(self) -> None:
        """Says again that we leave, and whom we voted for: what is said just before a program ends may never arrive."""
        if self._heir is not None:
            self._say(_ballot(self._heir))
            self._say(Pledge(self._heir.roster, NEVER, self._me))

    def may_go_on(self, state: Coordinator) -> bool:
        """Whether the round of ``state`` may end, for a host: whether so many voters were in it that no others can
        elect somebody."""
        roster = self._peer.roster
        if not self._hosts or roster is None:
            return not self._hosts
        clients = state.epoch_state.clients
        there = {
            clients[report.proof.index].id.p2p_identity
            for report in state.current_round.witnesses
            if report.proof.index < len(clients)
        }
        present = {name for name in roster.voters if name == self._me or key_of(name) in there}
        present.update(self._resigned)
        self._blocked = self._peer.term != self._term or not goes_on(roster, present)
        return not self._blocked

    def receive(self, data: bytes, now: float) -> None:
        """A letter of a peer, from itself or repeated by another.

        Raises:
            ProtocolError: it is malformed, or not signed by the one that it is about.
        """
        data = letter_in(data)
        sender, said = open_letter(self._run, data)
        if self._heir is not None and isinstance(said, Elected) and said.candidate == self._heir.candidate:
            self._heir = None
        if sender == self._key.public or self._is_over:
            return
        match said:
            case Here():
                if sender in self._members or said.name in self._order:
                    self._here[sender] = (said, now)
            case Proposal():
                self._hear_proposal(said, data)
            case Pledge():
                self._hear_pledge(said, data)
            case Stands():
                self._hear_candidate(said, now)
                self._answer_challenge(said.candidate, said.term, now)
            case EstatePart():
                self._hear_estate(said)
            case Ballot():
                if said.candidate == self._me and said.voter == self._host and not self._hosts:
                    self._handed = (said, data)
                self._count_vote(said, data)
                self._answer_challenge(said.voter, said.term, now)
            case Elected():
                self._hear_elected(said)

    def told(self, by: bytes, host: bytes, term: int, address: EndpointAddr) -> None:
        """We have asked a peer, whose key is proven, who hosts.

        Somebody that has missed an election, or more, believes half of its roster's voters. It follows as one
        that has forgotten everything: what it has promised and voted counts no more.
        """
        if term <= self._term or address.id != host or host == self._key.public:
            return
        if not self.wants_to_know:
            return
        roster = self._peer.roster
        voters = set() if roster is None else {key_of(name) for name in roster.voters}
        if voters and by not in voters:
            return
        if len(self._rumours) < MAX_VOTERS:
            self._rumours[by] = (host, term)
        agreeing = sum(rumour == (host, term) for rumour in self._rumours.values())
        if roster is not None and 2 * agreeing < len(roster.voters):
            return  # with half of them gone over to another roster the others elect nobody
        number = int.from_bytes(self._me[PUBLIC_KEY_SIZE:], "little") + 1
        self._me = self._key.public + (number % (1 << 8 * NUMBER_SIZE)).to_bytes(NUMBER_SIZE, "little")
        self._peer = Peer(self._me, term=term)
        self._order, self._known, self._elected, self._proof, self._old = (), {}, None, (), None
        self._become(term, host + bytes(NUMBER_SIZE), hosts=False)
        self._host = None  # its name is in what it says next
        self._out += [Follow(host, address), Tell(f"the run went on without us: peer {host.hex()[:8]} hosts it now")]

    def tick(self, now: float) -> None:
        """Time passes; call it twice a second."""
        passed = 0.0 if self._at is None else max(0.0, min(STEP_SECONDS, now - self._at))
        self._at = now
        if self._is_over:
            return
        known = {*self._members, *map(key_of, self._order)}
        self._here = {key: entry for key, entry in self._here.items() if key in known}
        if self._hosts:
            self._silence = self._silence + passed if self._blocked else 0.0
            self._lead(now)
        else:
            self._silence += passed
        if self._handed is not None:
            self._inherit_office(*self._handed, now)
        if self._wants and self.running and not self._hosts and self._is_due("here", now, HERE_SECONDS):
            self._say_here()
        if self._peer.roster is not None and self._silence > self._after / 3:
            self._call_for_others(now)
        if self._silence >= self._after and self._peer.may_vote:
            self._consider(now)
        elif self._silence >= self._after and self._members and self._is_due("tell", now, TELL_SECONDS):
            self._out.append(Tell(without_a_vote(self._silence, is_followed=self._host is not None)))

    # -- the host ------------------------------------------------------------------------------------------------------

    def _lead(self, now: float) -> None:
        """Says who votes, and sees to it that those vote who are there."""
        campaign = self._campaign
        if campaign is not None and now < campaign.until and self._is_due("stands", now, STEP_SECONDS):
            self._say(self._stands(campaign.asked))
        if self._peer.term != self._term:
            return  # we stand for another term
        changed = self._change is None and self._begin_change()
        every = HOST_SECONDS if self._change is None else STEP_SECONDS
        if self._is_due("proposal", now, every) or changed:
            self._due["proposal"] = now + every
            self._propose()
        if self._elected is not None and self._is_due("elected", now, HOST_SECONDS):
            self._say(self._elected)
        if self._members and self._is_due("estate", now, ESTATE_SECONDS):
            self._say_estate()

    # -- elections -----------------------------------------------------------------------------------------------------

    @property
    def _may_stand(self) -> bool:
        """Whether we could host: not without the host's list of guests, or with one of which we know that it is old,
        unless nobody else does for long."""
        is_any = self._estate.has_any and self._silence >= 2 * self._after
        return self._may_host and (self._estate.is_complete or is_any)

    def _call_for_others(self, now: float) -> None:
        if self._is_due("here", now, min(HERE_SECONDS, self._after / 4)):
            self._say_here()
            self._repeat_the_host()

    def _say_here(self) -> None:
        self._say(Here(self._me, self._peer.position, self._is_silent))

    @property
    def _is_silent(self) -> bool:
        return self._silence >= self._after / 2

    def _in_reach(self, roster: Roster, now: float) -> list[bytes]:
        """The voters that hear no host either, the one that is to stand first in front."""
        fresh = 3 * min(HERE_SECONDS, self._after / 4) + STEP_SECONDS
        positions = {self._me: self._peer.position}
        for here, at in self._here.values():
            if here.silent and now - at <= fresh and here.name in roster.voters:
                positions[here.name] = here.position
        order = {name: place for place, name in enumerate(self._order)}
        return sorted(
            positions, key=lambda name: ((-positions[name][0], -positions[name][1]), order.get(name, len(order)))
        )

    def _consider(self, now: float) -> None:
        """The host has been silent for too long: stands for election, or says why not."""
        roster, campaign = self._peer.roster, self._campaign
        if roster is None:
            return
        reach = self._in_reach(roster, now)
        if 2 * len(reach) <= len(roster.voters):
            if self._is_due("tell", now, TELL_SECONDS):
                words = others_are_gone if self._hosts else too_few_in_reach
                self._out.append(Tell(words(self._silence, len(roster.voters), len(reach))))
            return
        if campaign is not None and now < campaign.until:
            if self._is_due("stands", now, STEP_SECONDS):
                self._say(self._stands(campaign.asked))
            return
        if campaign is not None:
            self._campaign, self._wait_until = None, now
        patience = RANK_SECONDS * reach.index(self._me)
        is_our_turn = self._silence >= self._after + patience and now >= self._wait_until + patience
        if not is_our_turn:
            return
        if self._may_stand:
            self._stand(now, self._peer.term + 1)
        elif self._is_due("tell", now, TELL_SECONDS):
            self._out.append(Tell(without_the_estate(self._silence)))

    def _inherit_office(self, said: Ballot, letter: bytes, now: float) -> None:
        """The host leaves, and has voted for us: we stand as soon as we are as far as it was."""
        roster = self._peer.roster
        if self._hosts or roster is None or said.roster != roster.which or said.term <= self._peer.term:
            self._handed = None
        elif said.position <= self._peer.position and self._may_stand:
            self._handed = None
            self._stand(now, said.term)
            self._count_vote(said, letter)

    def _stand(self, now: float, term: int) -> None:
        roster = self._peer.roster
        if roster is None:
            return
        asked = Candidacy(term, self._me, roster.which)
        self._peer, vote = self._peer.vote(asked)
        if vote is None:
            return
        self._out.append(Leave())
        self._campaign = _Campaign(asked, now + CAMPAIGN_SECONDS)
        ballot = _ballot(vote)
        self._campaign.votes[self._me] = (vote, self._seal(ballot))
        self._say(self._stands(asked))
        self._due["stands"] = now + STEP_SECONDS
        self._count_up()

    def _stands(self, asked: Candidacy) -> Stands:
        return Stands(asked.term, asked.candidate, asked.roster, self._peer.position)

    def _hear_candidate(self, said: Stands, now: float) -> None:
        # The host itself stands if some have voted for another, who was not elected: they come back in a new term.
        if not (self._is_silent or said.candidate == self._host) or said.position < self._peer.position:
            return
        self._peer, vote = self._peer.vote(Candidacy(said.term, said.candidate, said.roster))
        if vote is not None:
            if self._campaign is not None and self._campaign.asked.term < said.term:
                self._campaign = None
            self._wait_until = now + CAMPAIGN_SECONDS
            self._out.append(Leave())
            self._say(_ballot(vote))

    def _answer_challenge(self, voter: bytes, term: int, now: float) -> None:
        """A voter of ours has left us for a later term: nobody may ever be elected in it, so we stand ourselves."""
        roster = self._peer.roster
        if not self._hosts or not self._may_host or roster is None or voter not in roster.voters:
            return
        if term > self._peer.term and self._is_due("challenge", now, CHALLENGE_SECONDS):
            self._stand(now, term + 1)

    def _count_vote(self, said: Ballot, letter: bytes) -> None:
        campaign = self._campaign
        if campaign is None or said.position > self._peer.position:
            return
        if (said.term, said.candidate) == (campaign.asked.term, self._me):
            campaign.votes[said.voter] = (said.vote, letter)
            self._count_up()

    def _count_up(self) -> None:
        campaign, roster = self._campaign, self._peer.roster
        if campaign is None or roster is None or self._peer.term != campaign.asked.term:
            return
        if election(roster, campaign.asked, [vote for vote, _ in campaign.votes.values()]) is None:
            return
        term = campaign.asked.term
        letters = [letter for vote, letter in campaign.votes.values() if vote.voter in roster.voters]
        needed = len(roster.voters) // 2 + 1
        self._elected = Elected(term, self._me, roster.which, self.address, tuple(letters[:needed]))
        before = self._host_key
        why = "has left" if self._is_host_leaving else f"could not be reached for {self._silence:.0f} s"
        self._become(term, self._me, hosts=True)
        self._estate.take_over(term)
        self._out += [
            TakeOver(term, before, self._estate.ours),
            Tell(f"the host {why}: {HOSTS_NOW}, in term {term}"),
        ]
        self._say(self._elected)

    def _hear_elected(self, said: Elected) -> None:
        roster = self._peer.roster
        if roster is None or roster.which != said.roster:
            roster = self._known.get(said.roster)
        if roster is None or said.term <= self._term or said.term < self._peer.term:
            return
        if key_of(said.candidate) != said.address.id or not self._is_proven(said, roster):
            return
        followed = self._peer.follow(said.term, roster, said.candidate)
        # The same term with another candidate of ours: only one of them can have more than half, and it is this one.
        self._peer = followed if followed is not None else replace(self._peer, voted=said.candidate)
        self._become(said.term, said.candidate, hosts=False)
        self._elected = None
        self._out += [
            Follow(key_of(said.candidate), said.address),
            Tell(f"peer {key_of(said.candidate).hex()[:8]} hosts the run now, in term {said.term}"),
        ]

    def _is_proven(self, said: Elected, roster: Roster) -> bool:
        votes = []
        for letter in said.votes:
            try:
                _, ballot = open_letter(self._run, letter)
            except ProtocolError:
                return False
            if isinstance(ballot, Ballot):
                votes.append(ballot.vote)
        return election(roster, Candidacy(said.term, said.candidate, said.roster), votes) is not None

    def _become(self, term: int, host: bytes, *, hosts: bool) -> None:
        self._term, self._host, self._host_key, self._hosts = term, host, key_of(host), hosts
        self._campaign, self._change, self._silence, self._blocked = None, None, 0.0, False
        self._is_host_leaving = False
        self._wait_until = 0.0
        self._rumours.clear()
        self._handed, self._grounds = None, ()
        for what in ("proposal", "elected", "stands", "here", "tell", "estate"):
            self._due.pop(what, None)


def _ballot(vote: Vote) -> Ballot:
    return Ballot(vote.term, vote.candidate, vote.roster, vote.voter, vote.position)
