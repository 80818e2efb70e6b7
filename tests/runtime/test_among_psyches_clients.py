"""Two of ours and two twins of Psyche's clients train over the swarm in memory, each with a runtime and a thread."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any, cast

import pytest
from typing_extensions import override

from distro_optim.compress import CompressedUpdate
from distro_optim.coordinator.model import Hub, HubRepo
from distro_optim.coordinator.types import ClientState, Coordinator
from distro_optim.strategy.network.link import RunLink
from distro_optim.strategy.network.runtime import Runtime
from distro_optim.strategy.rounds import actions as act
from distro_optim.strategy.rounds.actions import DropReason
from distro_optim.strategy.rounds.rounds import Rounds
from distro_optim.testing.psyche_twin import PsycheTwin, with_wild_values
from distro_optim.testing.updates import random_update
from rounds.auditing import evidence
from rounds.simulator import PLAN, secret
from runtime.memory import MemoryRun, MemorySource
from runtime.training import TrainingThread, assert_equal_weights

pytestmark = [pytest.mark.waiting]

STEPS = 7
HARMLESS = {DropReason.DUPLICATE, DropReason.WRONG_STEP, DropReason.NOT_RUNNING}


class TwinRuntime(Runtime):
    """What drives ours drives a client of Psyche's."""

    twin: PsycheTwin

    @override
    def _new_rounds(self, link: RunLink) -> Rounds:
        self.twin = PsycheTwin(
            identity=self.identity, key=self._source.key, address=link.swarm.address, draw=os.urandom
        )
        return cast(Rounds, self.twin)


class TwinThread(TrainingThread):
    """Notes its weights before each training, as ours do when they hash them."""

    @override
    def carry_out(self, action: Any) -> None:
        if isinstance(action, act.TrainBatch):
            self.hashes[action.step] = tuple(self.trainer.digests())
        super().carry_out(action)


class PsycheRun(MemoryRun):
    """By Psyche's rules: a round has a second for reports, and the weights are not with the peers alone."""

    steps = STEPS

    @override
    def first_state(self) -> Coordinator:
        state = super().first_state()
        config = replace(
            state.config,
            round_witness_time=1,
            total_steps=self.steps,
            init_min_clients=4,
            min_clients=2,
            warmup_time=50,
        )
        return replace(state, config=config, model=replace(state.model, checkpoint=Hub(HubRepo("somebody/model"))))

    def twin(self, number: int, **options: Any) -> TwinThread:
        peer = TwinThread(TwinRuntime(MemorySource(self, secret(number)), loop=self.loop), **options)
        self.peers.append(peer)
        peer.start()
        return peer


def values(action: act.TrainBatch, update: CompressedUpdate) -> CompressedUpdate:
    return random_update(PLAN, quantized=False, seed=100 * action.step + action.batch.start)


def wild_values(action: act.TrainBatch, update: CompressedUpdate) -> CompressedUpdate:
    return with_wild_values(values(action, update))


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [True, False])
def test_all_results_count_and_nobody_is_dropped(quantized: bool) -> None:
    with PsycheRun(hurried=True) as run:
        ours = [run.peer(number, gradient=None if quantized else values) for number in (1, 2)]
        theirs = [run.twin(number, gradient=None if quantized else wild_values) for number in (3, 4)]
        for peer in (*ours, *theirs):
            peer.join()
        state = run.state
        assert all(client.state is ClientState.HEALTHY for client in state.epoch_state.clients)
        assert not state.epoch_state.exited_clients
    # The rounds whose results are applied in this epoch; the last two steps of a run are cut off by its end.
    common = assert_equal_weights(*ours, *theirs)
    assert len(common) >= STEPS - 2
    for peer in (*ours, *theirs):
        assert {len(action.updates) for action in peer.of(act.ApplyResults)} == {4}
    for peer in ours:
        assert not peer.of(act.Desynced)
        assert peer.of(act.RunEnded)[-1].error is None
        assert set(peer.port.view().dropped) <= HARMLESS
    for twin in theirs:
        assert "next RunState is Finished" in str(twin.of(act.RunEnded)[-1].error)


class AuditingThread(TrainingThread):
    """Audits what it is asked to; what it finds is made up, of honest results and of those of ``riders``."""

    riders: frozenset[bytes] = frozenset()

    @override
    def carry_out(self, action: Any) -> None:
        if isinstance(action, act.AuditResults):
            for each in action.audited:
                found = evidence(0.5 if each.trainer in self.riders else 0.67)
                self.port.audited(action.of_step, each.trainer, found, evidence(0.66))
        super().carry_out(action)


class LongerRun(PsycheRun):
    """It takes seven audits to fail whom one auditor alone looks at, which knows little of honest results at first."""

    steps = STEPS + 4


@pytest.mark.slow
def test_one_of_ours_that_audits_looks_at_every_result_of_every_twin_and_tells_nobody_else() -> None:
    with LongerRun(hurried=True) as run:
        port = Runtime(MemorySource(run, secret(1)), loop=run.loop)
        port.audit_alone = 1.0
        watching = AuditingThread(port)
        watching.riders = frozenset({secret(4).public})
        run.peers.append(watching)
        watching.start()
        plain = run.peer(2)
        twins = [run.twin(number) for number in (3, 4)]
        for peer in (watching, plain, *twins):
            peer.join()
        view, others = watching.port.view(), plain.port.view()
    asked = {(action.of_step, each.trainer) for action in watching.of(act.AuditResults) for each in action.audited}
    steps = {step for step, _ in asked}
    assert steps >= set(range(1, run.steps - 2))
    assert asked == {(step, secret(number).public) for step in steps for number in (2, 3, 4)}
    assert view.audits[secret(4).public].failed == 1
    assert all(view.audits[secret(number).public].passed for number in (2, 3))
    assert not any(view.audits[secret(number).public].failed for number in (2, 3))
    assert others.audits == {}
    assert any("does not train what it is given" in event for event in view.last_events)
    assert_equal_weights(watching, plain, *twins)
