"""Fixtures: Lightning under both names, its strategy, and runs without a network."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from frameworks.lightning_runs import NAMESPACES, STRATEGIES, Runs, load, quiet_runs


@pytest.fixture(scope="session", params=NAMESPACES)
def both(request: pytest.FixtureRequest) -> ModuleType:
    """``lightning.pytorch``, then ``pytorch_lightning``."""
    return load(request.param)


@pytest.fixture(scope="session")
def pl() -> ModuleType:
    return load("lightning.pytorch")


@pytest.fixture(scope="session")
def strategy() -> Callable[..., Any]:
    """Makes the strategy for a namespace."""

    def make(pl: ModuleType, **settings: Any) -> Any:
        module, name = STRATEGIES[pl.__name__]
        return getattr(load(module), name)(**settings)

    return make


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    return quiet_runs(monkeypatch)
