"""The coordinator server without sockets: whom it serves, and what a client that misbehaves can and cannot do."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.coordinator_swarm import METADATA, RUN, UNIX_START, WORK_SECONDS, Peer, Swarm, frame, key
from distro_optim.comm.framing import encode_frame
from distro_optim.comm.postcard import encode
from distro_optim.comm.serving.limits import Bucket, ServerLimits
from distro_optim.comm.serving.watched_clock import WatchedClock
from distro_optim.coordinator.messages import CLIENT_TO_SERVER, HealthCheckMessage, Join, WitnessMessage, WitnessStep
from distro_optim.coordinator.rules.committee import CommitteeSelection
from distro_optim.coordinator.server.service import REDIRECTED_SECONDS, RETURN_SECONDS, frame_of
from distro_optim.coordinator.types import (
    ClientState,
    Committee,
    CommitteeProof,
    Coordinator,
    NodeIdentity,
    RunState,
    Witness,
)
from distro_optim.errors import ConfigurationError, LimitExceededError
from runs import elected, report

pytestmark = pytest.mark.waiting


def test_who_has_proved_its_key_gets_the_state_at_once_and_with_every_tick() -> None:
    swarm = Swarm()
    peer = swarm.connect(1)
    assert peer.state is None
    peer.read()
    assert peer.state == swarm.state
    swarm.second()
    assert peer.states_read == 3


def test_states_are_sent_in_psyches_frames() -> None:
    state = Swarm().state
    data = encode(state)
    assert frame_of(state) == (len(data) + 2).to_bytes(4, "big") + b"\x01\x00" + data


def test_a_run_goes_through_its_epochs() -> None:
    swarm = Swarm()
    peers = swarm.join(1, 2, 3)
    for epoch in (1, 2):
        swarm.until(RunState.COOLDOWN)
        swarm.until(RunState.WAITING_FOR_MEMBERS)
        assert swarm.state.progress.epoch == epoch
    assert all(peer.connected for peer in peers)
    assert not swarm.reasons


def test_a_change_of_phase_is_sent_without_waiting_for_a_tick() -> None:
    swarm = Swarm()
    peers = swarm.join(1, 2)
    swarm.until(RunState.WARMUP, acting=[])
    for peer in peers:
        peer.read()
    swarm.now += WORK_SECONDS
    peers[0].act()
    assert swarm.state.run_state is RunState.ROUND_TRAIN
    peers[1].read()
    assert peers[1].state == swarm.state


def test_the_same_state_is_not_put_in_line_twice() -> None:
    swarm = Swarm()
    peer = swarm.connect(1)
    peer.read()
    for _ in range(10):
        swarm.service.tick(swarm.now)
    peer.read()
    assert peer.states_read == 2


def test_a_newer_connection_of_the_same_key_takes_over_without_leaving_the_run() -> None:
    swarm = Swarm()
    older, _ = swarm.join(1, 2)
    swarm.until(RunState.WARMUP)
    newer = swarm.connect(1)
    newer.read()
    swarm.collect()
    assert not older.connected
    assert newer.connected
    assert "the same key has connected again" in swarm.reasons
    assert swarm.state.epoch_state.clients[0].state is ClientState.HEALTHY
    assert newer.identity in swarm.service.host.pending


def test_a_join_to_another_run_closes_the_connection_after_the_state_was_sent() -> None:
    swarm = Swarm()
    peer = swarm.connect(1)
    peer.read()
    assert peer.state is not None
    assert peer.state.run_id == RUN
    peer.say(Join("another"))
    assert not peer.connected


def test_a_key_that_is_not_on_the_list_is_let_go_after_its_proof() -> None:
    swarm = Swarm(allowed=[key(1).public])
    friend, stranger = swarm.connect(1), swarm.connect(2)
    friend.read()
    stranger.read()
    swarm.collect()
    assert friend.connected
    assert not stranger.connected
    assert stranger.state is None
    assert any("list of this run" in reason for reason in swarm.reasons)


def test_the_operator_takes_clients_out_of_a_running_run_and_keeps_them_out() -> None:
    swarm = Swarm()
    first, second, third = swarm.join(1, 2, 3)
    swarm.until(RunState.WARMUP)
    swarm.service.kick(key(2).public, swarm.now)
    swarm.collect()
    assert not second.connected
    assert "the operator took it out of the run" in swarm.reasons
    assert swarm.state.epoch_state.clients[1].state is ClientState.WITHDRAWN
    back = swarm.connect(2)
    back.read()
    swarm.collect()
    assert back.connected
    swarm.service.ban(key(2).public, swarm.now)
    swarm.service.let_in([key(1).public], swarm.now)
    again = swarm.connect(2)
    again.read()
    swarm.collect()
    assert (first.connected, third.connected, back.connected, again.connected) == (True, False, False, False)
    assert list(swarm.service.host.pending) == [first.identity]


def test_challenges_are_fresh() -> None:
    swarm = Swarm()
    openings = {swarm.connect(number).connection.next_frame() for number in range(20)}
    assert len(openings) == 20


def test_an_answer_replayed_to_another_connection_is_refused() -> None:
    swarm = Swarm()
    victim = swarm.connect(1)
    opening = victim.connection.next_frame()
    assert opening is not None
    victim.link.receive(opening)
    answer = victim.link.data_to_send()
    thief = swarm.connect(2)
    thief.send(answer)
    assert not thief.connected
    assert not swarm.service.clients


# -- limits --------------------------------------------------------------------------------------------------------


def test_connections_are_limited_in_all_and_from_one_place() -> None:
    limits = ServerLimits(connections=4, per_address=3)
    swarm = Swarm(limits=limits)
    for number in (1, 2, 3):
        swarm.connect(number, f"a:{number}").read()
    with pytest.raises(LimitExceededError, match="from a are"):
        swarm.connect(4, "a:4")
    swarm.connect(4, "b:4").read()
    with pytest.raises(LimitExceededError, match="4 connections are open"):
        swarm.connect(5, "c:5")
    swarm.peers[0].leave()
    swarm.connect(5, "a:5")


def test_who_only_holds_the_line_makes_room_for_who_answers() -> None:
    swarm = Swarm(limits=ServerLimits(unproved=3))
    silent = [swarm.connect(number) for number in range(100, 150)]
    assert [peer.connected for peer in silent] == [False] * 47 + [True] * 3
    honest = swarm.join(*range(1, 9))
    assert all(peer.connected for peer in honest)
    assert len(swarm.service.clients) == 8


def test_who_does_not_answer_the_challenge_is_cut_off_in_time() -> None:
    swarm = Swarm(limits=ServerLimits(handshake_seconds=5))
    peer = swarm.connect(1)
    swarm.seconds(5, acting=[])
    assert peer.connected
    swarm.second(acting=[])
    assert not peer.connected
    assert any("did not answer" in reason for reason in swarm.reasons)


def test_who_reads_nothing_is_cut_off_and_costs_no_more_than_a_few_states() -> None:
    swarm = Swarm(limits=ServerLimits(stall_seconds=8, unsent_frames=4))
    others = swarm.join(1, 2)
    deaf = swarm.connect(3)
    deaf.join()
    swarm.until(RunState.ROUND_TRAIN, acting=others)
    assert len(deaf.connection._unsent) <= 4
    swarm.seconds(9, acting=others)
    assert not deaf.connected
    assert any("read nothing" in reason for reason in swarm.reasons)


def test_a_message_above_the_limit_is_refused_from_its_header() -> None:
    swarm = Swarm()
    peer = swarm.connect(1)
    peer.read()
    peer.send((1 << 20).to_bytes(4, "big"))
    assert not peer.connected


def test_a_bucket_gives_its_burst_at_once_and_its_rate_in_the_long_run() -> None:
    bucket = Bucket(rate=2.0, burst=10.0, now=0.0)
    assert [bucket.take(1, 0.0) for _ in range(11)] == [True] * 10 + [False]
    assert [bucket.take(1, 1.0) for _ in range(3)] == [True, True, False]
    assert not bucket.take(11, 1000.0)
    assert bucket.take(10, 1000.0)
    assert not bucket.take(1, 500.0)  # a clock that goes back gives nothing


def test_limits_are_checked_when_they_are_made() -> None:
    with pytest.raises(ConfigurationError, match="stall_seconds must be above 0"):
        ServerLimits(stall_seconds=0)


# -- offenders: the others go on, and the state is as if the offender had been absent -----------------------------


def flood(peer: Peer) -> None:
    peer.send(frame(Join("x")) * 5000)


def many_bytes(peer: Peer) -> None:
    for _ in range(100):
        peer.send(bytes(16 * 1024))


def garbage(peer: Peer) -> None:
    peer.send(random.Random(7).randbytes(500))


def garbage_in_a_frame(peer: Peer) -> None:
    peer.send(encode_frame(random.Random(8).randbytes(500)))


def nothing_at_all(peer: Peer) -> None:
    pass


def another_clients_witness(peer: Peer) -> None:
    state = peer.swarm.state
    if state.run_state is RunState.ROUND_TRAIN:
        members = [member.id for member in state.epoch_state.clients]
        for identity, proof in elected(state):
            if identity != peer.identity:
                peer.say(WitnessMessage(WitnessStep(report(proof, members), METADATA)))


def the_witness_of_another_round(peer: Peer) -> None:
    state = peer.swarm.state
    if state.run_state is RunState.ROUND_TRAIN and state.current_round.height > 0:
        members = [member.id for member in state.epoch_state.clients]
        old = CommitteeSelection.for_round(state, state.previous_round)
        present = dict(elected(state))
        for index, identity in enumerate(members):
            proof = old.get_witness(index)
            # Between small committees the same place comes up again; then it is no old report but a good one.
            if proof != present.get(identity):
                peer.say(WitnessMessage(WitnessStep(report(proof, members), METADATA)))


def false_health_checks(peer: Peer) -> None:
    state = peer.swarm.state
    checks = tuple(
        (member.id, CommitteeProof(Committee.TRAINER, index, index))
        for index, member in enumerate(state.epoch_state.clients)
    )
    peer.say(HealthCheckMessage(checks))


def impossible_health_checks(peer: Peer) -> None:
    stranger = NodeIdentity.from_single_key(bytes(32))
    peer.say(HealthCheckMessage(((stranger, CommitteeProof(Committee.VERIFIER, 2**64 - 1, 2**64 - 1)),) * 3))


def comes_and_goes(peer: Peer) -> None:
    peer.leave()
    again = peer.swarm.connect(99)
    again.read()
    again.leave()
    peer.swarm.peers.remove(again)


OFFENCES: list[Callable[[Peer], None]] = [
    flood,
    many_bytes,
    garbage,
    garbage_in_a_frame,
    nothing_at_all,
    another_clients_witness,
    the_witness_of_another_round,
    false_health_checks,
    impossible_health_checks,
    comes_and_goes,
]
PHASES = [
    RunState.WAITING_FOR_MEMBERS,
    RunState.WARMUP,
    RunState.ROUND_TRAIN,
    RunState.ROUND_WITNESS,
    RunState.COOLDOWN,
]


def without_seeds(state: Coordinator) -> Coordinator:
    """Seeds differ: the offender's challenge and messages draw from the same source."""

    def without_position(one: Witness) -> Witness:
        return replace(one, proof=replace(one.proof, position=0))

    rounds = tuple(
        replace(one, random_seed=0, witnesses=tuple(without_position(report) for report in one.witnesses))
        for one in state.epoch_state.rounds
    )
    return replace(state, epoch_state=replace(state.epoch_state, rounds=rounds))


def run_with(offence: Callable[[Peer], None] | None, phase: RunState) -> list[Coordinator]:
    """A state a second, while one who is in no epoch does its worst in every second from ``phase`` on."""
    swarm = Swarm(witness_nodes=0, epoch_time=12)
    honest = swarm.join(1, 2, 3)
    states, begun = [], False
    offender: Peer | None = None
    for _ in range(42):
        begun = begun or swarm.state.run_state is phase
        if offence is not None and begun:
            if offender is None or not offender.connected:
                offender = swarm.connect(99)
                swarm.peers.remove(offender)
                offender.read()
            offence(offender)
        swarm.second(acting=honest)
        states.append(without_seeds(swarm.state))
    assert all(peer.connected for peer in honest)
    assert all(peer.state is not None and peer.state.progress == swarm.state.progress for peer in honest)
    assert begun
    return states


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.value)
def test_a_run_beside_an_offender_is_the_run_without_it(phase: RunState) -> None:
    expected = run_with(None, phase)
    assert expected[-1].progress.epoch >= 1
    for offence in OFFENCES:
        assert run_with(offence, phase) == expected, offence.__name__


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.value)
def test_a_member_that_disconnects_in_any_phase_is_the_only_one_to_miss_the_run(phase: RunState) -> None:
    swarm = Swarm(witness_nodes=0, epoch_time=20)
    peers = swarm.join(1, 2, 3, 4)
    swarm.until(phase)
    peers[3].leave()
    swarm.seconds(120)
    assert swarm.state.progress.epoch >= 2
    assert [member.id for member in swarm.state.epoch_state.clients] == [peer.identity for peer in peers[:3]]
    assert all(peer.connected for peer in peers[:3])


def run_beside_member(
    phase: RunState, offence: Callable[[Peer], None] | None, leaves_at: int | None = None
) -> tuple[list[Coordinator], int | None]:
    """A state every half second beside a member that is honest before ``phase``.

    From then on it only reads, commits the offence at every tick, and leaves before tick ``leaves_at``.

    Returns:
        The states, and before or in which tick the member was cut off or left.
    """
    swarm = Swarm(witness_nodes=0, epoch_time=40, max_round_train_time=4)
    *honest, member = swarm.join(1, 2, 3, 4)
    swarm.until(phase)
    swarm.refusals.clear()
    states: list[Coordinator] = []
    gone = None
    for tick in range(200):
        if member.connected:
            if offence is not nothing_at_all:
                member.read()
            if offence is not None:
                offence(member)
            if tick == leaves_at:
                member.leave()
        swarm.tick(acting=honest)
        if gone is None and not member.connected:
            gone = tick
        states.append(without_seeds(swarm.state))
    assert all(peer.connected for peer in honest)
    assert all(peer.state is not None and peer.state.progress == swarm.state.progress for peer in honest)
    if offence is not None:
        assert gone is not None or swarm.refusals[member.identity] > 0, "the offence was never committed"
    return states, gone


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.value)
def test_a_member_that_misbehaves_achieves_what_its_silence_would(phase: RunState) -> None:
    expected: dict[int | None, list[Coordinator]] = {}
    for offence in OFFENCES:
        states, gone = run_beside_member(phase, offence)
        if gone not in expected:
            expected[gone], _ = run_beside_member(phase, None, leaves_at=gone)
        assert states[-1].progress.epoch >= 1
        assert states == expected[gone], offence.__name__


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.value)
def test_an_hour_that_is_missing_ends_a_phase_and_nobodys_membership(phase: RunState) -> None:
    swarm = Swarm(witness_nodes=0, epoch_time=20)
    peers = swarm.join(1, 2, 3)
    swarm.until(phase)
    for peer in peers:
        peer.read()
    swarm.now += 3600  # the machine slept
    swarm.seconds(90)
    assert swarm.state.progress.epoch >= 2
    assert [member.id for member in swarm.state.epoch_state.clients] == [peer.identity for peer in peers]
    assert all(peer.connected for peer in peers)


def test_a_flood_is_cut_off_before_it_is_all_worked_through() -> None:
    swarm = Swarm()
    peer = swarm.connect(1)
    peer.read()
    flood(peer)
    swarm.collect()
    assert not peer.connected
    assert any("more than 100 messages came at once" in reason for reason in swarm.reasons)


def test_a_flood_is_not_even_decoded_above_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    swarm = Swarm()
    peer = swarm.connect(1)
    peer.read()
    decoded = 0
    real = CLIENT_TO_SERVER.read

    def counting(*arguments: Any) -> Any:
        nonlocal decoded
        decoded += 1
        return real(*arguments)

    monkeypatch.setattr(peer.connection._link, "_incoming", replace(CLIENT_TO_SERVER, read=counting))
    flood(peer)
    assert decoded == swarm.service.limits.messages_burst


def test_bytes_that_arrive_after_the_cut_are_dropped() -> None:
    swarm = Swarm()
    peer = swarm.connect(1)
    peer.read()
    garbage(peer)
    assert not peer.connected
    peer.say(Join(RUN))
    peer.leave()
    assert not swarm.service.host.pending
    assert swarm.service.num_connections == 0


def test_whoever_goes_is_forgotten_on_every_path() -> None:
    swarm = Swarm(limits=ServerLimits(handshake_seconds=1, stall_seconds=2))
    for offence in (garbage, flood, garbage_in_a_frame, Peer.leave):
        offence(swarm.connect(1).join())
    swarm.connect(2)
    swarm.connect(3).join()
    swarm.seconds(10, acting=[])
    assert swarm.service.num_connections == 0
    assert not swarm.service.clients
    assert not swarm.service._addresses
    assert not swarm.service.host.pending


def test_unix_time_follows_the_monotonic_clock_alone() -> None:
    swarm = Swarm()
    assert swarm.service.unix_time(swarm.now) == UNIX_START
    assert swarm.service.unix_time(swarm.now + 3600) == UNIX_START + 3600


@pytest.mark.slow
@settings(deadline=None, max_examples=50)
@given(st.lists(st.binary(max_size=120), max_size=5), st.booleans())
def test_arbitrary_bytes_end_a_connection_and_nothing_else(pieces: list[bytes], joined: bool) -> None:
    swarm = Swarm()
    honest = swarm.join(1, 2)
    peer = swarm.connect(3)
    if joined:
        peer.join()
    for piece in pieces:
        peer.send(piece)
    swarm.until(RunState.ROUND_TRAIN, acting=honest)
    assert all(one.connected for one in honest)


def test_a_server_that_slept_takes_nobody_out_and_its_run_has_lost_no_time() -> None:
    swarm = Swarm()
    first, second, third = swarm.join(1, 2, 3)
    swarm.until(RunState.ROUND_TRAIN)
    before, unix_time = swarm.state, swarm.unix_time()
    swarm.now += 3600
    swarm.service.woke(swarm.now, 3600)
    assert swarm.unix_time() == unix_time
    for peer in (first, second, third):  # as if they had given us up
        peer.leave()
    again = [swarm.connect(1).join(), swarm.connect(2).join()]
    swarm.service.tick(swarm.now)
    assert swarm.state == before
    swarm.until(RunState.ROUND_WITNESS, acting=again)
    assert all(client.state is ClientState.HEALTHY for client in swarm.state.epoch_state.clients)
    for _ in range(int(RETURN_SECONDS)):
        swarm.second(acting=[])
    assert set(swarm.service.host.pending) == {peer.identity for peer in again}
    assert third.identity not in {c.id for c in swarm.state.epoch_state.clients if c.state is ClientState.HEALTHY}


def test_who_has_come_back_after_the_sleep_and_leaves_is_waited_for_shortly_and_whose_link_breaks_longer() -> None:
    swarm = Swarm(max_round_train_time=60)
    peers = swarm.join(1, 2, 3, 4)
    swarm.until(RunState.ROUND_TRAIN)
    swarm.service.woke(swarm.now, 3600)
    for peer in peers:
        peer.leave()
    _, leaves, breaks, moves = (swarm.connect(number).join() for number in (1, 2, 3, 4))

    def healthy() -> set[NodeIdentity]:
        return {c.id for c in swarm.state.epoch_state.clients if c.state is ClientState.HEALTHY}

    leaves.leave()
    moves.leave()
    swarm.service.disconnect(breaks.connection, "the connection broke")
    assert {peer.identity for peer in (leaves, breaks, moves)} <= healthy()
    swarm.second(acting=[])
    swarm.connect(4).join()  # it had heard once more who hosts
    for _ in range(int(REDIRECTED_SECONDS) + 1):
        swarm.second(acting=[])
    assert leaves.identity not in healthy()
    assert {peer.identity for peer in (breaks, moves)} <= healthy()
    for _ in range(int(RETURN_SECONDS)):
        swarm.second(acting=[])
    assert breaks.identity not in healthy()
    assert moves.identity in healthy()


def test_a_clock_tells_of_a_gap_once_and_not_of_ordinary_pauses() -> None:
    times = iter([0.0, 0.5, 5.5, 40.0, 40.5])
    woke: list[tuple[float, float]] = []
    clock = WatchedClock(lambda: next(times), lambda now, seconds: woke.append((now, seconds)))
    assert [clock() for _ in range(4)] == [0.5, 5.5, 40.0, 40.5]
    assert woke == [(40.0, 34.5)]
