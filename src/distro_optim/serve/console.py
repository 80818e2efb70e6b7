"""What a server shows: a live table in a terminal, lines elsewhere, JSON for machines."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TextIO

from ..callbacks import SafeCallback
from ..comm.serving.limits import Bucket
from ..console import Display, Forms, Mode, display_for, printable
from ..coordinator.server.service import ServiceEvent
from .status import RunStatus, describe, event_record

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["FORMS", "Reporter", "Situation", "render", "reporter_for"]

SHOWN_EVENTS: Final = 8
"""Lines below the table."""

SHOWN_CLIENTS: Final = 24
"""Rows that fit a terminal; of more clients the rest is counted."""

EVENTS_PER_SECOND: Final = 20.0
"""Lines of events that are printed for good; see :data:`EVENTS_BURST`."""

EVENTS_BURST: Final = 1000.0
"""Lines at once: more than an honest swarm causes, and so few that strangers who come and go do not fill a disk."""

STATUS_SECONDS: Final = 10.0
"""Between two lines of status where nothing is redrawn."""


_log: Final = logging.getLogger(__name__)


@dataclass(frozen=True)
class Situation:
    """What is shown of a server.

    Attributes:
        status: of the run.
        events: the last ones, in words; printable.
        left_out: events of which no line was shown, since the last status that was.
    """

    status: RunStatus
    events: tuple[str, ...] = ()
    left_out: int = 0


class Reporter:
    """Tells how a server is doing. A context manager.

    Args:
        display: where that is shown; whatever fails there, the server goes on.
    """

    def __init__(self, display: Display[Situation]) -> None:
        self._display = display
        self._tell = SafeCallback(display.tell, "the display")
        self._update = SafeCallback(self._show, "the display")
        self._events: deque[str] = deque(maxlen=SHOWN_EVENTS)
        self._room = Bucket(EVENTS_PER_SECOND, EVENTS_BURST, time.monotonic())
        self._left_out = 0

    def __enter__(self) -> Self:
        self._display.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._display.__exit__(kind, error, at)

    def tell(self, text: str, **facts: object) -> None:
        """Something about the server itself; ``facts`` are the same for machines."""
        self._tell(text, facts, kind="server", stays=True)
        _log.info("%s", text)

    def event(self, event: ServiceEvent) -> None:
        """Something happened in the run."""
        text = describe(event)
        self._events.append(f"{time.strftime('%H:%M:%S')} {printable(text)}")
        if self._room.take(1, time.monotonic()):
            record = event_record(event)
            kind = str(record.pop("event"))
            self._tell(text, record, kind=kind)
            _log.info("%s", text)
        else:
            self._left_out += 1

    def status(self, status: RunStatus) -> None:
        """How the run is doing; called about twice a second."""
        self._update(Situation(status, tuple(self._events), self._left_out))

    def _show(self, now: Situation) -> None:
        if self._display.update(now):
            self._left_out = 0


def reporter_for(*, as_json: bool, plain: bool, stream: TextIO | None = None) -> Reporter:
    """The reporter that suits the output: JSON if asked for, the table in a terminal, else lines."""
    mode: Mode = "json" if as_json else "console" if plain else "tui"
    return Reporter(display_for(mode, FORMS, stream))


def status_line(now: Situation) -> str:
    """The situation in a line."""
    status = now.status
    rate = "" if status.tokens_per_second is None else f", {status.tokens_per_second:.0f} tokens/s"
    loss = "" if status.loss is None else f", loss {status.loss:.4f}"
    left_out = f"; {now.left_out} more events were left out" if now.left_out else ""
    return (
        f"{status.phase} for {status.phase_seconds} s, epoch {status.epoch}, step {status.step} of "
        f"{status.total_steps}, {status.in_epoch} in the epoch, {status.connected} connected{rate}{loss}{left_out}"
    )


def record(now: Situation) -> dict[str, object]:
    """The situation for machines."""
    return {"events_left_out": now.left_out, **dataclasses.asdict(now.status)}


def render(now: Situation) -> RenderableType:
    """The situation as a picture."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    status = now.status
    head = Table.grid(padding=(0, 3))
    rate = "-" if status.tokens_per_second is None else f"{status.tokens_per_second:,.0f} tokens/s"
    loss = "-" if status.loss is None else f"{status.loss:.4f}"
    head.add_row(
        Text(printable(status.run_id), style="bold"),
        Text(f"{status.phase} ({status.phase_seconds} s)", style="cyan"),
        f"epoch {status.epoch}",
        f"step {status.step}/{status.total_steps}",
        f"round {status.round}",
        f"{status.witnesses} reports",
        f"loss {loss}",
        rate,
    )
    clients = Table(expand=False)
    for name in ("client", "address", "state"):
        clients.add_column(name)
    has_points = any(client.work is not None for client in status.clients)
    for name in ("report", "loss", "tokens/s", *(("samples", "points: equal", "by work") if has_points else ())):
        clients.add_column(name, justify="right")
    for client in status.clients[:SHOWN_CLIENTS]:
        clients.add_row(
            client.key[:8],
            Text(printable(client.address)),
            client.state,
            "-" if client.reported_step is None else f"step {client.reported_step}",
            "-" if client.loss is None else f"{client.loss:.4f}",
            "-" if client.tokens_per_second is None else f"{client.tokens_per_second:,.0f}",
            *((_count(client.samples), _count(client.equal), _count(client.work)) if has_points else ()),
        )
    if len(status.clients) > SHOWN_CLIENTS:
        clients.caption = f"and {len(status.clients) - SHOWN_CLIENTS} more"
    return Group(head, clients, *(Text(line, style="dim") for line in now.events))


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


FORMS: Final = Forms(
    line=status_line, record=record, picture=render, line_seconds=STATUS_SECONDS, record_seconds=STATUS_SECONDS
)
"""The forms of a server's :class:`Situation`."""
