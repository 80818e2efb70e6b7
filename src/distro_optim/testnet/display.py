"""What a test network shows while it runs: a live table in a terminal, lines elsewhere, JSON for machines."""

from __future__ import annotations

import json
import sys
import time
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Final, Self, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from ..strategy.run_report import printable
from .watching import PeerState, PeerWatch, SwarmWatch

__all__ = ["Display", "JsonDisplay", "LiveDisplay", "PlainDisplay", "display_for", "kilobytes", "peer_table", "render"]

REDRAW_SECONDS: Final = 0.25

STATUS_SECONDS: Final = 10.0
"""Between two lines where nothing is redrawn."""

RECORD_SECONDS: Final = 1.0
"""Between two records for machines."""

STATES: Final = {
    PeerState.STARTING: "yellow",
    PeerState.RUNNING: "green",
    PeerState.KILLED: "red",
    PeerState.ENDED: "cyan",
    PeerState.FAILED: "bold red",
    PeerState.STOPPED: "yellow",
}


class Display(ABC):
    """Where the news of a network goes. Used as a context manager."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        return None

    @abstractmethod
    def event(self, text: str, *, kind: str, **facts: str) -> None:
        """Something happened; ``kind`` and ``facts`` are for machines."""

    @abstractmethod
    def update(self, watch: SwarmWatch, seconds: float) -> None:
        """How it goes, ``seconds`` after the start; called several times a second."""


class PlainDisplay(Display):
    """One line an event, and one every ten seconds."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._due = 0.0

    @override
    def event(self, text: str, *, kind: str, **facts: str) -> None:
        self._write(printable(text))

    @override
    def update(self, watch: SwarmWatch, seconds: float) -> None:
        if seconds < self._due:
            return
        self._due = seconds + STATUS_SECONDS
        self._write(describe(watch))

    def _write(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", file=self._stream or sys.stdout, flush=True)


class JsonDisplay(Display):
    """One JSON object a line: events as they come, a status every second."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._due = 0.0

    @override
    def event(self, text: str, *, kind: str, **facts: str) -> None:
        self.write({"event": kind, "text": text, **facts})

    @override
    def update(self, watch: SwarmWatch, seconds: float) -> None:
        if seconds >= self._due:
            self._due = seconds + RECORD_SECONDS
            self.write({"event": "status", "seconds": round(seconds, 1), **picture(watch)})

    def write(self, record: dict[str, object]) -> None:
        """One line."""
        print(json.dumps({"time": round(time.time(), 3), **record}), file=self._stream or sys.stdout, flush=True)


class LiveDisplay(Display):
    """The table, redrawn in place."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False)
        self._due = 0.0

    @override
    def __enter__(self) -> Self:
        self._live.start()
        return self

    @override
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._live.stop()

    @override
    def event(self, text: str, *, kind: str, **facts: str) -> None:
        self._due = 0.0  # the table shows the last events

    @override
    def update(self, watch: SwarmWatch, seconds: float) -> None:
        if seconds >= self._due:
            self._due = seconds + REDRAW_SECONDS
            self._live.update(render(watch, seconds), refresh=True)


def display_for(*, as_json: bool, plain: bool, stream: TextIO | None = None) -> Display:
    """The display that suits the output: JSON if asked for, the table in a terminal, else lines."""
    if as_json:
        return JsonDisplay(stream)
    console = Console(file=stream)
    if plain or not console.is_terminal:
        return PlainDisplay(stream)
    return LiveDisplay(console)


def describe(watch: SwarmWatch) -> str:
    """The present state in a line."""
    peers = "  ".join(
        f"{peer.name}: {'-' if peer.smoothed_loss is None else f'{peer.smoothed_loss:.3f}'}"
        if peer.state is PeerState.RUNNING
        else f"{peer.name}: {peer.state.value}"
        for peer in watch.peers
    )
    sent, ddp = sum(p.bytes_sent for p in watch.peers), sum(p.ddp_bytes for p in watch.peers)
    return f"step {watch.step}  {peers}  sent {kilobytes(sent)} (DDP {kilobytes(ddp)})"


def picture(watch: SwarmWatch) -> dict[str, object]:
    """The present state for machines."""
    return {
        "step": watch.step,
        "epoch": watch.epoch,
        "run_state": watch.run_state,
        "peers": [peer_record(peer) for peer in watch.peers],
    }


def peer_record(peer: PeerWatch) -> dict[str, object]:
    """One peer for machines."""
    return {
        "number": peer.number,
        "key": peer.key,
        "state": peer.state.value,
        "exit_code": peer.exit_code,
        "rounds": peer.rounds,
        "step": peer.last.step,
        "loss": peer.smoothed_loss,
        "bytes_sent": peer.bytes_sent,
        "bytes_received": peer.bytes_received,
        "ddp_bytes": peer.ddp_bytes,
        "seconds_training": round(peer.seconds_training, 3),
        "seconds_waiting": round(peer.seconds_waiting, 3),
        "weights_hash": peer.final_hash or peer.last.weights_hash,
    }


def render(watch: SwarmWatch, seconds: float) -> RenderableType:
    """The picture of :class:`LiveDisplay`."""
    running = sum(1 for peer in watch.peers if peer.state is PeerState.RUNNING)
    head = Text(watch.run_state or "starting", style="cyan")
    head.append(f"   epoch {watch.epoch}   step {watch.step}   {running} peers   {seconds:.0f} s", style="default")
    return Group(
        head, peer_table(watch), _equality(watch), *(Text(printable(line), style="dim") for line in watch.events)
    )


def _equality(watch: SwarmWatch) -> Text:
    compared = watch.comparison
    if compared.differing:
        return Text(f"weights differed in {compared.differing} of {compared.compared} rounds", style="bold red")
    return Text(f"weights equal in {compared.compared} rounds", style="green")


def peer_table(watch: SwarmWatch) -> Table:
    """One row a peer; fits in 80 columns."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in ("peer", "state", "step", "loss", "sent", "with DDP", "training", "waiting", "weights"):
        table.add_column(name, justify="left" if name in ("peer", "state", "weights") else "right", no_wrap=True)
    for peer in watch.peers:
        table.add_row(
            f"{peer.number} host" if peer.number == 0 else str(peer.number),
            Text(peer.state.value, style=STATES[peer.state]),
            str(peer.last.step) if peer.rounds else "-",
            "-" if peer.smoothed_loss is None else f"{peer.smoothed_loss:.3f}",
            kilobytes(peer.bytes_sent),
            kilobytes(peer.ddp_bytes),
            f"{peer.seconds_training:.0f} s",
            f"{peer.seconds_waiting:.0f} s",
            (peer.final_hash or peer.last.weights_hash)[:8] or "-",
        )
    return table


def kilobytes(count: float) -> str:
    """``count`` bytes in words, 1 kB being 1000 bytes."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"
