"""The way into a run that another process hosts: a ticket, or ``host:port/run-id``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from typing_extensions import override

from ...comm.addresses import EndpointAddr
from ...comm.iroh.endpoint import RELAY_SECONDS, Node
from ...comm.iroh.home import NodeHome
from ...comm.iroh.introduction import introduce
from ...comm.iroh.meeting_place import WHO_HOSTS
from ...comm.iroh.reach import Discovery, Relays
from ...comm.iroh.rendezvous import ask_over_stream, ask_rendezvous
from ...comm.iroh.sharing.exchange import SharedModels
from ...comm.iroh.sharing.live import LiveSharing
from ...comm.iroh.sharing.transfer import ModelSharing
from ...comm.iroh.streams import COORDINATOR_ALPN
from ...comm.iroh.swarm import IrohSwarm, topic_of_run
from ...comm.loop import LoopThread
from ...comm.signing import SecretKey
from ...comm.swarm import Swarm
from ...comm.tickets import EndpointTicket
from ...coordinator.client.remote import BESIDE_SECONDS, RemoteCoordinator
from ...coordinator.rules.checkpoints import is_run_of_psyche
from ...coordinator.ticket import RunTicket, connector
from ...coordinator.watchers import ask_who_watches
from ...errors import ConfigurationError, CoordinatorLinkError, DistroError, JoinRefusedError, ProtocolError
from ...protocol import OURS, why_apart
from ..environment import TICKET_NAME
from ..rounds.trust.saved_step import SavedStep
from .coordinating import HostingPeer, farewell
from .finding_the_host import find_host
from .keeping import RunKeeper
from .link import RunLink, RunSource

__all__ = ["SILENCE_SECONDS", "JoinedRun", "NodeOptions", "parse_peers", "parse_run"]

T = TypeVar("T")

SILENCE_SECONDS: Final = 10.0
"""A coordinator sends twice a second; after so many seconds without a byte we open a new link. As long as the host has
patience with us (``comm/iroh/streams.py``)."""

HOST_SECONDS: Final = 60.0
"""For which a peer that was in the run before looks for a host, when it is started again. Chosen arbitrarily."""

WATCHERS_SECONDS: Final = 5.0
"""To hear from the host who may watch. Chosen arbitrarily."""

HOST_LOOK_SECONDS: Final = 1.0
"""Between two attempts."""

MAX_GIVEN_PEERS: Final = 256
"""Tickets that a user may pass as ``peers``. Chosen arbitrarily."""


@dataclass(frozen=True, kw_only=True)
class NodeOptions:
    """How to open our own endpoint.

    Attributes:
        key: our secret key.
        relays: servers for peers that do not reach each other directly.
        discovery: where peers find each other.
        external_addr: see :class:`~distro_optim.comm.iroh.endpoint.Node`.
        bind_addr: likewise.
        peers: where other peers are, as far as the user knows.
        home: where key and ports are kept from one start to the next; None keeps none. :attr:`key` is the one there.
        folder: of our checkpoints, where we write down what a host does if we have to host; None writes nothing.
    """

    key: SecretKey
    relays: Relays = "default"
    discovery: Discovery = "none"
    external_addr: str | Sequence[str] | None = None
    bind_addr: str = "0.0.0.0:0"
    peers: tuple[EndpointAddr, ...] = ()
    home: NodeHome | None = None
    folder: Path | None = None

    async def open(self, loop: LoopThread) -> Node:
        """An endpoint on ``loop``, the loop that runs this; with its relay server, if one answers in time.

        Raises:
            ExchangeError: the address is taken, or the like.
        """
        node = Node(
            secret_key=self.key,
            relay=self.relays,
            discovery=self.discovery,
            external_addr=self.external_addr,
            bind_addr=self.bind_addr,
            usual_ports=None if self.home is None else self.home.ports(),
            loop=loop,
        )
        # Clients of a coordinator are not in its epoch yet, and it need not be a peer itself.
        node.exempt(COORDINATOR_ALPN)
        node.addresses.add(self.peers)
        try:
            await node.bind()
            if self.home is not None:
                self.home.keep_ports(node.sockets())
            if self.relays != "none":
                with suppress(TimeoutError):
                    async with asyncio.timeout(RELAY_SECONDS):
                        await node.online()
        except BaseException:
            await node.aclose()
            raise
        return node


def parse_run(run: str) -> RunTicket:
    """What a user passes as ``run``.

    Raises:
        ConfigurationError: it is neither a ticket nor ``host:port/run-id``.
    """
    try:
        return RunTicket.parse(run)
    except ProtocolError as error:
        raise ConfigurationError(
            f"run={run[:40]!r} is neither a ticket nor host:port/run-id: {error}. Copy the whole line that the host "
            "printed (psyche1...), or write host:port/run-id",
            name="run",
            value=run,
        ) from None


def parse_peers(peers: Sequence[str]) -> tuple[EndpointAddr, ...]:
    """What a user passes as ``peers``: endpoint tickets.

    Raises:
        ConfigurationError: one of them is not a ticket, or there are too many.
    """
    if len(peers) > MAX_GIVEN_PEERS:
        raise ConfigurationError(f"at most {MAX_GIVEN_PEERS} peers can be given, got {len(peers)}", name="peers")
    addresses = []
    for peer in peers:
        try:
            addresses.append(EndpointTicket.parse(peer).addr)
        except ProtocolError as error:
            raise ConfigurationError(
                f"peers holds {peer[:40]!r}, which is not an endpoint ticket: {error}", name="peers", value=peer
            ) from None
    return tuple(addresses)


class JoinedRun(RunSource):
    """A run whose coordinator is elsewhere.

    Args:
        ticket: which run, and where its coordinator is.
        options: how to open our endpoint.
        loop: the event loop of the network.
        patience: seconds without a link to the coordinator after which the run counts as lost.
        saved: what our own checkpoint says of the run; None if we resume from none.

    Raises:
        ConfigurationError: our key is that of the host.
    """

    is_host = False

    def __init__(
        self,
        ticket: RunTicket,
        options: NodeOptions,
        *,
        loop: LoopThread,
        patience: float,
        saved: SavedStep | None = None,
    ) -> None:
        if ticket.endpoint is not None and ticket.endpoint.id == options.key.public:
            raise ConfigurationError(
                "secret_key is the key of the run's host, and a key stands for one peer: leave secret_key out, or give "
                "each process on this machine a key, or a file for its key, of its own",
                name="secret_key",
            )
        self.key = options.key
        self.run_id = ticket.run_id
        self._ticket = ticket
        self._options = options
        self._loop = loop
        self._patience = patience
        self._saved = saved
        self._is_asked = True
        self._kept_by: RunKeeper | None = None

    @property
    @override
    def host(self) -> bytes | None:
        keeper = self._kept_by
        if keeper is not None and (known := keeper.core.host) is not None:
            return known
        return self._ticket.endpoint.id if self._ticket.endpoint is not None else None

    @override
    async def open(self) -> RunLink:
        async with AsyncExitStack() as stack:
            node = await self._options.open(self._loop)
            stack.push_async_callback(node.aclose)
            peer = HostingPeer(
                node=node,
                key=self.key,
                loop=self._loop,
                folder=self._options.folder,
                keep_banned=lambda keys: True,  # all peers are told, and so is the next host
            )
            keeper = RunKeeper(
                peer,
                self.run_id,
                host=self.host,
                way=connector(self._ticket, node),
                on_note=lambda text: self.on_note(text),
                tcp=self._ticket.tcp,
                saved=self._saved,
            )
            self._kept_by = keeper
            stack.push_async_callback(keeper.aclose)
            keeper.know(self._ticket.peers)
            coordinator = keeper.coordinator = RemoteCoordinator(
                keeper.connect,
                self.key,
                self.run_id,
                name=self._name,
                silence=SILENCE_SECONDS,
                give_up_after=self._patience,
                on_bytes=keeper.heard,
            )
            coordinator.on_told = lambda text: self.on_note(text)
            stack.push_async_callback(coordinator.close)
            await self._look(coordinator, keeper, node)
            is_ours = (state := coordinator.state) is not None and not is_run_of_psyche(state)
            if is_ours:
                coordinator.beside = BESIDE_SECONDS
                await self._introduce(node)
            swarm = IrohSwarm(node, topic_of_run(self.run_id))
            stack.push_async_callback(swarm.aclose)
            models = SharedModels(ModelSharing(node, swarm.publish), swarm, LiveSharing(node, swarm))
            if self._ticket.endpoint is not None:
                node.addresses.add(self._ticket.endpoint)
            closing = stack.pop_all()
        return RunLink(
            coordinator=coordinator,
            swarm=swarm,
            models=models,
            ticket=str(self._ticket),
            enter=lambda: self._enter(coordinator, node, swarm if is_ours else None),
            find_peers=lambda: self._find_peers(node),
            here=lambda: keeper.here,
            farewell=lambda: _farewell(keeper),
            aclose=closing.aclose,
            keeper=keeper if is_ours else None,
        )

    async def _look(self, coordinator: RemoteCoordinator, keeper: RunKeeper, node: Node) -> None:
        """Looks at the run, with its host or with whoever hosts it by now. A peer that was in the run before waits a
        while for one: after a power cut all start at once.

        Raises:
            JoinRefusedError, CoordinatorLinkError, ProtocolError: see :meth:`~.link.RunSource.open`.
        """
        node.addresses.add(self._ticket.peers)
        until = time.monotonic() + (HOST_SECONDS if self._was_in_it() else 0.0)
        is_told = False
        while True:
            try:
                await self._advised(coordinator.look())
                return
            except JoinRefusedError:
                raise
            except CoordinatorLinkError as error:
                found = await find_host(node, self._ticket)
                if found is not None and found.host is not None and found.host != self._ticket.endpoint:
                    self.on_note(f"the run {self.run_id!r} is hosted by peer {found.host.id.hex()[:8]} now")
                    node.addresses.add([found.host, *found.peers])
                    keeper.lead(found.host)
                    await self._advised(coordinator.look())
                    return
                if time.monotonic() >= until:
                    raise
                if not is_told:
                    is_told = True
                    self.on_note(
                        f"{error} This peer was in the run before, so it tries again for up to {HOST_SECONDS:.0f} s, "
                        "in case the host is starting, too"
                    )
            await asyncio.sleep(HOST_LOOK_SECONDS)

    def _was_in_it(self) -> bool:
        """Whether the folder of our checkpoints says that we were in the run before."""
        if self._saved is not None and self._saved.run_id == self.run_id:
            return True
        folder = self._options.folder
        if folder is None:
            return False
        try:
            kept = (folder / TICKET_NAME).read_text(encoding="utf-8", errors="replace")
            return RunTicket.parse(kept).run_id == self.run_id
        except (OSError, ProtocolError):
            return False

    @property
    def _name(self) -> str:
        ways = list(self._ticket.tcp)
        if self._ticket.endpoint is not None:
            ways.append(f"endpoint {self._ticket.endpoint.id.hex()[:10]}")
        return f"the coordinator of run {self.run_id!r} at {' or '.join(ways)}"

    async def _introduce(self, node: Node) -> None:
        """Sees to it that the host and we can train together, before we are in the run.

        A host of which only an address is known cannot be asked: what its peers say of their model has it, too.

        Raises:
            JoinRefusedError: we cannot; says who has to upgrade.
        """
        host = self._kept_by.host if self._kept_by is not None else None
        host = host or self._ticket.endpoint
        if host is None or (theirs := await introduce(node, host)) is None:
            return
        reason = why_apart(OURS, theirs, us="this machine", them="the host of the run")
        if reason is not None:
            raise JoinRefusedError(reason, wanted=self.run_id)

    async def _enter(self, coordinator: RemoteCoordinator, node: Node, swarm: Swarm | None) -> None:
        await self._advised(coordinator.join())
        with suppress(DistroError, OSError):  # it is asked again when we look for peers
            await self._ask_where(node)
        if swarm is not None:
            with suppress(DistroError, OSError, TimeoutError):  # of a host that knows no such question
                await self._let_them_watch(swarm)

    async def _let_them_watch(self, swarm: Swarm) -> None:
        """Lets those in that the host lets watch. The list is that of the time when we joined."""
        keeper = self._kept_by
        if keeper is None:
            return
        async with asyncio.timeout(WATCHERS_SECONDS):
            stream = await keeper.connect()
            try:
                watchers = await ask_who_watches(stream, self.key)
            finally:
                await stream.close()
        if watchers:
            keeper.watchers = watchers
            swarm.set_watchers(watchers)

    async def _advised(self, attempt: Awaitable[T]) -> T:
        """Looks at the run, or joins it; errors say what a user can do."""
        try:
            return await attempt
        except JoinRefusedError as error:
            advice = (
                f"; pass run='...{error.hosted}' to join that one"
                if error.hosted
                else "; ask the host for a fresh ticket, or to let your key in, or wait until another client has left"
            )
            raise JoinRefusedError(f"{error}{advice}", wanted=error.wanted, hosted=error.hosted) from error
        except CoordinatorLinkError as error:
            raise CoordinatorLinkError(f"{error}. Is the host still running, and is this its latest ticket?") from error

    async def _find_peers(self, node: Node) -> Sequence[EndpointAddr]:
        return [*self._options.peers, *await self._ask_where(node)]

    async def _ask_where(self, node: Node) -> Sequence[EndpointAddr]:
        """Tells the coordinator where we are, and hears where the others are; nothing from one that does not know."""
        keeper = self._kept_by
        if keeper is not None and keeper.here is not None:
            return keeper.here.rendezvous.visit(node.addr())
        host = keeper.host if keeper is not None and keeper.host is not None else self._ticket.endpoint
        if host is not None:
            members = await ask_rendezvous(node, host)
            if keeper is not None:
                keeper.know(members)
            return members
        if not self._is_asked:
            return []
        if keeper is not None and keeper.core.host is None:
            with suppress(DistroError, OSError):
                hosts = await ask_over_stream(connector(self._ticket), node, WHO_HOSTS)
                for host in hosts or ():
                    keeper.know_host(host)
        found = await ask_over_stream(connector(self._ticket), node)
        self._is_asked = found is not None  # one of Psyche's is not asked again
        return found or []


async def _farewell(keeper: RunKeeper) -> None:
    """The others hear of the end, if we host the run by now."""
    if keeper.here is not None:
        await farewell(keeper.here)
