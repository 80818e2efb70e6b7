"""A host's ticket stays one line, whatever draws in the terminal, with what others type."""

from __future__ import annotations

import io
import logging
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from distro_optim.console import Forms, LivePicture, make_console
from distro_optim.strategy.environment import RunEnvironment
from distro_optim.strategy.frameworks.invitation import invitation, print_unbroken
from distro_optim.strategy.monitor.shell import shell_line
from distro_optim.strategy.news import News

TICKET = "psyche1" + "a2" * 60
CODE = "Trainer(strategy=PsycheStrategy(run={ticket!r}))"
TEXT = invitation("my run [bold]", TICKET, CODE)
WIDTH = 80

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def main_module(**facts: object) -> ModuleType:
    module = ModuleType("__main__")
    module.__spec__ = None
    for name, value in facts.items():
        setattr(module, name, value)
    return module


def lines_with_ticket(output: str) -> list[str]:
    return [line.strip() for line in re.split(r"[\r\n]", ESCAPES.sub("", output)) if "psyche1" in line]


def test_an_invitation_has_the_line_for_a_shell_and_the_one_for_a_script() -> None:
    assert [line.strip() for line in TEXT.splitlines() if TICKET in line] == [
        shell_line(TICKET),
        f"Trainer(strategy=PsycheStrategy(run={TICKET!r}))",
    ]
    assert "'my run [bold]'" in TEXT


@pytest.mark.parametrize(
    ("main", "what"),
    [
        (main_module(__file__="/home/me/train.py"), "train.py"),
        (main_module(__file__="my script.py"), "'my script.py'"),
        (main_module(__file__=str(Path("examples/train.py").absolute())), "examples/train.py"),
        (main_module(), "script.py"),  # a notebook
        (main_module(__file__="/x/y.py", __spec__=SimpleNamespace(name="lab.train")), "-m lab.train"),
        (main_module(__file__="/x/__main__.py", __spec__=SimpleNamespace(name="lab.__main__")), "-m lab"),
    ],
)
def test_the_line_for_a_shell_names_the_script(main: ModuleType, what: str) -> None:
    assert shell_line(TICKET, main) == f"DISTRO_OPTIM_RUN={TICKET} python {what}"


def test_an_invitation_says_whether_the_run_waits_for_others() -> None:
    assert "RunConfig(peers_to_start=2) would wait" in TEXT
    assert "The first step waits until 3 peers are here." in invitation("run", TICKET, CODE, 3)


def test_it_is_printed_as_it_is_where_nothing_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    print_unbroken(TEXT)
    assert capsys.readouterr().out == f"{TEXT}\n"


def test_a_bar_of_rich_does_not_break_it() -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=WIDTH, force_terminal=True, _environ={})
    with Progress(console=console, auto_refresh=False) as bar:
        bar.add_task("training")
        bar.refresh()
        print(TICKET)  # which breaks: else the test would show nothing
        print_unbroken(TEXT)
    broken, *unbroken = lines_with_ticket(screen.getvalue())
    assert len(broken) < len(TICKET)
    assert unbroken == [line.strip() for line in TEXT.splitlines() if TICKET in line]


def test_the_live_picture_of_a_server_does_not_break_it() -> None:
    screen = io.StringIO()
    forms: Forms[str] = Forms(line=str, record=lambda text: {}, picture=Text, line_seconds=0.0, record_seconds=0.0)
    with LivePicture(forms, make_console(screen, width=WIDTH, force_terminal=True, _environ={})) as display:
        display.update("waiting for members")
        display.tell(f"join from anywhere with {TICKET}", stays=True)
    assert lines_with_ticket(screen.getvalue()) == [f"join from anywhere with {TICKET}"]


def test_a_sentence_does_not_share_the_line_of_a_bar_of_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    tqdm = pytest.importorskip("tqdm").tqdm
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(logging.getLogger("distro_optim"), "propagate", False)
    handler = logging.StreamHandler(screen)
    logging.getLogger("distro_optim").addHandler(handler)
    try:
        with tqdm(total=10, ncols=WIDTH, desc="training") as bar:
            bar.update(3)
            News(None, RunEnvironment()).tell("a peer came")
    finally:
        logging.getLogger("distro_optim").removeHandler(handler)
    before, _, after = screen.getvalue().partition("a peer came\n")
    assert before.endswith("\r"), "the bar is gone"
    assert after.startswith("\rtraining:"), "and comes back below"


def test_a_bar_of_tqdm_does_not_share_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    tqdm = pytest.importorskip("tqdm").tqdm
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    with tqdm(total=10, file=screen, ncols=WIDTH, desc="training") as bar:
        bar.update(3)
        print_unbroken(TEXT)
    assert lines_with_ticket(screen.getvalue()) == [line.strip() for line in TEXT.splitlines() if TICKET in line]
