"""What the tests of the benchmark's learners share."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module ``learners.base``; while it is used, the others can be imported as well."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("learners.base")
