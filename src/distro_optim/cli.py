"""The command ``distro-optim``: its subcommands, each of which is imported when it runs."""

from __future__ import annotations

import argparse
import logging
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ._version import __version__
from .client import command as join_command
from .client import doctor as doctor_command
from .client import replaying as replay_command
from .client import verifying as verify_command
from .errors import ConfigurationError, DistroError
from .logs import log_options, logging_to
from .operate import command as run_command
from .operate import ledger as ledger_command
from .operate import localnet as localnet_command
from .operate import ticket as ticket_command
from .serve import command as serve_command
from .testing import simulating as simulate_command
from .testnet import command as testnet_command

__all__ = ["main"]

_log: Final = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: of the command; None takes those of the process.

    Returns:
        the status of the process: 0 if all went well, 1 if it failed, 2 for wrong usage, 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    try:
        with logging_to(log_options(options, os.environ) if hasattr(options, "log_file") else None):
            return _carried_out(options)
    except ConfigurationError as error:
        print(f"distro-optim: {error}", file=sys.stderr)
        return 2
    except DistroError as error:
        print(f"distro-optim: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _carried_out(options: argparse.Namespace) -> int:
    """The status of a command, whose end is logged."""
    system = f"Python {platform.python_version()} on {platform.system()}"
    _log.info("distro-optim %s, process %d, %s", __version__, os.getpid(), system)
    try:
        status = int(options.command(options))
    except BaseException as error:
        known = isinstance(error, DistroError | KeyboardInterrupt | SystemExit)
        _log.info("ends with %s: %s", type(error).__name__, error, exc_info=not known)
        raise
    _log.info("ends with status %d", status)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="distro-optim", description="Train neural networks over the open internet.")
    parser.add_argument("--version", action="version", version=f"distro-optim {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    serve = commands.add_parser("serve", help="host a run that our clients and Psyche's can join")
    serve.set_defaults(command=serve_command.run)
    serve_command.add_options(serve)

    join = commands.add_parser("join", help="train in a run of Psyche's, without a script")
    join.set_defaults(command=join_command.run)
    join_command.add_options(join)

    doctor = commands.add_parser("doctor", help="look whether this machine can train with others, and how fast")
    doctor.set_defaults(command=doctor_command.run)
    doctor_command.add_options(doctor)

    ticket = commands.add_parser("ticket", help="print a fresh ticket of a run, from an older one or from any peer")
    ticket.set_defaults(command=ticket_command.run)
    ticket_command.add_options(ticket)

    replay = commands.add_parser(
        "replay", help="repeat a recorded run and compare its weights with those of its clients"
    )
    replay.set_defaults(command=replay_command.run)
    replay_command.add_options(replay)

    verify = commands.add_parser(
        "verify", help="tell whether each peer of a run trained what it was given, recorded or live"
    )
    verify.set_defaults(command=verify_command.run)
    verify_command.add_options(verify)

    run = commands.add_parser(
        "run", help="look at runs on Solana and operate your own; pause and change one hosted here"
    )
    run.set_defaults(command=run_command.run)
    run_command.add_options(run)

    localnet = commands.add_parser("localnet", help="try runs on Solana on this machine, without a cluster or money")
    localnet.set_defaults(command=localnet_command.run)
    localnet_command.add_options(localnet)

    ledger = commands.add_parser("ledger", help="check what a host wrote down of its clients' work, and their points")
    ledger.set_defaults(command=ledger_command.run)
    ledger_command.add_options(ledger)

    testnet = commands.add_parser(
        "testnet",
        help="run a training script as several peers on this machine",
        description="Runs a training script in several processes, which are the peers of one run: the first hosts it, "
        "the others join. Shows how they do, disturbs them if asked to, and ends with a table and a plot.",
    )
    testnet.set_defaults(command=testnet_command.run)
    testnet_command.add_options(testnet)

    simulate = commands.add_parser(
        "simulate",
        help="see what a run with many peers costs each of them, without a network",
        description="Runs the real rounds and the real coordinator over a simulated network, in virtual time, once for "
        "each number of peers, and prints what a round takes: seconds, bytes, and CPU of this machine. Everything but "
        "the CPU follows from the seed.",
    )
    simulate.set_defaults(command=simulate_command.run)
    simulate_command.add_options(simulate)

    validate = commands.add_parser("validate", help="check a state.toml", description="Checks a state.toml.")
    validate.set_defaults(command=_validate)
    validate.add_argument("state", type=Path, metavar="FILE")

    tokenize = commands.add_parser(
        "tokenize",
        help="make a file of tokens from a folder of texts",
        description="Makes a file of tokens to train on out of a folder of texts. Can be interrupted: the same command "
        "goes on where it was, and the file is the same as if it had been made at once.",
    )
    tokenize.set_defaults(command=_tokenize)
    tokenize.add_argument("folder", type=Path, metavar="FOLDER", help="with the texts; each file is one")
    tokenize.add_argument(
        "--tokenizer", required=True, metavar="PATH|bytes", help="a tokenizer.json, a folder with one, or bytes"
    )
    tokenize.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to make: tokens.bin")
    tokenize.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="PATTERN",
        help="only files called so; may be repeated",
    )
    tokenize.add_argument("--end-token", metavar="TOKEN", help="what ends a text, if not what the tokenizer says")
    tokenize.add_argument("--restart", action="store_true", help="begin again, whatever is there")
    return parser


def _tokenize(options: argparse.Namespace) -> int:
    from .data.making.tokenizing import TokenizeOptions, run_tokenize

    run_tokenize(
        TokenizeOptions(
            folder=options.folder,
            tokenizer=options.tokenizer,
            out=options.out,
            include=options.include,
            end_token=options.end_token,
            restart=options.restart,
        )
    )
    return 0


def _validate(options: argparse.Namespace) -> int:
    from .coordinator.rules.validation import check_run, model_problems
    from .coordinator.server.store import read_state_file

    state = read_state_file(options.state)
    check_run(state)
    for field, advice in model_problems(state.model):
        print(f"note: model.{field} {advice} for a run in the open")
    print(f"{options.state}: run {state.run_id!r} is in order")
    return 0
