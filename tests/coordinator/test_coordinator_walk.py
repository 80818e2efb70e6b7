"""One run of Psyche's coordinator from its start over two pauses and two epochs, with the bytes of its states."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest

from distro_optim.comm import postcard
from distro_optim.coordinator.model import P2P, Hub
from distro_optim.coordinator.rules import machine
from distro_optim.coordinator.rules.committee import CommitteeSelection
from distro_optim.coordinator.rules.consensus import is_healthy
from distro_optim.coordinator.rules.machine import TickResult
from distro_optim.coordinator.types import Coordinator, RunState
from distro_optim.errors import CoordinatorError, CoordinatorErrorCode
from runs import client, clients, elected, ready, report, waiting_run

TICKED, EPOCH_END = TickResult.TICKED, TickResult.EPOCH_END


class Walk:
    """A state, and a check of each step against the recorded length and first six bytes of SHA-256."""

    def __init__(self, state: Coordinator) -> None:
        self.state = state

    def tick(self, now: int, pending: int, seed: int, expected: TickResult, digest: str) -> None:
        self.state, result = machine.tick(self.state, clients(*range(1, pending + 1)), now, seed)
        assert result is expected
        self.has(digest)

    def witness(self, now: int, digest: str, index: int | None = None) -> None:
        ((sender, proof),) = elected(self.state)
        assert index is None or proof.index == index
        present = [c.id for c in self.state.epoch_state.clients if c.id != client(3)]
        self.state = machine.witness(self.state, sender, report(proof, present), now)
        self.has(digest)

    def has(self, digest: str) -> None:
        data = postcard.encode(self.state)
        assert f"{len(data)} {hashlib.sha256(data).hexdigest()[:12]}" == digest

    def is_at(self, run_state: RunState, step: int, head: int, height: int, data_index: int) -> None:
        state, round_ = self.state, self.state.current_round
        place = (state.run_state, state.progress.step, state.epoch_state.rounds_head, round_.height, round_.data_index)
        assert place == (run_state, step, head, height, data_index)


def refused(code: CoordinatorErrorCode) -> pytest.RaisesExc[CoordinatorError]:
    return pytest.raises(CoordinatorError, match=code.value)


@pytest.mark.slow
def test_the_recorded_run_is_reproduced() -> None:
    walk = Walk(waiting_run())
    walk.tick(0, 2, 1, TICKED, "81 3112d5bb2732")
    walk.tick(2, 2, 1, TICKED, "81 3112d5bb2732")
    walk.tick(3, 3, 1, TICKED, "279 254c034da699")
    assert walk.state.run_state is RunState.WARMUP
    assert isinstance(walk.state.model.checkpoint, Hub)
    walk.tick(12, 3, 2, TICKED, "279 254c034da699")

    walk.state = machine.warmup_witness(walk.state, client(2), ready(1), 12, 777)
    walk.has("280 98f8b7c002d4")
    walk.is_at(RunState.ROUND_TRAIN, 1, 0, 0, 0)
    walk.state = machine.warmup_witness(walk.state, client(1), ready(0), 12, 777)
    walk.has("280 98f8b7c002d4")

    walk.witness(14, "454 b62156ce2765", index=2)
    sender, proof = elected(walk.state)[0]
    with refused(CoordinatorErrorCode.INVALID_WITNESS):
        machine.witness(walk.state, sender, report(replace(proof, position=proof.position + 1), []), 14)
    walk.tick(16, 3, 4, TICKED, "454 b62156ce2765")
    walk.tick(17, 3, 5, TICKED, "454 3caec80c4a6b")
    walk.is_at(RunState.ROUND_TRAIN, 2, 1, 1, 4)
    with refused(CoordinatorErrorCode.INVALID_HEALTH_CHECK):
        machine.health_check(walk.state, [])

    walk.tick(31, 3, 6, TICKED, "454 3caec80c4a6b")
    walk.tick(32, 3, 7, TICKED, "454 e8824a587c66")
    walk.witness(33, "628 00fdb71d4ddb", index=1)
    walk.tick(35, 3, 8, TICKED, "628 194252957663")
    walk.is_at(RunState.ROUND_TRAIN, 3, 2, 2, 8)

    previous = CommitteeSelection.for_round(walk.state, walk.state.previous_round)
    proofs = {number: previous.get_committee(number - 1) for number in (1, 2, 3)}
    healthy = {number: is_healthy(walk.state, client(number), proof) for number, proof in proofs.items()}
    assert healthy == {1: True, 2: True, 3: False}
    walk.state, dropped = machine.health_check(walk.state, [(client(3), proofs[3])])
    assert dropped == 1
    walk.has("628 b01afdc8f038")

    walk.witness(37, "802 c04cb19598e7", index=1)
    walk.tick(40, 3, 9, TICKED, "802 cee243c174a1")
    walk.is_at(RunState.ROUND_TRAIN, 4, 3, 3, 12)
    assert [c.id for c in walk.state.epoch_state.clients] == clients(1, 2)
    ((exited),) = walk.state.epoch_state.exited_clients
    assert (exited.id, exited.exited_height) == (client(3), 2)

    walk.witness(41, "976 059c5d49bac3", index=1)
    walk.tick(44, 3, 10, TICKED, "801 dcc9cba25ef3")
    walk.is_at(RunState.ROUND_TRAIN, 5, 0, 4, 16)
    assert walk.state.epoch_state.last_step == 7
    walk.witness(45, "975 de1c8423607b", index=1)
    walk.tick(48, 3, 11, TICKED, "801 9e08c2e7f29f")
    walk.is_at(RunState.ROUND_TRAIN, 6, 1, 5, 20)
    walk.witness(49, "975 bc9bd4d97b48", index=1)
    walk.tick(52, 3, 12, TICKED, "801 0fe85b32e944")
    assert walk.state.run_state is RunState.COOLDOWN
    sender, proof = elected(walk.state)[0]
    with refused(CoordinatorErrorCode.INVALID_RUN_STATE):
        machine.witness(walk.state, sender, report(proof, []), 53)
    walk.tick(56, 3, 13, TICKED, "801 0fe85b32e944")
    walk.tick(60, 3, 14, EPOCH_END, "801 90570d55d8b5")
    assert (walk.state.progress.epoch, walk.state.progress.epoch_start_data_index) == (1, 24)
    assert isinstance(walk.state.model.checkpoint, P2P)

    walk.tick(66, 3, 15, TICKED, "279 3911644b3575")
    assert isinstance(walk.state.model.checkpoint, P2P)
    walk.state = machine.pause(walk.state, 67)
    walk.has("279 9defa7f60565")
    walk.state = machine.resume(walk.state, 68)
    walk.has("279 7c8d2861bbad")
    walk.tick(71, 2, 20, TICKED, "213 b841f24c4f2a")
    assert isinstance(walk.state.model.checkpoint, Hub)
    walk.tick(81, 2, 21, TICKED, "213 3762cda5652f")
    walk.is_at(RunState.ROUND_TRAIN, 7, 0, 0, 24)
    walk.witness(82, "387 42bdc15921ea", index=1)
    walk.state = machine.pause(walk.state, 83)
    walk.has("387 cb6bee156484")
    walk.tick(85, 2, 22, TICKED, "213 abac131c478c")
    assert (walk.state.run_state, walk.state.progress.step) == (RunState.COOLDOWN, 8)
    walk.tick(90, 2, 23, EPOCH_END, "213 fd82f9c68f82")
    assert walk.state.run_state is RunState.PAUSED
    with refused(CoordinatorErrorCode.HALTED):
        machine.tick(walk.state, [], 91, 24)
    with refused(CoordinatorErrorCode.INVALID_WITHDRAW):
        machine.withdraw(walk.state, 7)
