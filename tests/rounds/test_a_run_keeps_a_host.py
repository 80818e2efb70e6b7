"""Who hosts, among peers whose messages are late, lost or cut off: in simulated time, with the real letters."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest

from distro_optim.comm.addresses import EndpointAddr, SocketAddr
from distro_optim.comm.announcements import MAX_ANNOUNCEMENT
from distro_optim.comm.signing import SecretKey
from distro_optim.coordinator.types import (
    Client,
    Coordinator,
    NodeIdentity,
    Round,
    RunState,
    Witness,
    WitnessProof,
)
from distro_optim.errors import ProtocolError
from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.rounds.trust.succeeding import Succession
from distro_optim.strategy.rounds.trust.succession_messages import (
    MAX_VOTERS,
    Ballot,
    Elected,
    Here,
    Proposal,
    VoterList,
    open_letter,
    repeat_letter,
    run_mark,
    seal_letter,
)
from distro_optim.strategy.rounds.trust.succession_outcomes import Follow, Say, TakeOver, Tell

RUN = "run"
TICK = 0.5
KEYS = [SecretKey(bytes(31) + bytes([number])) for number in range(1, 8)]


@dataclass
class Peer:
    """A peer with the coordinator that runs if it hosts; ``chain`` are the rounds that it was in, with their terms."""

    succession: Succession
    state: Coordinator
    alive: bool = True
    term: int = 0  # of the coordinator here
    reported: set[int] = field(default_factory=set)
    told: list[str] = field(default_factory=list)
    chain: list[tuple[int, int]] = field(default_factory=list)


class World:
    """Peers that tick twice a second. Letters arrive with the next tick, or are lost."""

    def __init__(self, peers: int, *, loss: float = 0.0, seed: int = 0, after: float = 15.0) -> None:
        self.rng, self.loss, self.now = random.Random(seed), loss, 100.0
        self.groups: list[set[int]] = []
        self.counted: list[tuple[int, int]] = []  # term and step of each round that was ended
        clients = tuple(Client(NodeIdentity.from_single_key(key.public)) for key in KEYS[:peers])
        begins = RunConfig(total_steps=10_000, global_batch_size=8).coordinator_state(RUN)
        begins = replace(
            begins,
            run_state=RunState.ROUND_WITNESS,
            epoch_state=replace(begins.epoch_state, clients=clients),
        )
        self.after = after
        self.peers = [Peer(self.new(number), begins) for number in range(peers)]
        self.peers[0].term = 1
        self.mail: list[tuple[int, bytes]] = []

    def new(self, number: int, host: int = 0, drawn: int = 0) -> Succession:
        made = Succession(
            KEYS[number],
            RUN,
            number=bytes([drawn]) * 8,
            host=KEYS[host].public,
            term=1 if number == host else None,
            after=self.after,
        )
        made.running = True
        return made

    def reach(self, one: int, other: int) -> bool:
        if not (self.peers[one].alive and self.peers[other].alive):
            return False
        return all((one in group) == (other in group) for group in self.groups)

    def hosts(self) -> list[int]:
        return [n for n, peer in enumerate(self.peers) if peer.alive and peer.succession.hosts]

    def run(self, seconds: float) -> None:
        for _ in range(int(seconds / TICK)):
            self.tick()

    def tick(self) -> None:
        self.now += TICK
        mail, self.mail = self.mail, []
        for sender, letter in mail:
            for number, peer in enumerate(self.peers):
                if number != sender and self.reach(sender, number) and self.rng.random() >= self.loss:
                    peer.succession.receive(letter, self.now)
        for number in range(len(self.peers)):
            self.follow_host(number)
        for number, peer in enumerate(self.peers):
            if peer.alive and peer.succession.silence >= self.after and self.now % 5 == 0:
                self.ask_around(number, peer)
            if peer.alive:
                peer.succession.tick(self.now)
                self.carry_out(number, peer)
        for number in self.hosts():
            self.end_round(number)

    def ask_around(self, number: int, peer: Peer) -> None:
        for other, neighbor in enumerate(self.peers):
            host = neighbor.succession.host
            if other != number and self.reach(number, other) and host is not None:
                key = KEYS[other].public
                peer.succession.told(key, host, neighbor.succession.term, EndpointAddr(host))

    def follow_host(self, number: int) -> None:
        succession = self.peers[number].succession
        for host in self.hosts():
            if KEYS[host].public == succession.host and self.reach(number, host):
                chief = self.peers[host]
                if chief.term == succession.term or not succession.term:
                    succession.heard()
                    self.take(number, chief)

    def take(self, number: int, chief: Peer) -> None:
        peer = self.peers[number]
        if peer.succession.see(chief.state):
            peer.state = chief.state
            where = (chief.term, chief.state.progress.step)
            if where not in peer.chain:
                peer.chain.append(where)
            chief.reported.add(number)

    def carry_out(self, number: int, peer: Peer) -> None:
        for what in peer.succession.take():
            match what:
                case Say(data):
                    assert len(data) <= MAX_ANNOUNCEMENT
                    self.mail.append((number, data))
                case TakeOver(term):
                    peer.term, peer.reported = term, set()
                case Follow():
                    peer.reported = set()
                case Tell(text):
                    peer.told.append(text)

    def end_round(self, number: int) -> None:
        """The coordinator of a host: ends a round a tick, if it may."""
        peer = self.peers[number]
        self.take(number, peer)
        reports = tuple(Witness(WitnessProof(0, place, True)) for place in sorted(peer.reported))
        state = replace(
            peer.state, epoch_state=replace(peer.state.epoch_state, rounds=(Round(witnesses=reports),) + (Round(),) * 3)
        )
        if peer.succession.may_go_on(state):
            self.counted.append((peer.term, state.progress.step))
            progress = replace(state.progress, step=state.progress.step + 1)
            peer.state, peer.reported = replace(state, progress=progress), set()

    def check(self) -> None:
        """One history: a host of an earlier term ends no round after one of a later has, and the later one begins at
        the last round that was ended, or behind it."""
        for (term, step), (next_term, next_step) in pairwise(self.counted):
            assert (next_term == term and next_step == step + 1) or (next_term > term and next_step >= step)


@pytest.mark.parametrize("peers", [3, 5])
def test_a_host_that_is_gone_is_followed_within_twenty_seconds_and_again(peers: int) -> None:
    world = World(peers)
    world.run(10)
    assert len(world.peers[1].succession.voters) == peers
    for _ in range((peers - 1) // 2):
        (host,) = world.hosts()
        before = len(world.counted)
        world.peers[host].alive = False
        world.run(20)
        assert len(world.hosts()) == 1
        assert len(world.counted) > before
        world.run(20)
    world.check()
    (host,) = world.hosts()
    term = world.peers[host].succession.term
    assert all(peer.succession.term == term for peer in world.peers if peer.alive)
    assert any("hosts the run now" in text for peer in world.peers for text in peer.told)


def test_while_the_host_is_heard_nobody_else_hosts() -> None:
    world = World(3)
    world.run(40)
    assert world.hosts() == [0]
    assert world.peers[0].term == world.peers[2].succession.term == 1


def test_a_partition_without_a_majority_waits_says_so_and_comes_back() -> None:
    world = World(5)
    world.run(10)
    world.groups = [{3, 4}]
    before = len(world.counted)
    world.run(60)
    assert world.hosts() == [0]
    assert len(world.counted) > before + 100
    assert any("this peer waits for them" in text for text in world.peers[3].told)
    assert not world.peers[3].succession.has_left
    world.groups = []
    world.run(5)
    assert world.peers[3].chain[-1][1] == world.counted[-1][1]
    world.check()


def test_a_host_that_is_cut_off_with_the_minority_stops_and_follows_the_new_one() -> None:
    world = World(5)
    world.run(10)
    world.groups = [{0, 4}]
    world.run(40)
    assert world.hosts() == [0, 1]
    ended = [step for term, step in world.counted if term == 1]
    world.run(20)
    assert [step for term, step in world.counted if term == 1] == ended
    world.groups = []
    world.run(15)
    assert world.hosts() == [1]
    assert {peer.succession.term for peer in world.peers} == {2}
    world.check()


@pytest.mark.parametrize("seed", range(4))
def test_all_vote_in_the_end_however_many_letters_are_lost(seed: int) -> None:
    world = World(4, loss=0.6, seed=seed)
    world.run(60)
    assert all(len(peer.succession.voters) == 4 for peer in world.peers)


def test_those_who_leave_and_say_so_are_not_waited_for() -> None:
    world = World(5)
    world.run(10)
    before = len(world.counted)
    for peer in world.peers[1:4]:
        peer.succession.resign()
    for number in (1, 2, 3):
        world.carry_out(number, world.peers[number])
    world.tick()
    for peer in world.peers[1:4]:
        peer.alive = False
    world.run(20)
    assert world.hosts() == [0]
    assert len(world.counted) > before + 30
    world.check()


def test_a_host_that_leaves_and_says_so_is_followed_within_seconds() -> None:
    world = World(4)
    world.run(10)
    before = len(world.counted)
    world.peers[0].succession.resign()
    world.carry_out(0, world.peers[0])
    world.tick()
    world.peers[0].alive = False
    world.run(5)
    assert world.hosts() == [1]
    assert len(world.counted) > before
    world.check()


@pytest.mark.parametrize("has_heard_of_it", [False, True])
def test_a_voter_that_had_not_heard_that_it_is_one_hears_it_from_the_others(has_heard_of_it: bool) -> None:
    world = World(3)
    for number in (1, 2):
        world.peers[number].succession.running = number == 1
    world.run(10)
    assert len(world.peers[0].succession.voters) == 2
    world.peers[2].succession.running = True
    while len(world.peers[0].succession.voters) < 3:
        world.tick()
    while len(world.peers[1].succession.voters) < 3:
        if not has_heard_of_it:
            world.groups = [{2}]
        world.peers[2].succession.running = False  # it cannot vote by what it hears now
        world.tick()
    world.peers[0].alive, world.groups = False, []
    world.peers[2].succession.running = True
    assert not world.peers[2].succession.voters
    world.run(30)
    assert len(world.hosts()) == 1
    world.check()


def test_what_is_repeated_is_believed_from_the_one_who_said_it_alone() -> None:
    world = World(3)
    world.run(10)
    run = run_mark(RUN)
    name = world.peers[2].succession._me
    forged = Proposal(name, 9, VoterList(9, 0, (name,), (0, 0)), None, (), 1, 0)
    world.peers[1].succession.receive(repeat_letter(1, seal_letter(KEYS[2], run, 1, forged)), world.now)
    assert len(world.peers[1].succession.voters) == 3
    twice = repeat_letter(1, repeat_letter(2, seal_letter(KEYS[0], run, 1, forged)))
    for letter in (twice, twice[:13], twice[:9], repeat_letter(1, b"")):
        with pytest.raises(ProtocolError):
            world.peers[1].succession.receive(letter, world.now)


def test_a_host_that_says_another_list_by_the_same_number_changes_nothing() -> None:
    world = World(3)
    world.run(10)
    hears, host = world.peers[1].succession, world.peers[0].succession
    roster, before = hears._peer.roster, hears.voters
    assert roster is not None
    other = VoterList(*roster.which, (host._me,), roster.base)
    said = Proposal(host._me, host.term, other, None, (), 150, 0)
    hears.receive(seal_letter(KEYS[0], run_mark(RUN), 1, said), world.now)
    assert hears.voters == before
    assert len(before) == 3


def test_a_host_that_others_have_left_without_a_word_waits() -> None:
    world = World(5)
    world.run(10)
    for number in (1, 2, 3):
        world.peers[number].alive = False
    world.run(2)
    before = len(world.counted)
    world.run(30)
    assert len(world.counted) == before
    assert any("host again from its checkpoint" in text for text in world.peers[0].told)


def test_one_that_hears_no_host_alone_disturbs_nobody() -> None:
    world = World(3)
    world.run(10)
    world.groups = [{2}]
    world.run(100)
    world.groups = []
    world.run(10)
    assert world.hosts() == [0]
    assert {peer.succession.term for peer in world.peers} == {1}


def test_of_two_peers_the_one_without_the_host_waits() -> None:
    world = World(2)
    world.run(10)
    world.peers[0].alive = False
    world.run(60)
    assert not world.hosts()
    assert sum("one of two is no majority" in text for text in world.peers[1].told) >= 2


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 6, 10))])
def test_whatever_is_lost_and_cut_off_there_is_one_history(seed: int) -> None:
    world = World(5, loss=0.3, seed=seed)
    world.run(15)
    for _ in range(12):
        event = world.rng.random()
        if event < 0.5:
            world.groups = [set(world.rng.sample(range(5), world.rng.choice((1, 2))))]
        elif event < 0.8:
            world.groups = []
        world.run(world.rng.choice((5, 20, 45)))
        world.check()
    world.groups, world.loss = [], 0.0
    world.run(60)
    world.check()
    assert len(world.hosts()) == 1
    assert len({peer.succession.term for peer in world.peers}) == 1


def test_a_host_that_forbids_it_and_one_that_is_not_known_have_no_voters() -> None:
    onlooker = Succession(KEYS[1], RUN, number=bytes(8), host=None)
    for second in range(60):
        onlooker.tick(float(second))
    assert not onlooker.voters
    assert not onlooker.take()


def test_nobody_speaks_for_another_or_in_another_run() -> None:
    run = run_mark(RUN)
    name = KEYS[0].public + bytes(8)
    letter = seal_letter(KEYS[0], run, 1, Here(name, (1, 2), False))
    assert open_letter(run, letter) == (KEYS[0].public, Here(name, (1, 2), False))
    forged = seal_letter(KEYS[1], run, 1, Here(name, (1, 2), False))
    for bad in (forged, letter[:-1], letter[1:], letter + b"\0", letter[:-1] + bytes([letter[-1] ^ 1])):
        with pytest.raises(ProtocolError):
            open_letter(run, bad)
    with pytest.raises(ProtocolError, match="another run"):
        open_letter(run_mark("other"), letter)


def test_the_proof_of_an_election_by_the_most_voters_is_one_announcement() -> None:
    run = run_mark("r" * 32)
    name, big = KEYS[0].public + bytes(8), ((1 << 32) - 1, (1 << 50) - 1)
    ballot = seal_letter(KEYS[0], run, (1 << 32) - 1, Ballot(big[0], name, (big[0], 1 << 20), name, big))
    places = tuple(SocketAddr.parse(f"[2001:db8::{n}]:40000") for n in range(8))
    address = EndpointAddr(KEYS[0].public, ("https://relay.example.org/",), places)
    elected = Elected(big[0], name, (big[0], 1 << 20), address, (ballot,) * (MAX_VOTERS // 2 + 1))
    assert len(seal_letter(KEYS[0], run, (1 << 32) - 1, elected)) <= MAX_ANNOUNCEMENT


def test_a_host_whose_voters_have_gone_asks_whether_they_have_another() -> None:
    world = World(3)
    world.run(10)
    host, state = world.peers[0].succession, world.peers[0].state
    assert not host.wants_to_know
    epoch = state.epoch_state
    host.see(replace(state, epoch_state=replace(epoch, clients=epoch.clients[:1])))
    assert host.wants_to_know  # it may have slept: no round has begun that it could not end
    host.see(replace(state, epoch_state=replace(epoch, clients=epoch.clients[:2])))
    assert not host.wants_to_know
