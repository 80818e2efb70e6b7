"""Each kind of work that can take long says so, in a run and in commands; here every wait is said to be a long one."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from rich.console import Console

from client.test_the_model_is_kept import OneEpoch
from distro_optim.cli import main
from distro_optim.client import command as join_command
from distro_optim.client import joining, training
from distro_optim.compress.fast import loading
from distro_optim.data.making import tokenizing
from distro_optim.operate import asking
from distro_optim.operate import command as run_command
from distro_optim.serve import command as serve_command
from distro_optim.strategy import session
from distro_optim.strategy.model import participant
from distro_optim.strategy.network.runtime import Runtime
from session.scripts import Script
from session.world import SessionWorld

pytestmark = pytest.mark.waiting


class Narrations:
    """In the place of ``narrated``: all that is entered is told, once it is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *modules: Any) -> None:
        self.said: list[str] = []
        for module in modules:
            monkeypatch.setattr(module, "narrated", self.narrated)

    @contextmanager
    def narrated(self, what: str | Callable[[], str], tell: Callable[[str], None] | None = None) -> Iterator[None]:
        yield
        text = what() if callable(what) else what
        self.said.append(text)
        if tell is not None:
            tell(text)


def test_a_session_from_its_checkpoint_to_its_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    narrations = Narrations(monkeypatch, session, participant)
    told: list[str] = []
    world = SessionWorld(total_steps=8, epoch_time=200, init_min_clients=1, min_clients=1)
    try:
        settings = {"on_event": told.append, "checkpoint_dir": tmp_path, "resume": True}
        world.run(world.port(1), Script(session_settings=settings))
        world.until_all_ended()
    finally:
        world.release()
    assert narrations.said == [
        "reading the checkpoint",
        "opening our endpoint",
        "asking to be let into the run",
        "step 1: loading the weights of the run",
        "step 8: hashing and saving the weights",
        "leaving the run",
    ]
    assert set(narrations.said) <= set(told), "as other news is"


def test_a_file_of_tokens_in_a_terminal_by_a_bar_and_elsewhere_in_lines(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Narrations(monkeypatch, tokenizing)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("some text")
    for is_terminal in (False, True):
        options = tokenizing.TokenizeOptions(
            folder=tmp_path / "texts", tokenizer="bytes", out=tmp_path / f"{is_terminal}.bin"
        )
        stream = io.StringIO()
        tokenizing.run_tokenize(options, Console(file=stream, force_terminal=is_terminal, width=200))
        assert ("9 of 9 bytes of text, 10 tokens\n" in stream.getvalue()) is not is_terminal


@pytest.mark.parametrize(
    ("module", "calls", "arguments", "said"),
    [
        (join_command, "distro_optim.client.joining.join", "join 127.0.0.1:1/run", "loading PyTorch"),
        (serve_command, "distro_optim.serve.serving.serve", "serve --state none.toml", "loading the server"),
        (run_command, "distro_optim.operate.looking.look", "run list", "asking the cluster"),
        (
            run_command,
            "distro_optim.operate.changing.change",
            "run pause mine --yes",
            "sending it to the cluster, and waiting until it is confirmed",
        ),
        (run_command, asking.__name__ + ".ask", "run pause mine --save-dir .", "waiting for the server's answer"),
    ],
)
def test_commands_that_load_libraries_or_wait_for_an_answer(
    monkeypatch: pytest.MonkeyPatch, module: Any, calls: str, arguments: str, said: str
) -> None:
    narrations = Narrations(monkeypatch, module)
    home, name = calls.rsplit(".", 1)

    async def later(*_: Any) -> list[str]:
        return ["done"]

    at_once = name in ("join", "ask")
    monkeypatch.setattr(importlib.import_module(home), name, (lambda *_: "done") if at_once else later)
    assert main(arguments.split()) == 0
    assert narrations.said == [said]


def test_a_client_from_its_first_look_to_the_devices(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    narrations = Narrations(monkeypatch, joining)
    monkeypatch.chdir(tmp_path)
    port = OneEpoch(tmp_path)
    monkeypatch.setattr(Runtime, "connect", lambda *_, **__: port)
    assert main(["join", "127.0.0.1:1/proof", "--device", "cpu", "--logs", "console", "--no-checkpoints"]) == 0
    assert narrations.said == [
        "opening our endpoint and looking for the run",
        "loading transformers",
        "preparing the devices",
    ]
    shown = capsys.readouterr().out
    assert [text for text in narrations.said if text not in shown] == [], "as other news is"


def test_kernels_that_are_compiled(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("numba")
    narrations = Narrations(monkeypatch, loading)
    monkeypatch.setattr(loading, "_known", {})
    monkeypatch.setattr(loading, "_tried", lambda module, name: name)
    assert loading.kernel("merge") == "merge"
    assert narrations.said == ["compiling a part of the step (merge), once on this machine"]
    assert narrations.said[0] in caplog.text, "a warning, which Python shows by default"


def test_a_batch_that_comes_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    Narrations(monkeypatch, training)
    monkeypatch.setattr(training, "collate", lambda samples: samples)
    told: list[str] = []
    world = MagicMock()  # of the session, the devices, the data and the figures
    world.rounds.return_value = [MagicMock(step=7, batch="B[1, 2]")]
    training.train_language_model(world, world, world, world, tell=told.append)
    assert told == ["step 7: reading B[1, 2]"]
    world.train.assert_called_once()
