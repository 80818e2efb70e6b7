"""What a command shows while it works: lines, JSON lines, or a live picture in a terminal.

Each command says by :class:`Forms` what its figures look like, and gets from :func:`display_for` a :class:`Display`
that it tells the news and updates. Two promises hold for all of them. Output that goes away, such as a pipe to
``head``, is done without: the command goes on. And no control character reaches the output: part of a text may come
from a stranger, and a terminal obeys them.

``rich`` is imported when a picture is drawn, not before.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, Self, TextIO, TypeVar

from typing_extensions import override

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = [
    "NO_FACTS",
    "Display",
    "Facts",
    "Forms",
    "JsonLines",
    "LivePicture",
    "Mode",
    "Output",
    "PlainLines",
    "Silent",
    "display_for",
    "make_console",
    "narrated",
    "print_lines",
    "print_picture",
    "printable",
]

Mode = Literal["tui", "console", "json", "none"]
"""A live picture where there is a terminal, lines, JSON lines, nothing."""

Facts = Mapping[str, object]
"""What a piece of news says, for machines; JSON by its values."""

NO_FACTS: Final[Facts] = MappingProxyType({})
"""For news that says nothing more than its sentence."""

T = TypeVar("T")


SILENT_SECONDS: Final = 2.0
"""What takes longer should be seen to go on."""

STILL_SECONDS: Final = 15.0
"""Between two sentences about the same work. Chosen arbitrarily."""


def printable(text: str) -> str:
    """``text`` with a question mark for each control character, line ends among them."""
    return "".join(char if char.isprintable() else "?" for char in text)


@dataclass(frozen=True, kw_only=True)
class Forms(Generic[T]):
    """How the figures of a command are shown.

    Attributes:
        line: the figures in a line.
        record: the figures as a JSON object, without ``event`` and ``time``.
        picture: the figures as rich draws them.
        line_seconds: at least so long between two lines of figures.
        record_seconds: likewise between two records.
        picture_seconds: likewise between two pictures; 0 draws each.
    """

    line: Callable[[T], str]
    record: Callable[[T], dict[str, object]]
    picture: Callable[[T], RenderableType]
    line_seconds: float
    record_seconds: float
    picture_seconds: float = 0.0


# -- work that takes a while -------------------------------------------------------------------------------------------


@contextmanager
def narrated(
    what: str | Callable[[], str],
    tell: Callable[[str], None] | None = None,
    *,
    wait: Callable[[threading.Event, float], bool] | None = None,
) -> Iterator[None]:
    """While it is entered, says after two seconds what is being done, and from time to time that it still is.

    What takes less says nothing. Nothing is said any more once this is left.

    Args:
        what: is being done, such as ``"loading the model"``; or gives that, with how far it is.
        tell: told the sentences, in another thread than that which works; by default they go to the standard error.
        wait: waits for the end of the work for so many seconds, and says whether it has come.
    """
    tell, wait = tell or _say_on_stderr, wait or threading.Event.wait
    words = what if callable(what) else lambda: what
    over = threading.Event()

    def watch() -> None:
        seconds = SILENT_SECONDS
        if wait(over, seconds):
            return
        tell(f"{words()} ...")
        while not wait(over, STILL_SECONDS):
            seconds += STILL_SECONDS
            tell(f"{words()} ... {seconds:.0f} s so far")

    watching = threading.Thread(target=watch, name="distro-optim-narrator", daemon=True)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()


def _say_on_stderr(text: str) -> None:
    Output(sys.stderr).write(f"distro-optim: {printable(text)}")


# -- output that may go away -------------------------------------------------------------------------------------------


class Output:
    """A stream that may go away, as a pipe to a pager does. After that nothing is written, and nothing raised.

    Args:
        stream: by default what ``sys.stdout`` is now.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream: TextIO | None = stream or sys.stdout

    @property
    def is_there(self) -> bool:
        """False once the stream is gone."""
        return self._stream is not None

    def write(self, line: str) -> None:
        """One line, at once."""
        with self.guard():
            if self._stream is not None:
                print(line, file=self._stream, flush=True)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """For writing to the stream in other ways: if that fails, the stream is gone."""
        try:
            yield
        except (OSError, ValueError) as error:  # a closed pipe, a terminal that hung up; a closed file
            stream, self._stream = self._stream, None
            # While a live picture is shown, rich has a stream of its own in the place of sys.stdout.
            if stream is not None and stream in (sys.stdout, sys.__stdout__) and isinstance(error, OSError):
                _discard(stream)


def _discard(stream: TextIO) -> None:
    """Lets what the standard output still holds go nowhere; otherwise Python fails to flush it when it exits."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
        finally:
            os.close(nowhere)
    except (OSError, ValueError):
        pass  # not a file of the system


# -- displays ----------------------------------------------------------------------------------------------------------


class Display(ABC, Generic[T]):
    """Where a command's news goes. A context manager. May be told from several threads."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        return None

    @property
    def is_seen(self) -> bool:
        """False once the output has gone away, for a command that does nothing but show."""
        return True

    @abstractmethod
    def tell(self, text: str, facts: Facts = NO_FACTS, *, kind: str = "note", stays: bool = False) -> None:
        """Something happened.

        Args:
            text: that, in a sentence.
            facts: what the sentence says, for machines.
            kind: of news, for machines.
            stays: it must stay in sight where the figures are redrawn in place, such as what users copy.
        """

    @abstractmethod
    def update(self, figures: T) -> bool:
        """How things are. May be called more often than is shown; True if this was shown."""


class Silent(Display[Any]):
    """Shows nothing."""

    @override
    def tell(self, text: str, facts: Facts = NO_FACTS, *, kind: str = "note", stays: bool = False) -> None:
        return None

    @override
    def update(self, figures: object) -> bool:
        return False


class PlainLines(Display[T]):
    """A line for each piece of news, with the time of day, and now and then one with the figures.

    Args:
        forms: of the figures.
        stream: by default the standard output.
        clock: monotonic seconds.
    """

    def __init__(
        self, forms: Forms[T], stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._forms = forms
        self._output = Output(stream)
        self._due = _Due(forms.line_seconds, clock)

    @property
    @override
    def is_seen(self) -> bool:
        return self._output.is_there

    @override
    def tell(self, text: str, facts: Facts = NO_FACTS, *, kind: str = "note", stays: bool = False) -> None:
        self._output.write(f"{time.strftime('%H:%M:%S')} {printable(text)}")

    @override
    def update(self, figures: T) -> bool:
        if not self._due.has_come():
            return False
        self.tell(self._forms.line(figures))
        return True


class JsonLines(Display[T]):
    """One JSON object a line: ``{"time": Unix seconds, "event": kind, ...}``, the figures as event ``"status"``.

    Args:
        forms: of the figures.
        stream: by default the standard output.
        clock: monotonic seconds.
    """

    def __init__(
        self, forms: Forms[T], stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._forms = forms
        self._output = Output(stream)
        self._due = _Due(forms.record_seconds, clock)

    @property
    @override
    def is_seen(self) -> bool:
        return self._output.is_there

    @override
    def tell(self, text: str, facts: Facts = NO_FACTS, *, kind: str = "note", stays: bool = False) -> None:
        self.write({"event": kind, "text": printable(text), **facts})

    @override
    def update(self, figures: T) -> bool:
        if not self._due.has_come():
            return False
        self.write({"event": "status", **self._forms.record(figures)})
        return True

    def write(self, record: dict[str, object]) -> None:
        """One object. JSON in ASCII has no control characters, whatever the strings."""
        self._output.write(json.dumps({"time": round(time.time(), 3), **record}))


class LivePicture(Display[T]):
    """The figures, redrawn in place. Other news than what stays is shown only where it is part of the figures.

    Args:
        forms: of the figures.
        console: to draw on, from :func:`make_console`; by default one at the standard output.
        clock: monotonic seconds.
    """

    def __init__(
        self, forms: Forms[T], console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        from rich.live import Live

        self._forms = forms
        self._console = console if console is not None else make_console()
        self._output = Output(self._console.file)  # type: ignore[arg-type]  # an IO[str] that is a text stream
        self._live = Live(console=self._console, auto_refresh=False)
        self._due = _Due(forms.picture_seconds, clock)

    @property
    @override
    def is_seen(self) -> bool:
        return self._output.is_there

    @override
    def __enter__(self) -> Self:
        with self._output.guard():
            self._live.start()
        return self

    @override
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._output.guard():
            self._live.stop()

    @override
    def tell(self, text: str, facts: Facts = NO_FACTS, *, kind: str = "note", stays: bool = False) -> None:
        self._due.now()
        if stays and self._output.is_there:
            from rich.text import Text

            with self._output.guard():
                # Softly: a ticket that was wrapped would be copied in pieces.
                self._console.print(Text(printable(text)), soft_wrap=True)

    @override
    def update(self, figures: T) -> bool:
        if not self._output.is_there or not self._due.has_come():
            return False
        picture = self._forms.picture(figures)
        with self._output.guard():
            self._live.update(picture, refresh=True)
        return True


class _Due:
    """Says when something is due again."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._seconds = seconds
        self._clock = clock
        self._at = clock()

    def has_come(self) -> bool:
        """Whether it is due; if so, it is not until the time has passed."""
        now = self._clock()
        if now < self._at:
            return False
        self._at = now + self._seconds
        return True

    def now(self) -> None:
        """It is due at once."""
        self._at = self._clock()


def display_for(mode: Mode, forms: Forms[T], stream: TextIO | None = None) -> Display[T]:
    """The display of a mode; a picture only where the output is a terminal, else lines.

    Args:
        mode: what was asked for.
        forms: of the figures.
        stream: by default the standard output.
    """
    match mode:
        case "json":
            return JsonLines(forms, stream)
        case "none":
            return Silent()
        case "tui" if make_console(stream).is_terminal:
            return LivePicture(forms, make_console(stream))
        case _:
            return PlainLines(forms, stream)


def print_picture(picture: RenderableType, stream: TextIO | None = None) -> None:
    """Draws something once; if the output is gone, nothing happens."""
    with Output(stream).guard():
        make_console(stream).print(picture)


def print_lines(*lines: str, stream: TextIO | None = None) -> None:
    """Prints lines; if the output is gone, nothing happens."""
    output = Output(stream)
    for line in lines:
        output.write(printable(line))


def make_console(stream: TextIO | None = None, **settings: Any) -> Console:
    """A console of rich's that raises BrokenPipeError where rich's own would end the process.

    Args:
        stream: by default the standard output.
        **settings: of ``rich.console.Console``.
    """
    from rich.console import Console

    class RaisingConsole(Console):
        @override
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return RaisingConsole(file=stream, **settings)
