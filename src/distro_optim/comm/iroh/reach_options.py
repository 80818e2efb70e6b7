"""How others reach an endpoint, as options of our commands. No I/O.

The names are those of Psyche's client; ``--relay`` is an older one of ours. What reads them is imported when there is
something to read, so that a command's help is there at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, Final

from ...errors import ConfigurationError

__all__ = ["add_reach_options", "reach_from"]


def add_reach_options(
    add: Callable[..., Any], *, checked: bool = True, default_relay: str = "default", external: bool = True
) -> None:
    """Adds ``--iroh-relay`` (``--relay``), ``--iroh-discovery`` and ``--external-addr`` to a command.

    Args:
        add: ``add_argument`` of its parser, or what stands for it.
        checked: whether the parser refuses values that make no sense; else :func:`reach_from` alone does, which can
            name a variable of the environment as well.
        default_relay: what the help says of the first one's default.
        external: whether the last makes sense.
    """

    def kind(option: str) -> dict[str, Any]:
        return {"type": lambda text: _checked(option, text)} if checked else {}

    add(
        "--relay",
        "--iroh-relay",
        dest="iroh_relay",
        **kind("iroh_relay"),
        metavar="default|psyche|none|URL",
        help=f"relay servers for peers behind firewalls: iroh's, Psyche's, none, or URLs with commas ({default_relay})",
    )
    add(
        "--iroh-discovery",
        **kind("iroh_discovery"),
        metavar="n0|local|none",
        help="find peers by their keys through the internet, or through files on this machine "
        "(n0 with public relay servers, else none)",
    )
    if external:
        add(
            "--external-addr",
            **kind("external_addr"),
            metavar="IP:PORT",
            help="where others reach us: a forwarded port, or a cloud's public address; several with commas",
        )


def reach_from(found: Callable[[str], tuple[str, str | None]]) -> dict[str, Any]:
    """The ``relay``, ``discovery`` and ``external_addr`` that were asked for; what was not is left out.

    Args:
        found: by the name of an option, as an attribute, what it is called in messages, and its value or None.

    Raises:
        ConfigurationError: a value makes no sense; names the option.
    """
    asked: dict[str, Any] = {}
    for option, argument in _ARGUMENTS.items():
        name, text = found(option)
        if text is not None:
            asked[argument] = _read(option, text, name)
    return asked


_ARGUMENTS: Final = {"iroh_relay": "relay", "iroh_discovery": "discovery", "external_addr": "external_addr"}
"""Options, and the arguments for which they stand."""


def _read(option: str, text: str, name: str) -> str:
    """What stands for the option elsewhere: what was written, if it makes sense."""
    from .reach import parse_discovery, parse_external_addrs, parse_relays

    match option:
        case "iroh_relay":
            parse_relays(text, name=name)
        case "iroh_discovery":
            return parse_discovery(text, "none", name=name)
        case _:
            parse_external_addrs(text, name=name)
    return text


def _checked(option: str, text: str) -> str:
    try:
        return _read(option, text, "")
    except ConfigurationError as error:  # argparse puts the name in front
        raise argparse.ArgumentTypeError(str(error).strip()) from None
