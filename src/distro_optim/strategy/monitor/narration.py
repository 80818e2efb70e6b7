"""What a peer says of a run while it goes: how it gets in, and who comes and leaves. One sentence each."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Final

from ..port import RunView

__all__ = ["Narration", "peers"]

STILL_SECONDS: Final = 15.0
"""Between two sentences about the same wait. Chosen arbitrarily."""

UNREACHED_SECONDS: Final = 8.0
"""In an epoch with others, without any of them, before that is said. A dial that nobody answers takes five seconds."""

DOWNLOAD_SECONDS: Final = 2.0
"""Between two sentences about a download: what takes longer should be seen to go on."""

NAMED: Final = 3
"""Peers that a sentence names; of more the rest is counted."""

_KEY_DIGITS: Final = 8
"""Of a public key, in a sentence."""

_WITH_PEERS: Final = frozenset({"WARMUP", "ROUND_TRAIN", "ROUND_WITNESS", "COOLDOWN"})
"""Phases in which the list of clients is that of an epoch."""

_IN_A_ROUND: Final = frozenset({"ROUND_TRAIN", "ROUND_WITNESS"})


def peers(count: int) -> str:
    """``count`` peers, in words."""
    return f"{count} peer{'s' if count != 1 else ''}"


class Narration:
    """Looks at a run now and then, and says what has changed. Belongs to the training thread.

    Args:
        tell: told the sentences.
        clock: monotonic seconds.

    Attributes:
        clock: as above.
    """

    def __init__(self, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._tell = tell
        self._clock = self.clock = clock
        self._others: frozenset[bytes] | None = None
        self._waiting_since: float | None = None
        self._has_waited = False
        self._alone_since: float | None = None
        self._told_alone_at: float | None = None
        self._linked = False
        self._unlinked_since: float | None = None
        self._told_wait_at = 0.0
        self._told_download_at: float | None = None
        self._waiting_peers = 0
        self._is_in = False
        self._round: tuple[int, int] | None = None
        self._round_waits_since = self._told_round_at = 0.0

    def found(self, view: RunView) -> None:
        """We have looked at a run that is to be joined, and nobody there knows of us yet."""
        self._tell(
            f"found the run {view.run_id!r}: step {view.step} of {view.total_steps}, {peers(view.num_peers)} in it"
        )

    def downloaded(self, done: int, total: int) -> None:
        """So many parameters of the model have come, of so many in all."""
        now = self._clock()
        if self._told_download_at is None or now >= self._told_download_at + DOWNLOAD_SECONDS or done == total:
            self._told_download_at = None if done == total else now
            self._tell(f"the model comes from peers: {100 * done // max(1, total)} %")

    def entered(self, view: RunView, step: int, *, is_host: bool) -> None:
        """A round begins in which we train."""
        if not self._is_in:
            self._is_in = True
            others = view.num_peers - 1
            if not is_host or self._has_waited:
                whom = f"with {peers(others)}" if others > 0 else "as the only peer"
                self._tell(f"in the run {whom}, from step {step} of {view.total_steps}")
        self._waiting_since = None
        self.look(view, me=None)

    def look(self, view: RunView, me: bytes | None) -> None:
        """The run is like this now.

        Args:
            view: of it.
            me: our public key; None if we are in it for sure.
        """
        now = self._clock()
        if self._see_link(view, now):
            self._see_wait(view, now)
        if view.run_state in _WITH_PEERS and (me is None or me in view.clients):
            self._see_peers(view)
            self._see_reach(view, now)
            self._see_round(view, now)
        elif self._is_in and view.waits_for is not None and view.run_state in _WITH_PEERS:
            self._is_in, self._others = False, None  # an epoch goes on without us
        waiting = view.waiting_peers or 0
        if waiting > self._waiting_peers:
            self._tell(f"{peers(waiting)} joined and will be in the next epoch")
        self._waiting_peers = waiting

    def _see_link(self, view: RunView, now: float) -> bool:
        """Says that the coordinator is gone, or back; returns whether it is there."""
        since = self._unlinked_since
        if view.connected:
            if since is not None:
                self._tell(f"the coordinator answers again, after {now - since:.0f} s")
            self._linked, self._unlinked_since = True, None
        elif self._linked and since is None:
            self._unlinked_since = self._told_wait_at = now
            limit = f" for up to {view.gives_up_after:.0f} s (give_up_seconds)" if view.gives_up_after else ""
            self._tell(
                f"the coordinator does not answer: we keep the weights, call it again{limit}, and train on when it is "
                "back"
            )
        elif since is not None and now >= self._told_wait_at + STILL_SECONDS:
            self._told_wait_at = now
            left = (
                f"; we wait {max(0.0, view.gives_up_after - (now - since)):.0f} s more" if view.gives_up_after else ""
            )
            self._tell(f"no link to the coordinator for {now - since:.0f} s{left}")
        return self._unlinked_since is None

    def _see_wait(self, view: RunView, now: float) -> None:
        if view.waits_for is None:
            self._waiting_since = None
        elif self._waiting_since is None:
            self._waiting_since = self._told_wait_at = now
            self._has_waited = True
            self._tell(f"waiting for {view.waits_for}")
        elif now >= self._told_wait_at + STILL_SECONDS:
            self._told_wait_at = now
            self._tell(f"waiting for {view.waits_for}; {now - self._waiting_since:.0f} s so far")

    def _see_round(self, view: RunView, now: float) -> None:
        """Says of a round in which we have nothing left to do that the others still have, after a while."""
        if view.run_state not in _IN_A_ROUND or len(view.clients) < 2 or self._alone_since is not None:
            self._round = None
        elif (at := (view.epoch, view.height)) != self._round:
            self._round = at
            self._round_waits_since = self._told_round_at = now
        elif now >= self._told_round_at + STILL_SECONDS:
            self._told_round_at = now
            self._tell(f"step {view.step}: waiting for the others; {now - self._round_waits_since:.0f} s so far")

    def _see_reach(self, view: RunView, now: float) -> None:
        """Says that nobody else of the epoch can be reached, or that this is over."""
        since = self._alone_since
        if view.num_peers < 2 or view.neighbors or not view.connected:
            if self._told_alone_at is not None and since is not None and view.neighbors:
                self._tell(f"a peer is reached, after {now - since:.0f} s")
            self._alone_since = self._told_alone_at = None
        elif since is None:
            self._alone_since = now
        elif now >= since + UNREACHED_SECONDS and (
            self._told_alone_at is None or now >= self._told_alone_at + STILL_SECONDS
        ):
            self._told_alone_at = now
            others = view.num_peers - 1
            self._tell(
                f"for {now - since:.0f} s none of the {peers(others)} besides us can be reached. On one machine give "
                'all of them --iroh-discovery local (in a script discovery="local"); else give a peer\'s endpoint '
                "ticket with --peer (peers=[...]), or see what distro-optim doctor says about UDP and relay servers"
            )

    def _see_peers(self, view: RunView) -> None:
        now, before = frozenset(view.clients), self._others
        self._others = now
        if before is None:
            return
        for which, did in ((now - before, "came"), (before - now, "left")):
            if which:
                self._tell(f"{_named(which)} {did}: {peers(len(now))} now")


def _named(keys: Collection[bytes]) -> str:
    names = sorted(key.hex()[:_KEY_DIGITS] for key in keys)
    shown = ", ".join(names[:NAMED])
    more = len(names) - NAMED
    return f"peer{'s' if len(names) > 1 else ''} {shown}{f' and {more} more' if more > 0 else ''}"
