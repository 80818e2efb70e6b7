"""Ways of working, on the CPU: its own, and those of accelerators."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import pytest

from distro_optim.compress import profile
from distro_optim.compress.profile import ACCELERATOR, CPU, Profile
from engines.quick_interpreter import replace_the_language_once

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    replace_the_language_once()

ACCELERATORS: Final = {
    "as a GPU": replace(ACCELERATOR, block_elements=40 * 64),
    "as Apple's": replace(ACCELERATOR, block_elements=40 * 64, float64=False),
}
"""With blocks so small that small models have several."""

PROFILES: Final = {"as a CPU": CPU, **ACCELERATORS}

Work = Callable[[Profile], None]


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    """From now on tensors on the CPU are worked on as a profile says."""

    def as_it_says(chosen: Profile) -> None:
        monkeypatch.setattr(profile, "CPU", chosen)

    return as_it_says


@pytest.fixture(params=PROFILES)
def any_profile(request: pytest.FixtureRequest, work: Work) -> Profile:
    chosen = PROFILES[request.param]
    work(chosen)
    return chosen
