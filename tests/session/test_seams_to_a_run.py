"""The seams between a session and its run are small, and what stands before one passes everything on."""

from __future__ import annotations

import pytest

from distro_optim.strategy.forwarding import ForwardingActions, ForwardingLife, ForwardingSharing
from distro_optim.strategy.port import (
    AuditAnswers,
    ModelSharing,
    RunAccess,
    RunActions,
    RunAnswers,
    RunFacts,
    RunLife,
    RunPort,
)

SEAMS = (RunFacts, RunActions, RunAnswers, AuditAnswers, ModelSharing, RunLife)
MOST = 6


def members(kind: type) -> set[str]:
    return {
        name
        for name, value in vars(kind).items()
        if not name.startswith("_") and (callable(value) or isinstance(value, property))
    }


@pytest.mark.parametrize("seam", [*SEAMS, RunAccess], ids=lambda seam: seam.__name__)
def test_a_seam_has_at_most_six_members(seam: type) -> None:
    assert 0 < len(members(seam)) <= MOST


def test_an_access_has_all_seams_and_a_port_is_all_of_them() -> None:
    assert len(members(RunAccess)) == len(SEAMS)
    assert set(SEAMS) < set(RunPort.__mro__)


@pytest.mark.parametrize(
    ("forwarding", "seam"),
    [(ForwardingActions, RunActions), (ForwardingSharing, ModelSharing), (ForwardingLife, RunLife)],
    ids=["actions", "sharing", "life"],
)
def test_what_stands_before_a_seam_passes_all_of_it_on(forwarding: type, seam: type) -> None:
    assert members(forwarding) == members(seam)
