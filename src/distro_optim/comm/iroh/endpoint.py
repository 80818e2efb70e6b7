"""A node: one iroh endpoint on an event loop of its own, for synchronous and asynchronous callers alike.

::

    with Node() as node:  # binds, publishes nothing but its address
        node.accept(b"my-protocol/0", serve)  # `async def serve(connection)`, run on the node's loop
        connection = node.submit(node.connect(peer_id, b"my-protocol/0")).result()

Nothing happens before the node is first used. Coroutines of a node, its connections and streams belong to its loop;
other threads hand them over with :meth:`Node.submit`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, Final, Self, TypeVar

from typing_extensions import override

from ...errors import ConfigurationError, ExchangeError, NodeClosedError, PeerRefusedError, PeerUnreachableError
from ..addresses import AddressBook, EndpointAddr, SocketAddr
from ..loop import LoopThread
from ..signing import SECRET_KEY_SIZE, SecretKey
from .connection import Connection
from .ffi import accelerate
from .home import Ports
from .keys import generate_secret_key, load_secret_key
from .local_discovery import LocalDiscovery, local_addresses
from .node.accepting import CLOSE_PROTOCOL_ERROR, Acceptor, Handler, NodeLimits
from .node.allowing import CLOSE_NOT_ALLOWED, AllowList
from .node.dialling import Dialler
from .node.holding import OpenConnections
from .node.opening import FAREWELL_SECONDS, Opener, close_quietly, sockets_of
from .node.vigil import Vigil
from .reach import Discovery, parse_discovery, parse_external_addrs, parse_relays
from .stream_ends import translate_errors

__all__ = ["CLOSE_NOT_ALLOWED", "CLOSE_PROTOCOL_ERROR", "RELAY_SECONDS", "Handler", "Node", "NodeLimits"]

T = TypeVar("T")

_log = logging.getLogger(__name__)

DIAL_SECONDS: Final = 5.0
"""Psyche's connection pool gives a dial this long (``shared/network/src/lib.rs``)."""

RELAY_SECONDS: Final = 5.0
"""How long to wait for :meth:`Node.online`; without a relay server peers learn our own addresses only."""

# Out of the two seconds that closing may take.
_HOOK_SECONDS: Final = 0.3
_BIND_SECONDS: Final = 10.0
_DEFAULT_BIND: Final = "0.0.0.0:0"


class Node:
    """One iroh endpoint: identity, sockets, protocols, connections.

    Args:
        secret_key: a key, or its 32 bytes; or the path of a key file, made with mode 0600 if there is none; or None
            for a fresh identity.
        bind_addr: where to listen for IPv4, such as ``"0.0.0.0:4433"``; port 0 takes any. IPv6 listens on any
            address, or on ``::1`` only if this is a loopback address.
        usual_ports: those to take in place of any, as far as they are free; see :mod:`.home`.
        relay: ``"default"`` for iroh's public relay servers, ``"psyche"`` for Psyche's, ``"none"``, or URLs of one's
            own, see :mod:`.reach`.
        discovery: where to publish the own address, and to look up those of peers: ``"n0"``, iroh's public DNS, or
            ``"local"``, files on this machine, see :mod:`.local_discovery`. None: the former with public relays. True
            is ``"n0"``; with ``"none"`` or False, peers must be in the address book.
        external_addr: where else others reach us, such as ``"203.0.113.7:4433"`` for a forwarded port or a one-to-one
            NAT; one address or several. They are told to peers and stand in tickets.
        allowed: endpoint ids that may connect or be dialled; None allows everybody. See :meth:`set_allowed`.
        addresses: the address book; an empty one if None.
        loop: a loop shared with other nodes; None starts one for this node alone.
        limits: bounds against strangers.

    Raises:
        ConfigurationError: an argument is wrong.
    """

    def __init__(
        self,
        *,
        secret_key: SecretKey | bytes | str | os.PathLike[str] | None = None,
        bind_addr: str = _DEFAULT_BIND,
        usual_ports: Ports | None = None,
        relay: str | Sequence[str] = "default",
        discovery: Discovery | bool | None = None,
        external_addr: str | Sequence[str] | None = None,
        allowed: Iterable[bytes] | None = None,
        addresses: AddressBook | None = None,
        loop: LoopThread | None = None,
        limits: NodeLimits | None = None,
    ) -> None:
        if secret_key is None:
            secret_key = generate_secret_key()
        elif isinstance(secret_key, str | os.PathLike):
            secret_key = load_secret_key(secret_key)
        elif isinstance(secret_key, bytes):
            if len(secret_key) != SECRET_KEY_SIZE:
                raise ConfigurationError(
                    f"secret_key must have {SECRET_KEY_SIZE} bytes, got {len(secret_key)}; "
                    "pass a path to keep it in a file, or None for a fresh one",
                    name="secret_key",
                )
            secret_key = SecretKey(secret_key)
        self.secret_key = secret_key
        self.endpoint_id = secret_key.public
        self.addresses = addresses if addresses is not None else AddressBook()
        self.limits = limits if limits is not None else NodeLimits()
        relays = parse_relays(relay)
        published = parse_discovery(discovery, relays)
        self._opener = Opener(
            secret_key,
            bind_addr,
            usual_ports=usual_ports,
            relays=relays,
            discovery=published,
            external=parse_external_addrs(external_addr),
        )
        self._local = LocalDiscovery(self.endpoint_id) if published == "local" else None
        self._has_relay = relays != "none"
        self._allowed = AllowList(allowed)
        self._owns_loop = loop is None
        self.loop = loop if loop is not None else LoopThread(f"iroh-{self.endpoint_id.hex()[:8]}")

        self._close_hooks: list[Callable[[], Awaitable[None]]] = []
        self._endpoint: Any = None
        # As the package told it last, and what it means: it is asked several times a second.
        self._addr: tuple[object, EndpointAddr] = None, EndpointAddr(self.endpoint_id)
        self._binding: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._held = OpenConnections(self._uses_relays)
        self._acceptor = Acceptor(self.limits, self._allowed, self._held, self._spawn)
        self._dialler = Dialler(self._bound, self._held, self._open_beside, has_relay=self._has_relay)

    @override
    def __repr__(self) -> str:
        state = "closed" if self._closing else "bound" if self._endpoint is not None else "not bound"
        return f"<Node {self.endpoint_id.hex()[:10]} {state}>"

    # -- for any thread ------------------------------------------------------------------------------------------------

    def start(self, timeout: float = _BIND_SECONDS) -> Self:
        """Binds now instead of at first use; waits for it, at most ``timeout`` seconds.

        Raises:
            ExchangeError: the address is taken, or the like.
            NodeClosedError: the node was closed.
        """
        self.loop.run(self.bind(), timeout)
        return self

    def close(self) -> None:
        """Tells the peers, ends all connections, stops what runs. Idempotent; takes at most two seconds."""
        if self._owns_loop:
            self.loop.stop()  # awaits `aclose`
        elif self._binding is not None:
            try:
                self.loop.run(self.aclose(), FAREWELL_SECONDS * 2)
            except (TimeoutError, NodeClosedError):
                pass

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Runs ``coroutine`` on the node's loop; binds the node first."""

        async def bound() -> T:
            try:
                await self.bind()
            except BaseException:
                coroutine.close()
                raise
            return await coroutine

        if self._closing is not None:
            coroutine.close()
            raise NodeClosedError("the node is closed")
        return self.loop.submit(bound())

    def accept(self, alpn: bytes, handler: Handler) -> None:
        """Serves the protocol ``alpn``: each connection a peer makes for it is given to ``handler``.

        The connection belongs to the handler: when it returns or raises, the connection is closed.

        Raises:
            ConfigurationError: the protocol is served already, or the name is empty.
        """
        self._acceptor.serve(alpn, handler)
        self._advertise()

    def refuse(self, alpn: bytes) -> None:
        """Serves ``alpn`` no more; open connections go on."""
        self._acceptor.refuse(alpn)
        self._advertise()

    def on_close(self, hook: Callable[[], Awaitable[None]]) -> None:
        """Has ``hook`` awaited on the loop before the connections are closed, for a word of farewell.

        All hooks together get 0.3 seconds.
        """
        self._close_hooks.append(hook)

    def addr(self) -> EndpointAddr:
        """The own id with the addresses known at this moment. The node must be bound."""
        raw = self._bound().addr()
        words = raw.relay_url(), tuple(raw.direct_addresses())
        if words != self._addr[0]:
            relay, direct = words
            known = tuple(SocketAddr.parse(text) for text in direct)
            self._addr = words, EndpointAddr(self.endpoint_id, (relay,) if relay else (), known)
        return self._addr[1]

    def sockets(self) -> tuple[SocketAddr, ...]:
        """Where the node listens. It must be bound."""
        return sockets_of(self._bound())

    @property
    def is_closed(self) -> bool:
        """Whether the node is closed, or closing."""
        return self._closing is not None

    @property
    def allowed(self) -> frozenset[bytes] | None:
        """Endpoint ids that may connect or be dialled; None for everybody."""
        return self._allowed.ids

    def set_allowed(self, ids: Iterable[bytes] | None) -> None:
        """Replaces the allow-list; connections of peers that are no longer on it are closed."""
        self._allowed.replace(ids)
        self._turn_away()

    def set_watchers(self, ids: Iterable[bytes], alpns: Iterable[bytes]) -> None:
        """Lets the owners of these keys connect for these protocols alone, beside those of the allow-list.

        Connections that this does not allow any more are closed.
        """
        self._allowed.let_watch(ids, alpns)
        self._turn_away()

    def _turn_away(self) -> None:
        for connection in self._held:
            self._allowed.turn_away(connection)

    def exempt(self, alpn: bytes) -> None:
        """Lets everybody connect, and be dialled, for ``alpn``, whatever the allow-list says.

        For protocols that decide themselves whom they serve, such as a coordinator's, whose clients are not in the
        epoch yet.
        """
        self._allowed.exempt(alpn)

    def connections(self) -> list[Connection]:
        """All open connections, incoming and outgoing."""
        return list(self._held)

    # -- on the loop ---------------------------------------------------------------------------------------------------

    async def bind(self) -> None:
        """Opens the sockets, once; later calls wait for the first."""
        if self._closing is not None:
            raise NodeClosedError("the node is closed")
        if self._binding is None:
            self._binding = asyncio.get_running_loop().create_task(self._bind())
        await asyncio.shield(self._binding)

    async def connect(self, peer: bytes | EndpointAddr, alpn: bytes, *, timeout: float = DIAL_SECONDS) -> Connection:
        """Dials ``peer`` once. The caller closes the connection; see :class:`~.pool.ConnectionPool` for reuse.

        Raises:
            PeerRefusedError: the peer is not on our allow-list.
            PeerUnreachableError: no handshake, with the reason.
            NodeClosedError: the node was closed.
        """
        await self.bind()
        address = peer if isinstance(peer, EndpointAddr) else EndpointAddr(peer)
        name = address.id.hex()[:10]
        if address.id == self.endpoint_id:
            raise PeerUnreachableError("a node cannot dial itself")
        if not self._allowed.allows(address.id, alpn):
            raise PeerRefusedError(f"{name} is not on the allow-list")
        address = self.addresses.lookup(address.id, time.monotonic()).merged(address)
        if self._local is not None:
            address = address.merged(self._local.look_up(address.id))
        try:
            async with asyncio.timeout(timeout):
                raw, endpoint = await self._dialler.dial(address, alpn)
        except TimeoutError:
            raise PeerUnreachableError(f"{name} did not answer within {timeout} s at {_places(address)}") from None
        except ExchangeError as error:
            raise PeerUnreachableError(f"{name} cannot be reached at {_places(address)}: {error}") from error
        connection = Connection(raw, dialled=True, endpoint=endpoint)
        # The list may have changed during the handshake.
        if self._allowed.turn_away(connection):
            raise PeerRefusedError(f"{name} is not on the allow-list")
        self._held.add(connection)
        _log.debug(
            "%r from %s at %s", connection, "the first" if endpoint is self._endpoint else "another", address.direct
        )
        return connection

    async def online(self) -> None:
        """Waits until a relay server is connected, so that :meth:`addr` holds it; without end if there is none."""
        await self.bind()
        with translate_errors():
            await self._bound().online()

    async def aclose(self) -> None:
        """See :meth:`close`."""
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close())
        await asyncio.shield(self._closing)

    # -- inside --------------------------------------------------------------------------------------------------------

    async def _bind(self) -> None:
        # At first use, not in the constructor: a node that is only described costs nothing.
        accelerate()
        self.loop.on_stop(self.aclose)
        self._endpoint = endpoint = await self._opener.open(self._acceptor.alpns)
        self._advertise()
        self._spawn(self._acceptor.run(endpoint))
        self._spawn(Vigil(self.connections, self._own_places).run())
        self._spawn(self._dialler.sweep())
        await self._opener.tell_external(endpoint, self.addr)
        if self._local is not None:
            self._local.publish(self._local_addr())
            self._spawn(self._local.keep_published(self._local_addr))

    async def _open_beside(self) -> Any:
        endpoint = await self._opener.open_beside(self._acceptor.alpns)
        self._spawn(self._acceptor.run(endpoint))
        return endpoint

    def _local_addr(self) -> EndpointAddr:
        """What peers on this machine need to know; in the words of Psyche's files."""
        return EndpointAddr(self.endpoint_id, self.addr().relays, local_addresses(self.sockets()))

    def _own_places(self) -> object:
        return None if self._endpoint is None else self._endpoint.addr().direct_addresses()

    def _bound(self) -> Any:
        if self._closing is not None:
            raise NodeClosedError("the node is closed")
        if self._endpoint is None:
            raise ExchangeError("the node is not bound yet: call start() first")
        return self._endpoint

    def _uses_relays(self, endpoint: Any) -> bool:
        return self._has_relay and endpoint is self._endpoint

    def _advertise(self) -> None:
        if self._endpoint is not None and self._closing is None:
            for endpoint in (self._endpoint, *self._dialler.beside):
                endpoint.set_alpns(self._acceptor.alpns)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _close(self) -> None:
        if self._binding is not None:
            await asyncio.wait([self._binding])
        if self._local is not None:
            self._local.withdraw()
        hooks = [asyncio.ensure_future(hook()) for hook in self._close_hooks]
        if hooks:
            _, late = await asyncio.wait(hooks, timeout=_HOOK_SECONDS)
            for task in late:
                task.cancel()
            for task in hooks:
                if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                    _log.warning("a close hook failed: %s", error)
        for task in list(self._tasks):
            task.cancel()
        self.loop.remove_hook(self.aclose)
        if self._endpoint is None:
            return
        self._held.close()
        endpoint, self._endpoint = self._endpoint, None
        await asyncio.gather(*map(close_quietly, [endpoint, *self._dialler.beside.all()]))


def _places(address: EndpointAddr) -> str:
    return ", ".join([*map(str, address.direct), *address.relays]) or "no known address"
