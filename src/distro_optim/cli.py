"""The command ``distro-optim``."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from ._version import __version__
from .client import command as join_command
from .errors import ConfigurationError, DistroError
from .testnet import command as testnet_command

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the status of the process: 0, 1 if it failed, 2 if it was asked for wrongly."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except ConfigurationError as error:
        print(f"distro-optim: {error}", file=sys.stderr)
        return 2
    except DistroError as error:
        print(f"distro-optim: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="distro-optim", description="Train neural networks over the open internet.")
    parser.add_argument("--version", action="version", version=f"distro-optim {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    serve = commands.add_parser(
        "serve",
        help="host a run for clients of ours and of Psyche",
        description="Hosts a run: a coordinator that clients of ours and of Psyche join.",
    )
    serve.set_defaults(command=_serve)
    serve.add_argument("--state", type=Path, required=True, metavar="FILE", help="the run, as in Psyche's state.toml")
    serve.add_argument("--data", type=Path, metavar="FILE", help="serve training data too, as in Psyche's data.toml")
    serve.add_argument("--host", default="0.0.0.0", help="address to listen on (%(default)s)")
    serve.add_argument("--port", type=_port, default=20000, help="TCP port, 0 for any free one (%(default)s)")
    serve.add_argument("--save-dir", type=Path, metavar="DIR", help="keep the run here, saved after each epoch")
    serve.add_argument("--resume", action="store_true", help="go on from what is saved in --save-dir")
    serve.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="KEY|FILE",
        help="let only these public keys join: a key in hexadecimal, or a file with one a line; may be repeated",
    )
    serve.add_argument("--iroh", action="store_true", help="be reached over iroh too, behind a NAT as well")
    serve.add_argument("--key-file", type=Path, metavar="FILE", help="secret key of the iroh endpoint")
    serve.add_argument(
        "--relay", type=_relay, default="default", metavar="default|none|URL", help="relay server for iroh"
    )
    serve.add_argument("--max-connections", type=_count, default=1024, metavar="N", help="open at once (%(default)s)")
    serve.add_argument("--init-warmup-time", type=_count, metavar="SECONDS", help="length of the first warm-up")
    serve.add_argument(
        "--keep-disconnected",
        action="store_true",
        help="leave a client that disconnects in its epoch (else it is withdrawn at once)",
    )
    output = serve.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object a line")
    output.add_argument("--plain", action="store_true", help="print lines, also in a terminal")

    join = commands.add_parser("join", help="train in a run of Psyche's, without a script")
    join.set_defaults(command=join_command.run)
    join_command.add_options(join)

    testnet = commands.add_parser(
        "testnet",
        help="run a training script as several peers on this machine",
        description="Runs a training script in several processes, which are the peers of one run: the first hosts it, "
        "the others join. Shows how they do, disturbs them if asked to, and ends with a table and a plot.",
    )
    testnet.set_defaults(command=testnet_command.run)
    testnet_command.add_options(testnet)

    validate = commands.add_parser("validate", help="check a state.toml", description="Checks a state.toml.")
    validate.set_defaults(command=_validate)
    validate.add_argument("state", type=Path, metavar="FILE")

    tokenize = commands.add_parser(
        "tokenize",
        help="make a file of tokens out of a folder of texts",
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
    tokenize.add_argument("--restart", action="store_true", help="begin anew, whatever is there")
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


def _serve(options: argparse.Namespace) -> int:
    from .comm.serving.limits import ServerLimits
    from .serve.console import reporter_for
    from .serve.serving import ServeOptions, serve

    request = ServeOptions(
        state=options.state,
        data=options.data,
        host=options.host,
        port=options.port,
        save_dir=options.save_dir,
        resume=options.resume,
        allow=options.allow,
        iroh=options.iroh,
        key_file=options.key_file,
        relay=options.relay,
        init_warmup_time=options.init_warmup_time,
        withdraw_on_disconnect=not options.keep_disconnected,
        limits=ServerLimits(connections=options.max_connections),
    )
    asyncio.run(serve(request, reporter_for(as_json=options.json, plain=options.plain)))
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


def _count(text: str) -> int:
    value = _number(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _port(text: str) -> int:
    value = _number(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"must be from 0 to 65535, got {value}")
    return value


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None


def _relay(text: str) -> str:
    try:
        url = urlsplit(text)
        good = text in ("default", "none") or (url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0)
    except ValueError:  # of a port or an IPv6 address that is none
        good = False
    if not good:
        raise argparse.ArgumentTypeError(f"must be default, none or a URL such as https://relay.example/, got {text!r}")
    return text
