"""The contract of token providers, on each of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from distro_optim.testing.token_data import CHECKS, TokenDataArena
from token_data.arenas import ARENAS

pytestmark = pytest.mark.waiting


@pytest.mark.parametrize("arena", ARENAS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_provider_keeps_its_promises(
    arena: type[TokenDataArena], check: Callable[[TokenDataArena], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with arena() as instance:
        check(instance)
