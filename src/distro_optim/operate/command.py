"""``distro-optim run``: its options."""

from __future__ import annotations

import argparse

__all__ = ["add_options", "run"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.description = "Looks at runs on Solana. Reads only: it needs no wallet and costs nothing."
    actions = parser.add_subparsers(required=True, metavar="action")

    show = actions.add_parser("show", help="a run: its phase, its clients, their points")
    show.set_defaults(action="show")
    show.add_argument("run_id", metavar="RUN-ID")
    _add_cluster(show)

    listed = actions.add_parser("list", help="all runs of a program")
    listed.set_defaults(action="list", run_id=None)
    _add_cluster(listed)


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cluster", default="devnet", metavar="NAME", help="devnet, mainnet or localhost (%(default)s)"
    )
    parser.add_argument(
        "--rpc",
        action="append",
        default=[],
        metavar="URL",
        help="a node of your own in place of the cluster's public ones; may be repeated",
    )
    parser.add_argument(
        "--program", metavar="KEY", help="id of the coordinator program, if not that of Psyche's source"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a run")


def run(options: argparse.Namespace) -> int:
    """Looks, and prints.

    Raises:
        ConfigurationError: an option cannot work.
        DistroError: there is no such run, or it cannot be read.
    """
    import asyncio  # here, so that the other commands do without all this

    from .looking import LookOptions, look

    request = LookOptions(
        run_id=options.run_id,
        cluster=options.cluster,
        rpc=tuple(options.rpc),
        program=options.program,
        as_json=options.json,
    )
    for text in asyncio.run(look(request)):
        print(text)
    return 0
