"""Rounds in an event loop: bytes and answers in, bytes and actions out; nothing is decided here.

:class:`RoundDriver` feeds :class:`~.rounds.Rounds` with states of the coordinator, announcements, downloads and time
and carries out what comes of it. What changes the model goes to the training thread, through a
:class:`~.mailbox.Mailbox`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, Final

from ...comm.addresses import EndpointAddr
from ...comm.swarm import Channel, Swarm
from ...compress import CompressedUpdate, TilePlan
from ...coordinator.client import CoordinatorClient
from ...coordinator.messages import Join
from ...coordinator.types import Coordinator
from ...errors import BlobUnavailableError, CoordinatorLinkError, DistroError, ExchangeError, ProtocolError
from ..rounds import actions as act
from ..rounds.actions import Action
from ..rounds.phases import Rounds, Stage
from ..rounds.results import EncodedResult
from .journal import Journal
from .mailbox import Mailbox

__all__ = ["FindPeers", "RoundDriver"]

FindPeers = Callable[[], Awaitable[Sequence[EndpointAddr]]]
"""Where the other peers of the run are, as somebody knows who was asked; raises DistroError or OSError."""

MAX_FETCHES: Final = 8
"""Downloads at a time. Chosen so that eight peers' results flow at once, and 32 do not crowd out gossip."""

PUBLISH_SECONDS: Final = 0.005
"""Enough for a report to leave this process before its thread is busy with a result. Chosen arbitrarily."""

MAX_TO_ASK_THE_OWNER: Final = 15
"""In a swarm of so many others everybody fetches a result from its owner. Asking the nearest first, as Psyche's clients
do, costs a round trip for each who has not got it yet. Chosen arbitrarily."""

FETCH_SECONDS: Final = 20.0
"""For one attempt at one result; results are of use for two rounds. Chosen arbitrarily."""

OWNER_SECONDS: Final = 4.0
"""After which others are asked for a result whose owner is silent or slow; what it gave until then is kept, and a peer
that has not got it says so at once. Above what most results take. Chosen arbitrarily."""

MAX_MEETINGS: Final = 8
"""Peers to get in touch with at once; gossip brings the others."""

FIRST_MEETING_SECONDS: Final = 0.25
MAX_MEETING_SECONDS: Final = 10.0
"""Between two attempts to find neighbours: those whom the coordinator has told of us later still turn us away."""

_RESULT_TAG: Final = re.compile(r"(?:distro-result|downloaded-distro-result-\w+)_(\d+)")

_log = logging.getLogger(__name__)


class RoundDriver:
    """See the module. All methods belong to one event loop.

    Args:
        rounds: decides.
        coordinator: joined already.
        swarm: of the run.
        mailbox: what the training thread has to do goes there.
        journal: takes notes.
        find_peers: finds addresses of peers that gossip does not lead to; None leaves it to gossip.
        on_state: told when the coordinator's state has changed, and all that comes of it is under way.
        generator: for whom to meet first.
    """

    def __init__(
        self,
        *,
        rounds: Rounds,
        coordinator: CoordinatorClient,
        swarm: Swarm,
        mailbox: Mailbox,
        journal: Journal,
        find_peers: FindPeers | None = None,
        on_state: Callable[[], None] = lambda: None,
        generator: random.Random | None = None,
    ) -> None:
        self.rounds = rounds
        self.coordinator = coordinator
        self.swarm = swarm
        self._mailbox = mailbox
        self._journal = journal
        self._find_peers = find_peers
        self._on_state = on_state
        self._generator = generator or random.Random()
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._to_peers: asyncio.Queue[act.StoreBlob | act.Announce | act.AnnounceWeights] = asyncio.Queue()
        self._to_coordinator: asyncio.Queue[Callable[[], Awaitable[None]]] = asyncio.Queue()
        self._fetches: dict[bytes, tuple[int, asyncio.Task[None]]] = {}
        self._slots = asyncio.Semaphore(MAX_FETCHES)
        self._allowed: frozenset[bytes] = frozenset()
        self._new_peers = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._to_encode = asyncio.Event()

    async def run(self) -> None:
        """Returns when the run is over.

        Raises:
            CoordinatorLinkError: the link to the coordinator is gone for good.
            ExchangeError: our own node was closed.
        """
        work: list[Coroutine[Any, Any, None]] = [
            self._follow(),
            *(self._hear(channel) for channel in Channel),
            self._tell_peers(),
            self._tell_coordinator(),
            self._encode(),
            self._meet(),
        ]
        tasks = [self._loop.create_task(job) for job in work]
        try:
            await asyncio.wait([self._over, *tasks], return_when=asyncio.FIRST_COMPLETED)
            if not self._over.done():
                for task in tasks:
                    if task.done():
                        task.result()
            else:
                self._over.result()
                await self._drain()
        finally:
            if self._timer is not None:
                self._timer.cancel()
            tasks += [task for _, task in self._fetches.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # -- answers of the trainer ----------------------------------------------------------------------------------------

    def initialized(self, plan: TilePlan, names: Sequence[str]) -> None:
        self._feed(lambda now: self.rounds.initialized(plan, names, now))

    def initialization_failed(self, reason: str) -> None:
        self._feed(lambda now: self.rounds.initialization_failed(reason, now))

    def trained(self, step: int, update: CompressedUpdate, own: object, loss: float | None) -> None:
        self._journal.trained(step, loss)
        try:
            self.rounds.address = self.swarm.address  # it changes with the network that the machine is in
        except ExchangeError:
            pass  # the node is closing
        self._feed(lambda now: self.rounds.trained(step, update, own, now))

    def cancelled(self, step: int) -> None:
        self._feed(lambda now: self.rounds.cancelled(step, now))

    def weights_hashed(self, step: int, digests: Sequence[bytes]) -> None:
        self._journal.hashed(step, digests)
        self._feed(lambda now: self.rounds.weights_hashed(step, digests, now))

    # -- what comes in -------------------------------------------------------------------------------------------------

    def _feed(self, give: Callable[[float], list[Action]]) -> None:
        """One input, and all that comes of it."""
        if self._over.done():
            return
        try:
            for action in give(self._loop.time()):
                self._carry_out(action)
        except Exception as error:
            # Raised where somebody waits: an answer of the trainer comes from a callback that nobody looks at.
            if not self._over.done():
                self._over.set_exception(error)
            return
        self._set_timer()

    async def _follow(self) -> None:
        async for state in self.coordinator.states():
            self._see(state)
        raise CoordinatorLinkError("the link to the coordinator was closed")

    def _see(self, state: Coordinator) -> None:
        self._journal.state(state)
        self._feed(lambda now: self.rounds.coordinator_state(state, now))
        self._on_state()

    async def _hear(self, channel: Channel) -> None:
        rounds = self.rounds
        receive = rounds.receive if channel is Channel.RUN else rounds.receive_weights
        async for announcement in self.swarm.announcements(channel):
            self._feed(lambda now, heard=announcement: receive(heard, now))  # type: ignore[misc]
            # A peer that floods us must not keep the loop from everything else.
            await asyncio.sleep(0)
        raise ExchangeError("the swarm was closed")

    def _set_timer(self) -> None:
        due = self.rounds.next_timer()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if due is not None and not self._over.done():
            self._timer = self._loop.call_at(due, self._feed, self.rounds.tick)

    # -- what goes out -------------------------------------------------------------------------------------------------

    def _carry_out(self, action: Action) -> None:
        match action:
            case act.CancelTraining(step):
                self._mailbox.cancel(step)
            case act.AllowPeers(peers):
                self._allowed = peers
                self.swarm.set_allowed(peers)
                self._new_peers.set()
            case act.StoreBlob() | act.Announce() | act.AnnounceWeights():
                self._to_peers.put_nowait(action)
            case act.PublishResult():
                self._to_encode.set()
            case act.FetchBlob():
                self._begin_fetch(action)
            case act.Forget(before_step):
                self._forget(before_step)
            case act.SendWitness(step=step, witness=witness):
                metadata = self._journal.metadata(step)
                self._to_coordinator.put_nowait(lambda: self.coordinator.witness(witness, metadata))
            case act.SendWarmupWitness(witness):
                self._to_coordinator.put_nowait(lambda: self.coordinator.warmup_witness(witness))
            case act.SendHealthChecks(checks):
                self._to_coordinator.put_nowait(lambda: self.coordinator.health_check(checks))
            case act.Rejoin():
                self._to_coordinator.put_nowait(lambda: self.coordinator.send(Join(self.coordinator.run_id)))
            case act.Dropped():
                _log.debug("dropped: %s", action)
            case act.ResultMissing() | act.Desynced():
                self._journal.event(action)
                self._mailbox.tell(action)
            case act.RunEnded():
                self._journal.ended(action)
                self._mailbox.put(action)
                if not self._over.done():
                    self._over.set_result(None)
            case _:
                self._mailbox.put(action)

    async def _tell_peers(self) -> None:
        """In order: what is announced must have been stored."""
        while True:
            action = await self._to_peers.get()
            try:
                match action:
                    case act.StoreBlob(data=data, tag=tag):
                        await self.swarm.publish(data, tag)
                    case act.Announce(data):
                        await self.swarm.announce(data)
                    case act.AnnounceWeights(data):
                        await self.swarm.announce(data, channel=Channel.OWN_KIND)
            except DistroError as error:
                # Said again later; and if the swarm is closed, whoever listens to it ends the run.
                self._journal.note(f"a message to the peers was lost: {error}")
            finally:
                self._to_peers.task_done()

    async def _tell_coordinator(self) -> None:
        while True:
            send = await self._to_coordinator.get()
            try:
                await send()
            finally:
                self._to_coordinator.task_done()

    async def _encode(self) -> None:
        """Beside the loop, which has the next round to begin meanwhile."""
        while True:
            await self._to_encode.wait()
            self._to_encode.clear()
            await asyncio.sleep(PUBLISH_SECONDS)
            encode = self.rounds.encoding()
            encoded: EncodedResult | None = None
            if encode is not None:
                try:
                    encoded = await asyncio.to_thread(encode)
                except ProtocolError:
                    pass  # found again, and told, below
            self._feed(lambda now, encoded=encoded: self.rounds.publish(now, encoded))  # type: ignore[misc]

    async def _drain(self) -> None:
        """The last words of a finished run; nobody waits for them long."""
        try:
            async with asyncio.timeout(1.0):
                await self._to_coordinator.join()
        except TimeoutError:
            pass

    # -- downloads -----------------------------------------------------------------------------------------------------

    def _begin_fetch(self, action: act.FetchBlob) -> None:
        blob, step = action.ticket.hash, _step_of(action.tag)
        if blob in self._fetches:
            # One answer is for all who asked, and must come as long as the latest of them waits.
            first, task = self._fetches[blob]
            self._fetches[blob] = max(first, step), task
            return
        task = self._loop.create_task(self._fetch(action))
        self._fetches[blob] = (step, task)

    async def _fetch(self, action: act.FetchBlob) -> None:
        blob = action.ticket.hash
        data: bytes | None = None
        is_slow = False
        try:
            async with self._slots, asyncio.timeout(FETCH_SECONDS):
                data = await self._get(action)
        except (DistroError, TimeoutError) as error:
            is_slow = isinstance(error, TimeoutError) and not isinstance(error, DistroError)
            _log.info("a result could not be fetched: %s", error)
        # Before the answer: it may bring the same action again.
        self._fetches.pop(blob, None)
        if data is not None:
            whole = data
            self._feed(lambda now: self.rounds.fetched(blob, whole, now))
        else:
            self._feed(lambda now: self.rounds.fetch_failed(blob, now, is_slow=is_slow))

    async def _get(self, action: act.FetchBlob) -> bytes:
        """From the one who made it, who surely has it; in a large swarm from whoever is near, to spare its line."""
        ticket, max_size, tag = action.ticket, action.max_size, action.tag
        if len(action.providers) > MAX_TO_ASK_THE_OWNER:
            return await self.swarm.fetch(ticket, action.providers, max_size=max_size, tag=tag)
        others = [peer for peer in action.providers if peer != ticket.addr.id]
        try:
            async with asyncio.timeout(OWNER_SECONDS if others else None):
                return await self.swarm.fetch(ticket, max_size=max_size, tag=tag)
        except (BlobUnavailableError, TimeoutError) as error:
            if not others:
                raise
            is_slow = isinstance(error, TimeoutError)
        try:
            # Not the owner among them: if its line is dead, it would be waited for again.
            elsewhere = replace(ticket, addr=EndpointAddr(others[0]))
            return await self.swarm.fetch(elsewhere, others, max_size=max_size, tag=tag)
        except BlobUnavailableError:
            if not is_slow:
                raise
        return await self.swarm.fetch(ticket, max_size=max_size, tag=tag)

    def _forget(self, before_step: int) -> None:
        for blob, (step, task) in list(self._fetches.items()):
            if step < before_step:
                task.cancel()
                del self._fetches[blob]
        self.swarm.forget(lambda tag: _step_of(tag, default=before_step) < before_step)

    # -- finding each other --------------------------------------------------------------------------------------------

    async def _meet(self) -> None:
        """Gets in touch with the peers of the epoch, again while nobody of them passes messages on to us."""
        pause = FIRST_MEETING_SECONDS
        while True:
            try:
                async with asyncio.timeout(pause):
                    await self._new_peers.wait()
                pause = FIRST_MEETING_SECONDS
            except TimeoutError:
                pause = min(2 * pause, MAX_MEETING_SECONDS)
            self._new_peers.clear()
            neighbors = {peer.id for peer in self.swarm.peers() if peer.is_neighbor}
            strangers = sorted(self._allowed - neighbors)
            if strangers and len(neighbors) < MAX_MEETINGS and self.rounds.stage is not Stage.ENDED:
                await self._introduce(self._generator.sample(strangers, min(len(strangers), MAX_MEETINGS)))

    async def _introduce(self, strangers: Sequence[bytes]) -> None:
        known: dict[bytes, EndpointAddr] = {}
        if self._find_peers is not None:
            try:
                known = {address.id: address for address in await self._find_peers()}
            except (DistroError, OSError) as error:
                _log.info("nobody tells where the peers are: %s", error)
        try:
            await self.swarm.join([known.get(peer, EndpointAddr(peer)) for peer in strangers])
        except DistroError as error:
            _log.info("no peer could be met: %s", error)


def _step_of(tag: str, default: int = 0) -> int:
    match = _RESULT_TAG.fullmatch(tag)
    return int(match[1]) if match else default
