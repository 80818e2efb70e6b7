"""What a client shows: a live picture in a terminal, lines elsewhere, JSON for machines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..console import Forms, printable
from ..coordinator.solana_options import shown_sol
from ..strategy.monitor.figures import Figures

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["FORMS", "record", "render", "status_line"]

STATUS_SECONDS: Final = 30.0
"""Between two lines of figures where nothing is redrawn, as in Psyche's client."""

RECORD_SECONDS: Final = 2.0
"""Between two records for machines."""

SHOWN_PEERS: Final = 16
"""Rows that fit a terminal; of more peers the rest is counted."""

_GAP: Final = "   "
"""Between two figures of a line of the picture."""

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
"""Colours of the phases of a run."""


def status_line(figures: Figures) -> str:
    """The figures in a line."""
    view = figures.view
    parts = [
        view.run_state,
        f"epoch {view.epoch}, step {view.step} of {view.total_steps}, round {view.height}",
        f"{view.num_peers} clients",
        figures.role.replace("_", " "),
    ]
    if view.waits_for is not None:
        parts.append(f"waiting for {view.waits_for}")
    if figures.loss is not None:
        parts.append(f"loss {figures.loss:.4f}")
    if figures.tokens_per_second is not None:
        parts.append(f"{_short(figures.tokens_per_second).rstrip()} tokens/s")
    parts.append(f"sent {_short(view.bytes_sent)}B, received {_short(view.bytes_received)}B")
    if view.fees is not None:
        parts.append(f"fees {shown_sol(view.fees)}")
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
        "waits_for": view.waits_for,
        "role": figures.role,
        "batch": None if batch is None else [batch.start, batch.end],
        "loss": figures.loss,
        "lr": view.lr,
        "tokens_per_second": figures.tokens_per_second,
        "total_tokens": figures.total_tokens,
        "efficiency": figures.efficiency,
        "bytes_sent": view.bytes_sent,
        "bytes_received": view.bytes_received,
        "fees": view.fees,
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
    """The figures as a picture."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

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
    fees = [f"fees {shown_sol(view.fees)}"] if view.fees is not None else []
    pace = [speed, *efficiency, f"sent {_short(view.bytes_sent)}B, received {_short(view.bytes_received)}B", *fees]
    lines = [Text(_GAP.join(line), no_wrap=True, overflow="ellipsis") for line in (ours, pace)]
    rows: list[RenderableType] = [head, *lines]
    if view.waits_for is not None:
        rows.append(Text(f"waiting for {printable(view.waits_for)}", style="yellow"))
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
    from rich.table import Table

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


FORMS: Final = Forms(
    line=status_line, record=record, picture=render, line_seconds=STATUS_SECONDS, record_seconds=RECORD_SECONDS
)
"""The forms of a client's :class:`~.figures.Figures`."""
