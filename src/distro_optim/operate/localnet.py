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

    from ..coordinator.types import Coordinator
    from ..testing.solana.validator import Validator

__all__ = ["LocalnetOptions", "MadeCluster", "add_options", "lines_to_type", "make_cluster", "run", "serve_localnet"]

SOL_EACH: Final = 10
"""What each wallet gets; enough for a million transactions."""

TOKENS: Final = 1_000_000
"""Base units in the run's treasury, each for a point, and as many for the operator; chosen arbitrarily."""

OPERATOR_FILE: Final = "operator.json"


@dataclass(frozen=True, kw_only=True)
class LocalnetOptions:
    """What to make.

    Attributes:
        folder: where wallets are written.
        run_id: name of the run.
        wallets: how many clients there may be; None for as many as the run waits for.
        port: of the cluster on loopback; 0 takes any that is free.
        state: describes the run; None for one without tensors.
        model, data: what the clients are told to train; they go into the lines to type as they are.
        account_version: of the accounts of runs.
    """

    folder: Path
    run_id: str | None = None
    wallets: int | None = None
    port: int = 0
    state: Path | None = None
    model: Path | None = None
    data: Path | None = None
    account_version: int = 1


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.description = (
        "Simulates a cluster of Solana on this machine, with Psyche's programs, a run whose points a treasury pays, "
        "and wallets that have money. Prints what to type in other terminals, and goes on until Ctrl-C; then all of it "
        "is gone."
    )
    parser.add_argument("--solana", action="store_true", required=True, help="which kind of cluster; there is no other")
    parser.add_argument("--state", type=Path, metavar="FILE", help="state.toml of the run (one without tensors)")
    parser.add_argument("--model", type=Path, metavar="DIR", help="folder with its model, for the lines to type")
    parser.add_argument("--data", type=Path, metavar="PATH", help="its training data, likewise")
    parser.add_argument("--run-id", metavar="NAME", help="of the run (that of the state, or: local)")
    parser.add_argument("--wallets", type=int, metavar="N", help="for so many clients (as the run waits for, or 2)")
    parser.add_argument("--port", type=int, default=0, metavar="N", help="of the cluster (any that is free)")
    parser.add_argument("--account-version", type=int, default=1, metavar="N", help="of runs' accounts, 1 or 2 (1)")
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
        given = LocalnetOptions(
            folder=folder,
            run_id=options.run_id,
            wallets=options.wallets,
            port=options.port,
            state=options.state,
            model=options.model,
            data=options.data,
            account_version=options.account_version,
        )
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
        made = make_cluster(options)
    async with contextlib.AsyncExitStack() as stack:
        try:
            server = await stack.enter_async_context(ValidatorServer(made.validator, options.port, real_time=True))
        except OSError as error:
            raise ConfigurationError(
                f"the port {options.port} cannot be used ({error.strerror or error}): choose another, or leave it out",
                name="port",
                value=options.port,
            ) from None
        for text in lines_to_type(options, server.url, made):
            tell(text)
        await (until or asyncio.Event()).wait()


@dataclass(frozen=True)
class MadeCluster:
    """What was made.

    Attributes:
        validator: the cluster.
        run_id: the run on it.
        files: the wallets of its clients.
        mint: the tokens of its treasury, in base58.
        has_tensors: whether there is a model.
    """

    validator: Validator
    run_id: str
    files: list[Path]
    mint: str
    has_tensors: bool


def make_cluster(options: LocalnetOptions) -> MadeCluster:
    """Makes the cluster, and writes the wallets.

    Raises:
        ConfigurationError: an option cannot work.
        MissingDependencyError: solders is not installed.
    """
    from ..coordinator.formats.account import account_size
    from ..coordinator.model import DummyCheckpoint
    from ..coordinator.solana.programs import Programs
    from ..coordinator.solana.wallet import new_wallet
    from ..coordinator.solana_options import LAMPORTS_PER_SOL
    from ..testing.solana.validator import Validator

    run = _run(options)
    count = options.wallets if options.wallets is not None else max(2, run.config.init_min_clients)
    most = run.config.global_batch_size_end
    if not 1 <= count <= most:
        raise ConfigurationError(
            f"--wallets takes 1 to {most}, as many as the run's batch has sequences", name="wallets", value=count
        )
    if options.state is None and count < run.config.init_min_clients:
        run = replace(run, config=replace(run.config, init_min_clients=count, min_clients=count))
    account_size(options.account_version)  # says which there are
    validator = Validator(Programs(account_version=options.account_version), unix_timestamp=int(time.time()))
    validator.programs.instance(run.run_id)  # says if no run can have this name
    files = [options.folder / f"wallet-{number}.json" for number in range(1, count + 1)]
    operator, mint = new_wallet(), new_wallet().pubkey()
    keys = [operator, *(new_wallet() for _ in files)]
    for key, file in zip(keys, [options.folder / OPERATOR_FILE, *files], strict=True):
        validator.fund(key.pubkey(), SOL_EACH * LAMPORTS_PER_SOL)
        _write_wallet(file, bytes(key))
    owner = operator.pubkey()
    validator.host(run, new_wallet().pubkey(), main_authority=owner, join_authority=owner, mint=mint)
    for holder in (owner, validator.programs.treasury_of(run.run_id)):
        validator.give_tokens(mint, holder, TOKENS)
    has_tensors = not isinstance(run.model.checkpoint, DummyCheckpoint)
    return MadeCluster(validator, run.run_id, files, str(mint), has_tensors)


def _run(options: LocalnetOptions) -> Coordinator:
    """The run, which waits for members."""
    from ..coordinator.rules.validation import check_run
    from ..coordinator.server.store import read_state_file
    from ..coordinator.types import RunState
    from ..testing.coordinator import DUMMY_CONFIG, dummy_run

    if options.state is None:
        run = dummy_run(options.run_id or "local", replace(DUMMY_CONFIG, init_min_clients=2, min_clients=2))
    else:
        described = read_state_file(options.state)
        run = replace(described, run_id=options.run_id or described.run_id)
        check_run(run)
    return replace(run, run_state=RunState.WAITING_FOR_MEMBERS, run_state_start_unix_timestamp=int(time.time()))


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


def lines_to_type(options: LocalnetOptions, url: str, made: MadeCluster) -> list[str]:
    """What to tell the user, with each command on a line of its own."""
    name, where = shlex.quote(made.run_id), f"--rpc {url}"
    # Looking takes any version; what makes, joins or is paid must know it.
    version = "" if options.account_version == 1 else f" --account-version {options.account_version}"
    here = "--iroh-relay none --iroh-discovery local"
    given = {"--model": options.model, "--data": options.data}
    trains = "".join(f" {word} {shlex.quote(str(path))}" for word, path in given.items() if path is not None)
    run_name = shlex.quote(f"solana:{made.run_id}")
    operator = f"--wallet {shlex.quote(str(options.folder / OPERATOR_FILE))}"
    wallets = [f"--wallet {shlex.quote(str(file))}" for file in made.files]
    again = f"  distro-optim run resume {name} {where} {operator} --yes"
    return [
        f"A simulated cluster runs at {url}, with the run {made.run_id!r}. Ctrl-C ends it.",
        "",
        "Take part, each in a terminal of its own:",
        *(f"  distro-optim join {run_name} {where} {wallet}{version} {here}{trains}" for wallet in wallets),
        "",
        "Look at the run, once or for as long as it goes on:",
        f"  distro-optim run show {name} {where}",
        f"  distro-optim run show {name} {where} --follow",
        "",
        "Give points to those who take part in the epochs to come, and turn them into tokens:",
        f"  distro-optim run rates {name} 1000 {where} {operator} --yes",
        f"  distro-optim run claim {name} {where} {wallets[0]}{version} --yes",
        "",
        "Stop it after its epoch" + (", and go on:" if made.has_tensors else " (for good, as it has no tensors):"),
        f"  distro-optim run pause {name} {where} {operator} --yes",
        *([again] if made.has_tensors else []),
        "",
        "Make a run of your own, whose points are paid in tokens of which the operator has some:",
        f"  distro-optim run create mine --treasurer-collateral-mint {made.mint} {where} {operator}{version} --yes",
        f"  distro-optim run fund mine 1000 {where} {operator} --yes",
    ]
