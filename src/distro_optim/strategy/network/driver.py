"""Runs :class:`~distro_optim.strategy.rounds.rounds.Rounds` in an event loop. Nothing is decided here.

:class:`RoundDriver` feeds it with states of the coordinator, announcements, downloads and time, and carries out the
actions that come of it. What changes the model goes to the training thread, through a :class:`~.mailbox.Mailbox`.
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
from ...comm.swarm import FULL_MESH, Channel, Swarm
from ...compress import CompressedUpdate, TilePlan
from ...coordinator.client.interface import CoordinatorClient
from ...coordinator.messages import Join
from ...coordinator.types import Coordinator
from ...errors import BlobUnavailableError, CoordinatorLinkError, DistroError, ExchangeError, ProtocolError, RunError
from ...verify.audit import Verdict
from ...verify.calibrate import Noise
from ...verify.recompute import Evidence
from ..port import Note
from ..rounds import actions as act
from ..rounds.actions import Action
from ..rounds.audits.momentum_watch import OPENING_TAG
from ..rounds.results import EncodedResult
from ..rounds.rounds import Rounds, Stage
from .journal import Journal
from .keeping import RunKeeper
from .mailbox import Mailbox
from .to_peers import ToPeers

__all__ = ["FindPeers", "RoundDriver", "lacks_neighbors"]

FindPeers = Callable[[], Awaitable[Sequence[EndpointAddr]]]
"""Asks somebody where the other peers of the run are; raises DistroError or OSError."""

MAX_FETCHES: Final = 8
"""Downloads at a time, of results and of opened momenta each. Chosen so that the results of eight peers arrive at once,
and those of 32 leave room for gossip."""

MAX_SMALL_FETCHES: Final = 32
"""The same for small results, which take a round trip each, however fast the line is: of 127 peers they came eight at a
time, sixteen round trips after one another."""

SMALL_RESULT: Final = 128 << 10
"""Bytes. 32 of them take as long as eight of the results of 120 million parameters."""

PUBLISH_SECONDS: Final = 0.005
"""Enough for a report to leave this process before the thread is busy with a result. Chosen arbitrarily."""

FETCH_SECONDS: Final = 20.0
"""For one attempt to fetch a result; results are wanted for two rounds. Chosen arbitrarily."""

OWNER_SECONDS: Final = 4.0
"""After which others are asked for a result whose owner is silent or slow. What arrived until then is kept, and a peer
that does not have the result says so at once. Longer than most results take. Chosen arbitrarily."""

HEARD_IN_A_ROW: Final = 8
"""Announcements between two turns of the event loop: a few milliseconds of work. Chosen arbitrarily."""

MAX_MEETINGS: Final = 8
"""Peers to connect to at once; gossip brings the others."""

ENOUGH_NEIGHBORS: Final = 4
"""With so many a peer asks for no more, unless all peers of the epoch have room for each other (:data:`FULL_MESH`):
gossip takes in whoever asks and sends another away for it, who would ask in turn. Half of what gossip has room for in a
run of many."""

FIRST_MEETING_SECONDS: Final = 0.25
MAX_MEETING_SECONDS: Final = 10.0
"""Between two attempts to find neighbours: peers that the coordinator has not told about us yet turn us away."""

MAX_BEHIND: Final = 16
"""Actions that wait for one that watches, above which it audits nothing: some four rounds. Chosen arbitrarily."""

MAX_UNAPPLIED: Final = 256
"""Actions that wait for one that watches, above which it gives up: the run does not wait, and each holds the results of
a round. Chosen arbitrarily."""

_STEP_TAG: Final = re.compile(rf"(?:distro-result|downloaded-distro-result-\w+|{OPENING_TAG})_(\d+)")

_log = logging.getLogger(__name__)


class RoundDriver:
    """See the module. All methods belong to one event loop.

    Args:
        rounds: decides what is to be done.
        coordinator: the link to it; we have joined already.
        swarm: of the run.
        mailbox: where work for the training thread goes.
        journal: takes notes.
        find_peers: finds addresses of peers that gossip does not lead to; None leaves it to gossip.
        on_state: called when the coordinator's state has changed and everything that follows from it is under way.
        on_result: called with the tag and the bytes of each result, ours and others'; returns at once.
        on_audit: called with the public key of a peer that auditors have decided about, and whether it passed; returns
            whether something was done about one that failed.
        keeper: sees to it that the run has a host; None if nobody does.
        generator: picks the peers to connect to first.
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
        on_result: Callable[[str, bytes], None] | None = None,
        on_audit: Callable[[bytes, bool], bool] = lambda peer, passed: False,
        keeper: RunKeeper | None = None,
        generator: random.Random | None = None,
    ) -> None:
        self.rounds = rounds
        self.coordinator = coordinator
        self.swarm = swarm
        self._mailbox = mailbox
        self._journal = journal
        self._find_peers = find_peers
        self._on_state = on_state
        self._on_result = on_result
        self._on_audit = on_audit
        self._keeper = keeper
        self._generator = generator or random.Random()
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._to_peers = ToPeers(swarm, on_result=self._tell_of_result, on_lost=journal.tell)
        self._to_coordinator: asyncio.Queue[Callable[[], Awaitable[None]]] = asyncio.Queue()
        self._fetches: dict[bytes, tuple[int, asyncio.Task[None]]] = {}
        self._slots = asyncio.Semaphore(MAX_FETCHES)
        self._small_slots = asyncio.Semaphore(MAX_SMALL_FETCHES)
        # Who is audited decides how slowly its opening comes: nobody else's result may have to wait for that.
        self._opening_slots = asyncio.Semaphore(MAX_FETCHES)
        self._allowed: frozenset[bytes] = frozenset()
        self._new_peers = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._due: float | None = None
        self._to_encode = asyncio.Event()
        self._left_out: int | None = None  # the latest step of which something was not audited

    async def run(self) -> None:
        """Takes part in the run; returns when it is over.

        Raises:
            RunError: we only watch, and cannot keep up.
            CoordinatorLinkError: the link to the coordinator is gone for good.
            ExchangeError: our own node was closed.
        """
        work: list[Coroutine[Any, Any, None]] = [
            self._follow(),
            *(self._hear(channel) for channel in Channel),
            self._to_peers.run(),
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
        """The model is loaded."""
        self._feed(lambda now: self.rounds.initialized(plan, names, now))

    def initialization_failed(self, reason: str) -> None:
        """The model could not be loaded."""
        self._feed(lambda now: self.rounds.initialization_failed(reason, now))

    def trained(self, step: int, update: CompressedUpdate, own: object, loss: float | None) -> None:
        """A batch was trained; ``loss`` is None if the trainer does not know it."""
        self._journal.trained(step, loss)
        try:
            self.rounds.address = self.swarm.address  # it changes with the network that the machine is in
        except ExchangeError:
            pass  # the node is closing
        self._feed(lambda now: self.rounds.trained(step, update, own, now))

    def cancelled(self, step: int) -> None:
        """A training was stopped before it came to a result."""
        self._feed(lambda now: self.rounds.cancelled(step, now))

    def weights_hashed(self, step: int, digests: Sequence[bytes]) -> None:
        """The weights at ``step`` were hashed: 32 bytes for each tensor."""
        self._journal.hashed(step, digests)
        self._feed(lambda now: self.rounds.weights_hashed(step, digests, now))

    def audited(self, step: int, trainer: bytes, found: Evidence, own: Evidence | None) -> None:
        """The result of a peer was audited."""
        self._feed(lambda now: self.rounds.audited(step, trainer, found, own, now))

    def momentum_committed(self, step: int, root: bytes, decays: Sequence[float]) -> None:
        """Our momentum after ``step`` was hashed."""
        self._feed(lambda now: self.rounds.momentum_committed(step, root, decays, now))

    def momentum_opened(self, step: int, data: bytes, blob: bytes) -> None:
        """Parts of our momentum are there to be shown; ``blob`` is their BLAKE3."""
        self._feed(lambda now: self.rounds.momentum_opened(step, data, blob, now))

    def own_momentum_audited(self, step: int, noise: Noise) -> None:
        """We have looked at our own momentum."""
        self._feed(lambda now: self.rounds.own_momentum_audited(step, noise, now))

    def momentum_audited(self, step: int, trainer: bytes, verdict: Verdict) -> None:
        """The momentum of a peer was audited."""
        self._feed(lambda now: self.rounds.momentum_audited(step, trainer, verdict, now))

    def weights_repaired(self, step: int, digests: Sequence[bytes]) -> None:
        """Tensors that were wrong at ``step`` were replaced; the digests are of all tensors, as they are now."""
        self._journal.hashed(step, digests)
        self._feed(lambda now: self.rounds.weights_repaired(step, digests, now))

    def repair_failed(self, step: int) -> None:
        """They could not be replaced."""
        self._feed(lambda now: self.rounds.repair_failed(step, now))

    # -- what comes in -------------------------------------------------------------------------------------------------

    def _feed(self, give: Callable[[float], list[Action]]) -> None:
        """One input, and all that comes of it."""
        if self._over.done():
            return
        try:
            for action in give(self._loop.time()):
                self._carry_out(action)
        except Exception as error:
            # Raised by run(): an answer of the trainer comes from a callback whose errors nobody sees.
            if not self._over.done():
                self._over.set_exception(error)
            return
        self._set_timer()

    async def _follow(self) -> None:
        async for state in self.coordinator.states():
            self._see(state)
        raise CoordinatorLinkError("the link to the coordinator was closed")

    def _see(self, state: Coordinator) -> None:
        if self._keeper is not None and not self._keeper.see(state):
            return
        self._journal.state(state)
        self._feed(lambda now: self.rounds.coordinator_state(state, now))
        self._on_state()

    async def _hear(self, channel: Channel) -> None:
        rounds = self.rounds
        receive = rounds.receive if channel is Channel.RUN else rounds.receive_weights
        keeper = self._keeper if channel is Channel.OWN_KIND else None
        in_a_row = 0
        async for announcement in self.swarm.announcements(channel):
            if keeper is not None and keeper.hear(announcement.data):
                continue
            self._feed(lambda now, heard=announcement: receive(heard, now))  # type: ignore[misc]
            # A peer that floods us must not keep the loop from doing anything else.
            in_a_row += 1
            if in_a_row % HEARD_IN_A_ROW == 0:
                await asyncio.sleep(0)
        raise ExchangeError("the swarm was closed")

    def _set_timer(self) -> None:
        due = self.rounds.next_timer()
        if self._timer is not None:
            # Not asked of the timer itself: of one that is due at once, uvloop knows no time.
            if self._due == due:
                return  # as after most messages
            self._timer.cancel()
            self._timer = None
        if due is not None and not self._over.done():
            self._timer, self._due = self._loop.call_at(due, self._wake), due

    def _wake(self) -> None:
        self._timer = None
        self._feed(self.rounds.tick)

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
                self._to_peers.put(action)
            case act.HashWeights():
                self._to_peers.expect_report()
                self._mailbox.put(action)
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
                self._journal.contributions.dropped(action.sender, action.reason)
            case act.AuditSettled():
                self._audit_settled(action)
            case act.ResultMissing() | act.Desynced():
                self._journal.event(action)
                self._mailbox.put_event(action)
            case act.RunEnded():
                self._journal.ended(action)
                self._mailbox.put(action)
                if not self._over.done():
                    self._over.set_result(None)
            case act.AuditResults() if self.rounds.watches and self._mailbox.num_waiting > MAX_BEHIND:
                # Weights have to keep up with the run; who audits more than it can compute leaves some out.
                if action.of_step != self._left_out:
                    self._left_out = action.of_step
                    self._mailbox.put_event(Note(f"step {action.of_step}: not audited, since we are behind the run"))
            case act.ApplyResults() if self.rounds.watches and self._mailbox.num_waiting > MAX_UNAPPLIED:
                self._fall_behind(action.step)
            case act.ApplyResults():
                self._journal.contributions.counted(action.counted)
                self._mailbox.put(action)
            case _:
                self._mailbox.put(action)

    def _fall_behind(self, step: int) -> None:
        if not self._over.done():
            text = f"this machine applies results more slowly than the run makes them: {self._mailbox.num_waiting} "
            advice = f"actions wait at step {step}, and it cannot follow; watch the run with a faster machine"
            self._over.set_exception(RunError(text + advice))

    def _audit_settled(self, action: act.AuditSettled) -> None:
        acted = self._on_audit(action.trainer, action.passed)
        if action.passed:
            return
        done = ": it is taken out of the run" if acted else ""
        text = f"peer {action.trainer.hex()[:8]} does not train what it is given{done}; in step {action.step} its "
        self._journal.tell(text + action.words)
        self._mailbox.put_event(Note(text + action.words))

    async def _tell_coordinator(self) -> None:
        while True:
            send = await self._to_coordinator.get()
            try:
                await send()
            finally:
                self._to_coordinator.task_done()

    async def _encode(self) -> None:
        """Encodes our results in another thread, so that the loop can begin the next round meanwhile."""
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
                    pass  # publish() meets the same error again, and reports it
            self._feed(lambda now, encoded=encoded: self.rounds.publish(now, encoded))  # type: ignore[misc]

    async def _drain(self) -> None:
        """Sends what is still meant for the coordinator of a finished run, but does not wait long."""
        try:
            async with asyncio.timeout(1.0):
                await self._to_coordinator.join()
        except TimeoutError:
            pass

    # -- downloads -----------------------------------------------------------------------------------------------------

    def _begin_fetch(self, action: act.FetchBlob) -> None:
        blob, step = action.ticket.hash, _step_of(action.tag)
        if blob in self._fetches:
            # One answer is for all that asked, and must come for as long as the latest of them waits.
            first, task = self._fetches[blob]
            self._fetches[blob] = max(first, step), task
            return
        try:
            here = self.swarm.at_hand(action.ticket, max_size=action.max_size, tag=action.tag)
        except DistroError as error:
            _log.info("a result that came along was not kept: %s", error)
            here = None
        if here is not None:
            self._loop.call_soon(self._fetched, action, here)  # not before what else comes of the same input
            return
        task = self._loop.create_task(self._fetch(action))
        self._fetches[blob] = (step, task)

    async def _fetch(self, action: act.FetchBlob) -> None:
        blob = action.ticket.hash
        data: bytes | None = None
        is_slow = False
        is_small = action.max_size <= SMALL_RESULT
        slots = self._opening_slots if _is_opening(action.tag) else self._small_slots if is_small else self._slots
        try:
            async with slots, asyncio.timeout(FETCH_SECONDS):
                data = await self._get(action)
        except (DistroError, TimeoutError) as error:
            is_slow = isinstance(error, TimeoutError) and not isinstance(error, DistroError)
            _log.info("a result could not be fetched: %s", error)
        # Before the answer: it may bring the same action again.
        self._fetches.pop(blob, None)
        if data is not None:
            self._fetched(action, data)
        else:
            self._feed(lambda now: self.rounds.fetch_failed(blob, now, is_slow=is_slow))

    def _fetched(self, action: act.FetchBlob, data: bytes) -> None:
        self._tell_of_result(action.tag, data)
        self._feed(lambda now: self.rounds.fetched(action.ticket.hash, data, now))

    def _tell_of_result(self, tag: str, data: bytes) -> None:
        if self._on_result is not None and not _is_opening(tag):
            self._on_result(tag, data)

    async def _get(self, action: act.FetchBlob) -> bytes:
        """Fetches a result: from its owner, which has it for sure, and from others if it is slow or gone.

        Asking the nearest peer first, as Psyche's clients do, costs a round trip for each peer that does not have it
        yet. It spares no line either: each peer sends its own result to all others, and gets one from each of them.
        """
        ticket, max_size, tag = action.ticket, action.max_size, action.tag
        others = [peer for peer in action.providers if peer != ticket.addr.id]
        try:
            async with asyncio.timeout(OWNER_SECONDS if others else None):
                return await self.swarm.fetch(ticket, max_size=max_size, tag=tag)
        except (BlobUnavailableError, TimeoutError) as error:
            if not others:
                raise
            is_slow = isinstance(error, TimeoutError)
        try:
            # Without the owner: if its line is dead, we would wait for it again.
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
        """Connects to peers of the epoch, and tries again while too few of them pass messages on to us."""
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
            if lacks_neighbors(len(neighbors), len(self._allowed)) and self.rounds.stage is not Stage.ENDED:
                await self._introduce(self._generator.sample(strangers, min(len(strangers), MAX_MEETINGS)))

    async def _introduce(self, strangers: Sequence[bytes]) -> None:
        known: dict[bytes, EndpointAddr] = {}
        if self._find_peers is not None:
            try:
                known = {address.id: address for address in await self._find_peers()}
            except (DistroError, OSError) as error:
                _log.info("nobody could say where the peers are: %s", error)
        try:
            await self.swarm.join([known.get(peer, EndpointAddr(peer)) for peer in strangers])
        except DistroError as error:
            _log.info("no peer could be reached: %s", error)


def lacks_neighbors(neighbors: int, others: int) -> bool:
    """Whether a peer with so many neighbours asks for more, in an epoch of so many others."""
    return neighbors < (others if others <= FULL_MESH else ENOUGH_NEIGHBORS)


def _is_opening(tag: str) -> bool:
    return tag.startswith(OPENING_TAG)


def _step_of(tag: str, default: int = 0) -> int:
    match = _STEP_TAG.fullmatch(tag)
    return int(match[1]) if match else default
