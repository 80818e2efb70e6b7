"""Importing the package is cheap, and the optimizer and sessions load none of the large libraries of other rooms."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import distro_optim
import distro_optim.testing
from distro_optim.errors import ConfigurationError

SOURCES = Path(__file__).parents[1] / "src"
HEAVY = {"lightning", "pytorch_lightning", "lightning_fabric", "iroh", "transformers", "matplotlib", "rich"}
NUMERIC = {"torch", "numpy"}

# What `import distro_optim` may load. Others make it slow: typing, with re and enum, takes most of 10 ms on its own.
CHEAP = {"__future__", "importlib", "importlib._bootstrap", "importlib._bootstrap_external", "types", "warnings"}

# In this order, in one interpreter: what a statement must not load, those before it have not loaded either.
STATEMENTS = {
    "package": "import distro_optim; dir(distro_optim)",
    "testing": "import distro_optim.testing; dir(distro_optim.testing)",
    "command": "from distro_optim import cli; cli._parser().parse_args(['testnet', 'script.py'])",
    "optimizer": "from distro_optim import *; from distro_optim import DisTrO; DisTrO, MemoryExchange",
    "session": (
        "from distro_optim import RunConfig, SwarmSession; import torch; model = torch.nn.Linear(3, 2); "
        "SwarmSession(model, DisTrO(model.parameters(), lr=1e-3), config=RunConfig(run_id='r'), dataset_size=64)"
    ),
    "a step": (
        "x = DisTrO(model.parameters(), lr=1e-3); model(torch.ones(1, 3)).sum().backward(); x.step(); x.zero_grad(); "
        "x.eval(); x.train(); x.load_state_dict(x.state_dict()); x.flush()"
    ),
    "all of testing": "from distro_optim.testing import *; check_exchange, MemorySwarm, COORDINATOR_CHECKS",
    "join": "import distro_optim.client.joining",
}
# Imports nothing itself that the package could need.
PROGRAM = f"""
import sys
loaded = {{}}
for name, statement in {STATEMENTS!r}.items():
    before = set(sys.modules)
    exec(statement)
    loaded[name] = set(sys.modules) - before
print(repr(loaded))
"""


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """The modules that each of STATEMENTS loads in a fresh interpreter, beside those that were there before."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DISTRO_OPTIM_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**environment, "PYTHONPATH": str(SOURCES)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    modules: dict[str, set[str]] = ast.literal_eval(done.stdout)
    return modules


@pytest.mark.slow
def test_import_distro_optim_loads_not_even_torch(loaded: dict[str, set[str]]) -> None:
    assert "distro_optim" in loaded["package"]
    assert not loaded["package"] & (HEAVY | NUMERIC)


@pytest.mark.slow
def test_import_distro_optim_loads_next_to_nothing(loaded: dict[str, set[str]]) -> None:
    assert loaded["package"] - CHEAP == {"distro_optim", "distro_optim._version"}


@pytest.mark.slow
def test_the_optimizer_and_its_exchanges_load_torch_and_none_of_the_others(loaded: dict[str, set[str]]) -> None:
    assert "torch" in loaded["optimizer"]
    assert "distro_optim.optimizer" in loaded["optimizer"]
    assert not loaded["optimizer"] & HEAVY


@pytest.mark.slow
def test_a_session_loads_none_of_the_large_libraries_until_it_starts(loaded: dict[str, set[str]]) -> None:
    assert "distro_optim.strategy.session" in loaded["session"] | loaded["optimizer"]
    assert not loaded["session"] & HEAVY


@pytest.mark.slow
def test_a_step_does_not_load_the_compiler(loaded: dict[str, set[str]]) -> None:
    assert not any("torch._dynamo" in modules for modules in loaded.values())


@pytest.mark.slow
def test_a_client_loads_what_shards_models_only_when_it_does(loaded: dict[str, set[str]]) -> None:
    assert "distro_optim.client.several.team" in loaded["join"]
    assert "torch.distributed.fsdp" not in loaded["join"]


SCRIPT = """
import atexit, sys
atexit.register(lambda: print(sorted({"torch", "numpy", "lightning", "cryptography"} & set(sys.modules))))
from distro_optim import DisTrO, PsycheStrategy
"""


@pytest.mark.parametrize("run", ["psyche1abcdefgh", "'PSYCHE1ABCDEFGH',", "nonsense"])
def test_a_damaged_ticket_ends_a_script_in_one_line_before_anything_is_imported(run: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "PYTHONPATH": str(SOURCES), "DISTRO_OPTIM_RUN": run},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "[]\n")
    assert done.stderr.startswith("distro_optim: DISTRO_OPTIM_RUN does not name a run: ")
    assert done.stderr.count("\n") == 1
    assert "Copy all of the ticket" in done.stderr


def test_a_prompt_is_not_ended_by_a_damaged_ticket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTRO_OPTIM_RUN", "psyche1abcdefgh")
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    monkeypatch.delitem(vars(distro_optim), "DisTrO", raising=False)  # as if nobody had asked for it yet
    with pytest.raises(ConfigurationError, match="DISTRO_OPTIM_RUN does not name a run"):
        distro_optim.DisTrO  # noqa: B018
    monkeypatch.setenv("DISTRO_OPTIM_RUN", "host:20000/run")
    assert distro_optim.DisTrO.__name__ == "DisTrO"


@pytest.mark.slow
def test_import_the_testing_room_loads_not_even_torch(loaded: dict[str, set[str]]) -> None:
    assert loaded["testing"] == {"distro_optim.testing"}
    assert not loaded["testing"] & (HEAVY | NUMERIC)


@pytest.mark.slow
def test_everything_in_the_testing_room_does_without_the_large_libraries(loaded: dict[str, set[str]]) -> None:
    assert "distro_optim.testing.swarm" in loaded["all of testing"]
    assert not loaded["all of testing"] & HEAVY


@pytest.mark.slow
def test_the_command_loads_what_a_subcommand_needs_only_when_that_runs(loaded: dict[str, set[str]]) -> None:
    assert "distro_optim.testnet.command" in loaded["command"]
    assert not loaded["command"] & (HEAVY | NUMERIC | {"asyncio", "prometheus_client"})


@pytest.mark.parametrize("room", [distro_optim, distro_optim.testing], ids=lambda room: room.__name__)
def test_a_name_that_is_not_there_is_an_attribute_error(room: ModuleType) -> None:
    with pytest.raises(AttributeError, match="AdamW"):
        room.AdamW  # noqa: B018


@pytest.mark.parametrize("room", [distro_optim, distro_optim.testing], ids=lambda room: room.__name__)
def test_every_public_name_is_there(room: ModuleType) -> None:
    assert all(getattr(room, name) is not None for name in room.__all__)
