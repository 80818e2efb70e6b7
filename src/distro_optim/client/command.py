"""``distro-optim join``: its options."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from ..comm.iroh.reach_options import add_reach_options, reach_from
from ..console import narrated
from ..coordinator.solana_options import SolanaOptions, lamports
from ..coordinator.ticket_text import SOLANA, WHAT_TO_COPY, check_text, run_on_solana
from ..errors import ConfigurationError, ProtocolError
from ..logs import add_log_options

__all__ = ["add_options", "options_from", "run"]

DESCRIPTION: Final = (
    "Joins a run of Psyche's, or one that distro-optim serves, and trains the run's own model on the run's own data, "
    "with its settings. Options have the names that they have in Psyche's client; each but --peer and --json can be "
    "given in the environment as well, in upper case with underscores. Evaluation tasks are not supported."
)

_DEFAULT: Final = object()
"""An option that was not given, so that the environment is asked."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser, without defaults: the environment may say what is not given."""
    parser.description = DESCRIPTION
    parser.add_argument("run", nargs="?", metavar="RUN", help="a ticket, host:port/run-id, host:port, or solana:run-id")
    parser.add_argument("run_name", nargs="?", metavar="RUN-ID", help="the run's name, after host:port")

    def add(*names: str, **settings: Any) -> None:
        parser.add_argument(*names, **{"default": _DEFAULT, **settings})

    add("--server-addr", metavar="HOST:PORT", help="of the coordinator, in place of RUN")
    add("--run-id", metavar="NAME", help="of the run there")
    add("--wallet", metavar="FILE", help="pays and signs in a run on Solana (~/.config/solana/id.json)")
    add("--cluster", metavar="NAME", help="of a run on Solana: devnet, mainnet or localhost (devnet)")
    add("--rpc", metavar="URL[,URL]", help="nodes of your own in place of the cluster's public ones")
    add("--ws-rpc", metavar="URL[,URL]", help="their websockets (the same with ws in place of http)")
    add("--authorizer", metavar="KEY", help="that was authorized, and has the wallet among its delegates")
    add("--join-authority", metavar="KEY", help="that must let wallets in, to be sure whose run it is")
    add("--main-authority", metavar="KEY", help="that must operate the run, or its treasury, likewise")
    add("--client-version", metavar="TEXT", help="which client the run on Solana must be for (any)")
    add("--max-fees", metavar="SOL", help="what the wallet may spend in all, such as 0.05 (no limit)")
    add("--compute-unit-price", metavar="N", help="offered to a busy cluster, in millionths of a lamport a unit (0)")
    add("--programs", metavar="NAME|FILE", help="psyche, psyche-claimers, or a TOML file with ids (psyche)")
    add("--program", metavar="KEY", help="id of the coordinator program, in place of that among them")
    add("--authorizer-program", metavar="KEY", help="likewise of the authorizer")
    add("--account-version", metavar="N", help="of the run's account, 1 or 2 (as those programs have it)")
    add("--claimer", metavar="KEY", help="paid for the points, in accounts of version 2 (the wallet)")
    add(
        "-i",
        "--identity-secret-key-path",
        metavar="FILE",
        help="our secret key; made if missing (a new one each time)",
    )
    add("--bind-p2p-port", metavar="N", help="UDP port (any free one)")
    add("--bind-p2p-interface", metavar="ADDRESS", help="IPv4 address to listen on (all)")
    add_reach_options(add, checked=False)
    add("--peer", action="append", default=[], metavar="TICKET", help="endpoint ticket of a peer; may be repeated")
    add("--device", metavar="DEVICE", help="auto, cpu, mps, cuda, cuda:N or cuda:X,Y,Z (auto)")
    add("--data-parallelism", metavar="N", help="devices that share our batch (1)")
    add("--tensor-parallelism", metavar="N", help="devices that compute each sequence together (1)")
    add("--shard", action="store_const", const="true", help="they hold the model together, for none has room for it")
    add("--micro-batch-size", metavar="N", help="sequences in a forward pass (1)")
    add("--grad-accum-in-fp32", action="store_const", const="true", help="always so; accepted for Psyche's sake")
    add("--model", metavar="DIR", help="folder with the run's model, if it was not downloaded from the hub")
    add("--data", metavar="PATH", help="training data (folder, file, data.toml) of a run that wants them on your disk")
    add(
        "--data-mirror",
        action="append",
        default=[],
        metavar="URL|HOST:PORT|PATH",
        help="where else the run's data are, if its own place fails or lies; may be repeated",
    )
    add("--checkpoint-dir", metavar="DIR", help="save the model here at the end of each epoch (out/join/RUN-ID)")
    add("--no-checkpoints", action="store_const", const="true", help="save it nowhere: it is lost when this ends")
    add("--keep-steps", metavar="N", help="how many checkpoints stay (3)")
    add("--keep-every", metavar="STEPS", help="of each so many steps the first checkpoint stays for good (no)")
    add("--upload", metavar="COMMAND|URL", help='copy each elsewhere: "rclone copy {path} remote:x/{name}", s3://x/y')
    add("--upload-timeout", metavar="S", help="for one attempt (3600)")
    add("--upload-wait", metavar="S", help="how long the end waits for what has not arrived (600)")
    add("--write-gradients-dir", metavar="DIR", help="write every result here, for distro-optim replay")
    add("--gradients", metavar="N", help="so many of the latest steps stay there (all)")
    add("--logs", choices=("tui", "console", "json", "none"), help="live picture, lines, JSON, nothing (tui)")
    parser.add_argument("--json", action="store_true", help="the same as --logs json")
    add("--write-log", metavar="FILE", help="the same as --log-file, at level info")
    add_log_options(parser)
    add("--metrics-local-port", metavar="N", help="serve Prometheus metrics on this port of 127.0.0.1")
    add("--web", metavar="[HOST:]PORT", help="show the run on a page, on this machine unless told")
    add("--audit", nargs="?", const="0.02", metavar="SHARE", help="check whether others train what they are given (no)")
    add("--give-up-seconds", metavar="S", help="how long to wait for a coordinator that is gone (900)")
    add("--dummy-training-delay-secs", metavar="S", help="duration of a batch in runs without a model (0)")


def options_from(options: argparse.Namespace, environment: Mapping[str, str]) -> Any:
    """What was asked for, by options and, where those are silent, by the environment.

    Args:
        options: as :func:`add_options` has them parsed.
        environment: variables by name.

    Returns:
        the :class:`~.options.JoinOptions`.

    Raises:
        ConfigurationError: an option is missing or makes no sense; says which.
    """
    from .options import JoinOptions

    def found(name: str) -> tuple[str, Any]:
        value = getattr(options, name)
        if value is _DEFAULT:
            return name.upper(), environment.get(name.upper()) or None
        return "--" + name.replace("_", "-"), value or None

    def given(name: str, read: Callable[[str], Any] = str) -> Any:
        where, value = found(name)
        if value is None:
            return None
        try:
            return read(value)
        except ValueError:
            raise ConfigurationError(f"{where} {value!r}: {_EXPECTED[read]}", name=name, value=value) from None

    settings: dict[str, Any] = {
        **reach_from(found),
        "identity_secret_key_path": given("identity_secret_key_path", Path),
        "bind_addr": f"{given('bind_p2p_interface') or '0.0.0.0'}:{given('bind_p2p_port', _port) or 0}",
        "peers": tuple(options.peer),
        "device": given("device"),
        "data_parallelism": given("data_parallelism", int),
        "tensor_parallelism": given("tensor_parallelism", int),
        "shard": given("shard", _boolean),
        "micro_batch_size": given("micro_batch_size", int),
        "grad_accum_in_fp32": given("grad_accum_in_fp32", _boolean),
        "model": given("model", Path),
        "data": given("data", Path),
        "data_mirrors": tuple(options.data_mirror),
        "checkpoint_dir": given("checkpoint_dir", Path),
        "no_checkpoints": given("no_checkpoints", _boolean),
        "keep_steps": given("keep_steps", int),
        "keep_every": given("keep_every", int),
        "upload": given("upload"),
        "upload_timeout": given("upload_timeout", float),
        "upload_wait": given("upload_wait", float),
        "write_gradients_dir": given("write_gradients_dir", Path),
        "gradients": given("gradients", int),
        "logs": "json" if options.json else given("logs"),
        "write_log": given("write_log", Path),
        "metrics_port": given("metrics_local_port", _port),
        "web": given("web"),
        "audit": given("audit", float),
        "give_up_seconds": given("give_up_seconds", float),
        "dummy_training_delay_secs": given("dummy_training_delay_secs", float),
    }
    run = _run(options, given)
    return JoinOptions(
        run=run, solana=_solana(run, given), **{name: value for name, value in settings.items() if value is not None}
    )


def _solana(run: str, given: Callable[..., Any]) -> SolanaOptions | None:
    """What is said about a run on Solana; None for any other, whose environment may be full of it."""
    try:
        if run_on_solana(run) is None:
            return None
    except ProtocolError as error:
        raise ConfigurationError(str(error), name="run", value=run) from None
    settings = {
        "wallet": given("wallet", Path),
        "cluster": given("cluster"),
        "rpc": given("rpc", _several),
        "websockets": given("ws_rpc", _several),
        "authorizer": given("authorizer"),
        "join_authority": given("join_authority"),
        "main_authority": given("main_authority"),
        "client_version": given("client_version"),
        "max_fees": given("max_fees", lamports),
        "compute_unit_price": given("compute_unit_price", int),
        "programs": given("programs"),
        "account_version": given("account_version", int),
        "claimer": given("claimer"),
        "coordinator_program": given("program"),
        "authorizer_program": given("authorizer_program"),
    }
    return SolanaOptions(**{name: value for name, value in settings.items() if value is not None})


def _run(options: argparse.Namespace, given: Callable[[str], Any]) -> str:
    run = options.run or given("server_addr")
    name = options.run_name or given("run_id")
    if run is None:
        raise ConfigurationError(
            "which run? Write distro-optim join TICKET, or distro-optim join HOST:PORT RUN-ID", name="run"
        )
    run = str(run).strip()
    if run.lower() == SOLANA and name is not None:
        return f"{SOLANA}{str(name).strip().strip(chr(34) + chr(39))}"
    if run.lower().startswith(SOLANA) and options.run_name is None:
        return run
    if name is None:
        if "/" not in run and ":" in run:
            raise ConfigurationError(f"which run at {run}? Write distro-optim join {run} RUN-ID", name="run_id")
        return run
    if "/" in run or ":" not in run:
        raise ConfigurationError(
            f"{run[:40]!r} names a run already: leave out {name!r}, or write HOST:PORT RUN-ID", name="run", value=run
        )
    return f"{run}/{str(name).strip().strip(chr(34) + chr(39))}"


def run(options: argparse.Namespace) -> int:
    """Joins; 0 when the run is finished. Raises what :func:`~.joining.join` does."""
    request = options_from(options, os.environ)
    try:
        check_text(request.run)  # now, not after seconds of imports
    except ProtocolError as error:
        raise ConfigurationError(f"{error}. {WHAT_TO_COPY}", name="run", value=request.run) from None
    with narrated("loading PyTorch"):
        from .joining import join

    with _sigterm_as_ctrl_c():
        join(request)
    return 0


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65535:
        raise ValueError(text)
    return value


def _boolean(text: str) -> bool:
    value = text.strip().lower()
    if value not in ("1", "true", "yes", "0", "false", "no"):
        raise ValueError(text)
    return value in ("1", "true", "yes")


def _several(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


_EXPECTED: Final[Mapping[Callable[[str], Any], str]] = {
    str: "give text",
    Path: "give a path",
    int: "give a whole number",
    float: "give a number",
    _port: "give a port, 0 to 65535",
    _boolean: "give true or false",
    _several: "give an address, or several with commas between them",
    lamports: "give an amount in SOL, such as 0.05",
}


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does: the run is left cleanly."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
