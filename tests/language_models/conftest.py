"""Tests of an architecture that the installed transformers does not have are skipped, and say so."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
import transformers

from distro_optim.errors import ModelConfigError

HAS_DEEPSEEK = "deepseek_v3" in transformers.CONFIG_MAPPING


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    try:
        return (yield)
    except (ModelConfigError, ModuleNotFoundError) as error:
        if HAS_DEEPSEEK or "deepseek_v3" not in str(error):
            raise
        pytest.skip(f"transformers {transformers.__version__} has no DeepSeek")
