"""``distro-optim run``: its options."""

from __future__ import annotations

import argparse
import logging
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from ..console import display_for, narrated
from ..coordinator.solana_deployments import DEFAULT_DEPLOYMENT
from ..coordinator.solana_options import DEFAULT_WALLET, SolanaOptions
from ..logs import add_log_options

__all__ = ["add_options", "run"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.description = (
        "Looks at runs on Solana, which needs no wallet, and changes those of your own. What would be done and what it "
        "costs is printed; --yes does it. With --save-dir: pauses, resumes and changes a run hosted on this machine."
    )
    actions = parser.add_subparsers(required=True, metavar="action")

    show = actions.add_parser("show", help="a run: its phase, its clients, their points")
    show.set_defaults(action="show")
    show.add_argument("run_id", metavar="RUN-ID")
    show.add_argument("--follow", action="store_true", help="go on showing it, as it changes, until Ctrl-C")
    show.add_argument(
        "--ws-rpc",
        action="extend",
        type=_several,
        default=[],
        metavar="URL[,URL]",
        help="where changes are heard of (--rpc with ws in place of http)",
    )
    _add_cluster(show)
    show.add_argument("--treasurer-program", metavar="KEY", help="id of the treasurer, in place of that among them")

    listed = actions.add_parser("list", help="all runs of a program")
    listed.set_defaults(action="list", run_id=None)
    _add_cluster(listed)

    changed = actions.add_parser("set", help="change settings of a paused run that is hosted on this machine")
    changed.set_defaults(action="set")
    changed.add_argument("run_id", metavar="RUN-ID")
    changed.add_argument(
        "settings",
        metavar="NAME=VALUE",
        nargs="+",
        type=_setting,
        help="such as total_steps=20000 or global_batch_size=64; names as in state files",
    )
    changed.add_argument("--save-dir", type=Path, required=True, metavar="DIR", help=_SAVE_DIR)

    for name, (text, arguments) in _CHANGES.items():
        action = actions.add_parser(name, help=text)
        action.set_defaults(action=name, save_dir=None)
        action.add_argument("run_id", metavar="RUN-ID")
        for names, settings in arguments.items():
            action.add_argument(names, **settings)
        if name in ("pause", "resume"):
            action.add_argument(
                "--save-dir", type=Path, metavar="DIR", help=f"for a run hosted on this machine: {_SAVE_DIR}"
            )
        _add_cluster(action, as_json=False)
        action.add_argument("--wallet", type=Path, default=Path(DEFAULT_WALLET), metavar="FILE", help="(%(default)s)")
        action.add_argument("--authorizer-program", metavar="KEY", help="id of the authorizer, likewise")
        action.add_argument("--treasurer-program", metavar="KEY", help="id of the treasurer, likewise")
        action.add_argument(
            "--account-version", type=int, metavar="N", help="of the run's account, 1 or 2 (as those programs have it)"
        )
        action.add_argument("--yes", action="store_true", help="do it")
    for each in actions.choices.values():
        add_log_options(each)


_log: Final = logging.getLogger(__name__)

_SAVE_DIR: Final = "that of the server, or of RunConfig(save_dir)"


def _say(text: str) -> None:
    print(text)
    _log.info("%s", text)


def _setting(text: str) -> tuple[str, int]:
    name, _, value = text.partition("=")
    try:
        return name.strip(), int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be NAME=NUMBER, got {text!r}") from None


def _several(text: str) -> list[str]:
    """Addresses with commas between them, as ``distro-optim join`` takes them."""
    return [part.strip() for part in text.split(",") if part.strip()]


_KEY: Final[dict[str, Any]] = {"metavar": "KEY"}
_NUMBER: Final[dict[str, Any]] = {"type": int, "metavar": "N"}
_TEXT: Final[dict[str, Any]] = {"metavar": "TEXT"}

_CHANGES: Final[dict[str, tuple[str, dict[str, dict[str, Any]]]]] = {
    "create": (
        "make a run, which has neither model nor settings yet",
        {
            "--client-version": {**_TEXT, "help": "which client it is for (distro-optim)"},
            "--join-authority": {**_KEY, "help": "lets wallets in (this wallet)"},
            "--treasurer-collateral-mint": {**_KEY, "help": "tokens that pay for points: the run has a treasury then"},
            "--treasurer-index": {**_NUMBER, "help": "number of the treasury (follows from the run's name)"},
        },
    ),
    "configure": (
        "change a halted run: its settings and its model, and what people read about it",
        {
            "file": {
                "type": Path,
                "metavar": "FILE",
                "nargs": "?",
                "help": "TOML with [config] and [model.LLM], as Psyche's",
            },
            "--client-version": {**_TEXT, "help": "which client it is for from now on"},
            "--name": {**_TEXT, "help": "what people call it"},
            "--description": {**_TEXT, "help": "what it is about"},
            "--num-parameters": {**_NUMBER, "help": "of the model, for people"},
            "--vocab-size": {**_NUMBER, "help": "likewise"},
            "--restart-from-step": {**_NUMBER, "help": "go on with this step"},
            "--switch-to-hub": {"action": "store_true", "help": "load the model from the hub, not from peers"},
        },
    ),
    "pause": ("stop a run after its epoch", {}),
    "resume": ("let a run begin, or go on", {}),
    "rates": (
        "points that the clients of an epoch share, from the next one on",
        {
            "points": {"type": int, "metavar": "POINTS"},
            "--slashing": {
                **_NUMBER,
                "help": "points noted against each client that is ejected: by Psyche's program, nobody",
            },
        },
    ),
    "tick": ("tell the chain that time has passed", {}),
    "checkpoint": (
        "say where the model was uploaded to, as a client of the epoch",
        {
            "--repo": {"metavar": "NAME", "help": "repository of the hub"},
            "--revision": {**_TEXT, "help": "of it"},
            "--bucket": {"metavar": "NAME", "help": "of Google Cloud Storage, in place of a repository"},
            "--prefix": {**_TEXT, "help": "in it"},
            "--unchecked-format": {
                "action": "store_true",
                "help": "send it although nobody knows whether the program was deployed since 2026-02-20",
            },
        },
    ),
    "authorize": (
        "let a wallet in",
        {
            "key": {"metavar": "KEY", "help": "of the wallet, or: everybody"},
            "--revoke": {"action": "store_true", "help": "no longer let it in"},
            "--close": {"action": "store_true", "help": "remove its authorization; the deposit comes back"},
        },
    ),
    "delegate": (
        "let further wallets in by the authorization of this one",
        {
            "keys": {"metavar": "KEY", "nargs": "*", "help": "of wallets"},
            "--clear": {"action": "store_true", "help": "no longer let in those that were named before"},
        },
    ),
    "claim": (
        "turn this wallet's points into tokens of the run's treasury",
        {
            "--points": {**_NUMBER, "help": "so many (all that it can pay)"},
            "--user": {**_KEY, "help": "whose points, if it has named this wallet as its claimer (this wallet's own)"},
        },
    ),
    "fund": (
        "give the run's treasury tokens of this wallet",
        {"tokens": {"type": int, "metavar": "UNITS", "help": "base units; each pays for a point"}},
    ),
    "close": ("remove a halted run for good; its deposit comes back", {}),
}

_SETTINGS: Final = ("name", "description", "num_parameters", "vocab_size", "restart_from_step", "switch_to_hub")


def _add_cluster(parser: argparse.ArgumentParser, *, as_json: bool = True) -> None:
    parser.add_argument(
        "--cluster", default="devnet", metavar="NAME", help="devnet, mainnet or localhost (%(default)s)"
    )
    parser.add_argument(
        "--rpc",
        action="extend",
        type=_several,
        default=[],
        metavar="URL[,URL]",
        help="nodes of your own in place of the cluster's public ones; may be repeated",
    )
    parser.add_argument(
        "--programs",
        default=DEFAULT_DEPLOYMENT,
        metavar="NAME|FILE",
        help="which programs: psyche, psyche-claimers, psyche-2025, or a TOML file with ids (%(default)s)",
    )
    parser.add_argument("--program", metavar="KEY", help="id of the coordinator program, in place of that among them")
    if as_json:
        parser.add_argument("--json", action="store_true", help="print one JSON object a run")


def run(options: argparse.Namespace) -> int:
    """Looks, changes or asks, and prints.

    Raises:
        ConfigurationError: an option cannot work.
        DistroError: there is no such run, or it cannot be read.
    """
    if options.action == "set" or (options.action in _CHANGES and options.save_dir is not None):
        from .asking import ask

        settings = dict(options.settings) if options.action == "set" else {}
        with narrated("waiting for the server's answer"):
            answer = ask(options.save_dir, options.run_id, options.action, settings)
        _say(answer)
        return 0
    if options.action in _CHANGES:
        return _change(options)
    import asyncio  # here, so that the other commands do without all this

    from .looking import LookOptions, look, watch

    request = LookOptions(
        run_id=options.run_id,
        options=SolanaOptions(
            cluster=options.cluster,
            rpc=tuple(options.rpc),
            websockets=tuple(getattr(options, "ws_rpc", ())),
            programs=options.programs,
            coordinator_program=options.program,
            treasurer_program=getattr(options, "treasurer_program", None),
        ),
        as_json=options.json,
    )
    if getattr(options, "follow", False):
        from .following import FORMS

        asyncio.run(watch(request, display_for("json" if options.json else "tui", FORMS)))
        return 0
    with narrated("asking the cluster"):
        texts = asyncio.run(look(request))
    for text in texts:
        _say(text)
    return 0


def _change(options: argparse.Namespace) -> int:
    import asyncio

    from ..coordinator.solana.settings import Settings
    from .changing import ChangeOptions, change

    known = {field.name for field in fields(ChangeOptions)} - {"action", "run_id"}
    given = {name: value for name, value in vars(options).items() if name in known}
    if options.action == "configure":
        given["settings"] = Settings(**{name: getattr(options, name) for name in _SETTINGS})
    request = ChangeOptions(
        action=options.action,
        run_id=options.run_id,
        options=SolanaOptions(
            wallet=options.wallet,
            cluster=options.cluster,
            rpc=tuple(options.rpc),
            programs=options.programs,
            account_version=options.account_version,
            coordinator_program=options.program,
            authorizer_program=options.authorizer_program,
            treasurer_program=options.treasurer_program,
        ),
        send=options.yes,
        **given,
    )
    with narrated(
        "sending it to the cluster, and waiting until it is confirmed" if options.yes else "asking the cluster"
    ):
        texts = asyncio.run(change(request))
    for text in texts:
        _say(text)
    return 0
