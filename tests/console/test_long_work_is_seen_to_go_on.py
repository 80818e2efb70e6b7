"""Work that takes longer than two seconds says what it is, and from time to time that it still goes on."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable

import pytest

from distro_optim.console import SILENT_SECONDS, STILL_SECONDS, narrated

Wait = Callable[[threading.Event, float], bool]


class Clock:
    """Lets so many waits pass at once, each a time for the work to have gone on; the next one lasts to its end."""

    def __init__(self, waits: int) -> None:
        self.left = waits
        self.waited: list[float] = []
        self.passed = threading.Event()

    def wait(self, over: threading.Event, seconds: float) -> bool:
        self.waited.append(seconds)
        if self.left:
            self.left -= 1
            return False
        self.passed.set()
        return over.wait()


@pytest.mark.parametrize(
    ("waits", "told"),
    [
        (0, []),
        (1, ["reading the model ..."]),
        (3, ["reading the model ...", "reading the model ... 17 s so far", "reading the model ... 32 s so far"]),
    ],
)
def test_what_takes_long_is_told_and_what_does_not_is_not(waits: int, told: list[str]) -> None:
    clock = Clock(waits)
    said: list[str] = []
    with narrated("reading the model", said.append, wait=clock.wait):
        clock.passed.wait()
    assert said == told
    assert clock.waited == [SILENT_SECONDS, STILL_SECONDS, STILL_SECONDS, STILL_SECONDS][: waits + 1]


def test_how_far_it_is_can_be_part_of_it_and_an_error_ends_it() -> None:
    clock = Clock(2)
    said: list[str] = []
    steps = iter(("1 of 3", "2 of 3"))

    def work() -> None:
        with narrated(lambda: next(steps), said.append, wait=clock.wait):
            clock.passed.wait()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert said == ["1 of 3 ...", "2 of 3 ... 17 s so far"]
    assert not [thread for thread in threading.enumerate() if thread.name == "distro-optim-narrator"]


def test_commands_say_it_on_the_standard_error_without_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, clock = io.StringIO(), Clock(1)
    monkeypatch.setattr(sys, "stderr", stream)
    with narrated("opening \x1b[2J.toml", wait=clock.wait):
        clock.passed.wait()
    assert stream.getvalue() == "distro-optim: opening ?[2J.toml ...\n"
