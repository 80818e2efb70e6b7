"""Sessions audit each other: who trains nothing is found, and the training of those who audit stays as it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distro_optim import DisTrO
from distro_optim.coordinator.types import BatchId
from distro_optim.optim.rules import PUBLISHED
from distro_optim.strategy.model.audits.results import ResultAuditor
from distro_optim.strategy.model.named_tensors import NamedTensors
from distro_optim.strategy.model.trainer import SwarmTrainer
from distro_optim.strategy.rounds import actions as act
from distro_optim.verify.recompute import Evidence

from .auditing import DATA, DENSE, AuditingScript, Noisy, everything_of, named_by, settled
from .scripts import LR, Script

RIDER = 3


def trains_nothing(script: Script) -> None:
    """Leaves the gradients out: what goes out is the momentum."""
    for parameter in script.model.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()


def sends_noise(script: Script) -> None:
    for parameter in script.model.parameters():
        if parameter.grad is not None:
            parameter.grad.normal_()


@pytest.mark.parametrize("cheat", [trains_nothing, pytest.param(sends_noise, marks=pytest.mark.slow)])
def test_a_peer_that_does_not_train_is_named_by_the_others(audited_run: Any, cheat: Callable[[Script], None]) -> None:
    scripts: list[Script] = [
        AuditingScript(optimizer_settings=DENSE, during=cheat if number == RIDER else lambda script: None)
        for number in range(1, 5)
    ]
    world = audited_run(scripts, steps=6)
    rider = world.ports[RIDER - 1].key
    honest = [script for number, script in enumerate(scripts, start=1) if number != RIDER]
    for _ in range(400):
        if all(named_by(script) for script in honest):
            break
        world.step()
    assert all(named_by(script) == {rider} for script in honest)


def test_a_session_that_audits_trains_bit_by_bit_as_one_that_does_not(audited_run: Any) -> None:
    def train(*, audits: bool) -> tuple[list[dict[str, Any]], Any, int]:
        random.seed(7)
        torch.manual_seed(7)
        scripts: list[Script] = [AuditingScript(model_class=Noisy, audits=audits) for _ in range(3)]
        audited_run(scripts, steps=6)
        states = torch.get_rng_state(), random.getstate()
        return [everything_of(script) for script in scripts], states, len(scripts[1].port.audits)

    audited, states, count = train(audits=True)
    plain, plain_states, none = train(audits=False)
    assert count > 4
    assert none == 0
    for one, other in zip(audited, plain, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(a, b) for a, b in zip(one["weights"], other["weights"], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(one["momentum"], other["momentum"], strict=True))
        for name in one.keys() - {"weights", "momentum"}:
            assert one[name] == other[name], name
    assert torch.equal(states[0], plain_states[0])
    assert states[1] == plain_states[1]


def test_a_peer_without_a_loss_function_says_once_that_it_does_not_audit(audited_run: Any) -> None:
    scripts: list[Script] = [AuditingScript(audits=number != 2) for number in range(1, 5)]
    world = audited_run(scripts, steps=7)
    for _ in range(400):
        if settled(scripts[1]):
            break
        world.step()
    told = [text for text in scripts[1].news if "audit" in text]
    assert told == [
        "this run audits results, and this peer audits none: the loop gives no loss function for audits "
        "(audit_loss=...)"
    ]
    assert not scripts[1].port.audits
    assert not any("audit" in text for text in scripts[0].news)
    assert any(s.passed for s in settled(scripts[1])), "it hears what the others find"


def test_a_loss_function_that_fails_ends_audits_and_not_the_training(audited_run: Any) -> None:
    def broken(indices: list[int]) -> Tensor:
        raise IndexError("no such sample")

    scripts: list[Script] = [AuditingScript(session_settings={"audit_loss": broken}) for _ in range(3)]
    audited_run(scripts, steps=6)
    told = [text for text in scripts[0].news if "audit" in text]
    assert len(told) == 1
    assert "its loss function failed: IndexError: no such sample" in told[0]
    assert len(scripts[0].trained) >= 5


def test_nothing_is_expected_of_parameters_that_are_frozen_and_the_optimizers() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))
    model[0].requires_grad_(False)
    optimizer = DisTrO(model.parameters(), lr=LR, overlap=True, **PUBLISHED)
    trainer = SwarmTrainer(NamedTensors.of(model, optimizer), optimizer)
    model(DATA[:4]).sum().backward()
    sent = optimizer.generate()
    found: list[Evidence] = []
    answers: Any = SimpleNamespace(
        momentum_committed=None, momentum_opened=None, audited=lambda step, peer, evidence, own: found.append(evidence)
    )
    auditor = ResultAuditor(
        model,
        trainer,
        answers,
        order=None,
        loss=lambda indices: model(DATA[indices]).sum(),
        is_cancelled=lambda step: False,
        tell=pytest.fail,
    )
    audited = act.AuditResult(trainer=bytes(32), batch=BatchId(0, 3), update=sent)
    auditor.carry_out(act.AuditResults(step=3, of_step=1, audited=(audited,), control=BatchId(4, 7), own=None))
    assert found[0].expected == found[0].sent > 0
    assert found[0].assigned.share == 1.0
