"""A callback that fails, a pipe whose reader has gone, a display that breaks: what they look at goes on."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

import pytest
from typing_extensions import override

import warm_python
from client.processes import Process, Server, write_state
from distro_optim.callbacks import SafeCallback
from distro_optim.client.display import FORMS as CLIENT_FORMS
from distro_optim.client.joining import _Monitor, _News
from distro_optim.comm.serving.limits import ServerLimits
from distro_optim.console import (
    NO_FACTS,
    Display,
    Facts,
    JsonLines,
    LivePicture,
    PlainLines,
    display_for,
    make_console,
    print_lines,
    print_picture,
    printable,
)
from distro_optim.coordinator.server.embedded import EmbeddedCoordinator
from distro_optim.coordinator.server.host import RunHost
from distro_optim.coordinator.server.service import Connected, CoordinatorService
from distro_optim.coordinator.types import RunState
from distro_optim.serve.console import FORMS as SERVE_FORMS
from distro_optim.serve.console import Reporter
from distro_optim.serve.status import status_of
from distro_optim.strategy.environment import RunEnvironment
from distro_optim.strategy.monitor.figures import Figures, Progress
from distro_optim.strategy.news import News
from distro_optim.strategy.port import RunView
from distro_optim.testing.coordinator import dummy_run
from distro_optim.testnet.display import FORMS as TESTNET_FORMS
from distro_optim.testnet.display import Situation
from distro_optim.testnet.network import LocalNetwork, NetworkOptions
from distro_optim.testnet.watching import SwarmWatch
from runs import client, clients

pytestmark = [pytest.mark.waiting]

ERRORS = [BrokenPipeError, ValueError]
SENTENCE = "the checkpoint of step 3 could not be saved"
PRETENDED = Path(__file__).parents[1] / "testnet" / "pretended_training.py"
FIGURES = Progress(bytes(32)).figures(RunView(run_id="demo"), None)


def failing(error: type[BaseException]) -> Callable[..., NoReturn]:
    def fail(*_: object, **__: object) -> NoReturn:
        raise error("as the test wants it")

    return fail


@contextmanager
def stream_without_reader() -> Iterator[TextIO]:
    """A pipe as ``head`` leaves it behind."""
    reading, writing = os.pipe()
    os.close(reading)
    stream = os.fdopen(writing, "w", buffering=1)
    try:
        yield stream
    finally:
        try:
            stream.close()
        except BrokenPipeError:
            pass


class BrokenDisplay(Display[Any]):
    """Raises whatever it is told."""

    def __init__(self, error: type[Exception]) -> None:
        self.calls = 0
        self._error = error

    @override
    def tell(self, text: str, facts: Facts = NO_FACTS, *, kind: str = "note", stays: bool = False) -> None:
        self.calls += 1
        raise self._error(text)

    @override
    def update(self, figures: object) -> bool:
        self.calls += 1
        raise self._error("no figures")


class ViewOnly:
    """As much of the access to a run as its displays need."""

    state = None

    def view(self) -> RunView:
        return RunView(run_id="demo")


def logged(log: pytest.LogCaptureFixture) -> list[tuple[object, object]]:
    """Name and exception of what callbacks raised."""
    found = []
    for record in log.records:
        if record.name == "distro_optim.callbacks":
            assert isinstance(record.args, tuple)
            found.append((record.args[0], record.args[1]))
    return found


# -- callbacks ---------------------------------------------------------------------------------------------------------


def test_what_a_callback_raises_is_logged_once_for_each_kind(caplog: pytest.LogCaptureFixture) -> None:
    errors = iter([ValueError("one"), ValueError("two"), BrokenPipeError(), ValueError("three")])

    def fail(text: str) -> None:
        raise next(errors)

    call = SafeCallback(fail, "on_event")
    for _ in range(4):
        call("news")
    assert logged(caplog) == [("on_event", "ValueError"), ("on_event", "BrokenPipeError")]
    assert "one" in caplog.text


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, asyncio.CancelledError])
def test_what_ends_a_process_or_a_task_passes(error: type[BaseException]) -> None:
    with pytest.raises(error):
        SafeCallback(failing(error), "on_event")()
    with pytest.raises(error):
        News(failing(error), RunEnvironment()).tell(SENTENCE)


@pytest.mark.parametrize("error", ERRORS)
def test_news_is_logged_although_the_function_of_the_script_fails(
    error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "distro_optim")
    news = News(failing(error), RunEnvironment())
    for _ in range(3):
        news.tell(SENTENCE)
    assert caplog.text.count(SENTENCE) == 3
    assert logged(caplog) == [("on_event", error.__name__)]


def test_a_script_that_prints_news_goes_on_without_its_reader() -> None:
    with stream_without_reader() as stream:
        news = News(lambda text: print(text, file=stream, flush=True), RunEnvironment())
        for _ in range(3):
            news.tell(SENTENCE)


@pytest.mark.parametrize("error", ERRORS)
def test_an_embedded_coordinator_ticks_on_when_its_listener_fails(
    error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        now = [0]
        host = RunHost(dummy_run())
        coordinator = EmbeddedCoordinator(host, clock=lambda: now[0], tick_seconds=0.001, on_events=failing(error))
        async with coordinator:
            members = [coordinator.client(identity, "dummy") for identity in clients(1, 2, 3)]
            for member in members:
                await member.join()
            now[0] = 3
            async for state in members[2].states():
                if state.run_state is RunState.WARMUP:
                    break

    asyncio.run(work())
    assert logged(caplog) == [("on_events", error.__name__)]


# -- displays ----------------------------------------------------------------------------------------------------------


def displays(stream: TextIO) -> Iterator[tuple[Display[Any], Any]]:
    """All displays of all commands, with figures to show."""
    for forms, figures in ((CLIENT_FORMS, FIGURES), (TESTNET_FORMS, Situation(SwarmWatch(), 1.0))):
        yield PlainLines(forms, stream), figures
        yield JsonLines(forms, stream), figures
        yield LivePicture(forms, make_console(stream, force_terminal=True)), figures


def test_no_display_minds_that_its_reader_has_gone() -> None:
    with stream_without_reader() as stream:
        for display, figures in displays(stream):
            with display:
                for _ in range(3):
                    display.tell("hello", stays=True)
                    display.update(figures)
        for display in (PlainLines(SERVE_FORMS, stream), JsonLines(SERVE_FORMS, stream)):
            with Reporter(display) as reporter:
                reporter.tell("hello")
                reporter.tell("hello")
        print_lines("hello", "again", stream=stream)
        print_picture("hello", stream)


def test_no_display_minds_that_its_file_is_closed(tmp_path: Path) -> None:
    with open(tmp_path / "output", "w") as stream:
        made = list(displays(stream))
    for display, figures in made:
        with display:
            display.tell("hello", stays=True)
            display.update(figures)


def test_no_display_passes_control_characters_on() -> None:
    evil = "a\x1b[2J\x07\nb"
    assert printable(evil) == "a?[2J??b"
    for display, _ in displays(stream := io.StringIO()):
        display.tell(evil, {"name": evil})
    print_lines(evil, stream=stream)
    assert "\x1b" not in stream.getvalue()
    assert "\x07" not in stream.getvalue()


def test_figures_are_shown_when_they_are_due() -> None:
    now = 0.0
    stream = io.StringIO()
    lines = PlainLines(CLIENT_FORMS, stream, clock=lambda: now)
    assert lines.update(FIGURES)
    assert not lines.update(FIGURES)
    now = CLIENT_FORMS.line_seconds
    assert lines.update(FIGURES)
    assert stream.getvalue().count("\n") == 2


def test_what_must_stay_in_sight_is_printed_above_the_picture() -> None:
    stream = io.StringIO()
    with LivePicture(CLIENT_FORMS, make_console(stream, force_terminal=True)) as display:
        display.tell("join with TICKET", stays=True)
        display.tell("step 3")
    assert "join with TICKET" in stream.getvalue()
    assert "step 3" not in stream.getvalue()


def test_nothing_is_shown_if_nothing_is_wanted() -> None:
    stream = io.StringIO()
    with display_for("none", CLIENT_FORMS, stream) as display:
        display.tell("hello")
        assert not display.update(FIGURES)
    assert stream.getvalue() == ""


# -- a client, a network -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", ERRORS)
def test_a_client_goes_on_when_its_display_breaks(error: type[Exception], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "distro_optim")
    progress = Progress(bytes(32))
    display = BrokenDisplay(error)
    with _Monitor(ViewOnly(), progress, display) as monitor:  # type: ignore[arg-type]
        news = _News(progress, display)
        news.tell(SENTENCE)
        news.tell(SENTENCE)
        figures: Figures = monitor.figures()
    assert figures.events == (SENTENCE, SENTENCE)
    assert display.calls >= 3
    assert caplog.messages.count(SENTENCE) == 2
    assert set(logged(caplog)) == {("the display", error.__name__)}


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS)
def test_a_network_goes_on_when_its_display_breaks(error: type[Exception], tmp_path: Path) -> None:
    options = NetworkOptions(script=PRETENDED, arguments=("--steps", "5"), peers=2, out=tmp_path, timeout=60)
    display = BrokenDisplay(error)
    outcome = LocalNetwork(options, display).run()
    assert outcome.succeeded, outcome.problems
    assert display.calls > 2


@pytest.mark.parametrize("error", ERRORS)
def test_a_server_goes_on_when_its_display_breaks(error: type[Exception], caplog: pytest.LogCaptureFixture) -> None:
    display = BrokenDisplay(error)
    service = CoordinatorService(RunHost(dummy_run()), draw=os.urandom, unix_offset=0.0, limits=ServerLimits())
    with Reporter(display) as reporter:
        reporter.tell("listening")
        reporter.event(Connected(client=client(1), address="127.0.0.1:4000"))
        reporter.status(status_of(service, 0.0))
    assert display.calls == 3
    assert set(logged(caplog)) == {("the display", error.__name__)}


def after_one_line(*command: str) -> tuple[int, str]:
    """Reads one line of what a command prints and goes away, as ``| head -1`` does; its status and its errors."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with warm_python.Popen(
        [sys.executable, "-m", "distro_optim", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
        return process.wait(), errors


@pytest.mark.slow
@pytest.mark.parametrize("how", ["--plain", "--json"])
def test_a_network_trains_to_its_end_when_the_reader_of_its_output_goes(how: str, tmp_path: Path) -> None:
    options = ("--peers", "2", "--out", str(tmp_path))
    status, errors = after_one_line("testnet", how, *options, str(PRETENDED), "--", "--steps", "30")
    assert (status, errors) == (0, "")
    ends = [json.loads((tmp_path / f"peer-{peer}.jsonl").read_text().splitlines()[-1]) for peer in range(2)]
    assert [end["kind"] for end in ends] == ["ended"] * 2


@pytest.mark.slow
def test_a_client_trains_to_the_end_of_the_run_when_the_reader_of_its_output_goes(tmp_path: Path) -> None:
    state = write_state(tmp_path / "state.toml", total_steps=4, warmup_time=5, init_min_clients=1, min_clients=1)
    server: Process | None = None
    try:
        server = Server(tmp_path, state)
        log = tmp_path / "client.log"
        joining = ("join", server.ticket, "--iroh-relay", "none", "--device", "cpu")
        status, errors = after_one_line(*joining, "--logs", "console", "--write-log", str(log))
        assert (status, errors) == (0, "")
        assert "the run is finished" in log.read_text()
    finally:
        if server is not None:
            server.end()
