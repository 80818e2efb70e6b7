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
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Self, TypeVar

from typing_extensions import override

from ...errors import (
    ConfigurationError,
    DistroError,
    ExchangeError,
    MissingDependencyError,
    NodeClosedError,
    PeerRefusedError,
    PeerTimeoutError,
    PeerUnreachableError,
    ProtocolError,
)
from ..addresses import AddressBook, EndpointAddr, SocketAddr
from ..loop import LoopThread
from ..signing import PUBLIC_KEY_SIZE, SECRET_KEY_SIZE, SecretKey
from .connection import Connection, translate_errors
from .ffi import accelerate, spare_backtraces
from .home import Ports
from .keys import generate_secret_key, load_secret_key
from .local_discovery import LocalDiscovery, local_addresses
from .reach import Discovery, parse_discovery, parse_external_addrs, parse_relays
from .vigil import Vigil
from .watching.beside import EndpointsBeside

__all__ = ["CLOSE_NOT_ALLOWED", "CLOSE_PROTOCOL_ERROR", "RELAY_SECONDS", "Handler", "Node", "NodeLimits"]

T = TypeVar("T")
Handler = Callable[[Connection], Awaitable[None]]

_log = logging.getLogger(__name__)

# Code and words with which Psyche's clients turn away who is not in the run (`shared/network/src/allowlist.rs`).
CLOSE_NOT_ALLOWED: Final = 1
_NOT_ALLOWED: Final = b"not in allowlist"
CLOSE_PROTOCOL_ERROR: Final = 2
"""Ours; no peer looks at the code."""

DIAL_SECONDS: Final = 5.0
"""Psyche's connection pool gives a dial this long (``shared/network/src/lib.rs``)."""

BESIDE_SWEEP_SECONDS: Final = 5.0
"""Between two looks at such endpoints. Chosen arbitrarily."""

BESIDE_SECONDS: Final = 0.5
"""After which a peer that we are connected to, and that does not answer a dial, is dialled from another endpoint too:
see :mod:`.watching.beside`. Longer than most handshakes take; short, since what waits for the dial waits."""

GIVE_UP_SECONDS: Final = 1.0
"""After which the old way to a peer is given up, if it still does not answer, another endpoint does not reach the peer
either, and a relay server would: see :meth:`Node._give_up_old_way`. Enough for a handshake around the world."""

RELAY_SECONDS: Final = 5.0
"""How long to wait for :meth:`Node.online`; without a relay server peers learn our own addresses only."""

USUAL_PORT_SECONDS: Final = 3.0
"""How long to try for a port that was ours before; longer than an endpoint takes to close."""

_USUAL_PORT_PAUSE: Final = 0.1
_TOLD_SECONDS: Final = 2.0
_TOLD_PAUSE: Final = 0.01

# Time for the endpoint to tell its peers that it leaves, out of the two seconds that closing may take.
_FAREWELL_SECONDS: Final = 0.8
_HOOK_SECONDS: Final = 0.3
_BIND_SECONDS: Final = 10.0
_DEFAULT_BIND: Final = "0.0.0.0:0"


@dataclass(frozen=True, kw_only=True)
class NodeLimits:
    """What strangers can make a node hold.

    Attributes:
        connections: all together; Psyche's pool holds as many (``shared/network/src/lib.rs``).
        connections_per_peer: of one peer, whatever the protocols. Chosen: three protocols, twice each while both
            sides dial at once, and room.
        handshakes: at a time. From half of it on, callers must first prove their address (a QUIC retry), so that
            forged packets cannot fill the rest.
        handshake_seconds: after which a half-open connection is dropped.
    """

    connections: int = 1024
    connections_per_peer: int = 16
    handshakes: int = 64
    handshake_seconds: float = 10.0

    def __post_init__(self) -> None:
        for name in ("connections", "connections_per_peer", "handshakes", "handshake_seconds"):
            value = getattr(self, name)
            if value <= 0:
                raise ConfigurationError(f"{name} must be positive, got {value}", name=name, value=value)


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
        self._bind_addr = SocketAddr.parse(bind_addr)
        if self._bind_addr.ip.version != 4:
            raise ConfigurationError(
                f"bind_addr must be an IPv4 address, got {bind_addr}; IPv6 is listened on beside it",
                name="bind_addr",
                value=bind_addr,
            )
        self._usual_ports = usual_ports if self._bind_addr.port == 0 else None
        self.secret_key = secret_key
        self.endpoint_id = secret_key.public
        self.addresses = addresses if addresses is not None else AddressBook()
        self.limits = limits if limits is not None else NodeLimits()
        self._relays = parse_relays(relay)
        self._discovery = parse_discovery(discovery, self._relays)
        self._external = parse_external_addrs(external_addr)
        self._local = LocalDiscovery(self.endpoint_id) if self._discovery == "local" else None
        self._allowed = None if allowed is None else _checked_ids(allowed)
        self._owns_loop = loop is None
        self.loop = loop if loop is not None else LoopThread(f"iroh-{self.endpoint_id.hex()[:8]}")

        self._handlers: dict[bytes, Handler] = {}
        self._exempt: set[bytes] = set()
        self._close_hooks: list[Callable[[], Awaitable[None]]] = []
        self._endpoint: Any = None
        # As the package told it last, and what it means: it is asked several times a second.
        self._addr: tuple[object, EndpointAddr] = None, EndpointAddr(self.endpoint_id)
        self._binding: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._connections: set[Connection] = set()
        self._per_peer: Counter[bytes] = Counter()
        self._handshakes = 0
        self._beside: EndpointsBeside[Any] = EndpointsBeside(self._open_beside, time.monotonic)

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
                self.loop.run(self.aclose(), _FAREWELL_SECONDS * 2)
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
        if not alpn or len(alpn) > 255:
            raise ConfigurationError(f"an ALPN has 1 to 255 bytes, got {len(alpn)}", name="alpn", value=alpn)
        if alpn in self._handlers:
            raise ConfigurationError(f"{alpn!r} is served already", name="alpn", value=alpn)
        self._handlers[alpn] = handler
        self._advertise()

    def refuse(self, alpn: bytes) -> None:
        """Serves ``alpn`` no more; open connections go on."""
        self._handlers.pop(alpn, None)
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

    @property
    def is_closed(self) -> bool:
        """Whether the node is closed, or closing."""
        return self._closing is not None

    @property
    def allowed(self) -> frozenset[bytes] | None:
        """Endpoint ids that may connect or be dialled; None for everybody."""
        return self._allowed

    def set_allowed(self, ids: Iterable[bytes] | None) -> None:
        """Replaces the allow-list; connections of peers that are no longer on it are closed."""
        self._allowed = None if ids is None else _checked_ids(ids)
        for connection in list(self._connections):
            if not self._allows(connection.remote_id, connection.alpn):
                connection.close(CLOSE_NOT_ALLOWED, _NOT_ALLOWED)

    def exempt(self, alpn: bytes) -> None:
        """Lets everybody connect, and be dialled, for ``alpn``, whatever the allow-list says.

        For protocols that decide themselves whom they serve, such as a coordinator's, whose clients are not in the
        epoch yet.
        """
        self._exempt.add(alpn)

    def connections(self) -> list[Connection]:
        """All open connections, incoming and outgoing."""
        return list(self._connections)

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
        if not self._allows(address.id, alpn):
            raise PeerRefusedError(f"{name} is not on the allow-list")
        address = self.addresses.lookup(address.id, time.monotonic()).merged(address)
        if self._local is not None:
            address = address.merged(self._local.look_up(address.id))
        try:
            async with asyncio.timeout(timeout):
                raw, endpoint = await self._dial(address, alpn)
        except TimeoutError:
            raise PeerUnreachableError(f"{name} did not answer within {timeout} s at {_places(address)}") from None
        except ExchangeError as error:
            raise PeerUnreachableError(f"{name} cannot be reached at {_places(address)}: {error}") from error
        connection = Connection(raw, dialled=True, endpoint=endpoint)
        # The list may have changed during the handshake.
        if not self._allows(connection.remote_id, alpn):
            connection.close(CLOSE_NOT_ALLOWED, _NOT_ALLOWED)
            raise PeerRefusedError(f"{name} is not on the allow-list")
        self._register(connection)
        _log.debug(
            "%r from %s at %s", connection, "the first" if endpoint is self._endpoint else "another", address.direct
        )
        return connection

    async def _dial(self, address: EndpointAddr, alpn: bytes) -> tuple[Any, Any]:
        """A raw connection, and the endpoint that it is on."""
        first = self._bound()
        held = [connection for connection in self._connections if connection.remote_id == address.id]
        address = address.merged(_seen_at(address.id, held))
        if not held or not address.direct:
            return await _dial_from(first, address, alpn)
        dials: set[asyncio.Task[tuple[Any, Any]]] = set()
        try:
            if not any(connection.is_silent for connection in held):
                dials.add(asyncio.ensure_future(_dial_from(first, address, alpn)))
                done, _ = await asyncio.wait(dials, timeout=BESIDE_SECONDS)
                if done:
                    return done.pop().result()
            dials.add(asyncio.ensure_future(self._dial_beside(address, alpn)))
            may_give_up = bool(address.relays) and self._relays != "none"
            while True:
                timeout = GIVE_UP_SECONDS if may_give_up else None
                done, waiting = await asyncio.wait(dials, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                if not done and (all(one.is_closed for one in held) or self._give_up_old_way(address.id)):
                    may_give_up = False
                    dials.add(asyncio.ensure_future(_dial_from(first, address, alpn)))
                    continue
                for dial in done:
                    if not waiting or dial.exception() is None:
                        return dial.result()
                dials = waiting
        finally:
            for dial in dials:
                dial.cancel()
            await asyncio.gather(*dials, return_exceptions=True)

    def _give_up_old_way(self, peer: bytes) -> bool:
        """Closes what the first endpoint has with a peer, if that does not answer: with nothing open, the endpoint
        dials all addresses, and the relay server, at once. False, and nothing is closed, if something was heard since.

        It is the one way to a relay server, as no other endpoint with our key may be there. What was said in vain on
        what is closed is said again on the new connection, as after every silence. A connection that whoever serves it
        keeps for longer (``is_patient``) is not closed: then it is the peer that comes to us.
        """
        held = [one for one in self._connections if one.remote_id == peer and one.endpoint is self._endpoint]
        since = min((one.unanswered_since for one in held if one.is_silent and one.unanswered_since), default=None)
        if since is None or any(one.is_patient or not one.heard_nothing_since(since) for one in held):
            return False
        _log.debug("the way to %s is given up, for a relay server", peer.hex()[:10])
        for one in held:
            one.close_as_silent()
        return True

    async def _dial_beside(self, address: EndpointAddr, alpn: bytes) -> tuple[Any, Any]:
        def knows_peer(endpoint: Any) -> bool:
            return any(
                connection.endpoint is endpoint and connection.remote_id == address.id
                for connection in self._connections
            )

        endpoint = await self._beside.take(knows_peer)
        if endpoint is None:
            return await _dial_from(self._bound(), address, alpn)
        try:
            return await _dial_from(endpoint, address, alpn)
        finally:
            self._beside.give_back(endpoint)

    async def _open_beside(self) -> Any:
        """Another endpoint with our key."""
        host = self._bind_addr.ip
        binds = [f"{host}:0", *(["[::1]:0"] if host.is_loopback else [])]
        _log.debug("another endpoint is opened beside the first")
        preset = self._preset(_iroh(), binds, alone=True)
        with translate_errors():
            options = _iroh().EndpointOptions(preset=preset, alpns=list(self._handlers))
            endpoint = await _iroh().Endpoint.bind(options)
        self._spawn(self._accept_loop(endpoint))
        return endpoint

    async def _close_beside(self) -> None:
        """Closes what is beside the first endpoint and is not needed any more, all the time."""
        while True:
            await asyncio.sleep(BESIDE_SWEEP_SECONDS)
            used = {id(connection.endpoint) for connection in self._connections}
            for endpoint in self._beside.idle(lambda endpoint, used=used: id(endpoint) in used):  # type: ignore[misc]
                await _close_quietly(endpoint)

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
        iroh = _iroh()
        accelerate()
        self.loop.on_stop(self.aclose)
        self._endpoint = await self._open(iroh)
        self._advertise()
        self._spawn(self._accept_loop(self._endpoint))
        self._spawn(Vigil(self.connections, self._own_places).run())
        self._spawn(self._close_beside())
        with translate_errors():
            for external in self._external:
                await self._endpoint.add_external_addr(str(external))
        await self._until_told()
        self._warn_of_an_unlikely_port()
        if self._local is not None:
            self._local.publish(self._local_addr())
            self._spawn(self._local.keep_published(self._local_addr))

    async def _open(self, iroh: Any) -> Any:
        """The endpoint, at the usual ports if they are free; it says so if they are not.

        Those of a session that this process has just closed become free a moment later.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + USUAL_PORT_SECONDS
        *usual, any_port = self._binds()
        while usual:
            for binds in usual:
                try:
                    return await self._open_at(iroh, binds)
                except ExchangeError as error:
                    _log.debug("cannot listen at %s: %s", binds, error)
            if loop.time() >= until:
                _log.warning(
                    "UDP port %s, where this endpoint listened before, is taken: it listens at another one, so that "
                    "tickets from before lead here through relay servers or the public lookup only; end what has the "
                    "port (ss -ulpn shows it), or hand out a fresh ticket",
                    usual[0][0].rpartition(":")[2],
                )
                break
            await asyncio.sleep(_USUAL_PORT_PAUSE)
        return await self._open_at(iroh, any_port)

    async def _open_at(self, iroh: Any, binds: Sequence[str]) -> Any:
        options = iroh.EndpointOptions(preset=self._preset(iroh, binds), alpns=list(self._handlers))
        with translate_errors():
            return await iroh.Endpoint.bind(options)

    def _binds(self) -> list[list[str]]:
        """Addresses to listen at, the better ones first."""
        host, loopback = self._bind_addr.ip, self._bind_addr.ip.is_loopback
        # Otherwise the package listens on all IPv6 addresses although the user asked for loopback.
        any_port = [str(self._bind_addr), *(["[::1]:0"] if loopback else [])]
        if self._usual_ports is None:
            return [any_port]
        port, port6 = self._usual_ports
        usual = f"{host}:{port}"
        both = [[usual, f"{'[::1]' if loopback else '[::]'}:{port6}"]] if port6 else []
        return [*both, [usual, *any_port[1:]], any_port]

    async def _until_told(self) -> None:
        """Waits until the external addresses are among our own: a ticket that is made at once is to have them."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_TOLD_SECONDS):
                while not set(self._external) <= set(self.addr().direct):
                    await asyncio.sleep(_TOLD_PAUSE)

    def sockets(self) -> tuple[SocketAddr, ...]:
        """Where the node listens. It must be bound."""
        return tuple(SocketAddr.parse(text) for text in self._bound().bound_sockets())

    def _local_addr(self) -> EndpointAddr:
        """What peers on this machine need to know; in the words of Psyche's files."""
        return EndpointAddr(self.endpoint_id, self.addr().relays, local_addresses(self.sockets()))

    def _warn_of_an_unlikely_port(self) -> None:
        """A port that is taken at random is hardly the one that somebody forwards to."""
        if self._external and self._bind_addr.port == 0:
            ports = ", ".join(str(socket) for socket in self.sockets() if socket.ip.version == 4)
            _log.warning(
                "others are told to reach us at %s, but we listen on a port taken at random (%s): choose one with "
                "bind_addr='0.0.0.0:PORT' or --bind-p2p-port PORT, and let the router forward to it",
                ", ".join(map(str, self._external)),
                ports,
            )

    def _own_places(self) -> object:
        return None if self._endpoint is None else self._endpoint.addr().direct_addresses()

    def _preset(self, iroh: Any, binds: Sequence[str], *, alone: bool = False) -> Any:
        """What an endpoint is to be like; one that is ``alone`` has no relay server and publishes nothing."""
        relays, discovery, secret_key = self._relays, self._discovery, self.secret_key.to_bytes()

        class Settings(iroh.Preset):  # type: ignore[misc]
            def apply(self, builder: Any) -> None:
                if discovery == "n0" and not alone:
                    builder.apply_n0()
                else:
                    builder.apply_minimal()
                if relays == "none" or alone:
                    builder.relay_mode(iroh.RelayMode.disabled())
                elif relays == "default":
                    builder.relay_mode(iroh.RelayMode.default_mode())
                else:
                    builder.relay_mode(iroh.RelayMode.custom_from_urls(list(relays)))
                builder.secret_key(secret_key)
                for bind in binds:
                    builder.bind_addr(bind)

        return Settings()

    def _bound(self) -> Any:
        if self._closing is not None:
            raise NodeClosedError("the node is closed")
        if self._endpoint is None:
            raise ExchangeError("the node is not bound yet: call start() first")
        return self._endpoint

    def _advertise(self) -> None:
        if self._endpoint is not None and self._closing is None:
            for endpoint in (self._endpoint, *self._beside):
                endpoint.set_alpns(list(self._handlers))

    def _allows(self, peer: bytes, alpn: bytes) -> bool:
        return self._allowed is None or peer in self._allowed or alpn in self._exempt

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _register(self, connection: Connection) -> None:
        connection.has_relay = self._relays != "none" and connection.endpoint is self._endpoint
        self._connections.add(connection)
        self._per_peer[connection.remote_id] += 1

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self._connections.discard(connection)
            self._per_peer[connection.remote_id] -= 1
            if not self._per_peer[connection.remote_id]:
                del self._per_peer[connection.remote_id]
            if not task.cancelled() and (error := task.exception()) is not None:
                _log.debug("watching %r failed: %s", connection, error)

        task = connection.watch()
        self._tasks.add(task)
        task.add_done_callback(ended)

    async def _accept_loop(self, endpoint: Any) -> None:
        while True:
            with translate_errors():
                incoming = await endpoint.accept_next()
            if incoming is None:
                return
            try:
                with translate_errors():
                    if self._handshakes >= self.limits.handshakes or len(self._connections) >= self.limits.connections:
                        await incoming.refuse()
                        continue
                    if 2 * self._handshakes >= self.limits.handshakes and not await incoming.remote_addr_validated():
                        await incoming.retry()
                        continue
            except ExchangeError as error:
                _log.debug("an incoming connection vanished: %s", error)
                continue
            self._handshakes += 1
            self._spawn(self._serve(incoming, endpoint))

    async def _serve(self, incoming: Any, endpoint: Any) -> None:
        try:
            async with asyncio.timeout(self.limits.handshake_seconds):
                with translate_errors():
                    accepting = await incoming.accept()
                    raw = await accepting.connect()
        except (TimeoutError, ExchangeError) as error:
            _log.debug("an incoming handshake failed: %s", error)
            return
        finally:
            self._handshakes -= 1
        connection = Connection(raw, dialled=False, endpoint=endpoint)
        peer = connection.remote_id
        handler = self._handlers.get(connection.alpn)
        if not self._allows(peer, connection.alpn):
            _log.info("%s is not on the allow-list and was turned away", peer.hex()[:10])
            connection.close(CLOSE_NOT_ALLOWED, _NOT_ALLOWED)
            return
        if handler is None or self._per_peer[peer] >= self.limits.connections_per_peer:
            connection.close(CLOSE_NOT_ALLOWED, b"not served" if handler is None else b"too many connections")
            return
        self._register(connection)
        code = 0
        try:
            await handler(connection)
        except ProtocolError as error:
            code = CLOSE_PROTOCOL_ERROR
            _log.warning("%s broke %s: %s", peer.hex()[:10], connection.alpn.decode(errors="replace"), error)
        except (DistroError, TimeoutError) as error:
            _log.debug("serving %r ended: %s", connection, error)
        except Exception:
            code = CLOSE_PROTOCOL_ERROR
            _log.exception("serving %r failed", connection)
        finally:
            connection.close(code)

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
        for connection in list(self._connections):
            connection.close()
        endpoint, self._endpoint = self._endpoint, None
        await asyncio.gather(*map(_close_quietly, [endpoint, *self._beside.all()]))


def _seen_at(peer: bytes, connections: Iterable[Connection]) -> EndpointAddr:
    """Where ``peer`` is by the connections that answer: it may have moved since somebody told us."""
    places = {place for connection in connections if not connection.is_silent for place in connection.places()}
    return EndpointAddr(peer, (), tuple(map(SocketAddr.parse, places)))


async def _dial_from(endpoint: Any, address: EndpointAddr, alpn: bytes) -> tuple[Any, Any]:
    with translate_errors():
        return await endpoint.connect(_raw_addr(address), alpn), endpoint


async def _close_quietly(endpoint: Any) -> None:
    try:
        async with asyncio.timeout(_FAREWELL_SECONDS):
            with translate_errors():
                await endpoint.close()
    except (TimeoutError, PeerTimeoutError):
        _log.debug("some peers did not acknowledge the close in time")
    except ExchangeError as error:
        _log.debug("closing the endpoint: %s", error)


def _checked_ids(ids: Iterable[bytes]) -> frozenset[bytes]:
    checked = frozenset(ids)
    for peer in checked:
        if not isinstance(peer, bytes) or len(peer) != PUBLIC_KEY_SIZE:
            raise ConfigurationError(
                f"an endpoint id has {PUBLIC_KEY_SIZE} bytes, got {peer!r}", name="allowed", value=peer
            )
    return checked


def _iroh() -> Any:
    spare_backtraces()
    try:
        import iroh
    except ImportError as error:
        raise MissingDependencyError("the peer-to-peer network needs iroh: pip install 'iroh>=1.2,<2'") from error
    return iroh


def _raw_addr(address: EndpointAddr) -> Any:
    iroh = _iroh()
    # The package takes one relay server, and nothing at all of an address whose URL it cannot read. Which of several a
    # peer is at now is not known: another dial may try another one.
    readable = [url for url in address.relays if _is_readable(url)]
    relay = random.choice(readable) if readable else None
    with translate_errors():
        peer = iroh.EndpointId.from_bytes(address.id)
        return iroh.EndpointAddr(peer, relay, [str(socket_addr) for socket_addr in address.direct])


def _is_readable(url: str) -> bool:
    iroh = _iroh()
    try:
        iroh.RelayMode.custom_from_urls([url])
    except iroh.IrohError:
        return False
    return True


def _places(address: EndpointAddr) -> str:
    return ", ".join([*map(str, address.direct), *address.relays]) or "no known address"
