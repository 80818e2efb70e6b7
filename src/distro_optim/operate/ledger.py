"""``distro-optim ledger``: checks a points ledger, and shows what is in it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..errors import ConfigurationError, MissingDependencyError

if TYPE_CHECKING:
    from ..coordinator.ledger import LedgerTotals

__all__ = ["add_options", "draw", "run"]

MOST_DRAWN: Final = 24
"""Clients in a picture, those with most points. Chosen arbitrarily."""

LABELS: Final = {"work": "by work", "equal": "in equal shares"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.description = (
        "A host with a folder for saved states writes down after each epoch what every client did, as a quorum of "
        "witnesses saw it, and points for it. The lines are chained and signed, so that anybody can check them."
    )
    actions = parser.add_subparsers(required=True, metavar="action")
    check = actions.add_parser("check", help="check signatures and chain; the status is 2 if something is wrong")
    check.add_argument("file", type=Path, metavar="FILE", help="RUN-HOST.ledger.jsonl")
    check.add_argument("--host", metavar="KEY", help="public key that has to have signed it, 64 hexadecimal digits")
    check.add_argument("--last", metavar="HASH", help="hash of a last line that was kept, which has to be in it")
    check.add_argument("--json", action="store_true", help="print a JSON object")
    check.add_argument("--plot", type=Path, metavar="FILE", help="draw the points in a PNG, SVG or PDF file")


def run(options: argparse.Namespace) -> int:
    """Checks; 0 if the ledger is in order.

    Raises:
        ConfigurationError: it is not, or cannot be read.
        MissingDependencyError: matplotlib is not installed.
    """
    from ..coordinator.server.ledger_file import read_ledger

    totals = read_ledger(options.file, host=options.host, holding=options.last)
    if options.plot is not None:
        draw(totals, options.plot)
    print(json.dumps(_record(totals)) if options.json else _table(totals))
    return 0


def draw(totals: LedgerTotals, path: Path) -> None:
    """Draws the points of each client, by both ways to count.

    Args:
        totals: of a ledger.
        path: of the file; its ending says of what kind.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ConfigurationError: the file cannot be written, or is of no kind that can be drawn.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependencyError("--plot needs matplotlib: pip install 'distro-optim[plot]'") from error
    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot as plt

    most = sorted(totals.clients.items(), key=lambda item: -item[1].work)[:MOST_DRAWN]
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.45 * max(2, len(most))), layout="constrained")
    for offset, name, color in ((-0.2, "work", "tab:blue"), (0.2, "equal", "tab:orange")):
        places = [place + offset for place in range(len(most))]
        axes.barh(places, [getattr(one, name) for _, one in most], height=0.38, color=color, label=LABELS[name])
    failed = [f"{key.hex()[:8]}{' (failed an audit)' if one.audits_failed else ''}" for key, one in most]
    axes.set_yticks(range(len(most)), failed)
    axes.invert_yaxis()
    more = f", the first {MOST_DRAWN} of {len(totals.clients)}" if len(totals.clients) > MOST_DRAWN else ""
    axes.set(xlabel="points", title=f"run {totals.run}, {totals.lines} epochs{more}")
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot draw {path}: {error}", name="plot", value=path) from error
    finally:
        plt.close(figure)


def _record(totals: LedgerTotals) -> dict[str, object]:
    return {
        "run": totals.run,
        "host": totals.host.hex(),
        "lines": totals.lines,
        "last": totals.last,
        "follows": totals.follows,
        "clients": {k.hex(): {**asdict(one), "epochs": totals.epochs[k]} for k, one in totals.clients.items()},
    }


def _table(totals: LedgerTotals) -> str:
    if not totals.lines:
        return "the ledger is empty"
    before = [] if totals.follows is None else [f"it follows the line {totals.follows} of the host before"]
    lines = [
        f"run {totals.run}, {totals.lines} epochs, signed by {totals.host.hex()}: in order",
        *before,
        f"{'client':16} {'epochs':>7} {'batches':>8} {'samples':>9} {'tokens':>13} {'MB served':>10} {'audits':>9} "
        f"{'equal':>10} {'by work':>10}",
    ]
    for key, one in sorted(totals.clients.items(), key=lambda item: -item[1].work):
        audits = f"{one.audits_passed}/{one.audits_passed + one.audits_failed}"
        lines.append(
            f"{key.hex()[:16]:16} {totals.epochs[key]:7} {one.batches:8} {one.samples:9} {one.tokens:13} "
            f"{one.bytes_served / 1e6:10.1f} {audits:>9} {one.equal:10} {one.work:10}"
        )
    return "\n".join([*lines, f"hash of the last line: {totals.last}"])
