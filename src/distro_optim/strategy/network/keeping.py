"""Keeps a run hosted: carries out what :class:`~..rounds.trust.succeeding.Succession` decides. Decides nothing.

::

    letters   ◄──► the channel of our own kind     states ◄── the link to the coordinator, which moves with the host
    questions ◄──► whereabouts.py, of any peer     our own coordinator, if we are elected: from the last state we saw

One for each peer of a run of our own kind, whoever hosts it at first.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from typing import Final

from ...comm.addresses import EndpointAddr
from ...comm.iroh.streams import IrohListener, open_iroh
from ...comm.iroh.swarm import IrohSwarm
from ...comm.iroh.whereabouts import MAX_PEERS, Whereabouts, WhereaboutsDesk
from ...comm.streams import MemoryListener, Stream
from ...comm.swarm import Channel, Swarm
from ...coordinator.client.remote import RemoteCoordinator
from ...coordinator.types import Coordinator, NodeIdentity
from ...errors import ConfigurationError, DistroError, ExchangeError, ProtocolError
from ..rounds.rounds import Rounds, Stage
from ..rounds.trust.estate import Estate
from ..rounds.trust.saved_step import SavedStep
from ..rounds.trust.succeeding import SUCCESSION_AFTER, Succession
from ..rounds.trust.succession_messages import NUMBER_SIZE, is_letter
from ..rounds.trust.succession_outcomes import Follow, Inherit, Leave, Say, TakeOver, Tell
from .coordinating import Books, HostingPeer, OpenCoordinator, open_books, open_coordinator
from .finding_the_host import answers, fresh_ticket
from .newest import Newest, NewestDesk, claim_of, keep_key, kept_key, state_bytes

__all__ = ["RunKeeper"]

LOOK_SECONDS: Final = 0.5
"""Between two ticks."""

HAND_OVER_SECONDS: Final = 0.2
"""Between two times that a host that leaves says who is to host after it. Chosen below :data:`LOOK_SECONDS`."""

PLACES_SECONDS: Final = 2.0
"""Between two looks at where the peers are, while they are the same: looking takes 0.1 ms for each of them."""

ASK_SECONDS: Final = 2.0
"""Between two times that the peers are asked who hosts, while no host is heard: a peer that waits for an epoch has to
be known to a new host before the next one begins. Chosen arbitrarily."""

ANSWER_SECONDS: Final = 4.0
"""For which answers are waited for: some of those who are asked may be gone. Enough for a handshake over a bad line."""

HOSTED: Final = "hosted"
"""In the folder of checkpoints of a peer that has taken a run over: its states, and the ledger."""

MAX_TOLD: Final = 64
"""Addresses of peers from the host's list and the ticket. Chosen arbitrarily."""

MAX_UNSAID: Final = 64
"""Letters that wait to be announced; newer ones say more."""

_log = logging.getLogger(__name__)


class RunKeeper:
    """See the module. All methods belong to the network's loop.

    Args:
        peer: we.
        run_id: the run.
        host: public key of the host, as far as we know it.
        way: opens a link to the host that we were told of; None if that is us.
        on_note: told what people should know, in a sentence.
        term: in which we host; None if we do not.
        after: seconds for which a host may be silent, if we are the host.
        tcp: addresses of the first host beside its endpoint.
        saved: what our own checkpoint says of the run.

    Attributes:
        coordinator: our link, to be moved to other hosts; set it before :meth:`run`.
        watchers: public keys of those that the host lets watch, as it told us; we would go on with them.
    """

    def __init__(
        self,
        peer: HostingPeer,
        run_id: str,
        *,
        host: bytes | None,
        way: Callable[[], Awaitable[Stream]] | None,
        on_note: Callable[[str], None],
        term: int | None = None,
        after: float = SUCCESSION_AFTER,
        tcp: Sequence[str] = (),
        saved: SavedStep | None = None,
    ) -> None:
        self.core = Succession(
            peer.key, run_id, number=os.urandom(NUMBER_SIZE), host=host, term=term, after=after, may_host=True
        )
        self.coordinator: RemoteCoordinator | None = None
        self.watchers: frozenset[bytes] = frozenset()
        self._give_way: Callable[[], Awaitable[None]] | None = (
            None  # in favour of another, while we host from the start
        )
        self._peer = peer
        self._node = peer.node
        self._key = peer.key
        self._run_id = run_id
        self._tcp = tuple(tcp)
        self._way = way
        self._on_note = on_note
        self._loop = asyncio.get_running_loop()
        self._host: EndpointAddr | None = None  # where it is, once it has changed
        self._memory: MemoryListener | None = None
        self._here: OpenCoordinator | None = None
        self._stack: AsyncExitStack | None = None
        self._rounds: Rounds | None = None
        self._swarm: Swarm | None = None
        self._unsaid: deque[bytes] = deque(maxlen=MAX_UNSAID)
        self._news = asyncio.Event()
        self._moves: asyncio.Queue[Follow | TakeOver] = asyncio.Queue()
        self._state: Coordinator | None = None
        # When the present phase of the run was first seen, and when the host was last heard.
        self._phase_at = self._heard_at = self._loop.time()
        self._asked_at = 0.0
        # Of whom it was seen where they are, and when.
        self._placed: tuple[object, object] = None, None
        self._placed_at = 0.0
        self._ticket: str | None = None
        self._in_ticket: tuple[EndpointAddr, tuple[EndpointAddr, ...], tuple[str, ...]] | None = None
        self._asking: asyncio.Task[None] | None = None
        self._told: dict[bytes, EndpointAddr] = {}
        self._others: tuple[EndpointAddr, ...] = ()  # that we know to dial
        self._desk = WhereaboutsDesk(peer.node, run_id, self.whereabouts)
        before = kept_key(peer.folder) if saved is not None and saved.run_id == run_id else None
        self._claim = b"" if before is None or saved is None else claim_of(saved, before, peer.key.public)
        self._has_kept_key = peer.folder is None
        self._newest_desk = NewestDesk(peer.node, run_id, self.newest)

    # -- what others see -----------------------------------------------------------------------------------------------

    @property
    def hosts(self) -> bool:
        """Whether we host the run now."""
        return self.core.hosts

    @property
    def host(self) -> EndpointAddr | None:
        """Where the host is, if it is not the one of the ticket; None if it is, or there is none."""
        return None if self.core.has_left else self._host

    @property
    def ticket(self) -> str | None:
        """A fresh ticket, with the present host and some peers; None while there is nothing to say that is new. For
        any thread."""
        return self._ticket

    def know(self, peers: Sequence[EndpointAddr]) -> None:
        """Peers that somebody told us of: one that waits outside the epoch hears of the host from nobody else."""
        self._told = dict(list({**self._told, **{peer.id: peer for peer in peers}}.items())[-MAX_TOLD:])

    def lead(self, host: EndpointAddr) -> None:
        """The host is there, as somebody says whom we believe; before the first link."""
        self._host = host
        self.core.lead(host.id)
        if self.coordinator is not None:
            self.coordinator.redirect(f"peer {host.id.hex()[:10]}, which hosts run {self._run_id!r} now,")

    def know_host(self, host: EndpointAddr) -> None:
        """The host is the owner of this key, as the coordinator itself says, which was reached by its address: it can
        be followed by others."""
        if self.core.host is None:
            self.core.lead(host.id)
            self._node.addresses.add([host])

    def begin(self, opened: OpenCoordinator, give_way: Callable[[], Awaitable[None]]) -> None:
        """We host from the start.

        Args:
            opened: the run's coordinator.
            give_way: called if somebody else hosts after all.
        """
        self._here, self._give_way = opened, give_way
        self.core.leave_behind(opened.estate)

    @property
    def here(self) -> OpenCoordinator | None:
        """The run's coordinator, if it is ours: from the start, or since we were elected."""
        return self._here

    def whereabouts(self) -> Whereabouts:
        """What we answer to those who ask."""
        host = self.core.host
        if host is None or self.core.wants_to_know:
            return Whereabouts(self.core.term, None, self._others[:MAX_PEERS])
        address = self._node.addr() if self.core.hosts else self._host or self._address_of(host)
        return Whereabouts(self.core.term, address, self._others[:MAX_PEERS])

    def newest(self) -> Newest:
        """What we answer to a host that has started again."""
        has_weights, state = self.core.running and not self.core.hosts, self._state
        alive = b"" if state is None or not has_weights else state_bytes(state)
        return Newest(alive, self.core.has_left, self._claim)

    def _address_of(self, peer: bytes) -> EndpointAddr:
        return self._node.addresses.lookup(peer, self._loop.time())

    # -- inputs --------------------------------------------------------------------------------------------------------

    async def connect(self) -> Stream:
        """A link to whoever hosts now.

        Raises:
            OSError: nobody does, or it cannot be reached.
        """
        if self._memory is not None:
            return await self._memory.connect()
        if self.core.has_left:
            raise ConnectionRefusedError("the run has no host at the moment, and its peers have not agreed on one yet")
        if self._host is not None:
            return await open_iroh(self._node, self._host)
        if self._way is None:
            raise ConnectionRefusedError("this peer hosts the run itself")
        return await self._way()

    def heard(self) -> None:
        """Bytes of the host have come."""
        self._heard_at = self._loop.time()
        self.core.heard()

    def see(self, state: Coordinator) -> bool:
        """A state of the coordinator; False if it is not to be taken, since we have voted against its host."""
        if not self.core.see(state):
            return False
        before, self._state = self._state, state
        if before is None or before.run_state_start_unix_timestamp != state.run_state_start_unix_timestamp:
            self._phase_at = self._loop.time()
        if self.core.hosts:
            self._heard_at = self._loop.time()
        self._flush()
        return True

    def hear(self, data: bytes) -> bool:
        """What was announced on the channel of our own kind; False if it is something else than ours."""
        if not is_letter(data):
            return False
        try:
            self.core.receive(data, self._loop.time())
        except ProtocolError as error:
            _log.debug("about the run's host: %s", error)
        self._flush()
        return True

    async def run(self, swarm: Swarm, rounds: Rounds) -> None:
        """Until it is cancelled."""
        self._rounds, self._swarm = rounds, swarm
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._speak(swarm))
            tasks.create_task(self._move())
            while True:
                self.core.running = rounds.stage is Stage.RUNNING and rounds.fault is None
                if self.core.running and not self._has_kept_key and self._peer.folder is not None:
                    self._has_kept_key = True  # from now on what is saved is of a run that we were in with this key
                    keep_key(self._peer.folder, self._key)
                with suppress(ExchangeError):
                    self.core.address = self._node.addr()
                if self._here is not None and self.core.hosts:
                    self.core.leave_behind(self._here.estate)
                self.core.tick(self._loop.time())
                self._flush()
                self._look_around()
                await asyncio.sleep(LOOK_SECONDS)

    async def resign(self) -> None:
        """We are about to leave, and say so; a host says so until another one hosts the run. Bound it in time."""
        self.core.resign()
        while True:
            self._flush()
            if self._swarm is not None:
                await self._say(self._swarm)
            if not self.core.is_handing_over:
                return
            await asyncio.sleep(HAND_OVER_SECONDS)
            self.core.hand_over()

    async def aclose(self) -> None:
        """Answers no more, and stops hosting."""
        self._desk.close()
        self._newest_desk.close()
        if self._asking is not None:
            self._asking.cancel()
        await self._stop_hosting()

    # -- what comes of it ----------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        for what in self.core.take():
            match what:
                case Say(data):
                    self._unsaid.append(data)
                    self._news.set()
                case Tell(text):
                    _log.info("%s", text)
                    self._on_note(text)
                case Leave():
                    if self.coordinator is not None and self._memory is None:
                        self.coordinator.redirect()
                case Inherit(estate):
                    if self._peer.keep_banned is not None:
                        self._peer.keep_banned(estate.banned)
                case Follow(address=address):
                    self._host = address
                    self._moves.put_nowait(what)
                case TakeOver():
                    self._moves.put_nowait(what)

    async def _speak(self, swarm: Swarm) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            await self._say(swarm)

    async def _say(self, swarm: Swarm) -> None:
        while self._unsaid:
            try:
                await swarm.announce(self._unsaid.popleft(), channel=Channel.OWN_KIND)
            except DistroError as error:
                _log.debug("a letter about the run's host was lost: %s", error)

    async def _move(self) -> None:
        while True:
            match await self._moves.get():
                case Follow(address=address):
                    await self._stop_hosting()
                    self._node.addresses.add([address])
                    if self._rounds is not None:
                        self._rounds.forget_host()
                    if self._give_way is not None:
                        give_way, self._give_way = self._give_way, None
                        await give_way()
                    if self.coordinator is not None:
                        self.coordinator.redirect(
                            f"peer {address.id.hex()[:10]}, which hosts run {self._run_id!r} now,"
                        )
                case TakeOver(before=before, estate=estate):
                    try:
                        await self._host_it(before, estate)
                    except DistroError as error:
                        self._on_note(f"this peer was elected to host the run, but cannot: {error}")

    async def _host_it(self, before: bytes | None, estate: Estate) -> None:
        """Opens a coordinator that goes on from the last state that we have seen.

        Raises:
            DistroError: it cannot be opened.
        """
        state = self._state
        if self._here is not None or state is None:
            return  # it is open already, and only the term has changed
        gone = None if before is None else NodeIdentity.from_single_key(before)
        now = self._loop.time()
        # The run's clock stood still while nobody hosted it, whatever the clocks of this machine and the other say.
        offset = state.run_state_start_unix_timestamp + max(0.0, self._heard_at - self._phase_at) - now

        async with AsyncExitStack() as stack:
            memory = MemoryListener("this process")
            opened = await open_coordinator(
                stack,
                self._peer,
                state,
                [IrohListener(self._node), memory],
                estate=estate,
                unix_offset=offset,
                on_note=self._on_note,
                swarm=lambda: self._swarm if isinstance(self._swarm, IrohSwarm) else None,
                may_end_round=self.core.may_go_on,
                books=self._books(stack, estate),
                watchers=self.watchers,
            )
            opened.go_on(gone)
            opened.service.meeting_place.host = self._node.addr
            self._stack = stack.pop_all()
        self._here, self._memory = opened, memory
        if self._rounds is not None:
            self._rounds.forget_host()
        if self.coordinator is not None:
            self.coordinator.redirect(f"the coordinator of run {self._run_id!r}, hosted here,")

    def _books(self, stack: AsyncExitStack, estate: Estate) -> Books | None:
        """Where the run is written down from now on, if the host before did that."""
        if not estate.keeps_books:
            return None
        folder, why = self._peer.folder, "it has no folder for checkpoints (checkpoint_dir)"
        if folder is not None:
            try:
                return open_books(stack, folder / HOSTED, self._run_id, self._key, after=estate.ledger)
            except ConfigurationError as error:
                why = str(error)
        self._on_note(
            f"the host before kept the run's states and the ledger of points; this peer does not while it hosts: {why}"
        )
        return None

    async def _stop_hosting(self) -> None:
        stack, self._stack = self._stack, None
        self._here = self._memory = None
        if stack is not None:
            await stack.aclose()

    # -- asking --------------------------------------------------------------------------------------------------------

    def _look_around(self) -> None:
        """Remembers where peers are; and asks them who hosts, while we hear no host."""
        now = self._loop.time()
        state = self._state
        clients = None if state is None else state.epoch_state.clients
        about = clients, self._told
        if clients is not None and (about != self._placed or now - self._placed_at >= PLACES_SECONDS):
            self._placed, self._placed_at = about, now
            keys = [client.id.p2p_identity for client in clients]
            others = {key: self._address_of(key) for key in keys}
            others |= {
                key: peer for key, peer in self._told.items() if others.get(key, peer).is_empty or key not in keys
            }
            others.pop(self._key.public, None)
            known = [peer for peer in others.values() if not peer.is_empty]
            if len(known) < len(others):  # the ticket is to name them as soon as it is known where they are
                self._placed = None, None
            if known:
                self._others = tuple(known)
                self._renew_ticket()
        if not self.core.wants_to_know or now - self._asked_at < ASK_SECONDS:
            return
        if self._asking is None or self._asking.done():
            self._asked_at = now
            self._asking = asyncio.create_task(self._ask(self._others))

    def _renew_ticket(self) -> None:
        with suppress(DistroError):  # the node is closing
            answer = self.whereabouts()
            if answer.host is not None and not answer.host.is_empty:
                tcp = self._tcp if self._host is None and self._memory is None else ()
                content = answer.host, self._others, tcp
                if content != self._in_ticket:
                    self._in_ticket = content
                    self._ticket = str(fresh_ticket(self._run_id, *content))

    async def _ask(self, peers: Sequence[EndpointAddr]) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(ANSWER_SECONDS), aclosing(answers(self._node, peers, self._run_id)) as told:
                async for peer, found in told:
                    if found.host is not None:
                        self.core.told(peer, found.host.id, found.term, found.host)
                        self._flush()
