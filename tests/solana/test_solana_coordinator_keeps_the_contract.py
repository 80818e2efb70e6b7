"""A client on chain keeps the promises that every coordinator's client keeps, whatever the version of accounts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from distro_optim.coordinator.solana.programs import Programs
from distro_optim.testing.coordinator import CHECKS, Arena
from solana.solana_arena import SolanaArena, in_arena

pytestmark = pytest.mark.waiting


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("version", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_client_keeps_its_promises(version: int, check: Callable[[Arena], Awaitable[None]]) -> None:
    in_arena(check, SolanaArena(programs=Programs(account_version=version)))
