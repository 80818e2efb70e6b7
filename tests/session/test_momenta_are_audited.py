"""Sessions audit each other's momenta: who trains otherwise than it should is named, and nobody else is."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typing_extensions import override

from distro_optim import DisTrO, RunConfig
from distro_optim.coordinator.model import Hub
from distro_optim.coordinator.rules.checkpoints import hub_of_peers
from distro_optim.errors import ConfigurationError
from distro_optim.strategy.model.audits import keeper
from distro_optim.strategy.model.audits.momenta import MomentumAuditor, check_shows_momentum
from distro_optim.strategy.rounds import actions as act
from distro_optim.strategy.rounds.audits.momentum_watch import OPENING_TAG
from distro_optim.verify.calibrate import LOOSEST, TIGHTEST
from rounds.simulator import Member

from .scripts import LR, Net, Script, samples
from .world import SessionMember, SessionWorld, SimulatedPort

DATA = samples(torch.float32)
CHEAT = 3


class InlineJobs:
    """What a session does in another thread is done at once: this world has one clock."""

    def __init__(self, name: str) -> None:
        pass

    def add(self, job: Callable[[], object]) -> int:
        job()
        return 0

    def wait(self, number: int) -> None:
        pass

    def stop(self) -> None:
        pass


class Noisy(Net):
    """Draws random numbers, counts its calls, and has dropout: all that an audit could leave a trace in."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)
        self.calls = 0

    @override
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.drop(super().forward(x + 0.1 * torch.rand(()) * random.random()))
        return y


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
class AuditingScript(Script):
    """Audits, if ``audits``; ``cheats`` is called with the script after its first round."""

    model_class: type[Net] = Plain
    audits: bool = True
    cheats: Callable[[Script], None] = lambda script: None

    @override
    def __call__(self, port: SimulatedPort) -> None:
        def loss(indices: list[int]) -> Tensor:
            x = DATA[indices]
            mean: Tensor = nn.functional.mse_loss(self.model(x), x.flip(1))
            return mean

        if self.audits:
            self.session_settings = {"audit_loss": loss, **self.session_settings}
        self.after = lambda script, round_: self.cheats(script) if len(script.trained) == 1 else None
        self.optimizer_settings = {"compression_topk": 24, "lr": LR, **self.optimizer_settings}
        super().__call__(port)


class AuditedRun(SessionWorld):
    def __init__(self, *, fraction: float = 1.0, batch_size: int = 16, momentum: bool = True) -> None:
        checkpoint = Hub(hub_of_peers(audit_fraction=fraction, audit_momentum=momentum))
        super().__init__(
            checkpoint=checkpoint,
            lr=LR,
            total_steps=400,
            epoch_time=900,
            global_batch_size_start=batch_size,
            global_batch_size_end=batch_size,
        )
        self._elsewhere = random.Random(0)

    @override
    def gossip(self, sender: Member, data: bytes, *, weights: bool, to: Collection[Member] | None = None) -> None:
        # What only audits do takes its random numbers from elsewhere: a run without any has the same rounds.
        own = self.rng
        self.rng = self._elsewhere if weights else own
        super().gossip(sender, data, weights=weights, to=to)
        self.rng = own

    @override
    def fetch(self, who: Member, action: act.FetchBlob) -> None:
        if not action.tag.startswith(OPENING_TAG):
            super().fetch(who, action)
            return
        blob = action.ticket.hash
        data = next(member.blobs[blob] for member in self.members if blob in member.blobs)
        assert len(data) <= action.max_size
        who.later(0.1, lambda: who.rounds.fetched(blob, data, self.now))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(keeper, "SideJobs", InlineJobs)
    worlds: list[AuditedRun] = []

    def start(scripts: list[Script], *, steps: int, **settings: Any) -> AuditedRun:
        world = AuditedRun(batch_size=4 * len(scripts), **settings)
        worlds.append(world)
        for number, script in enumerate(scripts, start=1):
            world.run(world.port(number), script)
        world.until(lambda state: state.progress.step > steps)
        return world

    yield start
    for world in worlds:
        world.release()


def settled(script: Script) -> list[act.AuditSettled]:
    member = script.port.member
    assert isinstance(member, SessionMember)
    found: list[act.AuditSettled] = member.of(act.AuditSettled)
    return [each for each in found if "momentum" in each.words]


def named_by(script: Script) -> set[bytes]:
    return {each.trainer for each in settled(script) if not each.passed}


def honest(script: Script) -> None:
    """Trains as it should."""


def looks_nowhere(script: Script) -> None:
    """Trains all of its batch, at the weights as they are."""
    ahead = script.optimizer.lookahead
    script.optimizer.lookahead = lambda lr=None: ahead(0.0)  # type: ignore[method-assign]


def test_a_peer_that_does_not_look_ahead_is_named_and_honest_ones_are_not(run: Any) -> None:
    scripts = [AuditingScript(cheats=looks_nowhere if number == CHEAT else honest) for number in range(1, 5)]
    world = run(scripts, steps=6)
    others = [script for number, script in enumerate(scripts, start=1) if number != CHEAT]
    cheat = world.ports[CHEAT - 1].key
    world.until(lambda state: all(named_by(script) for script in others) or state.progress.step > 20)
    for script in others:
        assert named_by(script) == {cheat}
        assert {each.trainer for each in settled(script) if each.passed} == {o.port.key for o in others}
        found = [each for each in settled(script) if not each.passed]
        assert "momentum is not what its batch makes of the one before" in found[0].words
        assert "Manhattan distance of the momentum" in found[0].words
    noise = [noise.manhattan for script in others for noise in script.port.own_noise]
    assert noise
    assert max(value or 0.0 for value in noise) < 1e-4, "weights of two steps ago come back"
    member = others[0].port.member
    assert member is not None
    assert member.rounds.audit_limits is not None
    assert member.rounds.audit_limits.manhattan == TIGHTEST.manhattan


def test_where_honest_peers_differ_from_themselves_nothing_is_decided(run: Any) -> None:
    # A norm over the batch: in other pieces its gradient is another one.
    scripts = [AuditingScript(model_class=Net) for _ in range(3)]
    world = run(scripts, steps=7)
    for script, port in zip(scripts, world.ports, strict=True):
        assert any((noise.manhattan or 0.0) > LOOSEST.manhattan for noise in port.own_noise)
        assert port.verdicts
        assert settled(script) == []
        assert port.member.rounds.audits_nothing
        assert port.member.rounds.audit_limits is None


def everything_of(script: Script) -> dict[str, Any]:
    assert isinstance(script.model, Noisy)
    return {
        "weights": [t.clone() for t in script.model.state_dict().values()],
        "momentum": list(script.trainer.momentum().values()),
        "others": (dict(script.port.losses), script.model.calls, list(script.trained), dict(script.port.hashes)),
    }


def test_audits_of_momenta_leave_no_trace_in_who_audits_and_in_who_is_audited(run: Any) -> None:
    def train(*, momentum: bool) -> tuple[list[dict[str, Any]], Any, int]:
        random.seed(7)
        torch.manual_seed(7)
        scripts = [AuditingScript(model_class=Noisy, audits=momentum) for _ in range(3)]
        run(scripts, steps=6, momentum=momentum)
        states = torch.get_rng_state(), random.getstate()
        return [everything_of(script) for script in scripts], states, len(scripts[1].port.verdicts)

    audited, states, count = train(momentum=True)
    plain, plain_states, none = train(momentum=False)
    assert count > 2
    assert none == 0
    for one, other in zip(audited, plain, strict=True):
        for name in ("weights", "momentum"):
            assert all(torch.equal(a, b) for a, b in zip(one[name], other[name], strict=True)), name
        assert one["others"] == other["others"]
    assert torch.equal(states[0], plain_states[0])
    assert states[1] == plain_states[1]


@pytest.mark.slow
def test_a_peer_without_a_loss_function_shows_its_momentum_and_audits_nobody(run: Any) -> None:
    scripts = [AuditingScript(audits=number != 2) for number in range(1, 5)]
    world = run(scripts, steps=8)
    assert not world.ports[1].verdicts
    assert world.ports[1].key in {trainer for _, trainer, _ in world.ports[0].verdicts}
    assert not any(named_by(script) for script in scripts)


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
    plan = DisTrO(Net().parameters(), lr=LR).plan
    config = RunConfig(total_steps=9, global_batch_size=4, audit_fraction=0.5)
    for audit_momentum in (True, False):
        state = replace(config, audit_momentum=audit_momentum).coordinator_state("run")
        check_shows_momentum(state, plan, is_in_shards=False)
        if not audit_momentum:
            check_shows_momentum(state, plan, is_in_shards=True)
            continue
        with pytest.raises(ConfigurationError, match="audit_momentum=False"):
            check_shows_momentum(state, plan, is_in_shards=True)
