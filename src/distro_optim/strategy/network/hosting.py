"""A run that this process hosts: its coordinator is here, open to others over iroh and, if wanted, TCP."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from shlex import quote

from typing_extensions import override

from ...comm.addresses import EndpointAddr
from ...comm.iroh.endpoint import Node
from ...comm.iroh.introduction import VersionDesk
from ...comm.iroh.rendezvous import Rendezvous
from ...comm.iroh.sharing.exchange import SharedModels
from ...comm.iroh.sharing.live import LiveSharing
from ...comm.iroh.sharing.transfer import ModelSharing
from ...comm.iroh.streams import IrohListener
from ...comm.iroh.swarm import IrohSwarm, topic_of_run
from ...comm.loop import LoopThread
from ...comm.streams import StreamListener, TcpListener, split_address
from ...coordinator.client import RemoteCoordinator
from ...coordinator.rules.checkpoints import audit_fraction_of
from ...coordinator.rules.points import Account
from ...coordinator.rules.validation import check_run
from ...coordinator.server.acting import ServiceActs
from ...coordinator.server.host import RunHost, restartable
from ...coordinator.server.ledger_file import LedgerFile
from ...coordinator.server.server import unix_offset
from ...coordinator.server.store import StateStore
from ...coordinator.ticket import RunTicket
from ...coordinator.types import Coordinator, NodeIdentity, RunState
from ...errors import ConfigurationError, ProtocolError
from ..config import RunConfig
from ..environment import TICKET_NAME
from ..options import GIVE_UP_SECONDS, allowed_keys
from .coordinating import LIMITS, farewell, open_coordinator
from .finding_the_host import find_host, fresh_ticket
from .joining import SILENCE_SECONDS, NodeOptions
from .keeping import RunKeeper
from .link import RunLink, RunSource
from .moving import MovingCoordinator

__all__ = ["HostedRun", "host_state"]


def host_state(
    config: RunConfig, run_id: str, store: StateStore | None, given: Coordinator | None = None
) -> Coordinator:
    """The state with which the run begins or goes on: ``given``, or the one in the store, or a fresh one.

    Raises:
        ConfigurationError: the settings cannot work, or saved steps would be lost without ``resume``.
    """
    if given is not None:
        given = replace(given, run_id=run_id)
        check_run(given, prompt=True)
        before = None if store is None else store.load()
        return replace(given, run_state=RunState.PAUSED) if before is not None and _is_paused(before) else given
    state = config.coordinator_state(run_id)
    check_run(state, prompt=True)
    advice = "pass resume=True to go on from there, or name another save_dir or run_id to begin again"
    saved = None if store is None else store.to_resume(state, resume=config.resume, advice=advice)
    if saved is None:
        return state
    # No client is taken over from before: so the first of the list, which is the host, has the weights that count.
    epoch = replace(saved.epoch_state, clients=())
    return replace(saved, config=state.config, model=state.model, epoch_state=epoch)


def _is_paused(state: Coordinator) -> bool:
    return state.run_state is RunState.PAUSED


class HostedRun(RunSource):
    """A run that begins with this process.

    Args:
        config: the settings of the run.
        run_id: its name.
        options: how to open our endpoint.
        loop: the event loop of the network.
        state: where the run begins; None begins with a fresh one, or with what ``config`` resumes.
        tcp: ``host:port`` to listen on beside iroh; port 0 takes any free one. None does not listen.
        allow: public keys that may join; None lets everybody in.
        patience: once somebody else hosts it, seconds without a link after which the run counts as lost.

    Raises:
        ConfigurationError: the settings cannot work.
    """

    is_host = True

    def __init__(
        self,
        config: RunConfig,
        run_id: str,
        options: NodeOptions,
        *,
        loop: LoopThread,
        state: Coordinator | None = None,
        tcp: str | None = None,
        allow: Sequence[bytes | str] | None = None,
        patience: float = GIVE_UP_SECONDS,
    ) -> None:
        self.key = options.key
        self.run_id = run_id
        self._config = config
        self._options = options
        self._loop = loop
        self._tcp = None if tcp is None else split_address(tcp, name="tcp", any_port=True)
        self._allow = None if allow is None else allowed_keys([*allow, options.key.public])
        self._state = state
        self._patience = patience
        check_run(state if state is not None else config.coordinator_state(run_id), prompt=True)

    @override
    async def open(self) -> RunLink:
        async with AsyncExitStack() as stack:
            store = ledger = None
            if self._config.save_dir is not None:
                store = stack.enter_context(StateStore(self._config.save_dir, self.run_id))
                ledger = LedgerFile(store.directory, self.run_id, self.key)
            if self._options.home is not None:
                stack.enter_context(self._options.home)
                self._options.home.keep_run_id(self.run_id)
            state = host_state(self._config, self.run_id, store, self._state)
            if _is_paused(state):
                self.on_note(
                    "the run is paused, as it was when it was saved: distro-optim run resume "
                    f"{quote(state.run_id)} --save-dir {quote(str(self._config.save_dir))} lets it go on"
                )
            node = await self._options.open(self._loop)
            stack.push_async_callback(node.aclose)
            await self._unless_another_hosts(node)
            listeners: list[StreamListener] = [IrohListener(node)]
            ways: tuple[str, ...] = ()
            if self._tcp is not None:
                listener = await TcpListener.bind(*self._tcp)
                listeners.append(listener)
                ways = () if listener.reachable_address is None else (listener.reachable_address,)
            keeper = self._keeper(node, ways)
            if keeper is not None:
                stack.push_async_callback(keeper.aclose)
            offset = unix_offset()
            begins = restartable(state, now=int(time.monotonic() + offset))
            swarms: list[IrohSwarm] = []  # ours, once there is one

            def received() -> dict[bytes, int]:
                return {peer.id: peer.bytes_received for swarm in swarms for peer in swarm.peers()}

            counts = ledger is not None or audit_fraction_of(state.model.checkpoint)
            account = Account(received) if counts else None
            serving = await stack.enter_async_context(AsyncExitStack())
            opened = await open_coordinator(
                serving,
                node,
                lambda desk: self._rules(begins, desk, keeper, account),
                listeners,
                unix_offset=offset,
                on_note=self.on_note,
                store=store,
                ledger=ledger,
            )
            host, service, server = opened.host, opened.service, opened.server
            coordinator = MovingCoordinator(server, self.identity, self.run_id)
            stack.push_async_callback(coordinator.close)
            await coordinator.join()
            if keeper is not None:
                keeper.on_deposed = lambda: self._give_way(keeper, coordinator, serving)
            swarm = IrohSwarm(node, topic_of_run(self.run_id))
            stack.push_async_callback(swarm.aclose)
            swarms.append(swarm)
            models = SharedModels(ModelSharing(node, swarm.publish), swarm, LiveSharing(node, swarm))
            ticket = str(RunTicket(self.run_id, ways, node.addr()))
            closing = stack.pop_all()
        return RunLink(
            coordinator=coordinator,
            swarm=swarm,
            models=models,
            ticket=ticket,
            find_peers=lambda: _visit(opened.rendezvous, node, self._options.peers),
            reports=lambda: host.reports,
            waiting=lambda: _waiting(host, self.identity),
            missing=lambda: host.missing,
            acts=ServiceActs(
                service,
                time.monotonic,
                self._loop.submit,
                own=self.key.public,
                keep=None if self._options.home is None else self._options.home.keep_banned,
            ),
            points=lambda: host.points,
            on_audit=lambda peer, passed: service.audited(peer, time.monotonic(), passed=passed),
            farewell=lambda: farewell(opened) if keeper is None or keeper.hosts else _nothing(),
            aclose=closing.aclose,
            keeper=keeper,
        )

    async def _unless_another_hosts(self, node: Node) -> None:
        """Asks the peers of the last time whether the run has gone on without us.

        Raises:
            ConfigurationError: it has; says how to join it.
        """
        home = self._options.home
        if home is None or not self._config.succession:
            return
        path = home.directory / TICKET_NAME
        try:
            ticket = RunTicket.parse(path.read_text(encoding="utf-8", errors="replace"))
        except (OSError, ProtocolError):
            return
        if ticket.run_id != self.run_id:
            return
        found = await find_host(node, ticket)
        if found is not None and found.host is not None and found.host.id != self.key.public:
            fresh = fresh_ticket(self.run_id, found.host, found.peers)
            raise ConfigurationError(
                f"the run {self.run_id!r} has gone on without this host: peer {found.host.id.hex()[:8]} hosts it now. "
                f'Join it, with run="{fresh}"; to begin again without the others, remove {path}',
                name="run",
            )

    def _keeper(self, node: Node, tcp: Sequence[str]) -> RunKeeper | None:
        """What lets the run go on without us; None if it is not to."""
        if not self._config.succession or self._allow is not None:
            return None  # whom we let in, the next host does not know
        return RunKeeper(
            node,
            self.key,
            self.run_id,
            host=self.key.public,
            way=None,
            on_note=self.on_note,
            term=int(time.time()),  # later than that of any start before, with this clock
            after=self._config.succession_after,
            tcp=tcp,
        )

    def _rules(
        self, begins: Coordinator, desk: VersionDesk, keeper: RunKeeper | None, account: Account | None
    ) -> RunHost:
        return RunHost(
            begins,
            allowed=self._allow,
            banned=() if self._options.home is None else self._options.home.banned(),
            why_not=lambda public: None if public == self.key.public else desk.why_not(public),
            joiner_wait_time=self._config.joiner_wait_time,
            peers_to_start=self._config.peers_to_start or 1,
            max_pending=LIMITS.connections,
            account=account,
            may_end_round=(lambda state: True) if keeper is None else keeper.core.may_go_on,
        )

    async def _give_way(self, keeper: RunKeeper, coordinator: MovingCoordinator, serving: AsyncExitStack) -> None:
        """Somebody else was elected while we were away: we are a peer like any other from now on."""
        link = RemoteCoordinator(
            keeper.connect,
            self.key,
            self.run_id,
            silence=SILENCE_SECONDS,
            give_up_after=self._patience,
            on_bytes=keeper.heard,
            feed=coordinator.feed,
        )
        keeper.coordinator = link
        coordinator.move(link)
        await serving.aclose()


def _waiting(host: RunHost, me: NodeIdentity) -> int:
    """Others that wait for the next epoch."""
    members = {me, *(client.id for client in host.state.epoch_state.clients)}
    return sum(client not in members for client in host.pending)


async def _visit(rendezvous: Rendezvous, node: Node, given: Sequence[EndpointAddr]) -> Sequence[EndpointAddr]:
    return [*given, *rendezvous.visit(node.addr())]


async def _nothing() -> None:
    """There is nobody to wait for."""
