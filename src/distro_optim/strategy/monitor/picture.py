"""What a page shows of a run: one JSON object, the same for a peer and for a server."""

from __future__ import annotations

import math
from typing import Any, Final

from .figures import Figures
from .history import History, Point

__all__ = ["PeerPicture", "finite", "picture_of", "point_of", "short", "unit"]

MAX_EVENTS: Final = 30
"""News that a page shows, the newest."""

MAX_PEERS: Final = 256
"""Rows of its table: as many as an epoch has."""

PeerPicture = dict[str, Any]
"""A row of the table of peers."""


def short(key: bytes) -> str:
    """A public key as people tell it from others."""
    return key.hex()[:8]


def unit(seq_len: int) -> str:
    """What a run counts: tokens, or samples where those have one."""
    return "samples" if seq_len == 1 else "tokens"


def finite(value: float | None) -> float | None:
    """``value`` if JSON has a word for it."""
    return value if value is not None and math.isfinite(value) else None


def picture_of(figures: Figures, *, ticket: str | None, is_host: bool, how_to_join: str | None) -> dict[str, Any]:
    """A peer's run.

    Args:
        figures: the present ones.
        ticket: what others pass as ``run``.
        is_host: whether the run is hosted here.
        how_to_join: a line for a shell.
    """
    view = figures.view
    return {
        "run_id": view.run_id,
        "phase": view.run_state,
        "epoch": view.epoch,
        "step": view.step,
        "total_steps": view.total_steps,
        "is_host": is_host,
        "connected": view.connected,
        "fault": view.fault,
        "waits_for": view.waits_for,
        "waiting_peers": view.waiting_peers,
        "ticket": ticket,
        "how_to_join": how_to_join,
        "unit": unit(figures.seq_len),
        "tokens": figures.total_tokens,
        "tokens_per_second": figures.tokens_per_second,
        "lr": view.lr,
        "bytes": {"sent": view.bytes_sent, "received": view.bytes_received, "ddp": figures.ddp_bytes},
        "seconds": {"training": view.seconds_training, "waiting": view.seconds_waiting},
        "rounds": {"trained": view.rounds_trained, "missed": view.rounds_cancelled},
        "weights": None if view.weights_root is None else view.weights_root.hex()[:16],
        "peers": _peers(figures),
        "events": list(view.last_events[-MAX_EVENTS:]),
    }


def _peers(figures: Figures) -> list[PeerPicture]:
    view = figures.view
    links = {peer.id: peer for peer in view.peers}
    points, audits = view.points or {}, view.audits
    keys = dict.fromkeys([*view.clients, figures.key, *view.contributions])
    rows: list[PeerPicture] = []
    for key in list(keys)[:MAX_PEERS]:
        link, given, loss = links.get(key), view.contributions.get(key), view.losses.get(key)
        rows.append(
            {
                "id": short(key),
                "key": key.hex(),
                "is_me": key == figures.key,
                "in_epoch": key in view.clients,
                "path": None if link is None else link.path,
                "rtt": None if link is None else finite(link.rtt),
                "loss": finite(figures.loss if key == figures.key else None if loss is None else loss.loss),
                "rounds": None if given is None else given.rounds,
                "samples": None if given is None else given.samples,
                "bytes": None if given is None else given.bytes,
                "dropped": None if given is None else given.dropped,
                "points": None if key not in points else points[key].work,
                "audits": None if key not in audits else [audits[key].passed, audits[key].failed],
            }
        )
    return rows


def point_of(history: History, picture: dict[str, Any]) -> Point | None:
    """Adds the picture's step to a history; the new point, if it is one."""
    losses = {row["id"]: row["loss"] for row in picture["peers"] if row["loss"] is not None}
    seconds, sums = picture["seconds"], picture["bytes"]
    return history.add(
        picture["step"],
        losses,
        sent=None if sums is None else sums["sent"],
        ddp=None if sums is None else sums["ddp"],
        seconds=None if seconds is None else (seconds["training"], seconds["waiting"]),
    )
