"""One that only watches a run: it follows every round, names who trains nothing, says nothing, and is not heard."""

from __future__ import annotations

from functools import cache

import pytest
from typing_extensions import override

from distro_optim.comm import postcard
from distro_optim.comm.addresses import EndpointAddr
from distro_optim.comm.announcements import Announcement
from distro_optim.comm.tickets import BlobTicket
from distro_optim.coordinator.messages import ClientToServerMessage
from distro_optim.coordinator.types import MerkleRoot, RunState
from distro_optim.strategy.rounds import actions as act
from distro_optim.strategy.rounds.actions import SPOKEN, DropReason
from distro_optim.strategy.rounds.audits.momentum_messages import (
    Distances,
    MomentumReport,
    MomentumSaid,
    OpeningSaid,
    Outcome,
)
from distro_optim.strategy.rounds.audits.reports import AuditReport, Compared, encode_report
from distro_optim.strategy.rounds.broadcasts import Broadcast, Finished
from distro_optim.strategy.rounds.rounds import Rounds, Stage
from distro_optim.strategy.rounds.weights import weights_report
from distro_optim.verify.commitment import Commitment, finished_hash
from rounds.auditing import AuditedWorld, Auditor, evidence
from rounds.simulator import NAMES, PLAN, Member, secret
from rounds.test_hostile_messages import fresh, round_of, truth

RIDER, STEPS = 4, 18
WATCHING = secret(9).public


class Watcher(Auditor):
    """Is in no list. Gets the weights from the members, and what they say."""

    @override
    def join(self) -> None:
        pass

    @override
    def tell(self, message: ClientToServerMessage) -> None:
        raise AssertionError(f"it said {message}")

    @override
    def _new_rounds(self) -> Rounds:
        return Rounds(
            identity=self.id,
            key=self.key,
            address=EndpointAddr(self.key.public),
            draw=self.world.rng.randbytes,
            audit_alone=1.0,
            watches=True,
        )

    @override
    def audit(self, action: act.AuditResults) -> None:
        assert action.own is None
        for each in action.audited:
            assert each.batch != action.control
        super().audit(action)


@cache
def watched(fraction: float = 0.0) -> tuple[AuditedWorld, list[Auditor], Watcher]:
    world = AuditedWorld(fraction, total_steps=200, epoch_time=400, min_clients=2)
    world.riders = {RIDER}
    members = [Auditor(world, number) for number in range(1, 6)]
    watcher = Watcher(world, 9)
    world.until(lambda state: state.progress.step >= STEPS)
    return world, members, watcher


def test_it_follows_every_round_with_the_weights_of_the_members() -> None:
    world, members, watcher = watched()
    assert watcher.rounds.stage is Stage.RUNNING
    assert watcher.rounds.fault is None
    assert not watcher.of(act.Desynced)
    assert not watcher.of(act.ResultMissing)
    assert watcher.applied == {step: count for step, count in members[0].applied.items() if step in watcher.applied}
    assert set(range(3, STEPS - 1)) <= watcher.applied.keys()
    world.assert_equal_weights()


def test_it_names_who_trains_nothing_and_nobody_else() -> None:
    _, members, watcher = watched()
    assert watcher.named == {members[RIDER - 1].key.public}
    audited = {(action.of_step, each.trainer) for action in watcher.of(act.AuditResults) for each in action.audited}
    for step in range(1, STEPS - 3):
        assert {trainer for of, trainer in audited if of == step} == {member.key.public for member in members}
    counts = watcher.rounds.audits
    assert all(counts[m.key.public].passed and not counts[m.key.public].failed for m in members if m.number != RIDER)


def test_it_names_it_too_in_a_run_whose_members_audit_each_other() -> None:
    _, members, watcher = watched(0.5)
    rider = members[RIDER - 1].key.public
    assert watcher.named <= {rider}
    assert members[0].named <= {rider}
    assert {settled.trainer for settled in watcher.settled if settled.passed}


def test_nothing_comes_out_of_it_that_anybody_could_hear() -> None:
    for fraction in (0.0, 0.5):
        _, members, watcher = watched(fraction)
        assert not [action for action in watcher.log if isinstance(action, SPOKEN)]
        assert all(watcher.key.public not in member.rounds.audits for member in members)
        assert all(not member.of(act.Desynced) for member in members if member.number != RIDER)


def test_a_model_that_comes_late_is_caught_up_with() -> None:
    """Its rounds go on before the weights are there: what is to be applied waits for them."""

    class Slow(Watcher):
        @override
        def carry_out(self, action: act.Action) -> None:
            if isinstance(action, act.Initialize):
                self.do(self.rounds.initialized(PLAN, NAMES, self.world.now))
            else:
                super().carry_out(action)

    world = AuditedWorld(0.0, total_steps=200, epoch_time=400, min_clients=2)
    members = [Auditor(world, number) for number in range(1, 4)]
    watcher = Slow(world, 9)
    world.until(lambda state: state.progress.step >= 6)
    order = [type(action) for action in watcher.log if isinstance(action, act.Initialize | act.ApplyResults)]
    assert order[0] is act.Initialize
    assert order.count(act.ApplyResults) >= 3
    assert not watcher.of(act.Desynced)
    assert watcher.applied.keys() >= {3, 4, 5} & members[0].applied.keys()


def test_one_that_gets_no_model_accuses_nobody_and_tries_again_in_the_next_epoch() -> None:
    world = AuditedWorld(0.0, total_steps=200, epoch_time=20, min_clients=2)
    for number in range(1, 4):
        Auditor(world, number)
    watcher = Watcher(world, 9)
    world.until_phase(RunState.ROUND_TRAIN, height=2)
    assert watcher.in_step
    watcher.do(watcher.rounds.initialization_failed("nobody shares it any more", world.now))
    assert watcher.rounds.stage is Stage.OUTSIDE
    assert "nobody shares it any more" in watcher.of(act.Desynced)[-1].reason
    trainer = world.members[0].key.public
    watcher.do(watcher.rounds.audited(world.state.progress.step - 2, trainer, evidence(0.1), None, world.now))
    assert not watcher.rounds.audits
    world.until_phase(RunState.ROUND_TRAIN, epoch=1, height=3)
    assert watcher.in_step


# -- what it might say -------------------------------------------------------------------------------------------------


def of_the_run(speaker: Member, kind: str) -> bytes:
    """What a member may say at this moment on the run's channel."""
    round_ = round_of(speaker)
    if kind == "result":
        return postcard.encode(truth(speaker))
    warmup, step = kind == "ready", 0 if kind == "ready" else round_.step
    data_hash = finished_hash(bytes(32))
    commitment = Commitment(data_hash, speaker.key.sign(data_hash))
    said = Finished(MerkleRoot(bytes(32)), warmup=warmup)
    return postcard.encode(Broadcast(step, round_.committee_proof, commitment, 0, said))


def of_our_kind(speaker: Member, kind: str) -> bytes:
    """The same on the channel of our own kind."""
    progress = speaker.world.state.progress
    key, run = speaker.key, speaker.world.state.run_id
    counts = Compared.of(evidence(0.7))
    match kind:
        case "weights":
            return postcard.encode(weights_report(progress.epoch, progress.step, [bytes(32)] * 2, 0))
        case "audit":
            return encode_report(AuditReport(progress.epoch, progress.step, key.public, counts, None).signed(key, run))
        case "momentum":
            return MomentumSaid(progress.epoch, progress.step, bytes(64), 0, bytes(32), (0.9,)).encode()
        case "opening":
            ticket = BlobTicket.raw(EndpointAddr(key.public), bytes(32))
            return OpeningSaid(progress.epoch, progress.step, bytes(64), 0, ticket).encode()
    found = Distances(0, 0, 0)
    report = MomentumReport(progress.epoch, progress.step, bytes(64), 0, key.public, Outcome.COMPARED, found, 9, None)
    return report.encode()


@pytest.mark.parametrize("kind", ["result", "finished", "ready"])
def test_a_member_takes_nothing_of_the_run_from_it(kind: str) -> None:
    world, victim, speaker = fresh()
    (dropped,) = victim.rounds.receive(Announcement(WATCHING, of_the_run(speaker, kind)), world.now)
    assert isinstance(dropped, act.Dropped)
    assert dropped.reason is DropReason.UNKNOWN_SENDER


@pytest.mark.parametrize("kind", ["weights", "audit", "momentum", "opening", "report on a momentum"])
def test_a_member_takes_nothing_of_our_own_kind_from_it(kind: str) -> None:
    world, victim, speaker = fresh()
    (dropped,) = victim.rounds.receive_weights(Announcement(WATCHING, of_our_kind(speaker, kind)), world.now)
    assert isinstance(dropped, act.Dropped)
    assert dropped.reason is DropReason.UNKNOWN_SENDER
