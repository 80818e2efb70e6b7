"""``distro-optim testnet``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..comm.iroh.reach_options import add_reach_options, reach_from
from ..console import JsonLines, LivePicture, Mode, display_for, narrated, print_lines, print_picture
from ..logs import add_log_options, log_options
from .faults import Fault, Join, Kill, Restart, parse_peer_at_step

__all__ = ["add_options", "run"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.add_argument("script", type=Path, metavar="SCRIPT", help="a Python file that trains")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its own arguments")
    parser.add_argument("--peers", type=int, default=3, metavar="N", help="processes, the first hosts (%(default)s)")
    parser.add_argument(
        "--kill", action="append", default=[], metavar="PEER@STEP", help="kill -9 a peer at a step; may be repeated"
    )
    parser.add_argument(
        "--restart", action="append", default=[], metavar="PEER@STEP", help="start a killed peer again; likewise"
    )
    parser.add_argument(
        "--join-at", action="append", default=[], type=int, metavar="STEP", help="one more peer joins; likewise"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the run (RunConfig) where the script leaves the default; likewise",
    )
    parser.add_argument("--target", type=float, metavar="LOSS", help="fail unless the loss ends below it")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="fail if it is not over by then")
    parser.add_argument(
        "--stall-timeout",
        type=float,
        default=180.0,
        metavar="SECONDS",
        help="fail if no peer reports anything for so long (%(default)s)",
    )
    add_reach_options(parser.add_argument, default_relay="none", external=False)
    parser.add_argument(
        "--out", type=Path, default=Path("out/testnet"), metavar="DIR", help="logs, reports, plot (%(default)s)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="the plot (losses.png in --out)")
    add_log_options(parser)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object a line")
    output.add_argument("--plain", action="store_true", help="print lines, also in a terminal")


def run(options: argparse.Namespace) -> int:
    """Runs the network; 0 if all went as it should, 1 if not.

    Raises:
        ConfigurationError: an option cannot work.
        KeyboardInterrupt: the user ended it, or SIGTERM did.
    """
    # Here, so that the other commands do without all this.
    from .display import FORMS
    from .network import LocalNetwork, NetworkOptions, parse_setting
    from .summary import plot, summary_record, summary_table

    arguments = tuple(options.arguments)
    request = NetworkOptions(
        script=options.script,
        arguments=arguments[1:] if arguments[:1] == ("--",) else arguments,
        peers=options.peers,
        faults=tuple(_faults(options)),
        out=options.out,
        settings=dict(parse_setting(text) for text in options.set),
        **reach_from(lambda name: (f"--{name.replace('_', '-')}", getattr(options, name, None))),
        timeout=options.timeout,
        stall_timeout=options.stall_timeout,
        target=options.target,
        log=log_options(options, os.environ),
    )
    mode: Mode = "json" if options.json else "console" if options.plain else "tui"
    display = display_for(mode, FORMS)
    try:
        with _sigterm_as_ctrl_c(), display:
            outcome = LocalNetwork(request, display).run()
    except KeyboardInterrupt:
        print(f"stopped, and all peers with it; logs and reports: {options.out}", file=sys.stderr)
        raise
    image = options.plot or options.out / "losses.png"
    with narrated("drawing the plot"):
        drawn = plot(outcome, image)
    if isinstance(display, JsonLines):
        display.write({**summary_record(outcome), "plot": str(image) if drawn else None})
    else:
        print_picture(summary_table(outcome, with_peers=not isinstance(display, LivePicture)))
        lack = "no plot: there are no losses, or matplotlib is missing (pip install 'distro-optim[plot]')"
        print_lines(f"plot: {image}" if drawn else lack, f"logs and reports: {options.out}")
    return 0 if outcome.succeeded else 1


def _faults(options: argparse.Namespace) -> Iterator[Fault]:
    for text in options.kill:
        peer, step = parse_peer_at_step(text)
        yield Kill(peer=peer, step=step)
    for text in options.restart:
        peer, step = parse_peer_at_step(text)
        yield Restart(peer=peer, step=step)
    for step in options.join_at:
        yield Join(step=step)


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """SIGTERM and SIGHUP do what Ctrl-C does: they end the peers as well."""

    def interrupt(number: int, frame: object) -> None:
        print(f"stopped by {signal.Signals(number).name}", file=sys.stderr)
        raise KeyboardInterrupt

    numbers = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
