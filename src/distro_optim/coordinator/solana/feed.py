"""The newest state of a run's account: by subscription to one or more nodes, and by reading now and then.

A subscription can be silent, drop, or leave changes out. So the account is read once after each subscription, again
when a state is overdue by its own clock, and slowly all the time.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final
from urllib.parse import urlsplit

import aiohttp
from solders.pubkey import Pubkey
from solders.rpc.responses import AccountNotification, SubscriptionResult, parse_websocket_message

from ...errors import ConfigurationError, CoordinatorLinkError, ProtocolError
from .decisions.newest import NewestAccount
from .finding import check_bytes
from .rpc import RpcClient, shown_url

__all__ = ["AccountFeed"]

_log = logging.getLogger(__name__)

POLL_SECONDS: Final = 10.0
"""Between two readings while nothing is due."""

HEARTBEAT_SECONDS: Final = 10.0
"""Between two pings; a socket that leaves one unanswered is given up."""

LONGEST_PAUSE: Final = 30.0
"""Seconds before a socket is opened again: two for each failure in a row, as Psyche's client, and at most these."""

MAX_MESSAGE_BYTES: Final = 1024 * 1024
"""A notification of the whole account in base64 has 160 kB."""


class RunClosedError(CoordinatorLinkError):
    """There is no such run any more."""


class AccountFeed:
    """Follows one account.

    Args:
        rpc: for reading.
        websockets: ws or wss addresses to subscribe at; may be empty.
        account: the address.
        on_news: called with each newer copy.
        on_end: called with the error when there will be no more news.
        account_version: what the account must be; None takes any that is known.
        poll_seconds: between two readings.
        first_pause: seconds before a lost socket is opened again for the first time.
        give_up_after: seconds without any news or reading after which it ends.

    Raises:
        ConfigurationError: an address of another kind.
    """

    def __init__(
        self,
        rpc: RpcClient,
        websockets: Sequence[str],
        account: Pubkey,
        on_news: Callable[[bytes], None],
        on_end: Callable[[Exception], None],
        *,
        account_version: int | None = None,
        poll_seconds: float = POLL_SECONDS,
        first_pause: float = 2.0,
        give_up_after: float = 600.0,
    ) -> None:
        for url in websockets:
            if urlsplit(url).scheme not in ("ws", "wss"):
                raise ConfigurationError(
                    f"a websocket address begins with wss:// or ws://, not {shown_url(url)}", name="websocket"
                )
        self.account = account
        self.newest = NewestAccount()
        self.subscribed = 0
        """Sockets that are subscribed at the moment."""
        self.reachable = True
        """Whether the last reading went well."""
        self._rpc = rpc
        self._websockets = tuple(websockets)
        self._on_news = on_news
        self._on_end = on_end
        self._version = account_version
        self._give_up_after = give_up_after
        self._heard = asyncio.get_running_loop().time()
        self._poll_seconds = poll_seconds
        self._first_pause = first_pause
        self._read_now = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begins to follow."""
        self._tasks = [asyncio.create_task(self._poll(), name="reading the account")]
        self._tasks += [asyncio.create_task(self._follow(url), name="subscription") for url in self._websockets]

    async def close(self) -> None:
        """Ends."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def hurry(self) -> None:
        """Reads the account soon, since its state is overdue."""
        self._read_now.set()

    async def read(self, *, first: int = 0) -> bytes:
        """Reads the account now; returns the newest copy.

        Args:
            first: the number of the node that is asked first, counted round.

        Raises:
            CoordinatorLinkError: no node answers, or the account is gone.
            ProtocolError: the answer makes no sense, or the account is of another version.
        """
        read = await self._rpc.account(self.account, min_slot=self.newest.slot, first=first)
        if read.data is None:
            raise RunClosedError(f"the account {self.account} of the run was closed by its operator")
        check_bytes(read.data, self._version)
        self._offer(read.data, read.slot)
        return self.newest.data or read.data

    def _offer(self, data: bytes, slot: int) -> None:
        self._heard = asyncio.get_running_loop().time()
        if self.newest.offer(data, slot):
            self._on_news(data)

    async def _poll(self) -> None:
        for number in itertools.count():  # each node in turn: one that stands still does not know that it does
            try:
                async with asyncio.timeout(self._poll_seconds):
                    await self._read_now.wait()
            except TimeoutError:
                pass
            self._read_now.clear()
            await self._read_quietly(number)

    async def _read_quietly(self, first: int) -> None:
        try:
            await self.read(first=first)
            self.reachable = True
        except RunClosedError as error:
            self._on_end(error)
        except (CoordinatorLinkError, ProtocolError) as error:
            self.reachable = False
            _log.warning("the run's account cannot be read: %s", error)
            if asyncio.get_running_loop().time() >= self._heard + self._give_up_after:
                self._on_end(error)

    # -- subscriptions -------------------------------------------------------------------------------------------------

    async def _follow(self, url: str) -> None:
        failures = 0
        while True:
            try:
                async for _ in self._listen(url):
                    failures = 0
                reason = "it was closed"
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                reason = type(error).__name__  # the text can hold the whole address
            failures += 1
            pause = min(LONGEST_PAUSE, self._first_pause * failures)
            _log.info("the subscription at %s is lost (%s), again in %g s", shown_url(url), reason, pause)
            await asyncio.sleep(pause)

    async def _listen(self, url: str) -> AsyncIterator[None]:
        """Yields after each notification; ends with the socket."""
        session = await self._rpc.session()
        options = {"encoding": "base64+zstd", "commitment": "confirmed"}
        request = {"jsonrpc": "2.0", "id": 1, "method": "accountSubscribe", "params": [str(self.account), options]}
        async with session.ws_connect(url, heartbeat=HEARTBEAT_SECONDS, max_msg_size=MAX_MESSAGE_BYTES) as socket:
            await socket.send_json(request)
            subscribed = False
            try:
                async for message in socket:
                    if message.type is not aiohttp.WSMsgType.TEXT:
                        break
                    for part in _parsed(message.data):
                        if isinstance(part, SubscriptionResult) and not subscribed:
                            subscribed = True
                            self.subscribed += 1
                            self.hurry()  # what happened between the last reading and now
                        elif isinstance(part, AccountNotification):
                            self._offer(part.result.value.data, part.result.context.slot)
                    yield
            finally:
                self.subscribed -= subscribed


def _parsed(text: str) -> Sequence[object]:
    """The parts of a message; none if it makes no sense, which is the node's fault and not the run's."""
    try:
        return parse_websocket_message(text)
    except Exception as error:
        _log.info("a notification cannot be read: %s", str(error)[:200])
        return ()
