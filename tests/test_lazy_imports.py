"""Importing the package, and the optimizer from it, loads none of the large libraries of its other rooms."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import distro_optim
import distro_optim.testing

SOURCES = Path(__file__).parents[1] / "src"
HEAVY = ("lightning", "pytorch_lightning", "lightning_fabric", "iroh", "transformers", "matplotlib", "rich")


def modules_after(statement: str) -> set[str]:
    """What a fresh interpreter has loaded after ``statement``."""
    program = f"{statement}\nimport sys\nprint(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(SOURCES)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_import_distro_optim_loads_not_even_torch() -> None:
    loaded = modules_after("import distro_optim; dir(distro_optim)")
    assert "distro_optim" in loaded
    assert not loaded & {*HEAVY, "torch", "numpy"}


def test_the_optimizer_and_its_exchanges_load_torch_and_none_of_the_others() -> None:
    loaded = modules_after("from distro_optim import *; from distro_optim import DisTrO; DisTrO, MemoryExchange")
    assert "torch" in loaded
    assert not loaded & set(HEAVY)


def test_import_the_testing_room_loads_not_even_torch() -> None:
    loaded = modules_after("import distro_optim.testing; dir(distro_optim.testing)")
    assert "distro_optim.testing" in loaded
    assert not loaded & {*HEAVY, "torch", "numpy"}


def test_everything_in_the_testing_room_does_without_the_large_libraries() -> None:
    loaded = modules_after("from distro_optim.testing import *; check_exchange, MemorySwarm, COORDINATOR_CHECKS")
    assert not loaded & set(HEAVY)


@pytest.mark.parametrize("room", [distro_optim, distro_optim.testing], ids=lambda room: room.__name__)
def test_a_name_that_is_not_there_is_an_attribute_error(room: ModuleType) -> None:
    with pytest.raises(AttributeError, match="AdamW"):
        room.AdamW  # noqa: B018


@pytest.mark.parametrize("room", [distro_optim, distro_optim.testing], ids=lambda room: room.__name__)
def test_every_public_name_is_there(room: ModuleType) -> None:
    assert all(getattr(room, name) is not None for name in room.__all__)
