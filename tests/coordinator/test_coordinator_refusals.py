"""Inputs that a coordinator refuses, among them each that makes Psyche's panic; the state stays as it was."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from distro_optim.coordinator.model import (
    P2P,
    Checkpoint,
    DummyCheckpoint,
    Ephemeral,
    Gcs,
    GcsRepo,
    Hub,
    HubRepo,
    P2PGcs,
)
from distro_optim.coordinator.rules import machine
from distro_optim.coordinator.rules.committee import CommitteeSelection
from distro_optim.coordinator.rules.consensus import select_commitment, trainer_score, witness_quorum
from distro_optim.coordinator.rules.transitions import ACCEPTS, LEADS_TO, Input, enter
from distro_optim.coordinator.types import (
    Client,
    ClientState,
    Committee,
    CommitteeProof,
    Coordinator,
    CoordinatorEpochState,
    RunState,
    Witness,
    WitnessBloom,
    WitnessProof,
)
from distro_optim.errors import CoordinatorError, CoordinatorErrorCode
from distro_optim.verify.bloom import BloomFilter
from distro_optim.verify.commitment import Commitment
from runs import bloom_of, client, clients, elected, ready, report, waiting_run

HUB, GCS = HubRepo("a/b"), GcsRepo("bucket")


def warming_up(count: int = 3, **config: Any) -> Coordinator:
    state, _ = machine.tick(waiting_run(**config), clients(*range(count)), 10, 1)
    assert state.run_state is RunState.WARMUP
    return state


def training(count: int = 3, **config: int) -> Coordinator:
    state, _ = machine.tick(warming_up(count, **config), None, 20, 99)
    assert state.run_state is RunState.ROUND_TRAIN
    return state


def after_rounds(rounds: int, count: int = 3, percent: int = 0) -> Coordinator:
    """In the training of round ``rounds``, all earlier ones fully witnessed; ``percent`` verifiers from now on."""
    state, now = training(count, witness_nodes=0, epoch_time=1000), 20
    for _ in range(rounds):
        for sender, proof in elected(state):
            state = machine.witness(state, sender, report(proof, clients(0, 1)), now)
        now += 3
        state, _ = machine.tick(state, None, now, now)
    return replace(state, config=replace(state.config, verification_percent=percent))


def refuses(code: CoordinatorErrorCode) -> pytest.RaisesExc[CoordinatorError]:
    return pytest.raises(CoordinatorError, check=lambda error: error.code is code)


CALLS: dict[Input, Callable[[Coordinator], object]] = {
    Input.TICK: lambda state: machine.tick(state, [], 0, 0),
    Input.WARMUP_WITNESS: lambda state: machine.warmup_witness(state, client(0), ready(0), 0, 0),
    Input.WITNESS: lambda state: machine.witness(state, client(0), ready(0), 0),
    Input.HEALTH_CHECK: lambda state: machine.health_check(state, []),
    Input.PAUSE: lambda state: machine.pause(state, 0),
    Input.RESUME: lambda state: machine.resume(state, 0),
}


REFUSED = [(input_, run_state) for input_ in CALLS for run_state in RunState if run_state not in ACCEPTS[input_]]


@pytest.mark.parametrize(("input_", "run_state"), REFUSED)
def test_an_input_in_the_wrong_phase_is_refused_with_both_names(input_: Input, run_state: RunState) -> None:
    state = replace(warming_up(), run_state=run_state)
    with pytest.raises(CoordinatorError) as caught:
        CALLS[input_](state)
    assert input_.value in str(caught.value)
    assert run_state.name in str(caught.value)
    assert caught.value.run_state is run_state
    assert caught.value.code in (
        CoordinatorErrorCode.HALTED,
        CoordinatorErrorCode.INVALID_RUN_STATE,
        CoordinatorErrorCode.CANNOT_RESUME,
    )


def test_no_way_leads_where_the_table_has_none() -> None:
    for start in RunState:
        for end in set(RunState) - LEADS_TO[start]:
            with refuses(CoordinatorErrorCode.INVALID_RUN_STATE):
                enter(replace(warming_up(), run_state=start), end, 0)


@pytest.mark.parametrize("index", [1, 3, 255, 2**64 - 1])
def test_a_warmup_report_under_a_foreign_or_wild_index_is_refused(index: int) -> None:
    state = warming_up(witness_nodes=2)
    with refuses(CoordinatorErrorCode.INVALID_WITNESS):
        machine.warmup_witness(state, client(0), ready(index), 11, 5)
    assert machine.warmup_witness(state, client(0), ready(0), 11, 5).run_state is RunState.WARMUP


def test_a_stranger_cannot_end_the_warmup() -> None:
    with refuses(CoordinatorErrorCode.INVALID_WITNESS):
        machine.warmup_witness(warming_up(), client(77), ready(0), 11, 5)


def test_a_stored_warmup_report_whose_client_left_the_list_harms_nobody() -> None:
    state = warming_up(count=4, witness_nodes=0)
    state = machine.warmup_witness(state, client(3), ready(3), 11, 5)
    state = machine.withdraw(state, 0)
    state, _ = machine.tick(state, None, 12, 6)
    assert len(state.epoch_state.clients) == 3
    state = machine.warmup_witness(state, client(1), ready(0), 12, 7)
    assert len(state.current_round.witnesses) == 2


def test_a_client_reports_once_in_a_round() -> None:
    state = training(witness_nodes=0)
    sender, proof = elected(state)[0]
    state = machine.witness(state, sender, report(proof, []), 21)
    with refuses(CoordinatorErrorCode.DUPLICATE_WITNESS):
        machine.witness(state, sender, report(proof, []), 21)


def test_a_report_of_somebody_else_is_refused() -> None:
    state = training(witness_nodes=0)
    _, proof = elected(state)[0]
    other = elected(state)[1][0]
    for claim in (proof, replace(proof, witness=False), replace(proof, index=2**64 - 1)):
        with refuses(CoordinatorErrorCode.INVALID_WITNESS):
            machine.witness(state, other, report(claim, []), 21)


def test_the_33rd_report_of_a_round_is_refused() -> None:
    state = training(40, witness_nodes=0)
    witnesses = elected(state)
    assert len(witnesses) == 32
    full = tuple(Witness(WitnessProof(0, 1000, True)) for _ in range(32))
    rounds = (replace(state.current_round, witnesses=full), *state.epoch_state.rounds[1:])
    state = replace(state, epoch_state=replace(state.epoch_state, rounds=rounds))
    with refuses(CoordinatorErrorCode.WITNESSES_FULL):
        machine.witness(state, witnesses[0][0], report(witnesses[0][1], []), 21)


def test_all_elected_reports_end_the_training_early_and_fewer_do_not() -> None:
    state = training(40, witness_nodes=0)
    for sender, proof in elected(state)[:-1]:
        state = machine.witness(state, sender, report(proof, []), 21)
        assert state.run_state is RunState.ROUND_TRAIN
    sender, proof = elected(state)[-1]
    assert machine.witness(state, sender, report(proof, []), 21).run_state is RunState.ROUND_WITNESS


def test_a_health_check_drops_whom_a_quorum_did_not_see() -> None:
    state = after_rounds(2)
    proof = CommitteeSelection.for_round(state, state.previous_round).get_committee(2)
    after, dropped = machine.health_check(state, [(client(2), proof)] * 2)
    assert dropped == 1
    assert [c.state for c in after.epoch_state.clients] == [
        ClientState.HEALTHY,
        ClientState.HEALTHY,
        ClientState.DROPPED,
    ]
    assert machine.health_check(after, [(client(2), proof)]) == (after, 0)


def test_a_health_check_that_names_a_healthy_client_is_refused_as_a_whole() -> None:
    state = after_rounds(2)
    selection = CommitteeSelection.for_round(state, state.previous_round)
    checks = [(client(2), selection.get_committee(2)), (client(0), selection.get_committee(0))]
    with refuses(CoordinatorErrorCode.INVALID_HEALTH_CHECK):
        machine.health_check(state, checks)


@pytest.mark.parametrize("index", [0, 3, 2**64 - 1])
def test_a_health_check_with_a_foreign_or_wild_index_is_refused(index: int) -> None:
    with refuses(CoordinatorErrorCode.INVALID_COMMITTEE_PROOF):
        machine.health_check(after_rounds(2), [(client(2), CommitteeProof(Committee.TRAINER, 0, index))])


def test_a_health_check_of_a_verifier_is_refused() -> None:
    state = after_rounds(2, percent=100)
    proof = CommitteeSelection.for_round(state, state.previous_round).get_committee(2)
    assert proof.committee is Committee.VERIFIER
    with refuses(CoordinatorErrorCode.INVALID_COMMITTEE_PROOF):
        machine.health_check(state, [(client(2), proof)])


def test_a_health_check_about_a_round_without_witnesses_is_refused() -> None:
    state = after_rounds(2)
    rounds = tuple(replace(round_, witnesses=()) for round_ in state.epoch_state.rounds)
    state = replace(state, epoch_state=replace(state.epoch_state, rounds=rounds))
    proof = CommitteeSelection.for_round(state, state.previous_round).get_committee(2)
    with refuses(CoordinatorErrorCode.NO_ACTIVE_ROUND):
        machine.health_check(state, [(client(2), proof)])


@pytest.mark.slow
def test_more_pending_clients_than_an_epoch_can_hold_wait_for_the_next() -> None:
    state, _ = machine.tick(waiting_run(), clients(*range(70_000)), 10, 1)
    assert [c.id for c in state.epoch_state.clients] == clients(*range(256))


def test_a_client_that_is_pending_twice_is_listed_once() -> None:
    state, _ = machine.tick(waiting_run(), clients(1, 2, 1, 2), 10, 1)
    assert [c.id for c in state.epoch_state.clients] == clients(1, 2)


def test_an_overfull_list_of_exited_clients_forgets_the_oldest() -> None:
    everybody = tuple(Client(client(number), ClientState.WITHDRAWN) for number in range(256))
    earlier = tuple(Client(client(number), ClientState.WITHDRAWN) for number in range(1000, 1256))
    state = replace(warming_up(), epoch_state=CoordinatorEpochState(clients=everybody, exited_clients=earlier))
    state, _ = machine.tick(state, None, 11, 1)
    assert [c.id for c in state.epoch_state.exited_clients] == clients(*range(256))


def test_an_epoch_that_nobody_witnessed_withdraws_everybody() -> None:
    state = training()
    state, _ = machine.tick(state, None, 35, 1)
    state, _ = machine.tick(state, None, 38, 1)
    assert state.run_state is RunState.COOLDOWN
    assert {c.state for c in state.epoch_state.clients} == {ClientState.WITHDRAWN}


@pytest.mark.parametrize(
    ("present", "uploaded", "after"),
    [
        (P2P(HUB), Hub(HubRepo("new/one")), P2P(HubRepo("new/one"))),
        (P2PGcs(GCS), Gcs(GcsRepo("new")), P2PGcs(GcsRepo("new"))),
        (Hub(HUB), Hub(HubRepo("new/one")), Hub(HubRepo("new/one"))),
        (Gcs(GCS), Gcs(GcsRepo("new")), Gcs(GcsRepo("new"))),
        (P2PGcs(GCS), Hub(HUB), P2P(HUB)),
        (P2P(HUB), Gcs(GCS), P2PGcs(GCS)),
        (Hub(HUB), Gcs(GCS), Hub(HUB)),
        (Hub(HUB), P2P(HubRepo("new/one")), Hub(HUB)),
        (Ephemeral(), Hub(HUB), Ephemeral()),
        (DummyCheckpoint(HUB), Hub(HUB), DummyCheckpoint(HUB)),
        (P2P(HUB), Ephemeral(), P2P(HUB)),
    ],
)
def test_an_upload_replaces_only_what_it_fits(present: Checkpoint, uploaded: Checkpoint, after: Checkpoint) -> None:
    state = warming_up()
    state = replace(state, model=replace(state.model, checkpoint=present))
    assert machine.checkpoint(state, client(1), 1, uploaded).model.checkpoint == after


@pytest.mark.parametrize("index", [0, 3, -1])
def test_an_upload_under_a_foreign_index_is_refused(index: int) -> None:
    with refuses(CoordinatorErrorCode.INVALID_COMMITTEE_PROOF):
        machine.checkpoint(warming_up(), client(1), index, Hub(HUB))


def test_quorums_of_the_reference() -> None:
    with_everybody = [witness_quorum(0, count) for count in range(1, 33)]
    assert with_everybody == [
        *[1, 2, 2, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8, 9, 10, 10],
        *[11, 12, 12, 13, 14, 14, 15, 16, 16, 17, 18, 18, 19, 20, 20, 21],
    ]
    assert witness_quorum(9, 1) == 6
    with refuses(CoordinatorErrorCode.NO_ACTIVE_ROUND):
        witness_quorum(0, 0)


def commitment(number: int) -> Commitment:
    return Commitment(hashlib.sha256(bytes([number])).digest(), bytes(64))


def voter(*numbers: int) -> Witness:
    bloom = BloomFilter(range(1, 9))
    bloom.add_many([commitment(number).data_hash for number in numbers])
    return Witness(WitnessProof(0, 0, True), broadcast_bloom=WitnessBloom(bloom.keys, bloom.words))


@pytest.mark.parametrize(
    ("votes", "quorum", "chosen"),
    [
        ([], 1, None),
        ([(9,), (9,)], 1, None),
        ([(1,), (1,), (2,)], 2, 1),
        ([(1,), (2,)], 1, 2),  # of equals the last
        ([(0, 2), (0, 2), (2,)], 1, 0),  # one voice each, for the first it saw
        ([(1,)], 2, None),
        ([(1,)], 0, 1),
    ],
)
def test_the_commitment_that_most_witnesses_saw_counts(
    votes: list[tuple[int, ...]], quorum: int, chosen: int | None
) -> None:
    commitments = [commitment(number) for number in range(3)]
    assert select_commitment(commitments, [voter(*vote) for vote in votes], quorum) == chosen
    assert select_commitment([], [voter(*vote) for vote in votes], quorum) is None


def test_the_score_counts_the_witnesses_that_saw_a_client() -> None:
    proof = WitnessProof(0, 0, True)
    reports = [Witness(proof, participant_bloom=bloom_of(clients(*seen))) for seen in ((1, 2), (1,), ())]
    assert [trainer_score(client(number), reports) for number in (1, 2, 3)] == [2, 1, 0]
    assert trainer_score(client(1), []) == 0


def test_a_phase_cannot_time_out_within_the_second_it_began() -> None:
    state = warming_up(warmup_time=0)
    assert machine.tick(state, None, 10, 1)[0].run_state is RunState.WARMUP
    assert machine.tick(state, None, 11, 1)[0].run_state is RunState.ROUND_TRAIN


def test_a_clock_that_goes_back_makes_a_phase_wait() -> None:
    state = training()
    assert machine.tick(state, None, 20 - 3600, 1) == (state, machine.TickResult.TICKED)
    assert machine.tick(state, None, 35, 1)[0].run_state is RunState.ROUND_WITNESS


def test_a_run_that_reached_its_steps_is_finished_and_stays_so() -> None:
    state = replace(training(total_steps=2), run_state=RunState.COOLDOWN)
    state = replace(state, progress=replace(state.progress, step=2))
    state, result = machine.tick(state, None, 40, 1)
    assert (state.run_state, result) == (RunState.FINISHED, machine.TickResult.EPOCH_END)
    with refuses(CoordinatorErrorCode.HALTED):
        machine.tick(state, clients(1, 2, 3), 100, 1)
