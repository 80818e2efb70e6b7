"""What a test network shows while it runs: a live table in a terminal, lines elsewhere, JSON for machines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from ..console import Forms, printable
from ..strategy.monitor.narration import peers
from .watching import PeerState, PeerWatch, SwarmWatch

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

__all__ = ["FORMS", "Situation", "kilobytes", "peer_record", "peer_table", "render"]

REDRAW_SECONDS: Final = 0.25
"""Between two pictures."""

STATUS_SECONDS: Final = 10.0
"""Between two lines where nothing is redrawn."""

RECORD_SECONDS: Final = 1.0
"""Between two records for machines."""

SECONDS_UP_TO: Final = 90
"""Longer times are told in minutes, and so many minutes in hours."""

STATES: Final = {
    PeerState.STARTING: "yellow",
    PeerState.RUNNING: "green",
    PeerState.KILLED: "red",
    PeerState.ENDED: "cyan",
    PeerState.FAILED: "bold red",
    PeerState.STOPPED: "yellow",
}
"""Colours of what a peer's process does."""


class Situation(NamedTuple):
    """What is shown of a network: all that is known of it, and the seconds since its start."""

    watch: SwarmWatch
    seconds: float


def status_line(now: Situation) -> str:
    """The situation in a line."""
    watch = now.watch
    each = "  ".join(
        f"{peer.name}: {'-' if peer.smoothed_loss is None else f'{peer.smoothed_loss:.3f}'}"
        if peer.state is PeerState.RUNNING
        else f"{peer.name}: {peer.state.value}"
        for peer in watch.peers
    )
    sent, ddp = sum(p.bytes_sent for p in watch.peers), sum(p.ddp_bytes for p in watch.peers)
    return f"{progress(watch)}  {each}  sent {kilobytes(sent)} (DDP {kilobytes(ddp)})"


def record(now: Situation) -> dict[str, object]:
    """The situation for machines."""
    watch = now.watch
    return {
        "seconds": round(now.seconds, 1),
        "step": watch.step,
        "total_steps": watch.total_steps or None,
        "seconds_left": None if watch.seconds_left is None else round(watch.seconds_left, 1),
        "epoch": watch.epoch,
        "run_state": watch.run_state,
        "waiting_peers": watch.waiting_peers,
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


def render(now: Situation) -> RenderableType:
    """The situation as a picture."""
    from rich.console import Group
    from rich.text import Text

    watch = now.watch
    running = sum(1 for peer in watch.peers if peer.state is PeerState.RUNNING)
    head = Text(printable(watch.run_state) or "starting", style="cyan")
    waiting = f", {watch.waiting_peers} wait for the next epoch" if watch.waiting_peers else ""
    head.append(
        f"   epoch {watch.epoch}   {progress(watch)}   {peers(running)}{waiting}   {in_words(now.seconds)}",
        style="default",
    )
    return Group(
        head, peer_table(watch), _equality(watch), *(Text(printable(line), style="dim") for line in watch.events)
    )


def _equality(watch: SwarmWatch) -> Text:
    from rich.text import Text

    compared = watch.comparison
    if compared.differing:
        return Text(f"weights differed in {compared.differing} of {compared.compared} rounds", style="bold red")
    return Text(f"weights equal in {compared.compared} rounds", style="green")


def peer_table(watch: SwarmWatch) -> Table:
    """One row a peer; fits in 80 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in ("peer", "state", "step", "loss", "sent", "with DDP", "training", "waiting", "weights"):
        table.add_column(name, justify="left" if name in ("peer", "state", "weights") else "right", no_wrap=True)
    for peer in watch.peers:
        table.add_row(
            f"{peer.number} host" if peer.number == 0 else str(peer.number),
            Text(peer.state.value, style=STATES[peer.state]),
            str(watch.counted(peer.last.step)) if peer.rounds else "-",
            "-" if peer.smoothed_loss is None else f"{peer.smoothed_loss:.3f}",
            kilobytes(peer.bytes_sent),
            kilobytes(peer.ddp_bytes),
            f"{peer.seconds_training:.0f} s",
            f"{peer.seconds_waiting:.0f} s",
            Text(printable((peer.final_hash or peer.last.weights_hash)[:8]) or "-"),
        )
    return table


def progress(watch: SwarmWatch) -> str:
    """How far the run is, and for how long it goes on."""
    of = f" of {watch.total_steps}" if watch.total_steps else ""
    left = "" if watch.seconds_left is None else f", about {in_words(watch.seconds_left)} left"
    return f"step {watch.step}{of}{left}"


def in_words(seconds: float) -> str:
    """A time for people: seconds, minutes or hours."""
    if seconds < SECONDS_UP_TO:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 60 * SECONDS_UP_TO else f"{seconds / 3600:.1f} h"


def kilobytes(count: float) -> str:
    """``count`` bytes in words, 1 kB being 1000 bytes."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"


FORMS: Final = Forms(
    line=status_line,
    record=record,
    picture=render,
    line_seconds=STATUS_SECONDS,
    record_seconds=RECORD_SECONDS,
    picture_seconds=REDRAW_SECONDS,
)
"""The forms of a network's :class:`Situation`."""
