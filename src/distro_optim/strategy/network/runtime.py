"""A run in a thread of its own, beside the thread that trains.

::

    training thread                                 network's thread (one event loop)
    next_action()  ◄──── Mailbox: actions, FIFO ◄── RoundDriver ── Rounds
    trained(...)   ────► call_soon_threadsafe ────► RoundDriver     │
    is_cancelled() ◄──── Mailbox: cancelled steps   swarm, coordinator, models

The training thread waits in :meth:`Runtime.next_action` and while it loads a model, nowhere else.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Final, TypeVar, Unpack

from blake3 import blake3
from typing_extensions import override

from ...comm.live_weights import FetchedTensors, LiveWeights, WantedTensors
from ...comm.loop import LoopThread
from ...comm.model_exchange import Check, Patience, SharedModel, download_patiently
from ...comm.signing import SecretKey
from ...comm.swarm import PeerInfo, Swarm
from ...compress import CompressedUpdate, TilePlan
from ...coordinator.server.acting import HostActs
from ...coordinator.types import Coordinator, NodeIdentity
from ...errors import (
    ConfigurationError,
    CoordinatorLinkError,
    DistroError,
    ExchangeError,
    JoinRefusedError,
    NodeClosedError,
    PaymentError,
    RunError,
    RunLostError,
)
from ...verify.audit import Verdict
from ...verify.calibrate import Limits, Noise
from ...verify.recompute import Evidence
from ..config import RunConfig
from ..options import CONNECTION_DEFAULTS, ConnectionOptions, complete, shows
from ..polling import POLL_SECONDS
from ..port import Note, RunEvent, RunPort, RunView, TrainerAction
from ..rounds.actions import RunEnded
from ..rounds.rounds import Rounds
from ..rounds.trust.saved_step import SavedStep
from .coordinating import OpenCoordinator
from .driver import RoundDriver
from .journal import Journal, with_state
from .keeping import RunKeeper
from .link import RunLink, RunSource
from .mailbox import Mailbox
from .way_in import way_into

__all__ = ["Runtime"]

T = TypeVar("T")

VIEW_SECONDS: Final = 0.5
"""Between two looks at the run for :meth:`Runtime.view`."""

PEERS_SECONDS: Final = 5.0
"""Between two looks at the peers for it, for which the transport is asked about each connection: with sixteen peers
that took a fifth of what a round costs when it was done twice a second."""

MIN_DOWNLOAD_SECONDS: Final = 20.0
"""A model that is wanted is asked for this long, however short the warm-up: the next one may come soon."""

CLOSE_SECONDS: Final = 5.0
"""How long leaving a run may take. Chosen arbitrarily."""

RESIGN_SECONDS: Final = 2.5
"""For a word to the others before we leave, and for a host until another one hosts the run, which takes half a second
on a machine that is not busy. Without it a run of two could not go on. Chosen as what closing leaves (half of
:data:`CLOSE_SECONDS`)."""

_LOOP_SHARE: Final = 0.4
"""Of the time to close; the rest is for farewells on the loop that still runs."""

_log = logging.getLogger(__name__)


class Runtime(RunPort):
    """See the module and :class:`~.port.RunPort`.

    Args:
        source: the way into the run.
        loop: where the network lives.
        owns_loop: whether it ends with :meth:`close`.

    Attributes:
        on_result: called with the tag and the bytes of each result, ours and others', in the network's thread; has to
            return at once. Set it before :meth:`start`.
        audit_alone: share of the results that we audit by ourselves in a run of Psyche's, or in one that we only
            watch. Set it before :meth:`start`.
        on_audited: called with step, public key and what was found in each result that we have audited, in the
            training thread.
    """

    def __init__(self, source: RunSource, *, loop: LoopThread, owns_loop: bool = False) -> None:
        self._source = source
        source.on_note = lambda text: self._mailbox.put_event(Note(text))
        self._loop = loop
        self._owns_loop = owns_loop
        self._mailbox = Mailbox(time.monotonic)
        self._link: RunLink | None = None
        self._driver: RoundDriver | None = None
        self._driver_task: asyncio.Task[Any] | None = None
        self._running: concurrent.futures.Future[None] | None = None
        self._view: RunView | None = None  # what the driver last showed
        self._lock = threading.Lock()
        self._closed = False
        self._in_farewell = False
        self.on_result: Callable[[str, bytes], None] | None = None
        self.audit_alone = 0.0
        self.on_audited: Callable[[int, bytes, Evidence], None] | None = None
        self._audit_limits: Limits | None = None

    @classmethod
    @shows(ConnectionOptions, CONNECTION_DEFAULTS)
    def connect(
        cls,
        run: str | None = None,
        *,
        config: RunConfig | None = None,
        state: Coordinator | None = None,
        home: str | PathLike[str] | None = None,
        folder: Path | None = None,
        saved: SavedStep | None = None,
        resume: bool = False,
        watch: bool = False,
        **options: Unpack[ConnectionOptions],
    ) -> Runtime:
        """The access to a run. Nothing is opened before :meth:`start`.

        Args:
            run: a ticket, ``host:port/run-id`` or ``solana:run-id``, to join; None hosts a run of our own.
            config: of the run that we host.
            state: where it begins, such as a checkpoint has it; None begins with what ``config`` resumes, or from the
                start.
            home: folder in which a host keeps its key and its ports, so that its ticket stays the same from one start
                to the next; None takes ``save_dir`` of ``config``, if that is set.
            folder: of the checkpoints of one that joins, where it writes down what a host does if it comes to host.
            saved: what our own checkpoint says of the run, if we resume from one.
            watch: look at the run without being in it, which its host has to let us do; see :mod:`.observing`.
            resume: a run without a name in ``config`` and ``state`` has the one that was hosted from ``home`` last.
            **options: see :class:`~.options.ConnectionOptions`.

        Raises:
            ConfigurationError: an argument is wrong; says which, and what to write.
        """
        loop = LoopThread("distro-optim-run")
        given = complete(options, CONNECTION_DEFAULTS, of="Runtime.connect")
        source = way_into(
            run,
            given,
            loop=loop,
            config=config,
            state=state,
            home=home,
            folder=folder,
            saved=saved,
            resume=resume,
            watch=watch,
        )
        return cls(source, loop=loop, owns_loop=True)

    # -- who and what --------------------------------------------------------------------------------------------------

    @property
    @override
    def identity(self) -> NodeIdentity:
        return self._source.identity

    @property
    def secret_key(self) -> SecretKey:
        """The key by which peers know us."""
        return self._source.key

    @property
    @override
    def run_id(self) -> str:
        return self._source.run_id

    @property
    @override
    def ticket(self) -> str | None:
        link = self._link
        if link is None:
            return None
        fresh = link.keeper.ticket if link.keeper is not None else None
        return fresh or link.ticket

    @property
    @override
    def is_host(self) -> bool:
        return self._source.is_host

    @property
    @override
    def state(self) -> Coordinator | None:
        return self._link.coordinator.state if self._link is not None else None

    @property
    @override
    def acts(self) -> HostActs | None:
        opened = self._opened_here
        return opened.acts if opened is not None and self._hosts_now else None

    @property
    def _hosts_now(self) -> bool:
        """Whether the run's coordinator is here at present: it was from the beginning, or since we were elected."""
        keeper = self._link.keeper if self._link is not None else None
        return self.is_host if keeper is None else keeper.hosts

    @property
    def _opened_here(self) -> OpenCoordinator | None:
        """The run's coordinator, while it is here."""
        return self._link.here() if self._link is not None else None

    def _missing(self) -> int | None:
        """Clients that have still to come before an epoch can begin, if the coordinator is here."""
        opened = self._opened_here
        return None if opened is None else opened.host.missing

    # -- life ----------------------------------------------------------------------------------------------------------

    @override
    def look(self) -> None:
        self._open()

    @override
    def judge_by(self, limits: Limits | None) -> None:
        self._audit_limits = limits

    @override
    def start(self) -> None:
        if self._running is not None:
            raise ConfigurationError("start() is called once")
        link = self._open()
        try:
            if link.enter is not None:
                self._wait(_done(link.enter()))
            self._running = self._loop.submit(self._run(link))
        except BaseException:
            self.close()
            raise

    def _open(self) -> RunLink:
        """The link, opened if it is not."""
        if self._closed:
            raise RunError("this access to the run was closed; make a new one")
        if self._link is None:
            try:
                self._link = self._wait(self._source.open())
            except BaseException:
                self.close()
                raise
        return self._link

    @override
    def close(self, timeout: float = CLOSE_SECONDS) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        deadline = time.monotonic() + timeout
        self._mailbox.fail(RunError("we have left the run"))
        running, link = self._running, self._link
        try:
            if running is not None and not self._in_farewell:
                running.cancel()
            if link is not None:
                self._loop.run(self._leave(link), max(0.0, deadline - time.monotonic()) * (1 - _LOOP_SHARE))
        except (TimeoutError, concurrent.futures.TimeoutError):
            _log.warning("leaving the run took too long and was cut short")
        except DistroError as error:
            _log.debug("leaving the run: %s", error)
        finally:
            if self._owns_loop:
                self._loop.stop(max(0.1, min(_LOOP_SHARE * timeout, deadline - time.monotonic())))

    async def _leave(self, link: RunLink) -> None:
        driver = self._driver_task
        if link.keeper is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(RESIGN_SECONDS):
                    await link.keeper.resign()
        if driver is not None:
            # A host that goes while it tells the others of the end would leave them in doubt; its time is limited.
            if not self._in_farewell:
                driver.cancel()
            await asyncio.wait({driver})
        await link.aclose()

    async def _run(self, link: RunLink) -> None:
        """Until the run is over, or cannot go on."""
        self._driver_task = asyncio.current_task()
        rounds = self._new_rounds(link)
        journal = Journal(
            self.run_id,
            self.identity,
            time.monotonic,
            reports=lambda: {} if (opened := link.here()) is None else opened.reports,
            waiting=lambda: None if (opened := link.here()) is None else opened.waiting,
            missing=self._missing,
            points=lambda: None if (opened := link.here()) is None else opened.points,
            fees=link.fees,
            gives_up_after=link.coordinator.gives_up_after,
        )
        driver = self._driver = RoundDriver(
            rounds=rounds,
            coordinator=link.coordinator,
            swarm=link.swarm,
            mailbox=self._mailbox,
            journal=journal,
            find_peers=link.find_peers,
            on_result=self.on_result,
            on_audit=lambda peer, passed: (opened := link.here()) is not None and opened.on_audit(peer, passed),
            keeper=link.keeper,
            on_state=lambda: self._show(
                journal.view(rounds, self._view.peers if self._view is not None else (), self._mailbox)
            ),
        )
        looking = [asyncio.create_task(self._look(link, rounds, journal))]
        if link.keeper is not None:
            looking.append(asyncio.create_task(_kept(link.keeper, link.swarm, rounds)))
        try:
            await driver.run()
            self._in_farewell = link.farewell is not None
            self._mailbox.end(RunError("the run is over"))
            if link.farewell is not None:
                await link.farewell()
        except asyncio.CancelledError:
            raise
        except JoinRefusedError as error:
            self._mailbox.fail(error)
        except (CoordinatorLinkError, NodeClosedError) as error:
            self._mailbox.fail(_lost(error, is_host=self.is_host))
        except DistroError as error:
            self._mailbox.fail(error)
        except Exception as error:
            _log.exception("the network's side of the run broke")
            failure = RunError(f"the network's side of the run broke: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._mailbox.fail(failure)
        finally:
            for task in looking:
                task.cancel()
            self._show(journal.view(rounds, link.swarm.peers(), self._mailbox))

    def _new_rounds(self, link: RunLink) -> Rounds:
        """What decides. A test may put another kind of client here."""
        source = self._source
        return Rounds(
            identity=source.identity,
            key=source.key,
            address=link.swarm.address,
            draw=os.urandom,
            host=source.host,
            audit_alone=self.audit_alone,
            audit_limits=self._audit_limits,
            watches=source.watches,
        )

    def _show(self, view: RunView) -> None:
        self._view = view

    async def _look(self, link: RunLink, rounds: Rounds, journal: Journal) -> None:
        looks = max(1, round(PEERS_SECONDS / VIEW_SECONDS))
        peers: Sequence[PeerInfo] = ()
        for look in itertools.count():
            journal.connection(link.coordinator.connected)
            if look % looks == 0:
                peers = link.swarm.peers()
            self._show(journal.view(rounds, peers, self._mailbox))
            await asyncio.sleep(VIEW_SECONDS)

    # -- the training thread -------------------------------------------------------------------------------------------

    @override
    def next_action(self, timeout: float | None = None) -> TrainerAction | None:
        if self._running is None and not self._closed:
            raise ConfigurationError("start() comes first")
        action = self._mailbox.take(timeout)
        if isinstance(action, RunEnded) and self._hosts_now:
            # Not only once the driver has returned: the training thread may close as soon as it hears this.
            self._in_farewell = True
        return action

    @override
    def is_cancelled(self, step: int) -> bool:
        return self._mailbox.is_cancelled(step)

    @override
    def initialized(self, plan: TilePlan, names: Sequence[str]) -> None:
        self._tell(lambda driver: driver.initialized(plan, names))

    @override
    def initialization_failed(self, reason: str) -> None:
        self._tell(lambda driver: driver.initialization_failed(reason))

    @override
    def trained(self, step: int, update: CompressedUpdate, own: object, *, loss: float | None = None) -> None:
        self._mailbox.answered(trained=True)
        self._tell(lambda driver: driver.trained(step, update, own, loss))

    @override
    def cancelled(self, step: int) -> None:
        self._mailbox.answered(trained=False)
        self._tell(lambda driver: driver.cancelled(step))

    @override
    def weights_hashed(self, step: int, digests: Sequence[bytes]) -> None:
        self._tell(lambda driver: driver.weights_hashed(step, digests))

    @override
    def audited(self, step: int, trainer: bytes, found: Evidence, own: Evidence | None) -> None:
        if self.on_audited is not None:
            self.on_audited(step, trainer, found)
        self._tell(lambda driver: driver.audited(step, trainer, found, own))

    @override
    def momentum_committed(self, step: int, root: bytes, decays: Sequence[float]) -> None:
        self._tell(lambda driver: driver.momentum_committed(step, root, decays))

    @override
    def momentum_opened(self, step: int, data: bytes) -> None:
        blob = blake3(data).digest()  # here, and not in the thread of the network
        self._tell(lambda driver: driver.momentum_opened(step, data, blob))

    @override
    def own_momentum_audited(self, step: int, noise: Noise) -> None:
        self._tell(lambda driver: driver.own_momentum_audited(step, noise))

    @override
    def momentum_audited(self, step: int, trainer: bytes, verdict: Verdict) -> None:
        self._tell(lambda driver: driver.momentum_audited(step, trainer, verdict))

    @override
    def weights_repaired(self, step: int, digests: Sequence[bytes] | None) -> None:
        if digests is None:
            self._tell(lambda driver: driver.repair_failed(step))
        else:
            self._tell(lambda driver: driver.weights_repaired(step, digests))

    @override
    def download_model(
        self,
        providers: Iterable[bytes],
        *,
        max_parameter_bytes: int,
        check: Check | None = None,
        progress: Callable[[int, int], None] | None = None,
        patience: Patience = Patience.LONG,
    ) -> SharedModel:
        link = self._opened()
        state = link.coordinator.state
        warmup = state.config.warmup_time if state is not None else 0
        latest: list[tuple[int, int]] = []

        def tell() -> None:
            if progress is not None and latest:
                progress(*latest.pop())
                latest.clear()

        return self._wait(
            download_patiently(
                link.models,
                providers,
                patience=patience,
                seconds=max(MIN_DOWNLOAD_SECONDS, warmup),
                max_parameter_bytes=max_parameter_bytes,
                check=check,
                progress=lambda done, total: latest.append((done, total)),
            ),
            meanwhile=tell,
        )

    @override
    def offer_model(self, model: SharedModel) -> None:
        models = self._opened().models
        self._call(lambda: models.offer(model))

    @override
    def withdraw_model(self) -> None:
        models = self._opened().models
        self._call(models.withdraw)

    @override
    def offer_live(self, live: LiveWeights | None) -> None:
        models = self._opened().models
        self._call(lambda: models.offer_live(live))

    @override
    def download_tensors(self, providers: Iterable[bytes], wanted: WantedTensors, *, seconds: float) -> FetchedTensors:
        models = self._opened().models

        async def download() -> FetchedTensors:
            try:
                async with asyncio.timeout(seconds):
                    return await models.download_tensors(providers, wanted)
            except TimeoutError:
                raise ExchangeError(f"they did not come within {seconds:g} s") from None

        return self._wait(download())

    @override
    def take_events(self) -> list[RunEvent]:
        return self._mailbox.take_events()

    @override
    def view(self) -> RunView:
        mailbox, view, state = self._mailbox, self._view, self.state
        if view is None:
            view = RunView(run_id=self.run_id)
            if state is not None:
                view = with_state(replace(view, connected=True), state, self.identity, self._missing())
        return replace(
            view,
            watches=self._source.watches,
            rounds_trained=mailbox.rounds_trained,
            rounds_cancelled=mailbox.rounds_cancelled,
            seconds_waiting=mailbox.seconds_waiting,
            seconds_training=mailbox.seconds_training,
        )

    # -- between the threads -------------------------------------------------------------------------------------------

    def _opened(self) -> RunLink:
        if self._link is None:
            raise ConfigurationError("start() comes first")
        return self._link

    def _tell(self, what: Callable[[RoundDriver], None]) -> None:
        """Passes an answer on; if the run is over, nobody wants it."""

        def tell() -> None:
            if self._driver is not None:
                what(self._driver)

        self._call(tell)

    def _call(self, what: Callable[[], None]) -> None:
        try:
            self._loop.start().call_soon_threadsafe(what)
        except (NodeClosedError, RuntimeError):
            pass  # closed: next_action says so

    def _wait(self, work: Coroutine[Any, Any, T], meanwhile: Callable[[], None] = lambda: None) -> T:
        """Runs ``work`` on the loop and waits, in slices, so that Ctrl-C gets through everywhere, and ``interrupt``.

        ``meanwhile`` is called, in this thread, after each slice and at the end.
        """
        future = self._loop.submit(work)
        try:
            while True:
                try:
                    result = future.result(POLL_SECONDS)
                    meanwhile()
                    return result
                except (TimeoutError, concurrent.futures.TimeoutError):
                    if future.done():
                        return future.result()
                    meanwhile()
                    if self._closed:
                        raise ExchangeError("we have left the run") from None
                    if self.interrupt is not None:
                        self.interrupt()
        except BaseException:
            future.cancel()
            raise


async def _kept(keeper: RunKeeper, swarm: Swarm, rounds: Rounds) -> None:
    """The run goes on without it; only its next host would be missed."""
    try:
        await keeper.run(swarm, rounds)
    except Exception:
        _log.exception("who hosts the run is not looked after any more")


async def _done(work: Awaitable[None]) -> None:
    await work


def _lost(error: DistroError, *, is_host: bool) -> RunLostError:
    kept = "What was trained is in the model and in the last checkpoint"
    if isinstance(error, PaymentError):
        lost = RunLostError(f"money has run out: {error}, then start again with the same run. {kept}")
    else:
        who = "our own coordinator stopped" if is_host else "the run's coordinator is gone"
        lost = RunLostError(
            f"{who}: {error}. {kept}; start again with the same run once it is back, or host the run yourself from "
            "that checkpoint"
        )
    lost.__cause__ = error
    return lost
