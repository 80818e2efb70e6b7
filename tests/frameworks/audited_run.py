"""A run of one peer whose results are audited by itself, as if another had sent them."""

from __future__ import annotations

import pytest
from typing_extensions import override

from distro_optim.coordinator.types import BatchId
from distro_optim.strategy.rounds.actions import ApplyResults, AuditResult, AuditResults
from distro_optim.strategy.session import SwarmSession
from distro_optim.verify.recompute import Evidence
from frameworks.quiet_run import QuietRun

OTHER = bytes([7] * 32)


class AuditedRun(QuietRun):
    """What this peer sent is audited as if another had sent it."""

    audits = True
    found: list[Evidence]

    @override
    def start(self) -> None:
        self.found = []
        super().start()

    @override
    def _begin_round(self) -> None:
        super()._begin_round()
        if not self.audits:
            return
        for place, action in enumerate(list(self._actions)):
            if isinstance(action, ApplyResults) and self._step <= (self.config.total_steps or 0):
                of_step = action.step - 2
                result = AuditResult(trainer=OTHER, batch=self.batches[of_step], update=self.updates[of_step])
                control = BatchId(result.batch.start + 29, result.batch.end + 29)
                audit = AuditResults(
                    step=action.step, of_step=of_step, audited=(result,), control=control, own=result.update
                )
                self._actions.insert(place, audit)

    @override
    def audited(self, step: int, trainer: bytes, found: Evidence, own: Evidence | None) -> None:
        assert trainer == OTHER
        self.found.append(found)


def connect_to(monkeypatch: pytest.MonkeyPatch, *, audits: bool) -> list[AuditedRun]:
    ports: list[AuditedRun] = []

    def connect(session: SwarmSession) -> AuditedRun:
        ports.append(AuditedRun(session.hosting_config()))
        ports[-1].audits = audits
        return ports[-1]

    monkeypatch.setattr(SwarmSession, "connect", connect)
    return ports
