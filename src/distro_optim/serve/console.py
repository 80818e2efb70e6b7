"""What a server shows: a live table in a terminal, lines elsewhere, JSON for machines."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from types import TracebackType
from typing import Final, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from ..comm.serving.limits import Bucket
from ..coordinator.server.service import ServiceEvent
from .status import RunStatus, describe, event_record

__all__ = ["JsonLines", "LiveTable", "PlainLines", "Reporter", "render", "reporter_for"]

SHOWN_EVENTS: Final = 8
SHOWN_CLIENTS: Final = 24
"""Rows that fit a terminal; of more clients the rest is counted."""

EVENTS_PER_SECOND: Final = 20.0
EVENTS_BURST: Final = 1000.0
"""Lines of events; so many that no honest swarm reaches them, so few that strangers who come and go fill no disk."""

STATUS_SECONDS: Final = 10.0
"""Between two lines of status where nothing is redrawn."""


class Reporter(ABC):
    """Where a server's news goes. Used as a context manager."""

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        return None

    @abstractmethod
    def say(self, text: str, **facts: object) -> None:
        """Something about the server itself; ``facts`` are the same for machines."""

    @abstractmethod
    def event(self, event: ServiceEvent) -> None:
        """Something happened in the run."""

    @abstractmethod
    def status(self, status: RunStatus) -> None:
        """How the run is doing; called about twice a second."""


class _Output:
    """Lines to a stream that may go away, as a pipe to a pager does: the run goes on without them."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream: TextIO | None = stream or sys.stdout

    def write(self, line: str) -> None:
        if self._stream is None:
            return
        try:
            print(line, file=self._stream, flush=True)
        except (OSError, ValueError):  # a closed pipe, a closed file
            self._stream = None


def _printable(text: str) -> str:
    """Without control characters: part of a line may come from a stranger, and the terminal obeys them."""
    return "".join(char if char.isprintable() else "?" for char in text)


class PlainLines(Reporter):
    """One line an event, with the time of day."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._output = _Output(stream)
        self._due = 0.0
        self._room = Bucket(EVENTS_PER_SECOND, EVENTS_BURST, time.monotonic())
        self._left_out = 0

    @override
    def say(self, text: str, **facts: object) -> None:
        self._output.write(f"{time.strftime('%H:%M:%S')} {_printable(text)}")

    @override
    def event(self, event: ServiceEvent) -> None:
        if self._room.take(1, time.monotonic()):
            self.say(describe(event))
        else:
            self._left_out += 1

    @override
    def status(self, status: RunStatus) -> None:
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + STATUS_SECONDS
        if self._left_out:
            self.say(f"{self._left_out} more events were left out")
            self._left_out = 0
        rate = "" if status.tokens_per_second is None else f", {status.tokens_per_second:.0f} tokens/s"
        loss = "" if status.loss is None else f", loss {status.loss:.4f}"
        self.say(
            f"{status.phase} for {status.phase_seconds} s, epoch {status.epoch}, step {status.step} of "
            f"{status.total_steps}, {status.in_epoch} in the epoch, {status.connected} connected{rate}{loss}"
        )


class JsonLines(Reporter):
    """One JSON object a line: ``{"time": ..., "event": "joined", "client": "..."}``; the status as event "status"."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._output = _Output(stream)
        self._due = 0.0
        self._room = Bucket(EVENTS_PER_SECOND, EVENTS_BURST, time.monotonic())
        self._left_out = 0

    def _write(self, record: dict[str, object]) -> None:
        self._output.write(json.dumps({"time": round(time.time(), 3), **record}))

    @override
    def say(self, text: str, **facts: object) -> None:
        self._write({"event": "server", "text": text, **facts})

    @override
    def event(self, event: ServiceEvent) -> None:
        if self._room.take(1, time.monotonic()):
            self._write(event_record(event))
        else:
            self._left_out += 1

    @override
    def status(self, status: RunStatus) -> None:
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + STATUS_SECONDS
            self._write({"event": "status", "events_left_out": self._left_out, **dataclasses.asdict(status)})
            self._left_out = 0


class LiveTable(Reporter):
    """The run, its clients and the last events, redrawn in place."""

    def __init__(self, console: Console | None = None) -> None:
        self._live = Live(console=console, auto_refresh=False)
        self._events: deque[str] = deque(maxlen=SHOWN_EVENTS)

    @override
    def __enter__(self) -> LiveTable:
        self._live.start()
        return self

    @override
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._live.stop()

    @override
    def say(self, text: str, **facts: object) -> None:
        self._live.console.print(Text(_printable(text)))

    @override
    def event(self, event: ServiceEvent) -> None:
        self._events.append(f"{time.strftime('%H:%M:%S')} {_printable(describe(event))}")

    @override
    def status(self, status: RunStatus) -> None:
        self._live.update(render(status, list(self._events)), refresh=True)


def render(status: RunStatus, events: list[str]) -> RenderableType:
    """The picture of :class:`LiveTable`."""
    head = Table.grid(padding=(0, 3))
    rate = "-" if status.tokens_per_second is None else f"{status.tokens_per_second:,.0f} tokens/s"
    loss = "-" if status.loss is None else f"{status.loss:.4f}"
    head.add_row(
        Text(status.run_id, style="bold"),
        Text(f"{status.phase} ({status.phase_seconds} s)", style="cyan"),
        f"epoch {status.epoch}",
        f"step {status.step}/{status.total_steps}",
        f"round {status.round}",
        f"{status.witnesses} reports",
        f"loss {loss}",
        rate,
    )
    clients = Table(expand=False)
    for name in ("client", "address", "state", "report", "loss", "tokens/s"):
        clients.add_column(name, justify="right" if name in ("report", "loss", "tokens/s") else "left")
    for client in status.clients[:SHOWN_CLIENTS]:
        clients.add_row(
            client.key[:8],
            Text(_printable(client.address)),
            client.state,
            "-" if client.reported_step is None else f"step {client.reported_step}",
            "-" if client.loss is None else f"{client.loss:.4f}",
            "-" if client.tokens_per_second is None else f"{client.tokens_per_second:,.0f}",
        )
    if len(status.clients) > SHOWN_CLIENTS:
        clients.caption = f"and {len(status.clients) - SHOWN_CLIENTS} more"
    return Group(head, clients, *(Text(line, style="dim") for line in events))


def reporter_for(*, as_json: bool, plain: bool, stream: TextIO | None = None) -> Reporter:
    """The reporter that suits the output: JSON if asked for, the table in a terminal, else lines."""
    if as_json:
        return JsonLines(stream)
    console = Console(file=stream)
    if plain or not console.is_terminal:
        return PlainLines(stream)
    return LiveTable(console)
