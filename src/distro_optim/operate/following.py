"""``distro-optim run show --follow``: a run on Solana as it goes on, until it is finished or Ctrl-C."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from ..console import Display, Forms
from ..coordinator.formats.account import read_account
from ..coordinator.solana.feed import POLL_SECONDS, AccountFeed
from ..coordinator.solana.programs import Programs
from ..coordinator.solana.rpc import RpcClient
from ..coordinator.solana.viewing import SeenRun, as_plain, in_a_line, rows_of, see_run
from ..coordinator.types import RunState

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["FORMS", "Following", "follow"]

SHOWN_EVENTS: Final = 8
"""Rows below the figures of the picture; chosen arbitrarily."""

PHASES: Final = {
    RunState.WAITING_FOR_MEMBERS: "yellow",
    RunState.WARMUP: "yellow",
    RunState.ROUND_TRAIN: "green",
    RunState.ROUND_WITNESS: "green",
    RunState.COOLDOWN: "cyan",
    RunState.PAUSED: "red",
    RunState.FINISHED: "cyan",
}
"""Colours of the phases, as in the picture of a client."""


@dataclass(frozen=True)
class Following:
    """What is shown.

    Attributes:
        run: as it is now.
        events: what has happened since we look, the oldest first.
    """

    run: SeenRun
    events: tuple[str, ...] = ()


def _picture(figures: Following) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    colour = PHASES.get(figures.run.account.state.coordinator.run_state, "white")
    for name, value in rows_of(figures.run):
        table.add_row(Text(name, style="dim"), Text(value, style=f"bold {colour}" if name == "phase" else ""))
    events = [Text(event, style="dim") for event in figures.events[-SHOWN_EVENTS:]]
    return Group(table, Text(""), *events)


def _record(figures: Following) -> dict[str, Any]:
    return as_plain(figures.run)


FORMS: Final = Forms(
    line=lambda figures: in_a_line(figures.run),
    record=_record,
    picture=_picture,
    line_seconds=0.0,
    record_seconds=0.0,
)
"""A line and a record whenever the run has changed."""


async def follow(
    rpc: RpcClient,
    websockets: Sequence[str],
    programs: Programs,
    run_id: str,
    display: Display[Following],
    *,
    poll_seconds: float = POLL_SECONDS,
) -> None:
    """Shows a run, and again whenever it changes; ends when it is finished, or nobody can see it any more.

    Args:
        rpc: the cluster.
        websockets: to hear of changes; without any, the account is read now and then.
        programs: the deployment.
        run_id: the run.
        display: where it is shown.
        poll_seconds: between two readings of the account.

    Raises:
        JoinRefusedError: there is no such run.
        CoordinatorLinkError, ProtocolError: it cannot be read, or was closed by its operator.
    """
    seen = Following(await see_run(rpc, programs, run_id))
    changed = asyncio.Event()
    ends: list[Exception] = []

    def end(error: Exception) -> None:
        ends.append(error)
        changed.set()

    feed = AccountFeed(
        rpc, websockets, seen.run.found.account, lambda data: changed.set(), end, poll_seconds=poll_seconds
    )
    async with AsyncExitStack() as stack:
        stack.push_async_callback(feed.close)
        feed.start()
        while True:
            display.update(seen)
            if seen.run.account.state.coordinator.run_state is RunState.FINISHED or not display.is_seen:
                return
            after = seen
            while _shown(after) == _shown(seen):
                await changed.wait()
                changed.clear()
                if ends:
                    raise ends[0]
                if feed.newest.data is not None:
                    after = replace(seen, run=replace(seen.run, account=read_account(feed.newest.data)))
            seen = replace(after, events=(*seen.events, in_a_line(after.run))[-SHOWN_EVENTS:])


def _shown(figures: Following) -> object:
    """What people see; the reports of a round alone change nothing in it."""
    return rows_of(figures.run), in_a_line(figures.run)
