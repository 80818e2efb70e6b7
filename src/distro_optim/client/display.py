"""What a client shows: a live picture in a terminal, lines elsewhere, JSON for machines."""

from __future__ import annotations

import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from ..strategy.run_report import printable
from .figures import Figures
from .options import Logs

__all__ = ["Display", "display_for", "record", "render", "status_line"]

REDRAW_SECONDS: Final = 0.5
STATUS_SECONDS: Final = 30.0
"""Between two lines of figures where nothing is redrawn, as in Psyche's client."""
RECORD_SECONDS: Final = 2.0
SHOWN_PEERS: Final = 16
_GAP: Final = "   "

PHASES: Final = {
    "CONNECTING": "yellow",
    "WAITING_FOR_MEMBERS": "yellow",
    "WARMUP": "yellow",
    "ROUND_TRAIN": "green",
    "ROUND_WITNESS": "green",
    "COOLDOWN": "cyan",
    "PAUSED": "red",
    "FINISHED": "cyan",
}


class Display(ABC):
    """Where a client's news goes. Used as a context manager; may be told from several threads."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        return None

    @abstractmethod
    def event(self, text: str, **facts: object) -> None:
        """Something happened; ``facts`` are for machines."""

    @abstractmethod
    def update(self, figures: Figures) -> None:
        """How it goes; called every half second."""


class Silent(Display):
    """Nothing at all."""

    @override
    def event(self, text: str, **facts: object) -> None:
        return None

    @override
    def update(self, figures: Figures) -> None:
        return None


class PlainLines(Display):
    """A line for each event, each step, and now and then the figures."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream or sys.stdout
        self._clock = clock
        self._due = clock()
        self._loss_of: int | None = None

    @override
    def event(self, text: str, **facts: object) -> None:
        print(f"{time.strftime('%H:%M:%S')} {printable(text)}", file=self._stream, flush=True)

    @override
    def update(self, figures: Figures) -> None:
        if self._clock() >= self._due:
            self._due = self._clock() + STATUS_SECONDS
            self.event(status_line(figures))


class JsonLines(Display):
    """One JSON object a line: events as they come, the figures every two seconds."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream or sys.stdout
        self._clock = clock
        self._due = clock()

    @override
    def event(self, text: str, **facts: object) -> None:
        self._write({"event": "note", "text": printable(text), **facts})

    @override
    def update(self, figures: Figures) -> None:
        if self._clock() >= self._due:
            self._due = self._clock() + RECORD_SECONDS
            self._write({"event": "status", **record(figures)})

    def _write(self, content: dict[str, object]) -> None:
        print(json.dumps({"time": round(time.time(), 3), **content}), file=self._stream, flush=True)


class LivePicture(Display):
    """The run, our part, peers and last events, redrawn in place."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False)

    @override
    def __enter__(self) -> Self:
        self._live.start()
        return self

    @override
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._live.stop()

    @override
    def event(self, text: str, **facts: object) -> None:
        return None  # the picture shows the last ones

    @override
    def update(self, figures: Figures) -> None:
        self._live.update(render(figures), refresh=True)


def display_for(logs: Logs, stream: TextIO | None = None) -> Display:
    """What ``--logs`` asks for; a live picture only in a terminal."""
    console = Console(file=stream)
    match logs:
        case "json":
            return JsonLines(stream)
        case "none":
            return Silent()
        case "tui" if console.is_terminal:
            return LivePicture(console)
        case _:
            return PlainLines(stream)


def status_line(figures: Figures) -> str:
    """The figures in a line."""
    view = figures.view
    parts = [
        view.run_state,
        f"epoch {view.epoch}, step {view.step} of {view.total_steps}, round {view.height}",
        f"{view.num_peers} clients",
        figures.role.replace("_", " "),
    ]
    if figures.loss is not None:
        parts.append(f"loss {figures.loss:.4f}")
    if figures.tokens_per_second is not None:
        parts.append(f"{_short(figures.tokens_per_second).rstrip()} tokens/s")
    parts.append(f"sent {_short(view.bytes_sent)}B, received {_short(view.bytes_received)}B")
    return "; ".join(parts)


def record(figures: Figures) -> dict[str, object]:
    """The figures for machines."""
    view = figures.view
    batch = figures.batch
    return {
        "run_id": view.run_id,
        "run_state": view.run_state,
        "epoch": view.epoch,
        "step": view.step,
        "total_steps": view.total_steps,
        "round": view.height,
        "clients": view.num_peers,
        "role": figures.role,
        "batch": None if batch is None else [batch.start, batch.end],
        "loss": figures.loss,
        "lr": view.lr,
        "tokens_per_second": figures.tokens_per_second,
        "total_tokens": figures.total_tokens,
        "efficiency": figures.efficiency,
        "bytes_sent": view.bytes_sent,
        "bytes_received": view.bytes_received,
        "rounds_trained": view.rounds_trained,
        "seconds_training": round(view.seconds_training, 3),
        "seconds_waiting": round(view.seconds_waiting, 3),
        "weights_step": view.weights_step,
        "weights": view.weights_root.hex() if view.weights_root is not None else None,
        "fault": view.fault,
        "connected": view.connected,
        "peers": [
            {"id": peer.id.hex(), "path": peer.path, "rtt": peer.rtt, "neighbor": peer.is_neighbor}
            for peer in view.peers
        ],
    }


def render(figures: Figures) -> RenderableType:
    """The picture of :class:`LivePicture`."""
    view = figures.view
    head = Table.grid(padding=(0, 3))
    head.add_row(
        Text(printable(view.run_id), style="bold"),
        Text(view.run_state, style=PHASES.get(view.run_state, "white")),
        f"epoch {view.epoch}",
        f"step {view.step}/{view.total_steps}",
        f"round {view.height}",
        f"{view.num_peers} clients",
        Text("connected" if view.connected else "no link to the coordinator", style="" if view.connected else "red"),
    )
    speed = f"{_short(figures.tokens_per_second).rstrip()} tokens/s" if figures.tokens_per_second else "- tokens/s"
    efficiency = [f"{100 * figures.efficiency:.0f} % training"] if figures.efficiency is not None else []
    ours = [
        f"we are {figures.key.hex()[:8]}",
        figures.role.replace("_", " "),
        f"batch {'-' if figures.batch is None else figures.batch}",
        f"loss {_number(figures.loss, '.4f')}",
        f"lr {_number(view.lr, '.2e')}",
    ]
    pace = [speed, *efficiency, f"sent {_short(view.bytes_sent)}B, received {_short(view.bytes_received)}B"]
    lines = [Text(_GAP.join(line), no_wrap=True, overflow="ellipsis") for line in (ours, pace)]
    rows: list[RenderableType] = [head, *lines]
    if view.fault is not None:
        rows.append(Text(f"our weights are in doubt: {printable(view.fault)}", style="bold red"))
    if figures.downloaded is not None and figures.downloaded[0] < figures.downloaded[1]:
        rows.append(Text(f"{figures.downloaded[0]} of {figures.downloaded[1]} parameters downloaded", style="yellow"))
    if view.peers:
        rows.append(_peer_table(figures))
    events = [*figures.events, *view.last_events]
    rows += [Text(printable(event), style="dim") for event in events]
    return Group(*rows)


def _peer_table(figures: Figures) -> Table:
    table = Table(expand=False)
    for name in ("peer", "path", "round trip", "loss", "sent", "received"):
        table.add_column(name, justify="left" if name in ("peer", "path") else "right")
    for peer in figures.view.peers[:SHOWN_PEERS]:
        loss = figures.view.losses.get(peer.id)
        table.add_row(
            peer.id.hex()[:8],
            peer.path + (", neighbour" if peer.is_neighbor else ""),
            "-" if peer.rtt is None else f"{1000 * peer.rtt:.1f} ms",
            "-" if loss is None else f"{loss.loss:.4f}",
            f"{_short(peer.send_rate)}B/s",
            f"{_short(peer.receive_rate)}B/s",
        )
    if len(figures.view.peers) > SHOWN_PEERS:
        table.caption = f"and {len(figures.view.peers) - SHOWN_PEERS} more"
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _short(value: float | None) -> str:
    """With a prefix: 1234567 is "1.2 M"."""
    if value is None:
        return "-"
    for prefix in ("", "k", "M", "G"):
        if abs(value) < 1000:
            return f"{value:.0f} {prefix}" if not prefix else f"{value:.1f} {prefix}"
        value /= 1000
    return f"{value:.1f} T"
