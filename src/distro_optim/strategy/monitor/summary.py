"""What remains of a run when training is over, in a few lines."""

from __future__ import annotations

from typing import Final

from ...coordinator.solana_options import shown_sol
from ..port import RunView
from .narration import peers

__all__ = ["in_bytes", "summary"]

_NAMED: Final = 8
"""Peers that are named one by one."""


def summary(view: RunView, *, ddp_bytes: int = 0, is_host: bool = False) -> str:
    """The run as this peer saw it.

    Args:
        view: the last one.
        ddp_bytes: what gradients in bfloat16 would have taken, sent by us; 0 if that is not known.
        is_host: whether the run was hosted here: somebody who has invited others wants to know that nobody came.
    """
    is_over = view.run_state == "FINISHED"
    state = "is finished" if is_over else f"was left at step {view.step} of {view.total_steps}"
    instead = f" in place of {in_bytes(ddp_bytes)} of gradients" if ddp_bytes else ""
    givers = sum(given.rounds > 0 for given in view.contributions.values())
    counted = f"; results of {peers(givers)} counted" if givers else ""
    lines = [
        f"the run {view.run_id!r} {state}",
        f"  trained here  {view.rounds_trained} rounds{counted}",
        f"  sent          {in_bytes(view.bytes_sent)}{instead}; received {in_bytes(view.bytes_received)}",
        f"  time          {view.seconds_training:.0f} s training, {view.seconds_waiting:.0f} s waiting for the run",
    ]
    if is_host and view.rounds_trained and givers <= 1:
        lines.append(
            "  others        none came in time to train; RunConfig(peers_to_start=2) makes a host wait for one"
        )
    lines += _audits(view) + _points(view)
    if view.fees is not None:
        lines.append(f"  fees          {shown_sol(view.fees)}")
    if view.weights_root is not None:
        when = f"at the start of step {view.weights_step}"
        if (view.weights_step or 0) > view.total_steps > 0:  # in the rounds that apply what is still on its way
            when = f"after step {view.total_steps}"
        lines.append(f"  weights       {view.weights_root.hex()[:16]} {when}")
    if view.fault is not None:
        lines.append(f"  in doubt      {view.fault}")
    return "\n".join(lines)


def _audits(view: RunView) -> list[str]:
    """Who was audited, in a run with audits."""
    if not view.audits and not view.audits_nothing:
        return []
    passed = sum(count.passed for count in view.audits.values())
    failed = [key.hex()[:8] for key, count in view.audits.items() if count.failed]
    verdict = f"; failed: {', '.join(failed[:_NAMED])}" if failed else "; nobody failed"
    more = f" and {len(failed) - _NAMED} more" if len(failed) > _NAMED else ""
    lines = [f"  audits        {passed} passed, of {peers(len(view.audits))}{verdict}{more}"]
    if (limits := view.audit_limits) is not None:
        lines.append(
            f"  of momenta    at most {limits.jaccard:.3f} Jaccard, {limits.hamming:.3f} Hamming, "
            f"{limits.manhattan:.3f} Manhattan distance, learnt from {limits.samples} audits"
        )
    elif view.audits_nothing:
        lines.append(
            "  of momenta    nothing can be said: honest peers find other gradients in their own batches than they "
            "trained with (clipping, dropout or norms that the loss function of audits does not have?)"
        )
    return lines


def _points(view: RunView) -> list[str]:
    """Who did most, where that is counted."""
    points = view.points or {}
    most = sorted((key for key in points if points[key].samples), key=lambda key: -points[key].work)
    if not most:
        return []
    width = len(f"{points[most[0]].work:,}")
    rows = [
        f"    {key.hex()[:8]}    {points[key].work:>{width},} by work, {points[key].equal:>{width},} in equal shares, "
        f"{points[key].samples:,} samples"
        for key in most[:_NAMED]
    ]
    more = [f"    and {len(most) - _NAMED} more"] if len(most) > _NAMED else []
    return ["  points", *rows, *more]


def in_bytes(count: float) -> str:
    """``count`` bytes in words, 1 kB being 1000 bytes."""
    for size, unit in ((1e9, "GB"), (1e6, "MB")):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB"
