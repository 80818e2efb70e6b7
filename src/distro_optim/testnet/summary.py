"""What remains of a test network: a table, a plot, a record."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..console import printable
from .display import kilobytes, peer_record, peer_table
from .faults import Fault, Join, Kill, KillHost, Restart, RestartHost
from .network import Outcome

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["plot", "summary_record", "summary_table"]

DOTS_PER_INCH: Final = 110
"""Of the plot, which is 8 inches wide."""

_SHORT: Final[dict[type[Fault], str]] = {
    Kill: "kill -9",
    Restart: "restart",
    KillHost: "host killed",
    RestartHost: "restart",
    Join: "join",
}

LABEL_HEIGHT: Final = 0.05
"""Of the height of the plot."""

LABELS_STAGGERED: Final = 4
"""Labels below each other before the next one is at the top again."""


def summary_record(outcome: Outcome) -> dict[str, object]:
    """For machines."""
    watch, compared = outcome.watch, outcome.watch.comparison
    return {
        "event": "summary",
        "succeeded": outcome.succeeded,
        "problems": list(outcome.problems),
        "seconds": round(outcome.seconds, 1),
        "step": watch.step,
        "final_loss": watch.final_loss,
        "target": outcome.target,
        "weights_equal_at_the_end": watch.equal_at_the_end,
        "rounds_compared": compared.compared,
        "rounds_differing": compared.differing,
        "faults": [str(fault) for fault in outcome.faults],
        "peers": [peer_record(peer) for peer in watch.peers],
    }


def summary_table(outcome: Outcome, *, with_peers: bool = True) -> RenderableType:
    """For people.

    Args:
        outcome: of a run.
        with_peers: with the table of the peers; without it where a live picture has just left that on the screen.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    watch, compared = outcome.watch, outcome.watch.comparison
    facts = Table(title="The run", show_header=False)
    facts.add_column(style="bold")
    facts.add_column(justify="right")
    facts.add_row("rounds", f"{watch.step:,} in {outcome.seconds:.0f} s")
    for fault in outcome.faults:
        facts.add_row("", str(fault))
    if watch.final_loss is not None:
        target = "" if outcome.target is None else f" (target: below {outcome.target:g})"
        facts.add_row("loss at the end", f"{watch.final_loss:.3f}{target}")
    facts.add_row("weights of the peers that are left", _weights(outcome))
    facts.add_row(
        "weights compared during the run",
        "none"
        if not compared.compared
        else f"{compared.compared} rounds, "
        + (f"{compared.differing} with a difference" if compared.differing else "equal in each"),
    )
    sent, ddp = sum(p.bytes_sent for p in watch.peers), sum(p.ddp_bytes for p in watch.peers)
    if sent and ddp:
        facts.add_row("sent by all peers", f"{kilobytes(sent)} instead of {kilobytes(ddp)} (1 : {ddp / sent:,.0f})")
    waited, trained = sum(p.seconds_waiting for p in watch.peers), sum(p.seconds_training for p in watch.peers)
    if waited + trained:
        facts.add_row("waiting for others and the network", f"{100 * waited / (waited + trained):.0f} % of the time")
    lines = [line for problem in outcome.problems for line in problem.splitlines()]
    peers = [peer_table(watch)] if with_peers else []
    return Group(*peers, facts, *(Text(printable(line), style="bold red") for line in lines))


def _weights(outcome: Outcome) -> str:
    survivors = outcome.watch.survivors
    if outcome.watch.equal_at_the_end:
        return f"{printable(survivors[0].final_hash[:16])}, equal on all {len(survivors)}"
    if not survivors or not all(peer.final_hash for peer in survivors):
        return "[red]not known: not all peers came to the end[/red]"
    return "[red]they DIFFER[/red]"


def plot(outcome: Outcome, path: Path, *, unit: str = "loss") -> bool:
    """Draws the losses of all peers and what was sent.

    Args:
        outcome: of a run.
        path: of a PNG file.
        unit: of the loss, for the axis.

    Returns:
        False if there is no loss to draw, or matplotlib is missing (``pip install 'distro-optim[plot]'``).
    """
    watch = outcome.watch
    if not any(peer.losses for peer in watch.peers):
        return False
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for peer in watch.peers:
        if not peer.losses:
            continue
        steps, losses = zip(*_smoothed(peer.losses), strict=True)
        killed = "" if peer.has_survived else ", killed"
        axes.plot(steps, losses, label=f"{peer.name}{' (host)' if peer.number == 0 else ''}{killed}", linewidth=1.2)
    for number, fault in enumerate(outcome.faults):
        what = _SHORT[type(fault)]
        axes.axvline(fault.step, color="tab:gray", linestyle=":", linewidth=1)
        height = 1 - LABEL_HEIGHT * (number % LABELS_STAGGERED)  # neighbours do not overlap
        axes.annotate(f" {what}", (fault.step, height), xycoords=("data", "axes fraction"), va="top", fontsize=8)
    if outcome.target is not None:
        axes.axhline(outcome.target, label=f"target {outcome.target:g}", color="tab:red", linestyle=":")
    sent, ddp = sum(p.bytes_sent for p in watch.peers), sum(p.ddp_bytes for p in watch.peers)
    axes.set(
        xlabel="round",
        ylabel=unit,
        title=f"{len(watch.peers)} peers sent {kilobytes(sent)}; DDP would have sent {kilobytes(ddp)}",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH)
    plt.close(figure)
    return True


def _smoothed(losses: list[tuple[int, float]], newest: float = 0.1) -> list[tuple[int, float]]:
    """Exponential mean, so that peers can be told apart."""
    points: list[tuple[int, float]] = []
    mean = losses[0][1]
    for step, loss in losses:
        mean += newest * (loss - mean)
        points.append((step, mean))
    return points
