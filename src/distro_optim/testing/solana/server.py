"""The cluster on a port of this machine: JSON-RPC and websockets, with faults to inject.

::

    async with ValidatorServer(Validator()) as server:
        server.url, server.websocket_url
        server.faults.lost_answers = 1

One address serves both; a real cluster has the websockets on a port of their own.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final

from aiohttp import WSMsgType, web

from .ledger import Account
from .rpc_methods import RpcMethods, account_json
from .validator import Validator

__all__ = ["Faults", "ValidatorServer"]

_log = logging.getLogger(__name__)

MAX_REQUEST_BYTES: Final = 64 * 1024
"""A transaction has 1232 bytes; a list of signatures a few thousand."""

MAX_SUBSCRIPTIONS: Final = 64
MAX_UNSENT: Final = 256
"""Notifications that wait for one websocket; older ones are dropped."""

_CLOCK_SECONDS: Final = 0.1
"""Between two looks at the clock; a cluster's has whole seconds."""

_CLOSED: Final = Account(0)
"""What subscribers get of an account that is gone."""


@dataclass
class Faults:
    """What goes wrong from now on. Counts go down with each fault; a test can see that it happened.

    Attributes:
        lost_answers: requests that are carried out, and whose answer never comes.
        lost_methods: only of these methods; empty for any.
        too_many_requests: requests that are answered with HTTP 429.
        retry_after: seconds, in the header of those.
        server_errors: requests that are answered with HTTP 503.
        unknown_blockhashes: transactions whose blockhash this node does not know yet.
        silent: subscriptions send nothing.
        doubled: every notification comes twice.
        reversed_pairs: of two notifications the second comes first.
        held: notifications wait until this is False; see :meth:`ValidatorServer.release`.
        skipped: notifications that are left out.
        happened: names of the faults that a request or a notification has met.
    """

    lost_answers: int = 0
    lost_methods: frozenset[str] = frozenset()
    too_many_requests: int = 0
    retry_after: float = 0.0
    server_errors: int = 0
    unknown_blockhashes: int = 0
    silent: bool = False
    doubled: bool = False
    reversed_pairs: bool = False
    held: bool = False
    skipped: int = 0
    happened: list[str] = field(default_factory=list)


class ValidatorServer:
    """Serves one validator on loopback.

    Args:
        validator: the cluster.
        port: 0 takes any that is free.
        real_time: the validator's clock goes as this machine's; by default it stands still until it is moved.
        slot_seconds: what happens within so many seconds is confirmed and told together, as at a cluster's nodes,
            whose slots take about 0.4 s. By default everything is confirmed at once.
    """

    def __init__(
        self, validator: Validator, port: int = 0, *, real_time: bool = False, slot_seconds: float | None = None
    ) -> None:
        self.validator = validator
        self.methods = RpcMethods(validator)
        self.faults = Faults()
        self.requests: dict[str, int] = {}
        """How often each method was called."""
        self._port = port
        self._real_time = real_time
        self._slot_seconds = slot_seconds
        self._unconfirmed: set[str] = set()
        """Addresses that have changed within this slot."""
        self._at_work: list[asyncio.Task[None]] = []
        self._sockets: dict[web.WebSocketResponse, _Subscriber] = {}
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> ValidatorServer:
        app = web.Application(client_max_size=MAX_REQUEST_BYTES)
        app.router.add_post("/", self._post)
        app.router.add_get("/", self._websocket)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await site.start()
        self._port = self._runner.addresses[0][1]
        self.validator.listeners.append(self._changed)
        if self._real_time:
            self._at_work.append(asyncio.create_task(self._grow_older()))
        if self._slot_seconds is not None:
            self.methods.confirm()
            self._at_work.append(asyncio.create_task(self._end_slots(self._slot_seconds)))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.validator.listeners.remove(self._changed)
        for task in self._at_work:
            task.cancel()
        await self.drop_websockets()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _grow_older(self) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        while True:
            await asyncio.sleep(_CLOCK_SECONDS)
            # What moves the clock besides stays, and time goes on from there.
            passed = int(loop.time() - began)
            if passed:
                began += passed
                self.validator.advance(passed)

    async def _end_slots(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            self.end_slot()

    def end_slot(self) -> None:
        """What has happened until now is confirmed and told; for servers with ``slot_seconds``."""
        self.methods.confirm()
        keys, self._unconfirmed = frozenset(self._unconfirmed), set()
        self._tell(keys)

    @property
    def url(self) -> str:
        """For JSON-RPC."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def websocket_url(self) -> str:
        """For subscriptions."""
        return f"ws://127.0.0.1:{self._port}"

    @property
    def subscriptions(self) -> int:
        """How many there are."""
        return sum(len(subscriber.keys) for subscriber in self._sockets.values())

    async def drop_websockets(self) -> None:
        """Closes every websocket."""
        for socket in list(self._sockets):
            await socket.close()

    def lag(self) -> None:
        """From now on, reads show the accounts as they are now; :meth:`catch_up` ends that."""
        self.methods.accounts, self.methods.slot = self.validator.snapshot(), self.validator.clock.slot

    def catch_up(self) -> None:
        """Reads show the present again."""
        self.methods.accounts = None

    def release(self) -> None:
        """Sends the notifications that were held."""
        self.faults.held = False
        for subscriber in self._sockets.values():
            subscriber.wake.set()

    # -- requests ------------------------------------------------------------------------------------------------------

    async def _post(self, request: web.Request) -> web.StreamResponse:
        faults = self.faults
        if faults.too_many_requests:
            faults.too_many_requests -= 1
            faults.happened.append("429")
            return web.Response(status=429, headers={"Retry-After": f"{faults.retry_after:g}"})
        if faults.server_errors:
            faults.server_errors -= 1
            faults.happened.append("503")
            return web.Response(status=503)
        try:
            asked = json.loads(await request.read())
        except ValueError:
            return web.Response(status=400)
        method = asked.get("method") if isinstance(asked, dict) else None
        self.requests[str(method)] = self.requests.get(str(method), 0) + 1
        if method == "sendTransaction" and faults.unknown_blockhashes:
            faults.unknown_blockhashes -= 1
            faults.happened.append("blockhash")
            error = {"code": -32002, "message": "Blockhash not found", "data": {"err": "BlockhashNotFound"}}
            return web.json_response({"jsonrpc": "2.0", "id": asked.get("id"), "error": error})
        answer = self.methods.answer(asked)
        if faults.lost_answers and (not faults.lost_methods or method in faults.lost_methods):
            faults.lost_answers -= 1
            faults.happened.append("lost")
            if request.transport is not None:
                request.transport.abort()
        return web.json_response(answer)

    # -- subscriptions -------------------------------------------------------------------------------------------------

    async def _websocket(self, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(max_msg_size=MAX_REQUEST_BYTES)
        await socket.prepare(request)
        subscriber = self._sockets[socket] = _Subscriber()
        sender = asyncio.create_task(self._send(socket, subscriber))
        try:
            async for message in socket:
                if message.type is not WSMsgType.TEXT:
                    break
                await socket.send_json(self._subscribe(subscriber, message.data))
        except (ConnectionError, ValueError) as error:
            _log.debug("a websocket ends: %s", error)
        finally:
            sender.cancel()
            self._sockets.pop(socket, None)
        return socket

    def _subscribe(self, subscriber: _Subscriber, text: str) -> dict[str, Any]:
        asked = json.loads(text)
        identifier = asked.get("id") if isinstance(asked, dict) else None
        try:
            if asked["method"] != "accountSubscribe" or len(subscriber.keys) >= MAX_SUBSCRIPTIONS:
                raise LookupError(asked["method"])
            key = str(asked["params"][0])
            encoding = asked["params"][1].get("encoding", "base64")
        except (LookupError, TypeError, AttributeError):
            error = {"code": -32601, "message": "Method not found"}
            return {"jsonrpc": "2.0", "id": identifier, "error": error}
        subscriber.keys.append((key, encoding))
        return {"jsonrpc": "2.0", "id": identifier, "result": len(subscriber.keys)}

    def _changed(self, keys: frozenset[str]) -> None:
        if self._slot_seconds is None:
            self._tell(keys)
        else:
            self._unconfirmed |= keys

    def _tell(self, keys: frozenset[str]) -> None:
        """Tells the subscribers of these accounts how they are now."""
        faults, known = self.faults, dict[tuple[str, str], Any]()
        if faults.silent:
            return
        for subscriber in self._sockets.values():
            for number, (key, encoding) in enumerate(subscriber.keys, start=1):
                if key not in keys:
                    continue
                if faults.skipped:
                    faults.skipped -= 1
                    faults.happened.append("skipped")
                    continue
                if (key, encoding) not in known:
                    account = self.validator.accounts.get(key, _CLOSED)
                    known[key, encoding] = account_json(account, encoding)
                context = {"slot": self.validator.clock.slot}
                result = {"context": context, "value": known[key, encoding]}
                params = {"result": result, "subscription": number}
                news = {"jsonrpc": "2.0", "method": "accountNotification", "params": params}
                subscriber.unsent.extend([news] * (2 if faults.doubled else 1))
                subscriber.wake.set()

    async def _send(self, socket: web.WebSocketResponse, subscriber: _Subscriber) -> None:
        try:
            while True:
                await subscriber.wake.wait()
                subscriber.wake.clear()
                if self.faults.held or (self.faults.reversed_pairs and len(subscriber.unsent) < 2):
                    continue
                news = list(subscriber.unsent)
                subscriber.unsent.clear()
                for one in reversed(news) if self.faults.reversed_pairs else news:
                    await socket.send_json(one)
        except ConnectionError as error:
            _log.debug("a websocket takes no more: %s", error)


class _Subscriber:
    def __init__(self) -> None:
        self.keys: list[tuple[str, str]] = []
        self.unsent: deque[dict[str, Any]] = deque(maxlen=MAX_UNSENT)
        self.wake = asyncio.Event()
