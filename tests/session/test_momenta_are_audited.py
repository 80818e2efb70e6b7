"""Sessions audit each other's momenta: who trains otherwise than it should is named, and nobody else is."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typing_extensions import override

from distro_optim import DisTrO, RunConfig
from distro_optim.errors import ConfigurationError
from distro_optim.optim.rules import PUBLISHED
from distro_optim.strategy.model.audits.momenta import (
    MomentumAuditor,
    check_shows_momentum,
    why_momenta_are_not_audited,
)
from distro_optim.strategy.rounds import actions as act
from distro_optim.verify.calibrate import LOOSEST, TIGHTEST

from .auditing import DENSE, AuditingScript, Noisy, everything_of, named_by, settled
from .scripts import LR, Net, Script
from .world import SimulatedPort

CHEAT = 3
MOMENTUM = "momentum"
"""What the words of test 2 are about."""


class Plain(Net):
    """Without a norm, and without what only some samples use: the gradient does not depend on how a batch is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Identity()

    @override
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.relu(self.norm(self.first(x)))) * self.frozen.repeat(2)
        return y + self.sometimes.sum()


@dataclass
class ShowingScript(AuditingScript):
    """Shows a momentum that depends on nothing but its batch; ``cheats`` is called with it after its first round."""

    model_class: type[Net] = Plain
    cheats: Callable[[Script], None] = lambda script: None

    @override
    def __call__(self, port: SimulatedPort) -> None:
        self.after = lambda script, round_: self.cheats(script) if len(script.trained) == 1 else None
        self.optimizer_settings = {**DENSE, **self.optimizer_settings}
        super().__call__(port)


def honest(script: Script) -> None:
    """Trains as it should."""


def looks_nowhere(script: Script) -> None:
    """Trains all of its batch, at the weights as they are."""
    ahead = script.optimizer.lookahead
    script.optimizer.lookahead = lambda lr=None: ahead(0.0)  # type: ignore[method-assign]


def test_a_peer_that_does_not_look_ahead_is_named_and_honest_ones_are_not(audited_run: Any) -> None:
    scripts = [ShowingScript(cheats=looks_nowhere if number == CHEAT else honest) for number in range(1, 5)]
    world = audited_run(scripts, steps=6)
    others = [script for number, script in enumerate(scripts, start=1) if number != CHEAT]
    cheat = world.ports[CHEAT - 1].key
    world.until(lambda state: all(named_by(script, MOMENTUM) for script in others) or state.progress.step > 20)
    for script in others:
        assert named_by(script, MOMENTUM) == {cheat}
        assert {each.trainer for each in settled(script, MOMENTUM) if each.passed} == {o.port.key for o in others}
        found = [each for each in settled(script, MOMENTUM) if not each.passed]
        assert "momentum is not what its batch makes of the one before" in found[0].words
        assert "Manhattan distance of the momentum" in found[0].words
    noise = [noise.manhattan for script in others for noise in script.port.own_noise]
    assert noise
    assert max(value or 0.0 for value in noise) < 1e-4, "weights of two steps ago come back"
    member = others[0].port.member
    assert member is not None
    assert member.rounds.audit_limits is not None
    assert member.rounds.audit_limits.manhattan == TIGHTEST.manhattan


def test_where_honest_peers_differ_from_themselves_nothing_is_decided(audited_run: Any) -> None:
    # A norm over the batch: in other pieces its gradient is another one.
    scripts = [ShowingScript(model_class=Net) for _ in range(3)]
    world = audited_run(scripts, steps=7)
    for script, port in zip(scripts, world.ports, strict=True):
        assert any((noise.manhattan or 0.0) > LOOSEST.manhattan for noise in port.own_noise)
        assert port.verdicts
        assert settled(script, MOMENTUM) == []
        assert port.member.rounds.audits_nothing
        assert port.member.rounds.audit_limits is None


def test_audits_of_momenta_leave_no_trace_in_who_audits_and_in_who_is_audited(audited_run: Any) -> None:
    def train(*, momentum: bool) -> tuple[list[dict[str, Any]], Any, int]:
        random.seed(7)
        torch.manual_seed(7)
        scripts = [ShowingScript(model_class=Noisy, audits=momentum) for _ in range(3)]
        audited_run(scripts, steps=6, momentum=momentum)
        states = torch.get_rng_state(), random.getstate()
        return [everything_of(script) for script in scripts], states, len(scripts[1].port.verdicts)

    audited, states, count = train(momentum=True)
    plain, plain_states, none = train(momentum=False)
    assert count > 2
    assert none == 0
    for one, other in zip(audited, plain, strict=True):
        for name in ("weights", "momentum"):
            assert all(torch.equal(a, b) for a, b in zip(one[name], other[name], strict=True)), name
        for name in one.keys() - {"weights", "momentum"}:
            assert one[name] == other[name], name
    assert torch.equal(states[0], plain_states[0])
    assert states[1] == plain_states[1]


@pytest.mark.slow
def test_a_peer_without_a_loss_function_shows_its_momentum_and_audits_nobody(audited_run: Any) -> None:
    scripts = [ShowingScript(audits=number != 2) for number in range(1, 5)]
    world = audited_run(scripts, steps=8)
    assert not world.ports[1].verdicts
    assert world.ports[1].key in {trainer for _, trainer, _ in world.ports[0].verdicts}
    assert not any(named_by(script, MOMENTUM) for script in scripts)


def test_weights_of_an_audited_step_are_kept_for_as_long_as_its_opening_may_take_and_no_longer() -> None:
    trainer: Any = SimpleNamespace(
        weights_of=lambda step: {},
        known_rates=lambda step: [LR],
        live_momentum=list,
        optimizer=SimpleNamespace(plan=None, param_groups=[]),
    )
    answers: Any = SimpleNamespace(momentum_committed=None, momentum_opened=None)
    auditor = MomentumAuditor(trainer, answers, lambda *of, **more: None)
    auditor.keeper = SimpleNamespace(commit=lambda *of: None, pair=lambda step: None)  # type: ignore[assignment]

    def kept(step: int) -> set[int]:
        auditor.commit(step)
        return set(auditor._past)

    for step in (7, 8):
        auditor.prepare(act.PrepareAudit(step=step, of_step=step - 2, own=None))
    assert [kept(step) for step in range(8, 14)] == [{5, 6}, {5, 6}, {5, 6}, {5, 6}, {6}, set()]
    auditor.prepare(act.PrepareAudit(step=14, of_step=12, own=None))
    auditor.forget_weights()
    assert not auditor._past


def test_a_peer_that_cannot_show_its_momentum_is_told_before_it_is_in_the_run() -> None:
    plan = DisTrO(Net().parameters(), lr=LR, **PUBLISHED).plan
    config = RunConfig(total_steps=9, global_batch_size=4, audit_fraction=0.5)
    for audit_momentum in (True, False):
        state = replace(config, audit_momentum=audit_momentum).coordinator_state("run")
        check_shows_momentum(state, plan, is_in_shards=False)
        if not audit_momentum:
            check_shows_momentum(state, plan, is_in_shards=True)
            continue
        with pytest.raises(ConfigurationError, match="audit_momentum=False"):
            check_shows_momentum(state, plan, is_in_shards=True)


@pytest.mark.parametrize("rules", [{}, {"direction": "orthogonal", "update": "rms"}], ids=["published", "recipe"])
@pytest.mark.parametrize(("fraction", "momentum"), [(0.5, True), (0.5, False), (0.0, True)])
def test_where_momenta_cannot_be_audited_that_is_said(rules: dict[str, str], fraction: float, momentum: bool) -> None:
    groups = DisTrO(Net().parameters(), lr=LR, **{**PUBLISHED, **rules}).param_groups
    config = RunConfig(total_steps=9, global_batch_size=4, audit_fraction=fraction, audit_momentum=momentum)
    reason = why_momenta_are_not_audited(config.coordinator_state("run"), groups)
    if not rules or not fraction or not momentum:
        assert reason is None
    else:
        assert reason is not None
        assert "momenta are not audited" in reason


def test_peers_that_train_by_the_recipe_are_told_so_and_take_each_other_for_honest(audited_run: Any) -> None:
    scripts = [AuditingScript(optimizer_settings={"direction": "orthogonal", "update": "rms"}) for _ in range(3)]
    audited_run(scripts, steps=14)
    for script in scripts:
        assert [text for text in script.news if "momenta are not audited" in text] == script.news[:1]
        audits = settled(script)
        assert audits
        assert all(each.passed for each in audits)
        assert not settled(script, MOMENTUM)
