"""Reading a configuration needs neither transformers nor Lightning; each comes with what needs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "src"
TIMEOUT = 150

PROGRAM = """
import importlib, pkgutil, sys
import distro_optim, distro_optim.models
assert "torch" not in sys.modules
for module in pkgutil.iter_modules(distro_optim.models.__path__):
    if module.name != "lightning_module":
        importlib.import_module(f"distro_optim.models.{module.name}")
from distro_optim.models.config import read_config
read_config("llama-20m", "HfLlama")
print(*{"transformers", "lightning", "lightning_fabric", "iroh", "huggingface_hub"} & set(sys.modules))
"""


@pytest.mark.slow
def test_importing_the_room_loads_none_of_the_large_libraries() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
