"""A client on chain keeps the promises that every coordinator's client keeps."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from distro_optim.testing.coordinator import CHECKS, Arena
from solana.solana_arena import in_arena

pytestmark = pytest.mark.waiting


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_client_keeps_its_promises(check: Callable[[Arena], Awaitable[None]]) -> None:
    in_arena(check)
