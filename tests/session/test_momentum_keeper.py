"""What is done with a momentum beside the training, and what comes of openings that are none."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from distro_optim import DisTrO
from distro_optim.coordinator.types import BatchId
from distro_optim.strategy.model.audits.keeper import KEPT_STEPS, MomentumKeeper
from distro_optim.strategy.model.audits.momenta import MomentumAuditor
from distro_optim.strategy.model.named_tensors import NamedTensors
from distro_optim.strategy.model.trainer import SwarmTrainer
from distro_optim.strategy.model.weights_hash import SideJobs
from distro_optim.strategy.rounds import actions as act
from distro_optim.verify.audit import Challenge, Verdict
from distro_optim.verify.momentum import MomentumCommitment, Snapshot
from distro_optim.verify.opening import decode_opening, encode_opening, make_opening

from .scripts import new_model, new_optimizer

WAIT = 20.0


class Kept:
    """A keeper, and what it has told."""

    def __init__(self) -> None:
        self.optimizer = new_optimizer(new_model())
        self.params = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.roots: dict[int, bytes] = {}
        self.shown: dict[int, bytes] = {}
        self.keeper = MomentumKeeper(self._committed, self.shown.__setitem__)

    def _committed(self, step: int, root: bytes, decays: Sequence[float]) -> None:
        assert threading.current_thread() is not threading.main_thread()
        self.roots[step] = root

    def train(self, step: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(step)
        for param in self.params:
            param.grad = torch.randn(param.shape, generator=generator)
        self.keeper.before_change()
        self.optimizer.generate()
        momenta = [self.optimizer.state[param]["delta"] for param in self.params]
        self.keeper.commit(step, self.optimizer.plan, momenta, [0.9])
        return [momentum.clone() for momentum in momenta]

    def finish(self) -> None:
        self.keeper.wait()


def test_each_step_is_committed_to_as_it_was_however_the_training_goes_on() -> None:
    kept = Kept()
    momenta = {step: kept.train(step) for step in range(1, 9)}
    kept.finish()
    for step, tensors in momenta.items():
        assert kept.roots[step] == Snapshot(kept.optimizer.plan, tensors).root
    assert kept.keeper.pair(8 - KEPT_STEPS + 1) is None
    assert kept.keeper.pair(8) is not None
    kept.keeper.open(8, [0, 1])
    kept.keeper.open(2, [0, 1])
    kept.finish()
    assert set(kept.shown) == {8}, "of the others nothing is here any more"
    opening = decode_opening(kept.shown[8], kept.optimizer.plan)
    assert [leaf.number for leaf in opening.leaves] == [0, 1]
    kept.keeper.forget()
    assert kept.keeper.pair(8) is None


def test_the_momentum_does_not_change_before_it_is_copied() -> None:
    jobs, going = SideJobs("test"), threading.Event()
    done: list[str] = []

    def copy() -> None:
        going.wait(WAIT)
        done.append("copied")

    first = jobs.add(copy)
    second = jobs.add(lambda: done.append("hashed"))
    threading.Timer(0.0, going.set).start()
    jobs.wait(first)
    assert done[0] == "copied"
    jobs.wait(second)
    assert done == ["copied", "hashed"]


def test_a_job_that_fails_does_not_keep_others_from_being_done(caplog: pytest.LogCaptureFixture) -> None:
    jobs = SideJobs("test")
    done: list[int] = []
    jobs.add(lambda: 1 / 0)
    jobs.wait(jobs.add(lambda: done.append(1)))
    assert done == [1]
    assert "beside the training failed" in caplog.text
    jobs.stop()
    jobs.wait(jobs.add(lambda: done.append(2)))
    assert done == [1, 2], "it may begin again"


def changed(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


BAD: dict[str, Callable[[Any], bytes]] = {
    "nothing": lambda case: b"",
    "noise": lambda case: b"\xff" * 500,
    "a part": lambda case: case.data[:-3],
    "more than it has": lambda case: case.data + b"x",
    "another round": lambda case: case.opening(2),
    "other leaves": lambda case: case.opening(3, [1]),
    "another momentum": lambda case: changed(case.data, 8),
}


class Case:
    """An audit of an honest step."""

    def __init__(self) -> None:
        self.kept = Kept()
        for step in (1, 2, 3):
            self.kept.train(step)
        self.kept.finish()
        self.data = self.opening(3)
        model = new_model()
        trainer = SwarmTrainer(NamedTensors.of(model, optimizer := new_optimizer(model)), optimizer)
        self.verdicts: list[Verdict] = []
        answers: Any = type("Answers", (), {})()
        answers.momentum_committed = answers.momentum_opened = lambda *args: None
        answers.momentum_audited = lambda step, trainer, verdict: self.verdicts.append(verdict)
        self.auditor = MomentumAuditor(trainer, answers, lambda *args, **kwargs: [None] * len(optimizer.plan))
        trainer.remembers = True
        for step in (2, 3):
            trainer._rates_of(step, 0.01, None)
            trainer.lay_down(step)
        self.auditor.prepare(act.PrepareAudit(step=5, of_step=3, own=None))

    def opening(self, step: int, leaves: Sequence[int] = (0,)) -> bytes:
        pair = self.kept.keeper.pair(step)
        assert pair is not None
        return encode_opening(make_opening(step, leaves, *pair), self.kept.optimizer.plan)

    def audit(self, data: bytes) -> Verdict:
        before, after = self.kept.keeper.pair(3) or (None, None)
        assert before is not None
        assert after is not None
        update = DisTrO.generate(self.kept.optimizer)
        self.auditor.audit(
            act.AuditMomentum(
                step=5,
                of_step=3,
                challenge=Challenge(b"trainer", (b"auditor",), (0,)),
                opening=data,
                batch=BatchId(0, 3),
                before=MomentumCommitment(2, after.plan.layout, before.root),
                after=MomentumCommitment(3, after.plan.layout, after.root),
                decays=(0.9,),
                previous=update,
                sent=update,
            )
        )
        return self.verdicts.pop()


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


@pytest.mark.parametrize("name", list(BAD))
def test_what_is_no_opening_of_what_was_committed_to_is_a_verdict_and_no_error(case: Case, name: str) -> None:
    verdict = case.audit(BAD[name](case))
    assert not verdict.passed
    assert verdict.coefficients == 0, "nothing was compared"


def test_a_true_opening_is_compared(case: Case) -> None:
    assert not any("committed" in reason or "other leaves" in reason for reason in case.audit(case.data).reasons)
