"""A run that this process hosts: its coordinator is here, open to others over iroh and, if wanted, TCP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from shlex import quote
from typing import Final

from typing_extensions import override

from ...comm.addresses import EndpointAddr
from ...comm.iroh.endpoint import Node
from ...comm.iroh.rendezvous import ask_rendezvous
from ...comm.iroh.sharing.exchange import SharedModels
from ...comm.iroh.sharing.live import LiveSharing
from ...comm.iroh.sharing.transfer import ModelSharing
from ...comm.iroh.streams import IrohListener
from ...comm.iroh.swarm import IrohSwarm, topic_of_run
from ...comm.iroh.whereabouts import Whereabouts
from ...comm.loop import LoopThread
from ...comm.signing import public_keys
from ...comm.streams import StreamListener, TcpListener, split_address
from ...coordinator.client.remote import BESIDE_SECONDS, RemoteCoordinator
from ...coordinator.rules.validation import check_run
from ...coordinator.server.host import restartable
from ...coordinator.server.server import unix_offset
from ...coordinator.server.store import StateStore
from ...coordinator.ticket import RunTicket
from ...coordinator.types import Coordinator, NodeIdentity, RunState
from ...coordinator.watchers import watcher_keys
from ...errors import ConfigurationError, ProtocolError
from ..config import RunConfig
from ..environment import TICKET_NAME
from ..options import GIVE_UP_SECONDS
from ..rounds.trust.estate import MAX_KEYS, Estate
from ..rounds.trust.saved_step import SavedStep
from .coordinating import HostingPeer, OpenCoordinator, farewell, open_books, open_coordinator
from .finding_the_host import find_host, fresh_ticket
from .joining import SILENCE_SECONDS, JoinedRun, NodeOptions
from .keeping import RunKeeper
from .link import RunLink, RunSource
from .moving import MovingCoordinator
from .newest import Newest, NewestSearch, ask_all_newest, ask_newest, newest_live

__all__ = ["HostedRun", "host_state"]

ELECTION_SECONDS: Final = 20.0
"""For peers that have voted against us to agree on somebody, before we host after all. Chosen arbitrarily."""

PLACE_LOOKS: Final = 30
PLACE_LOOK_SECONDS: Final = 0.1
"""For a client that has joined to say where it is, which it does at once."""


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


@dataclass(frozen=True)
class _Others:
    """What became of the run while we were away.

    Attributes:
        host: who hosts it now; None if nobody else does.
        state: as far as the others are, if that is further than our own checkpoint.
    """

    host: Whereabouts | None = None
    state: Coordinator | None = None


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
        saved: what the checkpoint that we resume from says of the run; None if there is none.

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
        saved: SavedStep | None = None,
    ) -> None:
        self.key = options.key
        self.run_id = run_id
        self._config = config
        self._options = options
        self._loop = loop
        self._tcp = None if tcp is None else split_address(tcp, name="tcp", any_port=True)
        self._allow = None if allow is None else public_keys([*allow, options.key.public], name="allow")
        self._watchers = watcher_keys(config.observers)
        if self.key.public in self._watchers:
            raise ConfigurationError(
                "observers has the key of the host itself, and who watches a run takes no part in it", name="observers"
            )
        self._state = state
        self._patience = patience
        self._saved = saved
        self._joined: JoinedRun | None = None  # once we know that somebody else hosts the run by now
        check_run(state if state is not None else config.coordinator_state(run_id), prompt=True)

    @property
    @override
    def host(self) -> bytes | None:
        return self.key.public if self._joined is None else self._joined.host

    @override
    async def open(self) -> RunLink:
        async with AsyncExitStack() as stack:
            config, home = self._config, self._options.home
            books = None if config.save_dir is None else open_books(stack, config.save_dir, self.run_id, self.key)
            if home is not None:
                stack.enter_context(home)
                home.keep_run_id(self.run_id)
            state = host_state(config, self.run_id, None if books is None else books.store, self._state)
            if _is_paused(state):
                self.on_note(
                    "the run is paused, as it was when it was saved: distro-optim run resume "
                    f"{quote(state.run_id)} --save-dir {quote(str(config.save_dir))} lets it go on"
                )
            network = await stack.enter_async_context(AsyncExitStack())
            node = await self._options.open(self._loop)
            network.push_async_callback(node.aclose)
            others = await self._ask_the_others(node, state)
            if others.host is not None:
                await network.aclose()
                return await self._join(others, stack)
            listeners: list[StreamListener] = [IrohListener(node)]
            ways: tuple[str, ...] = ()
            if self._tcp is not None:
                listener = await TcpListener.bind(*self._tcp)
                listeners.append(listener)
                ways = () if listener.reachable_address is None else (listener.reachable_address,)
            peer = HostingPeer(
                node=node,
                key=self.key,
                loop=self._loop,
                folder=None if home is None else home.directory,
                keep_banned=None if home is None else home.keep_banned,
            )
            estate = self._estate()
            keeper = self._keeper(peer, ways, estate)
            if keeper is not None:
                stack.push_async_callback(keeper.aclose)
            offset = unix_offset()
            begins = restartable(state, now=int(time.monotonic() + offset))
            if others.state is not None:
                begins = replace(others.state, config=state.config, model=others.state.model)
                offset = begins.run_state_start_unix_timestamp - time.monotonic()  # its clock stood still
            swarms: list[IrohSwarm] = []  # ours, once there is one
            serving = await stack.enter_async_context(AsyncExitStack())
            search = self._search(serving, lambda: opened)
            opened = await open_coordinator(
                serving,
                peer,
                begins,
                listeners,
                estate=estate,
                unix_offset=offset,
                on_note=self.on_note,
                swarm=lambda: swarms[0] if swarms else None,
                may_begin=(lambda clients: True) if search is None or others.state is not None else search,
                may_end_round=(lambda state: True) if keeper is None else keeper.core.may_go_on,
                peers_to_start=config.peers_to_start or 1,
                books=books,
                watchers=self._watchers,
            )
            if others.state is not None:
                opened.go_on(self.identity)
            coordinator = MovingCoordinator(opened.server, self.identity, self.run_id)
            stack.push_async_callback(coordinator.close)
            await coordinator.join()
            here: Callable[[], OpenCoordinator | None] = lambda: opened  # noqa: E731
            if keeper is not None:
                opened.service.meeting_place.host = node.addr
                keeper.begin(opened, lambda: self._give_way(keeper, coordinator, serving))
                here = lambda: keeper.here  # noqa: E731
            swarm = IrohSwarm(node, topic_of_run(self.run_id))
            stack.push_async_callback(swarm.aclose)
            swarm.set_watchers(self._watchers)
            swarms.append(swarm)
            models = SharedModels(ModelSharing(node, swarm.publish), swarm, LiveSharing(node, swarm))
            ticket = str(RunTicket(self.run_id, ways, node.addr()))
            closing = stack.pop_all()
        return RunLink(
            coordinator=coordinator,
            swarm=swarm,
            models=models,
            ticket=ticket,
            find_peers=lambda: self._find_peers(node, here, keeper),
            here=here,
            farewell=lambda: _farewell(here()),
            aclose=closing.aclose,
            keeper=keeper,
        )

    def _estate(self) -> Estate:
        """What we decide by, at first."""
        home = self._options.home
        return Estate(
            allowed=None if self._allow is None else tuple(sorted(self._allow)),
            banned=() if home is None else tuple(sorted(home.banned())),
            joiner_wait_time=self._config.joiner_wait_time,
            keeps_books=self._config.save_dir is not None,
        )

    async def _find_peers(
        self, node: Node, here: Callable[[], OpenCoordinator | None], keeper: RunKeeper | None
    ) -> Sequence[EndpointAddr]:
        opened, given = here(), self._options.peers
        if opened is not None:
            return [*given, *opened.rendezvous.visit(node.addr())]
        host = None if keeper is None else keeper.host
        return given if host is None else [*given, *await ask_rendezvous(node, host)]

    async def _ask_the_others(self, node: Node, state: Coordinator) -> _Others:
        """Asks the peers of the last time whether the run has gone on without us, and how far they are."""
        home = self._options.home
        if home is None or not self._config.succession:
            return _Others()
        try:
            ticket = RunTicket.parse((home.directory / TICKET_NAME).read_text(encoding="utf-8", errors="replace"))
        except (OSError, ProtocolError):
            return _Others()
        if ticket.run_id != self.run_id:
            return _Others()
        until = time.monotonic() + ELECTION_SECONDS
        while True:
            found, answers = await asyncio.gather(
                find_host(node, ticket, waits_for_all=True), ask_all_newest(node, ticket)
            )
            if found is not None and found.host is not None and found.host.id != self.key.public:
                return _Others(host=found)
            if not any(answer.has_left for _, answer in answers) or time.monotonic() >= until:
                break
            await asyncio.sleep(1.0)  # an election is under way: whoever wins it hosts
        standing = {peer.id for peer in ticket.peers} if self._saved is None else self._saved.standing
        live = newest_live(answers, self.run_id, standing, state.progress.step)
        if live is not None:
            self.on_note(
                f"the other peers are in step {live.progress.step} of the run, and our own checkpoint is of step "
                f"{state.progress.step}: the run goes on where they are, and this peer is in it from the next epoch on"
            )
        return _Others(state=live)

    async def _join(self, others: _Others, stack: AsyncExitStack) -> RunLink:
        """Joins the run that we hosted once.

        Raises what :meth:`.JoinedRun.open` does.
        """
        host = others.host.host if others.host is not None else None
        if others.host is None or host is None:
            raise ConfigurationError("nobody else hosts the run", name="run")
        self.on_note(
            f"the run {self.run_id!r} has gone on without this host: peer {host.id.hex()[:8]} hosts it now, and this "
            "one joins it as a peer"
        )
        home = self._options.home
        options = replace(self._options, folder=None if home is None else home.directory)
        ticket = fresh_ticket(self.run_id, host, others.host.peers)
        joined = self._joined = JoinedRun(ticket, options, loop=self._loop, patience=self._patience, saved=self._saved)
        joined.on_note = self.on_note
        self.is_host = False
        link = await joined.open()
        outer = stack.pop_all()

        async def aclose() -> None:
            async with outer:
                await link.aclose()

        return replace(link, aclose=aclose)

    def _search(
        self, stack: AsyncExitStack, opened: Callable[[], OpenCoordinator]
    ) -> Callable[[Collection[NodeIdentity]], bool] | None:
        """Asks those that join for newer checkpoints than ours, if the run goes on from one."""
        if self._saved is None or not self._config.succession:
            return None

        async def ask(peer: bytes) -> Newest | None:
            node, meeting_place = opened().peer.node, opened().service.meeting_place
            for _ in range(PLACE_LOOKS):
                if (place := meeting_place.place_of(peer)) is not None:
                    return await ask_newest(node, place, self.run_id)
                await asyncio.sleep(PLACE_LOOK_SECONDS)
            return None

        search = NewestSearch(
            self._saved,
            ask=ask,
            adopt=lambda saved, client: opened().host.go_on_from(saved.progress, client),
            on_note=self.on_note,
        )
        stack.callback(search.close)
        return lambda clients: search.may_begin([client for client in clients if client != self.identity])

    def _keeper(self, peer: HostingPeer, tcp: Sequence[str], estate: Estate) -> RunKeeper | None:
        """What lets the run go on without us; None if it is not to."""
        if not self._config.succession:
            return None
        if len(estate.allowed or ()) > MAX_KEYS:
            self.on_note(
                f"more than {MAX_KEYS} keys are allowed in, which is more than a next host can be told: if this host "
                "ends, so does the run"
            )
            return None
        keeper = RunKeeper(
            peer,
            self.run_id,
            host=self.key.public,
            way=None,
            on_note=self.on_note,
            term=int(time.time()),  # later than that of any start before, with this clock
            after=self._config.succession_after,
            tcp=tcp,
        )
        keeper.watchers = self._watchers  # if it comes back to us, after others have hosted it
        return keeper

    async def _give_way(self, keeper: RunKeeper, coordinator: MovingCoordinator, serving: AsyncExitStack) -> None:
        """Somebody else was elected while we were away: we are a peer like any other from now on."""
        link = RemoteCoordinator(
            keeper.connect,
            self.key,
            self.run_id,
            silence=SILENCE_SECONDS,
            beside=BESIDE_SECONDS,
            give_up_after=self._patience,
            on_bytes=keeper.heard,
            feed=coordinator.feed,
        )
        link.on_told = self.on_note
        keeper.coordinator = link
        coordinator.move(link)
        await serving.aclose()


async def _farewell(opened: OpenCoordinator | None) -> None:
    """If we still host the run, the others have to hear of its end."""
    if opened is not None:
        await farewell(opened)
