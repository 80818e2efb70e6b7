"""``distro-optim localnet --solana``: a cluster on this machine with a run on it, to try everything without money."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..console import narrated
from ..errors import ConfigurationError

if TYPE_CHECKING:
    import asyncio

    from ..testing.solana.validator import Validator

__all__ = ["LocalnetOptions", "add_options", "lines_to_type", "make_cluster", "run", "serve_localnet"]

SOL_EACH: Final = 10
"""What each wallet gets; enough for a million transactions."""

MAX_WALLETS: Final = 8
"""As many as the run's batch has sequences, and more could not join."""

OPERATOR_FILE: Final = "operator.json"


@dataclass(frozen=True, kw_only=True)
class LocalnetOptions:
    """What to make.

    Attributes:
        folder: where wallets are written.
        run_id: name of the run.
        wallets: how many clients there may be.
        port: of the cluster on loopback; 0 takes any that is free.
    """

    folder: Path
    run_id: str = "local"
    wallets: int = 2
    port: int = 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.description = (
        "Simulates a cluster of Solana on this machine, with Psyche's programs, a run without tensors, and wallets "
        "that have money. Prints what to type in other terminals, and goes on until Ctrl-C; then all of it is gone."
    )
    parser.add_argument("--solana", action="store_true", required=True, help="which kind of cluster; there is no other")
    parser.add_argument("--run-id", default="local", metavar="NAME", help="of the run (%(default)s)")
    parser.add_argument("--wallets", type=int, default=2, metavar="N", help="for so many clients (%(default)s)")
    parser.add_argument("--port", type=int, default=0, metavar="N", help="of the cluster (any that is free)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="for the wallets (one that is removed at the end)")


def run(options: argparse.Namespace) -> int:
    """Serves until Ctrl-C.

    Raises:
        ConfigurationError: an option cannot work.
        MissingDependencyError: solders is not installed.
    """
    import asyncio  # here, so that the other commands do without

    with contextlib.ExitStack() as stack:
        folder = options.folder
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="distro-optim-localnet-")))
        given = LocalnetOptions(folder=folder, run_id=options.run_id, wallets=options.wallets, port=options.port)
        asyncio.run(serve_localnet(given, lambda text: print(text, flush=True)))
    return 0


async def serve_localnet(
    options: LocalnetOptions, tell: Callable[[str], None], *, until: asyncio.Event | None = None
) -> None:
    """A cluster with a run, until ``until`` is set, or until it is cancelled.

    Args:
        options: what to make.
        tell: takes what is to be printed.
        until: None goes on without an end.

    Raises:
        ConfigurationError: an option cannot work.
        MissingDependencyError: solders is not installed.
    """
    import asyncio

    from ..testing.solana.server import ValidatorServer

    with narrated("making the cluster"):
        validator, files = make_cluster(options)
    async with contextlib.AsyncExitStack() as stack:
        try:
            server = await stack.enter_async_context(ValidatorServer(validator, options.port, real_time=True))
        except OSError as error:
            raise ConfigurationError(
                f"the port {options.port} cannot be used ({error.strerror or error}): choose another, or leave it out",
                name="port",
                value=options.port,
            ) from None
        for text in lines_to_type(options, server.url, files):
            tell(text)
        await (until or asyncio.Event()).wait()


def make_cluster(options: LocalnetOptions) -> tuple[Validator, list[Path]]:
    """The cluster, and the files of its clients' wallets, which are written.

    Raises:
        ConfigurationError: an option cannot work.
        MissingDependencyError: solders is not installed.
    """
    if not 1 <= options.wallets <= MAX_WALLETS:
        raise ConfigurationError(
            f"--wallets takes 1 to {MAX_WALLETS}, as many as the run's batch has sequences",
            name="wallets",
            value=options.wallets,
        )
    from ..coordinator.solana.wallet import new_wallet
    from ..coordinator.solana_options import LAMPORTS_PER_SOL
    from ..testing.coordinator import DUMMY_CONFIG, dummy_run
    from ..testing.solana.validator import Validator

    validator = Validator(unix_timestamp=int(time.time()))
    files = [options.folder / f"wallet-{number}.json" for number in range(1, options.wallets + 1)]
    operator = new_wallet()
    keys = [operator, *(new_wallet() for _ in files)]
    for key, file in zip(keys, [options.folder / OPERATOR_FILE, *files], strict=True):
        validator.fund(key.pubkey(), SOL_EACH * LAMPORTS_PER_SOL)
        _write_wallet(file, bytes(key))
    least = min(2, options.wallets)
    config = replace(DUMMY_CONFIG, init_min_clients=least, min_clients=least)
    validator.host(
        dummy_run(options.run_id, config),
        new_wallet().pubkey(),
        main_authority=operator.pubkey(),
        join_authority=operator.pubkey(),
    )
    return validator, files


def _write_wallet(file: Path, key: bytes) -> None:
    """Writes a new file that nobody else can read."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as handle:
            json.dump(list(key), handle)
    except FileExistsError:
        raise ConfigurationError(
            f"there is {file} already, and a wallet is never overwritten: choose another folder", name="folder"
        ) from None
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be written: {error.strerror or error}", name="folder") from None


def lines_to_type(options: LocalnetOptions, url: str, files: list[Path]) -> list[str]:
    """What to tell the user, with each command on a line of its own."""
    name, where = shlex.quote(options.run_id), f"--rpc {url}"
    here = "--iroh-relay none --iroh-discovery local"
    run_name = shlex.quote(f"solana:{options.run_id}")
    operator = shlex.quote(str(options.folder / OPERATOR_FILE))
    return [
        f"A simulated cluster runs at {url}, with the run {options.run_id!r}. Ctrl-C ends it.",
        "",
        "Take part, each in a terminal of its own:",
        *(f"  distro-optim join {run_name} {where} --wallet {shlex.quote(str(file))} {here}" for file in files),
        "",
        "Look at the run:",
        f"  distro-optim run show {name} {where}",
        "",
        "Give points to those who take part, and stop it after its epoch (for good, as it has no tensors):",
        f"  distro-optim run rates {name} 1000 {where} --wallet {operator} --yes",
        f"  distro-optim run pause {name} {where} --wallet {operator} --yes",
    ]
