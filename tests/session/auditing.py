"""Sessions that audit each other in a simulated run, and what they have found."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from distro_optim.coordinator.model import Hub
from distro_optim.coordinator.rules.checkpoints import hub_of_peers
from distro_optim.strategy.rounds import actions as act
from distro_optim.strategy.rounds.audits.momentum_watch import OPENING_TAG
from rounds.simulator import Member

from .scripts import LR, Net, Script, samples
from .world import SessionMember, SessionWorld, SimulatedPort

DATA = samples(torch.float32)
DENSE = {"compression_topk": 24, "lr": LR}
"""So many coefficients that each round tells something of this small model."""


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


@dataclass
class AuditingScript(Script):
    """A script that gives a loss function for audits, if ``audits``."""

    audits: bool = True

    @override
    def __call__(self, port: SimulatedPort) -> None:
        def loss(indices: list[int]) -> Tensor:
            x = DATA[indices]
            mean: Tensor = nn.functional.mse_loss(self.model(x), x.flip(1))
            return mean

        if self.audits:
            self.session_settings = {"audit_loss": loss, **self.session_settings}
        super().__call__(port)


class AuditedRun(SessionWorld):
    """A run in which every result is audited, whose first session hosts.

    Args:
        batch_size: of a round.
        momentum: whether by test 2, too.
    """

    def __init__(self, batch_size: int, *, momentum: bool = True) -> None:
        super().__init__(
            checkpoint=Hub(hub_of_peers(audit_fraction=1.0, audit_momentum=momentum)),
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


def settled(script: Script, about: str = "") -> list[act.AuditSettled]:
    """What came of audits as this peer sees it; those whose words are ``about`` something."""
    member = script.port.member
    assert isinstance(member, SessionMember)
    found: list[act.AuditSettled] = member.of(act.AuditSettled)
    return [each for each in found if about in each.words]


def named_by(script: Script, about: str = "") -> set[bytes]:
    """Peers that have failed as this one sees it."""
    return {each.trainer for each in settled(script, about) if not each.passed}


def everything_of(script: Script) -> dict[str, Any]:
    """What an audit could leave a trace in."""
    assert isinstance(script.model, Noisy)
    return {
        "weights": [t.clone() for t in script.model.state_dict().values()],
        "momentum": list(script.trainer.momentum().values()),
        "losses": dict(script.port.losses),
        "calls": script.model.calls,
        "trained": list(script.trained),
        "hashes": dict(script.port.hashes),
    }
