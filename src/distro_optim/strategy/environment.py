"""What the environment says about a run where the script does not.

A script that says ``PsycheStrategy()`` hosts a run. A program that starts it, such as ``distro-optim testnet``, can
make it join one instead, have it report how it is doing, and shorten the run, without a change to the script. An
argument in the script wins.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ..comm.addresses import SocketAddr
from ..comm.iroh.reach import parse_discovery, parse_external_addrs, parse_relays
from ..errors import ConfigurationError
from ..logs import LOG, LOG_FORMAT, LOG_LEVEL, LOG_ROTATE, LogOptions

__all__ = [
    "BIND_ADDR",
    "CONFIG",
    "DISCOVERY",
    "EXTERNAL_ADDR",
    "PEER_NAME",
    "RELAY",
    "REPORT",
    "RUN",
    "TICKET_FILE",
    "TICKET_NAME",
    "WATCH",
    "WEB",
    "RunEnvironment",
    "read_ticket",
    "write_ticket",
]

RUN: Final = "DISTRO_OPTIM_RUN"
"""A ticket or ``host:port/run-id``: the run to join."""

TICKET_FILE: Final = "DISTRO_OPTIM_TICKET_FILE"
"""A path. The host of a run writes its ticket there."""

TICKET_NAME: Final = "run.ticket"
"""Of the file in a peer's checkpoint folder with the latest ticket of its run."""

RELAY: Final = "DISTRO_OPTIM_RELAY"
"""``default``, ``psyche``, ``none`` or URLs of relay servers, in place of the default."""

DISCOVERY: Final = "DISTRO_OPTIM_DISCOVERY"
"""``n0``, ``local`` or ``none``, in place of the default."""

EXTERNAL_ADDR: Final = "DISTRO_OPTIM_EXTERNAL_ADDR"
"""Addresses at which others reach our endpoint though it does not know it."""

BIND_ADDR: Final = "DISTRO_OPTIM_BIND_ADDR"
"""Where our endpoint listens, in place of the default."""

REPORT: Final = "DISTRO_OPTIM_REPORT"
"""A path. One JSON line for every round and event is added there, see :mod:`.run_report`."""

PEER_NAME: Final = "DISTRO_OPTIM_PEER_NAME"
"""What this peer is called in its report."""

WEB: Final = "DISTRO_OPTIM_WEB"
"""A port, or ``host:port``: where the run is shown on a page, as the option ``web`` says."""

WATCH: Final = "DISTRO_OPTIM_WATCH"
"""``1``: look at the run to join without being in it, if its host permits our key, and audit all results."""

CONFIG: Final = "DISTRO_OPTIM_CONFIG"
"""A JSON object with settings of the run; they take the place of a hosting script's defaults."""

MAX_TICKET_BYTES: Final = 4096
"""No ticket is longer (``coordinator/ticket.py``)."""


@dataclass(frozen=True, kw_only=True)
class RunEnvironment:
    """The variables of this module, read; None where one is not set or empty.

    Attributes:
        config: settings of a hosted run by name; their values are not checked here.
        log: where this process logs to, by the variables of :mod:`~distro_optim.logs`.
    """

    run: str | None = None
    ticket_file: Path | None = None
    relay: str | None = None
    discovery: str | None = None
    external_addr: str | None = None
    bind_addr: str | None = None
    report: Path | None = None
    peer_name: str | None = None
    web: str | None = None
    watch: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    log: LogOptions | None = None

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None) -> RunEnvironment:
        """Reads ``environ``, by default that of the process.

        Raises:
            ConfigurationError: a variable has a value of the wrong form; the message names it.
        """
        source = os.environ if environ is None else environ

        def text(name: str) -> str | None:
            return source.get(name, "").strip() or None

        def path(name: str) -> Path | None:
            value = text(name)
            return Path(value) if value is not None else None

        relay, discovery, external, bind = text(RELAY), text(DISCOVERY), text(EXTERNAL_ADDR), text(BIND_ADDR)
        relays = parse_relays(relay or "default", name=RELAY)
        parse_discovery(discovery, relays, name=DISCOVERY)
        parse_external_addrs(external, name=EXTERNAL_ADDR)
        return cls(
            run=text(RUN),
            ticket_file=path(TICKET_FILE),
            relay=relay,
            discovery=discovery,
            external_addr=external,
            bind_addr=None if bind is None else _bind_address(bind),
            report=path(REPORT),
            peer_name=text(PEER_NAME),
            web=text(WEB),
            watch=_flag(WATCH, text(WATCH)),
            config=_settings(text(CONFIG)),
            log=LogOptions.from_environment(source),
        )

    def variables(self) -> dict[str, str]:
        """The environment variables that :meth:`read` reads this from; unset ones are empty, so that none of the
        parent process shine through."""
        return {
            RUN: self.run or "",
            TICKET_FILE: str(self.ticket_file or ""),
            RELAY: self.relay or "",
            DISCOVERY: self.discovery or "",
            EXTERNAL_ADDR: self.external_addr or "",
            BIND_ADDR: self.bind_addr or "",
            REPORT: str(self.report or ""),
            PEER_NAME: self.peer_name or "",
            WEB: self.web or "",
            WATCH: "1" if self.watch else "",
            CONFIG: json.dumps(dict(self.config)) if self.config else "",
            **dict.fromkeys((LOG, LOG_LEVEL, LOG_ROTATE, LOG_FORMAT), ""),
            **(self.log.variables() if self.log is not None else {}),
        }

    @property
    def connection(self) -> dict[str, str]:
        """What is said about the connection, by the names of :class:`~.options.ConnectionOptions`."""
        said = {
            "relay": self.relay,
            "discovery": self.discovery,
            "external_addr": self.external_addr,
            "bind_addr": self.bind_addr,
        }
        return {name: value for name, value in said.items() if value is not None}


def _flag(name: str, text: str | None) -> bool:
    if text not in (None, "0", "1"):
        raise ConfigurationError(f"{name} is 1 or 0, got {text!r}", name=name, value=text)
    return text == "1"


def _bind_address(text: str) -> str:
    try:
        address = SocketAddr.parse(text)
    except ConfigurationError:
        address = None
    if address is None or address.ip.version != 4:
        raise ConfigurationError(
            f"{BIND_ADDR} must be an IPv4 address and a port such as 0.0.0.0:4433, got {text!r}",
            name=BIND_ADDR,
            value=text,
        )
    return text


def _settings(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(
            f'{CONFIG} is not JSON ({error}); write it like {{"total_steps": 100}}', name=CONFIG, value=text
        ) from None
    if not isinstance(settings, dict):
        raise ConfigurationError(
            f'{CONFIG} must be a JSON object such as {{"total_steps": 100}}, got {text!r}', name=CONFIG, value=text
        )
    return settings


def write_ticket(path: Path, ticket: str) -> None:
    """Writes a ticket so that a reader finds all of it or nothing.

    Raises:
        ConfigurationError: it cannot be written there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(f"{ticket}\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigurationError(
            f"cannot write the ticket to {path}: {error.strerror or error}; set {TICKET_FILE} to a path in a folder "
            "that can be written",
            name=TICKET_FILE,
            value=path,
        ) from None


def read_ticket(path: Path) -> str | None:
    """The ticket in a file; None as long as there is no file.

    Raises:
        ConfigurationError: there is something else.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_TICKET_BYTES + 1)
        ticket = data.decode("utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read a ticket from {path}: {error}", name=TICKET_FILE, value=path) from None
    if not ticket or len(data) > MAX_TICKET_BYTES:
        raise ConfigurationError(
            f"{path} does not hold a ticket; name the file that the host of the run wrote", name=TICKET_FILE, value=path
        )
    return ticket
