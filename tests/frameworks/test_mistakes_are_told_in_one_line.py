"""A mistake ends a program with one line; elsewhere it is an exception like any other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import warm_python
from distro_optim.errors import ConfigurationError, DistroError
from distro_optim.strategy.one_line import tell_mistakes_in_one_line

SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
import lightning.pytorch as pl
import torch
from distro_optim.errors import ConfigurationError
from distro_optim.strategy.psyche import PsycheStrategy
from frameworks.lightning_runs import loader, make_module, make_trainer

def fit():
    module = make_module(pl, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    make_trainer(pl, sys.argv[1], PsycheStrategy(relay="none")).fit(module, loader())

try:
    fit()
except ConfigurationError as error:
    print("caught", error.name)
fit()
"""


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """The errors that the hook before ours gets."""
    errors: list[BaseException] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, at: errors.append(error))
    tell_mistakes_in_one_line()
    return errors


def test_a_mistake_is_one_line_with_its_notes(told: list[BaseException], capsys: pytest.CaptureFixture[str]) -> None:
    error = ConfigurationError("total_steps is missing", name="total_steps")
    error.add_note("set it")
    sys.excepthook(type(error), error, None)
    assert capsys.readouterr().err == "distro_optim: total_steps is missing\nset it\n"
    assert not told


@pytest.mark.parametrize("error", [ValueError("the script's own"), DistroError("a fault of ours")])
def test_other_errors_keep_their_traceback(told: list[BaseException], error: Exception) -> None:
    sys.excepthook(type(error), error, None)
    assert told == [error]


def test_in_a_prompt_it_keeps_its_traceback(told: list[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    error = ConfigurationError("total_steps is missing")
    sys.excepthook(type(error), error, None)
    assert told == [error]


def test_it_stands_before_another_hook_only_once(told: list[BaseException]) -> None:
    hook = sys.excepthook
    tell_mistakes_in_one_line()
    assert sys.excepthook is hook


@pytest.mark.slow
@pytest.mark.waiting
def test_a_program_ends_with_one_line_and_who_catches_the_error_gets_it(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    process = warm_python.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        output, errors = process.communicate(timeout=100)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1
    assert "caught configure_optimizers" in output
    assert "Traceback" not in errors
    assert errors.count("distro_optim: configure_optimizers returned SGD") == 1
