"""``distro-optim ticket``: a fresh ticket of a run, from an older one or from the folder of any of its peers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from ..comm.iroh.reach_options import add_reach_options, reach_from
from ..coordinator.ticket_text import is_ticket
from ..errors import ConfigurationError, CoordinatorLinkError

__all__ = ["add_options", "run"]

SECONDS: Final = 30.0
"""To open an endpoint and ask everybody whom a ticket names, who have five seconds each."""

MAX_BYTES: Final = 8192
"""Of the file with a ticket."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.description = (
        "Prints a fresh ticket of a run: with its present host and some of its peers, which lead to the next host. "
        "Asks those whom an older ticket names; or takes the older ticket out of the checkpoint folder of any peer."
    )
    parser.add_argument("run", metavar="TICKET|FOLDER", help="an older ticket, or the checkpoint folder of a peer")
    add_reach_options(parser.add_argument)


def run(options: argparse.Namespace) -> int:
    """Asks and prints.

    Raises:
        ConfigurationError: it is neither a ticket nor a folder with one.
        CoordinatorLinkError: nobody answers.
    """
    from ..comm.iroh.endpoint import Node
    from ..comm.iroh.keys import generate_secret_key
    from ..strategy.network.finding_the_host import find_host, fresh_ticket
    from ..strategy.network.joining import parse_run

    ticket = parse_run(_read(options.run))
    reach = reach_from(lambda name: (f"--{name.replace('_', '-')}", getattr(options, name)))
    node = Node(secret_key=generate_secret_key(), **reach)
    node.addresses.add(ticket.peers)
    try:
        found = node.loop.run(find_host(node, ticket), SECONDS)
    finally:
        node.close()
    if found is None or found.host is None:
        raise CoordinatorLinkError(
            f"nobody whom the ticket names knows who hosts run {ticket.run_id!r}: ask somebody who is in the run for "
            "its ticket, or wait until its peers have agreed on a host"
        )
    tcp = ticket.tcp if ticket.endpoint is not None and found.host.id == ticket.endpoint.id else ()
    print(fresh_ticket(ticket.run_id, found.host, [*found.peers, *ticket.peers], tcp))
    return 0


def _read(given: str) -> str:
    """The ticket, also out of a folder or a file.

    Raises:
        ConfigurationError: there is none.
    """
    from ..strategy.environment import TICKET_NAME

    path = Path(given)
    try:
        if is_ticket(given) or not path.exists():
            return given
        with open(path / TICKET_NAME if path.is_dir() else path, encoding="utf-8", errors="replace") as file:
            return file.read(MAX_BYTES).strip()
    except FileNotFoundError:
        raise ConfigurationError(
            f"{given} has no {TICKET_NAME}, which a peer that is in a run keeps in its checkpoint folder", name="run"
        ) from None
    except OSError as error:
        raise ConfigurationError(f"cannot read {given}: {error.strerror or error}", name="run", value=given) from None
