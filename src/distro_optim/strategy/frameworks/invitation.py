"""What a host tells people so that they can join, printed so that it can be copied.

A ticket has a hundred characters and more. It has to stay one line in narrow terminals and beside progress bars,
since what was cut is copied in pieces. Two libraries draw such bars: ``rich`` puts a proxy in the place of
``sys.stdout`` that wraps lines at the width of the terminal, and ``tqdm`` leaves the cursor behind its bar.
"""

from __future__ import annotations

import sys
from typing import Any

from ..monitor.shell import shell_line

__all__ = ["invitation", "print_unbroken"]


def invitation(run_id: str, ticket: str, code: str, peers_to_start: int = 1) -> str:
    """How to join, in a shell or in the script.

    Args:
        run_id: the run's name.
        ticket: the way in.
        code: the line of a script that takes it, with ``{ticket!r}`` in it.
        peers_to_start: how many the run waits for before its first step, its host among them.
    """
    if peers_to_start > 1:
        begins = f"The first step waits until {peers_to_start} peers are here."
    else:
        begins = "It begins now and takes in who comes; RunConfig(peers_to_start=2) would wait for a second peer."
    return (
        f"Hosting the run {run_id!r}. Others join with the same script:\n\n"
        f"    {shell_line(ticket)}\n\n"
        f"or with the ticket in it:\n\n    {code.format(ticket=ticket)}\n\n{begins}\n"
    )


def print_unbroken(text: str) -> None:
    """Prints ``text`` above whatever is drawn in the terminal, without any line ends but its own."""
    console = _live_console()
    if console is not None:
        # `Text`, since brackets in a string would be markup.
        console.print(sys.modules["rich.text"].Text(text), soft_wrap=True)
        return
    bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
    if bars is not None:
        bars.write(text, file=sys.stdout)
        sys.stdout.flush()
    else:
        print(text, flush=True)


def _live_console() -> Any:
    """The console of rich that has put itself in the place of ``sys.stdout``; None if there is none.

    The name is private to rich's ``FileProxy``, which keeps its console to itself; without it the text is printed as
    any other.
    """
    if "rich.text" not in sys.modules or not hasattr(sys.stdout, "rich_proxied_file"):
        return None
    return getattr(sys.stdout, "_FileProxy__console", None)
