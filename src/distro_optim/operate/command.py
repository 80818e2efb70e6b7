"""``distro-optim run``: its options."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["add_options", "run"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.description = "Looks at runs on Solana, at no cost; pauses, resumes and changes a run hosted here."
    actions = parser.add_subparsers(required=True, metavar="action")

    show = actions.add_parser("show", help="a run: its phase, its clients, their points")
    show.set_defaults(action="show")
    show.add_argument("run_id", metavar="RUN-ID")
    _add_cluster(show)

    listed = actions.add_parser("list", help="all runs of a program")
    listed.set_defaults(action="list", run_id=None)
    _add_cluster(listed)

    for action, text in (
        ("pause", "stop a run that is hosted on this machine, after its present epoch"),
        ("resume", "let a paused run go on"),
        ("set", "change settings of a paused run"),
    ):
        asked = actions.add_parser(action, help=text, description=f"{text[0].upper()}{text[1:]}.")
        asked.set_defaults(action=action, settings=[])
        asked.add_argument("run_id", metavar="RUN-ID")
        if action == "set":
            asked.add_argument(
                "settings",
                metavar="NAME=VALUE",
                nargs="+",
                type=_setting,
                help="such as total_steps=20000 or global_batch_size=64; names as in state files",
            )
        asked.add_argument(
            "--save-dir", type=Path, required=True, metavar="DIR", help="that of the server, or of RunConfig(save_dir)"
        )


def _setting(text: str) -> tuple[str, int]:
    name, _, value = text.partition("=")
    try:
        return name.strip(), int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be NAME=NUMBER, got {text!r}") from None


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
    """Looks or asks, and prints.

    Raises:
        ConfigurationError: an option cannot work.
        DistroError: there is no such run, or it cannot be read.
    """
    if options.action in ("pause", "resume", "set"):
        from .asking import ask

        print(ask(options.save_dir, options.run_id, options.action, dict(options.settings)))
        return 0
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
