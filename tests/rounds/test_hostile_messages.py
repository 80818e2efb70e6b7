"""One message at a time: what a stranger, or a member that lies, can say, and why it is not taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from distro_optim.comm import postcard
from distro_optim.comm.addresses import EndpointAddr, SocketAddr
from distro_optim.comm.announcements import Announcement
from distro_optim.comm.tickets import BlobFormat, BlobTicket
from distro_optim.coordinator.types import BatchId, Committee, Hub, HubRepo, MerkleRoot, RunState
from distro_optim.errors import ConfigurationError
from distro_optim.strategy.rounds import actions as act
from distro_optim.strategy.rounds.actions import DropReason
from distro_optim.strategy.rounds.admission import MAX_EARLY_PER_SENDER
from distro_optim.strategy.rounds.broadcasts import Broadcast, Finished, TrainingResult, WeightsReport
from distro_optim.strategy.rounds.round_state import MAX_CLAIMS, MAX_SPARE_CLAIMS, ClaimState, RoundState
from distro_optim.strategy.rounds.rounds import Rounds, Stage
from distro_optim.strategy.rounds.weights import weights_report
from distro_optim.verify.commitment import Commitment, finished_hash
from rounds.simulator import NAMES, PLAN, Member, World, run_of, secret

HASH = bytes(range(32))


@cache
def in_round_three() -> tuple[World, Member, Member]:
    """A run in the middle of training: the victim, and a member who is about to speak. Only looked at by most tests."""
    world, members = run_of(3, total_steps=100)
    world.until_phase(RunState.ROUND_TRAIN, height=3)
    return world, members[0], members[1]


def fresh() -> tuple[World, Member, Member]:
    in_round_three.cache_clear()
    world, victim, speaker = in_round_three()
    in_round_three.cache_clear()
    return world, victim, speaker


def where_some_report() -> tuple[World, Member, Member]:
    """The same with two witnesses, of whom the victim is one."""
    world, members = run_of(3, total_steps=100, witness_nodes=2)
    world.until_phase(RunState.ROUND_TRAIN, height=3)
    victim = next(member for member in members if round_of(member).witness_proof.witness)
    return world, victim, next(member for member in members if member is not victim)


def round_of(member: Member) -> RoundState:
    round_ = member.rounds._phases.current_round
    assert round_ is not None
    return round_


def batch_of(member: Member) -> BatchId:
    batch = round_of(member).batch_of(member.id)
    assert batch is not None
    return batch


def truth(speaker: Member, blob: bytes = HASH) -> Broadcast:
    """An announcement of a result that ``speaker`` may make in the present round."""
    round_ = round_of(speaker)
    batch = batch_of(speaker)
    ticket = BlobTicket.raw(EndpointAddr(speaker.key.public), blob)
    commitment = Commitment(HASH, speaker.key.sign(HASH))
    return Broadcast(round_.step, round_.committee_proof, commitment, 0, TrainingResult(batch, ticket))


def say(victim: Member, speaker: bytes, broadcast: Broadcast | bytes) -> list[act.Action]:
    data = broadcast if isinstance(broadcast, bytes) else postcard.encode(broadcast)
    return victim.rounds.receive(Announcement(speaker, data), victim.world.now)


def assert_refused(actions: list[act.Action], reason: DropReason) -> None:
    (dropped,) = actions
    assert isinstance(dropped, act.Dropped)
    assert dropped.reason is reason


def test_a_true_announcement_is_fetched() -> None:
    _, victim, speaker = fresh()
    (fetch,) = say(victim, speaker.key.public, truth(speaker))
    assert isinstance(fetch, act.FetchBlob)
    assert fetch.ticket.hash == HASH
    assert speaker.key.public in fetch.providers


def test_addresses_of_somebody_else_are_not_believed() -> None:
    _, victim, speaker = fresh()
    broadcast = truth(speaker)
    assert isinstance(broadcast.data, TrainingResult)
    for other in (victim.key.public, secret(77).public):
        lure = EndpointAddr(other, direct=(SocketAddr.parse("192.0.2.1:4433"),))
        blob = bytes([other[0]]) * 32
        ticket = BlobTicket.raw(lure, blob)
        (fetch,) = say(victim, speaker.key.public, replace(broadcast, data=replace(broadcast.data, ticket=ticket)))
        assert isinstance(fetch, act.FetchBlob)
        assert fetch.ticket == BlobTicket.raw(EndpointAddr(speaker.key.public), blob)


def with_data(change: Callable[[TrainingResult, Member, Member], object]) -> Callable[..., Broadcast]:
    return lambda b, victim, speaker: replace(b, data=change(b.data, victim, speaker))


LIES: dict[str, tuple[DropReason, Callable[[Broadcast, Member, Member], Broadcast]]] = {
    "a_step_of_long_ago": (DropReason.WRONG_STEP, lambda b, *_: replace(b, step=b.step - 3)),
    "a_step_of_the_far_future": (DropReason.WRONG_STEP, lambda b, *_: replace(b, step=2**32 - 1)),
    "step_zero": (DropReason.WRONG_STEP, lambda b, *_: replace(b, step=0)),
    "the_index_of_another_client": (
        DropReason.WRONG_PROOF,
        lambda b, victim, _: replace(b, proof=round_of(victim).committee_proof),
    ),
    "an_index_beyond_the_list": (
        DropReason.WRONG_PROOF,
        lambda b, *_: replace(b, proof=replace(b.proof, index=2**64 - 1)),
    ),
    "another_position": (
        DropReason.WRONG_PROOF,
        lambda b, *_: replace(b, proof=replace(b.proof, position=b.proof.position + 1)),
    ),
    "another_committee": (
        DropReason.WRONG_PROOF,
        lambda b, *_: replace(b, proof=replace(b.proof, committee=Committee.VERIFIER)),
    ),
    "someone_elses_batch": (
        DropReason.NOT_ASSIGNED,
        with_data(lambda d, victim, _: replace(d, batch_id=batch_of(victim))),
    ),
    "a_batch_that_does_not_exist": (
        DropReason.NOT_ASSIGNED,
        with_data(lambda d, *_: replace(d, batch_id=replace(d.batch_id, end=d.batch_id.end + 1))),
    ),
    "a_sequence_of_blobs": (
        DropReason.NOT_A_BLOB,
        with_data(lambda d, *_: replace(d, ticket=replace(d.ticket, format=BlobFormat.HASH_SEQ))),
    ),
    "readiness_in_the_middle_of_training": (
        DropReason.WRONG_STEP,
        lambda b, *_: replace(b, step=0, data=Finished(MerkleRoot(), warmup=True)),
    ),
}


COMMITMENTS: dict[str, Callable[[Member, Member], Commitment]] = {
    "signed_by_another": lambda victim, _: Commitment(HASH, victim.key.sign(HASH)),
    "signed_over_something_else": lambda _, speaker: Commitment(HASH, speaker.key.sign(HASH[::-1])),
}


@pytest.mark.parametrize("name", COMMITMENTS)
def test_among_psyches_clients_a_commitment_is_to_be_signed_as_theirs(name: str) -> None:
    world = World(total_steps=100)
    model = replace(world.host.state.model, checkpoint=Hub(HubRepo("somebody/model")))
    world.host.state = replace(world.host.state, model=model)
    members = [Member(world, number) for number in range(11, 14)]  # nobody of them hosts
    world.until_phase(RunState.ROUND_TRAIN, height=3)
    victim, speaker = members[:2]
    lie = replace(truth(speaker), commitment=COMMITMENTS[name](victim, speaker))
    assert_refused(say(victim, speaker.key.public, lie), DropReason.BAD_SIGNATURE)
    (taken,) = say(victim, speaker.key.public, truth(speaker))
    assert isinstance(taken, act.FetchBlob)


@pytest.mark.parametrize("name", COMMITMENTS)
def test_in_a_run_of_our_own_the_signature_of_the_message_is_enough(name: str) -> None:
    _, victim, speaker = fresh()
    odd = replace(truth(speaker), commitment=COMMITMENTS[name](victim, speaker))
    (fetch,) = say(victim, speaker.key.public, odd)
    assert isinstance(fetch, act.FetchBlob)


@pytest.mark.parametrize("name", LIES)
def test_it_is_refused(name: str) -> None:
    reason, lie = LIES[name]
    _, victim, speaker = in_round_three()
    assert_refused(say(victim, speaker.key.public, lie(truth(speaker), victim, speaker)), reason)


def test_a_finish_that_commits_to_another_root_is_refused() -> None:
    _, victim, speaker = where_some_report()
    lie = replace(truth(speaker), data=Finished(MerkleRoot(HASH), warmup=False))
    assert_refused(say(victim, speaker.key.public, lie), DropReason.WRONG_HASH)


def test_a_stranger_is_not_heard() -> None:
    _, victim, speaker = in_round_three()
    assert_refused(say(victim, secret(77).public, truth(speaker)), DropReason.UNKNOWN_SENDER)


def test_nobody_speaks_in_our_own_name() -> None:
    _, victim, _ = in_round_three()
    assert_refused(say(victim, victim.key.public, truth(victim)), DropReason.UNKNOWN_SENDER)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_bytes_of_all_kinds_are_dropped_as_malformed(data: bytes) -> None:
    _, victim, speaker = in_round_three()
    assert_refused(say(victim, speaker.key.public, data), DropReason.MALFORMED)


def test_the_same_announcement_counts_once_whatever_its_nonce() -> None:
    _, victim, speaker = fresh()
    say(victim, speaker.key.public, truth(speaker))
    assert_refused(say(victim, speaker.key.public, replace(truth(speaker), nonce=9)), DropReason.DUPLICATE)


def test_a_fifth_result_for_one_batch_is_not_fetched() -> None:
    _, victim, speaker = fresh()
    for number in range(4):
        assert say(victim, speaker.key.public, truth(speaker, bytes([number]) * 32))
    assert_refused(say(victim, speaker.key.public, truth(speaker, bytes([9]) * 32)), DropReason.TOO_MANY)


def test_a_peer_that_announces_the_blob_of_another_as_its_own_does_not_silence_it() -> None:
    world, victim, speaker = fresh()
    thief = next(m for m in world.members if m not in (victim, speaker))
    world.until(lambda _: bool([a for a in speaker.of(act.StoreBlob) if a.tag.endswith(f"_{round_of(speaker).step}")]))
    stored = speaker.of(act.StoreBlob)[-1].data
    true, said = next(
        (r, r.data) for r in speaker.rounds._announcer.repeats.stored[::-1] if isinstance(r.data, TrainingResult)
    )
    stolen = truth(thief, said.ticket.hash)
    assert isinstance(say(victim, thief.key.public, stolen)[0], act.FetchBlob)
    assert isinstance(say(victim, speaker.key.public, true)[0], act.FetchBlob)
    dropped = [a for a in victim.rounds.fetched(said.ticket.hash, stored, world.now) if isinstance(a, act.Dropped)]
    assert [(drop.sender, drop.reason) for drop in dropped] == [(thief.key.public, DropReason.WRONG_HASH)]
    claims = round_of(victim).claims[said.batch_id]
    assert [claim.state for claim in claims] == [ClaimState.VALID]


def test_a_second_finish_of_a_round_is_a_duplicate() -> None:
    _, victim, speaker = where_some_report()
    root = MerkleRoot(HASH)
    data_hash = finished_hash(HASH)
    finish = replace(
        truth(speaker),
        commitment=Commitment(data_hash, speaker.key.sign(data_hash)),
        data=Finished(root, warmup=False),
    )
    assert say(victim, speaker.key.public, finish) == []
    assert_refused(say(victim, speaker.key.public, finish), DropReason.DUPLICATE)


@pytest.mark.parametrize("everybody", [False, True])
def test_who_waits_for_nobody_spends_nothing_on_who_has_finished_and_takes_results_all_the_same(
    everybody: bool,
) -> None:
    _, victim, speaker = fresh() if everybody else where_some_report()
    round_ = round_of(victim)
    if not everybody:
        round_.witness_proof = replace(round_.witness_proof, witness=False)
    heard = list(round_.broadcasts)
    for signature in (bytes(64), speaker.key.sign(finished_hash(HASH))):
        commitment = Commitment(finished_hash(HASH), signature)
        finish = replace(truth(speaker), commitment=commitment, data=Finished(MerkleRoot(HASH), warmup=False))
        assert say(victim, speaker.key.public, finish) == []
    assert speaker.id not in round_.finished
    assert round_.broadcasts == heard
    (fetch,) = say(victim, speaker.key.public, truth(speaker))
    assert isinstance(fetch, act.FetchBlob)


@pytest.mark.parametrize(("witnesses", "says"), [(0, False), (2, True)])
def test_that_one_has_finished_is_said_where_somebody_waits_for_it(witnesses: int, says: bool) -> None:
    world, members = run_of(3, total_steps=100, witness_nodes=witnesses)
    world.until_phase(RunState.ROUND_TRAIN, height=5)
    said = [postcard.decode(Broadcast, action.data) for member in members for action in member.of(act.Announce)]
    finished = [broadcast for broadcast in said if isinstance(broadcast.data, Finished)]
    assert any(broadcast.data == Finished(MerkleRoot(), warmup=True) for broadcast in finished)
    assert any(broadcast.step for broadcast in finished) == says
    assert sum(isinstance(broadcast.data, TrainingResult) for broadcast in said) >= 4 * len(members)


def test_a_result_may_go_along_with_its_announcement_and_with_nothing_else() -> None:
    world, members = run_of(3, total_steps=100)
    world.until_phase(RunState.ROUND_TRAIN, height=5)
    for member in members:
        stored = {blake3(action.data).digest(): action.data for action in member.of(act.StoreBlob)}
        carried = []
        for action in member.of(act.Announce):
            broadcast = postcard.decode(Broadcast, action.data)
            if action.carrying is not None:  # as what is said again, which others may have
                assert isinstance(broadcast.data, TrainingResult)
                carried.append(broadcast.data.ticket.hash)
                assert action.carrying == stored[broadcast.data.ticket.hash]
        assert carried == list(stored)


@pytest.mark.slow
def test_messages_about_the_next_round_are_held_up_to_a_bound_and_taken_when_it_begins() -> None:
    world, victim, speaker = fresh()
    early = replace(truth(speaker), step=truth(speaker).step + 1)

    def other(number: int) -> Broadcast:
        data_hash = bytes([number]) * 32
        return replace(early, commitment=Commitment(data_hash, speaker.key.sign(data_hash)))

    for number in range(MAX_EARLY_PER_SENDER):
        assert say(victim, speaker.key.public, other(number)) == []
        # Repetitions take no room: a client that hears of a round long before us repeats what it has said.
        assert_refused(say(victim, speaker.key.public, replace(other(number), nonce=99)), DropReason.DUPLICATE)
    assert_refused(say(victim, speaker.key.public, other(9)), DropReason.TOO_MANY)
    victim.forget()
    world.until_phase(RunState.ROUND_TRAIN, height=4)
    # They are checked then, against the round that they speak of; the proof of this round does not hold in it, or the
    # batch does not.
    reasons = {drop.reason for drop in victim.of(act.Dropped)}
    assert reasons & {DropReason.WRONG_PROOF, DropReason.NOT_ASSIGNED}


def test_nothing_is_heard_before_the_model_is_loaded() -> None:
    _, _, speaker = in_round_three()
    key = secret(50)
    address = EndpointAddr(key.public)
    outsider = Rounds(identity=Member.identity_of(key), key=key, address=address, draw=bytes)
    assert outsider.stage is Stage.OUTSIDE
    actions = outsider.receive(Announcement(speaker.key.public, postcard.encode(truth(speaker))), 0.0)
    assert_refused(actions, DropReason.NOT_RUNNING)


def test_data_that_nobody_asked_for_change_nothing() -> None:
    _, victim, _ = in_round_three()
    assert victim.rounds.fetched(HASH, b"data", victim.world.now) == []
    assert victim.rounds.fetch_failed(HASH, victim.world.now) == []
    assert victim.rounds.initialized(PLAN, NAMES, victim.world.now) == []


def test_keys_that_belong_to_different_peers_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="one peer"):
        Rounds(
            identity=Member.identity_of(secret(1)), key=secret(2), address=EndpointAddr(secret(2).public), draw=bytes
        )


# -- reports on weights ------------------------------------------------------------------------------------------------


def report(victim: Member, speaker: Member, content: WeightsReport | bytes) -> list[act.Action]:
    data = content if isinstance(content, bytes) else postcard.encode(content)
    return victim.rounds.receive_weights(Announcement(speaker.key.public, data), victim.world.now)


@pytest.mark.slow
def test_a_single_false_report_on_weights_convinces_nobody() -> None:
    world, victim, speaker = fresh()
    progress = world.state.progress
    lie = weights_report(progress.epoch, progress.step, [HASH, HASH], 1)
    victim.rounds._watch._table.clear()
    assert report(victim, speaker, lie) == []
    assert victim.rounds.fault is None
    world.until_phase(RunState.ROUND_TRAIN, height=5)
    assert victim.rounds.fault is None


def test_reports_of_other_steps_or_epochs_and_second_ones_are_dropped() -> None:
    world, victim, speaker = fresh()
    victim.rounds._watch._table.clear()
    epoch, step = world.state.progress.epoch, world.state.progress.step
    for wrong in ((epoch, step + 2), (epoch, step - 3), (epoch + 1, step)):
        assert_refused(report(victim, speaker, weights_report(*wrong, [HASH], 0)), DropReason.WRONG_STEP)
    ours = weights_report(epoch, step, list(victim.hashes[step]), 0)
    assert report(victim, speaker, ours) == []
    assert_refused(report(victim, speaker, ours), DropReason.DUPLICATE)
    assert_refused(report(victim, speaker, b"\xff"), DropReason.MALFORMED)


@pytest.mark.slow
def test_of_more_results_than_can_be_kept_those_of_the_lowest_hashes_are_kept_whatever_came_first() -> None:
    count = MAX_CLAIMS + MAX_SPARE_CLAIMS + 10
    for order in (1, -1):
        _, victim, speaker = fresh()
        hashes = [bytes([number]) * 32 for number in range(1, count + 1)]
        for number in range(MAX_CLAIMS):  # the first four are fetched
            assert say(victim, speaker.key.public, truth(speaker, hashes[number]))
        for blob in hashes[MAX_CLAIMS:][::order]:
            assert_refused(say(victim, speaker.key.public, signed_for(speaker, blob)), DropReason.TOO_MANY)
        (claims,) = (claims for claims in round_of(victim).claims.values() if len(claims) > 1)
        assert {claim.ticket.hash for claim in claims} == set(hashes[: MAX_CLAIMS + MAX_SPARE_CLAIMS])


def signed_for(speaker: Member, blob: bytes) -> Broadcast:
    """An announcement of another result, committed to under the hash of its blob."""
    return replace(truth(speaker, blob), commitment=Commitment(blob, speaker.key.sign(blob)))
