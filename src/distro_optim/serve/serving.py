"""``distro-optim serve``: files, server and console put together."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote as quoted
from typing import Any

from ..comm.iroh.endpoint import RELAY_SECONDS, Node
from ..comm.iroh.home import NodeHome
from ..comm.iroh.introduction import Introductions, VersionDesk
from ..comm.iroh.measuring import MeasuringPlace
from ..comm.iroh.reach import Discovery, parse_relays
from ..comm.iroh.rendezvous import Rendezvous
from ..comm.iroh.streams import IrohListener
from ..comm.serving.limits import ServerLimits
from ..comm.serving.stream_server import TICK_SECONDS
from ..comm.streams import StreamListener, TcpListener
from ..console import narrated, printable
from ..coordinator.model import ServerData
from ..coordinator.rules.checkpoints import is_run_of_psyche
from ..coordinator.rules.points import Account
from ..coordinator.rules.validation import check_run
from ..coordinator.server.acting import ServiceActs, named_acts
from ..coordinator.server.host import RunHost, restartable
from ..coordinator.server.ledger_file import LedgerFile
from ..coordinator.server.server import CoordinatorServer, unix_offset
from ..coordinator.server.service import CoordinatorService, ServiceEvent
from ..coordinator.server.store import StateStore, read_state_file
from ..coordinator.ticket import RunTicket
from ..coordinator.types import Coordinator, RunState
from ..coordinator.watchers import watcher_keys
from ..data.data_file import read_data_file
from ..data.remote.server import DataServer
from ..data.remote.service import DataService
from ..errors import ConfigurationError, CoordinatorError
from ..strategy.monitor.metrics import MetricsServer, load_prometheus
from ..strategy.monitor.page import PageServer
from ..strategy.network.uploads import Uploads
from ..strategy.upload import Upload
from .console import Reporter
from .guests import GuestList, read_allow_list
from .status import RunStatus, describe, status_of
from .watch import Watch

__all__ = ["ServeOptions", "initial_state", "serve"]


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What ``distro-optim serve`` was asked for.

    Attributes:
        state: the run, in the form of Psyche's ``state.toml``.
        data: training data to serve beside it, in the form of Psyche's ``data.toml``; on the port that the run's
            ``data_location`` names.
        host: address to listen on.
        port: TCP port; 0 takes any free one.
        save_dir: folder to keep the run in; None keeps nothing.
        resume: go on from what is saved there.
        upload: where each saved state is copied to; None copies nothing.
        allow: keys in hexadecimal, and files with one a line, which are read again when they change; empty lets
            everybody join.
        observers: public keys of those that may look at a run of our own kind without being in it.
        iroh: whether to be reached over iroh, too, also behind a NAT.
        key_file: secret key of the iroh endpoint, by which the ledger is signed, too; made if there is none. By
            default ``coordinator.key`` in ``save_dir``, or a fresh key each time. The UDP ports are kept beside it.
        p2p_port: UDP port of that endpoint; 0 takes that of the last time, if it is known and free, or any free one.
        relay: "default" for iroh's public relay servers, "psyche" for Psyche's, "none", or URLs of relay servers.
        discovery: where the endpoint is found by its key: "n0", "local" or "none"; None suits the relay servers.
        external_addr: where else others reach that endpoint; None leaves it to iroh to find out.
        init_warmup_time: seconds of the first warm-up, in place of the configured ones.
        withdraw_on_disconnect: whether a client that goes leaves its epoch at once.
        limits: what one stranger may ask.
        web: where the run is shown on a page, a port or ``host:port``; None shows it nowhere.
        metrics_port: port on this machine for Prometheus; None has none.
    """

    state: Path
    data: Path | None = None
    host: str = "0.0.0.0"
    port: int = 20000
    save_dir: Path | None = None
    resume: bool = False
    upload: Upload | None = None
    allow: Sequence[str] = ()
    observers: Sequence[str] = ()
    iroh: bool = False
    key_file: Path | None = None
    p2p_port: int = 0
    relay: str | Sequence[str] = "default"
    discovery: Discovery | None = None
    external_addr: str | Sequence[str] | None = None
    init_warmup_time: int | None = None
    withdraw_on_disconnect: bool = True
    limits: ServerLimits = field(default_factory=ServerLimits)
    web: str | int | None = None
    metrics_port: int | None = None


def initial_state(configured: Coordinator, store: StateStore | None, *, resume: bool) -> tuple[Coordinator, str]:
    """The state to begin with, and where it comes from.

    Raises:
        ConfigurationError: nothing can be resumed, or something would be lost without resuming.
    """
    if store is None and resume:
        raise ConfigurationError("--resume needs the folder to resume from: give --save-dir", name="resume")
    advice = "pass --resume to go on from there, or another --save-dir to begin again"
    saved = None if store is None else store.to_resume(configured, resume=resume, advice=advice)
    if saved is not None:
        note = f"the run goes on at step {saved.progress.step} of epoch {saved.progress.epoch}"
        if saved.config != configured.config:
            note += "; its saved settings count, not those of the state file"
        if saved.run_state is RunState.PAUSED and store is not None:
            note += (
                "; it is paused, as it was when it was saved: distro-optim run resume "
                f"{quoted(saved.run_id)} --save-dir {quoted(str(store.directory))} lets it go on"
            )
        return saved, note
    if configured.run_state is RunState.PAUSED:
        configured = replace(configured, run_state=RunState.WAITING_FOR_MEMBERS)  # begun is begun
    if resume:
        return configured, "nothing is saved yet: the run begins"
    return configured, "the run begins"


async def serve(options: ServeOptions, reporter: Reporter) -> None:
    """Serves until the run is finished, the process is asked to stop, or the task is cancelled.

    SIGTERM and SIGINT save and stop; SIGUSR1 pauses the run, or resumes it.

    Args:
        options: what was asked for.
        reporter: where the news goes.

    Raises:
        ConfigurationError: a file or the address cannot be used; nothing was started.
    """
    if options.metrics_port is not None:
        load_prometheus("--metrics-local-port")
    configured = read_state_file(options.state)
    check_run(configured)
    allowed = read_allow_list(options.allow)
    watchers = watcher_keys(options.observers, name="--observer")
    home = _home(options)
    with contextlib.ExitStack() as stack:
        store = ledger = None
        uploads = _uploads(options)
        if options.save_dir is not None:

            def on_saved(path: Path, step: int) -> None:
                if uploads is not None:
                    uploads.submit(path, step=step, run_id=configured.run_id)

            store = stack.enter_context(StateStore(options.save_dir, configured.run_id, on_saved=on_saved))
            if home is not None:
                ledger = LedgerFile(store.directory, configured.run_id, home.key())
        state, note = initial_state(configured, store, resume=options.resume)
        check_run(state)
        files = None
        if options.data is not None:
            with narrated(f"opening {options.data}", reporter.tell):
                files = stack.enter_context(read_data_file(options.data))
        data_port = _data_port(state) if files is not None else 0
        listener = await TcpListener.bind(options.host, options.port)
        offset = unix_offset()
        ours = not is_run_of_psyche(state)
        if watchers and not ours:
            raise ConfigurationError(
                "--observer: the run is one of Psyche's, whose clients turn everybody away that is not in its epoch; "
                "it is audited by a member: distro-optim join --audit 1",
                name="observers",
            )
        desk = VersionDesk(reporter.tell)
        host = RunHost(
            restartable(state, now=int(time.monotonic() + offset)),
            allowed=allowed,
            banned=() if home is None else home.banned(),
            why_not=desk.why_not if ours else lambda public: None,
            withdraw_on_disconnect=options.withdraw_on_disconnect,
            init_warmup_time=options.init_warmup_time,
            max_pending=options.limits.connections,
            account=None if ledger is None else Account(),
        )
        service = CoordinatorService(
            host, draw=os.urandom, unix_offset=offset, limits=options.limits, watchers=watchers
        )
        stop = asyncio.Event()

        def on_stop() -> None:
            if stop.is_set() and uploads is not None:
                uploads.give_up()  # asked twice
            stop.set()

        stack.enter_context(_signals(on_stop, lambda: _toggle_pause(service, reporter)))
        async with contextlib.AsyncExitStack() as servers:
            listeners: list[StreamListener] = [listener]
            ways = [] if listener.reachable_address is None else [listener.reachable_address]
            endpoint = None
            if options.iroh:
                with narrated("opening the iroh endpoint, and reaching a relay server", reporter.tell):
                    node = await servers.enter_async_context(_node(options, home))
                listeners.append(IrohListener(node))
                Rendezvous(node, service.meeting_place)
                if ours:
                    Introductions(node, desk)
                MeasuringPlace(node)
                endpoint = node.addr()
            watch = Watch(service)

            def on_event(event: ServiceEvent) -> None:
                watch.events.append(printable(describe(event)))
                reporter.event(event)

            server = CoordinatorServer(service, listeners, store=store, ledger=ledger, on_event=on_event)
            await servers.enter_async_context(server)
            stack.enter_context(reporter)
            if options.metrics_port is not None:
                metrics = MetricsServer(options.metrics_port, watch.metrics, option="--metrics-local-port")
                stack.enter_context(metrics)
                reporter.tell(f"metrics at http://127.0.0.1:{metrics.port}/metrics", metrics_port=metrics.port)
            reporter.tell(f"run {state.run_id}: {note}", run_id=state.run_id, step=state.progress.step)
            reporter.tell(f"listening on {listener.address}", address=listener.address)
            if ways:
                reporter.tell(f"join with {ways[0]}/{state.run_id}")
            elif endpoint is None:
                port = listener.address.rpartition(":")[2]
                reporter.tell(f"join with ADDRESS:{port}/{state.run_id}, ADDRESS being this machine's")
            if endpoint is not None:
                ticket = str(RunTicket(state.run_id, tuple(ways), endpoint))
                reporter.tell(f"join from anywhere with {ticket}", ticket=ticket)
            if options.web is not None:
                way_in = ticket if endpoint is not None else f"{ways[0]}/{state.run_id}" if ways else None
                loop = asyncio.get_running_loop()
                acts = ServiceActs(
                    service,
                    time.monotonic,
                    lambda act: asyncio.run_coroutine_threadsafe(act, loop),
                    keep=None if home is None else home.keep_banned,
                )
                page = stack.enter_context(PageServer(options.web, lambda: watch.picture(way_in), named_acts(acts)))
                reporter.tell(f"the run is shown at {page.url}", web=page.url)
            if files is not None:
                door = await TcpListener.bind(options.host, data_port)
                data = DataService(files, lambda: host.state, draw=os.urandom, limits=options.limits)
                await servers.enter_async_context(DataServer(data, files, [door]))
                reporter.tell(f"{len(files)} sequences of training data at {door.address}", address=door.address)
            guests = GuestList(options.allow, allowed)

            def on_look(status: RunStatus) -> None:
                watch.see(status)
                for text in uploads.take_news() if uploads is not None else ():
                    reporter.tell(text)
                _look_at_guests(guests, service, reporter)

            await _report_until(stop, server, reporter, on_look)
            reporter.tell("the run is finished" if host.state.run_state is RunState.FINISHED else "stopping")
        if uploads is not None:
            await asyncio.to_thread(uploads.close, reporter.tell)


@contextlib.asynccontextmanager
async def _node(options: ServeOptions, home: NodeHome | None) -> AsyncIterator[Node]:
    """The iroh endpoint, started; with its relay, if one answers in time."""
    relays = parse_relays(options.relay)
    if home is not None:
        home.enter()
    node = Node(
        secret_key=None if home is None else home.key(),
        relay=relays,
        discovery=options.discovery,
        external_addr=options.external_addr,
        bind_addr=f"0.0.0.0:{options.p2p_port}",
        usual_ports=None if home is None else home.ports(),
    )
    try:
        await asyncio.to_thread(node.start)
        if home is not None:
            home.keep_ports(node.sockets())
        if relays != "none":
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RELAY_SECONDS):
                    await asyncio.wrap_future(node.submit(node.online()))
        yield node
    finally:
        await asyncio.to_thread(node.close)
        if home is not None:
            home.close()


def _home(options: ServeOptions) -> NodeHome | None:
    """Where key and ports are kept: beside the key, if that has a place of its own, or else beside the run."""
    if options.key_file is not None:
        return NodeHome(options.key_file.parent, options.key_file.stem, key_file=options.key_file)
    return NodeHome(options.save_dir, "coordinator") if options.save_dir is not None else None


def _uploads(options: ServeOptions) -> Uploads | None:
    if options.upload is None:
        return None
    if options.save_dir is None:
        raise ConfigurationError("--upload copies what is saved, and nothing is: give --save-dir", name="upload")
    return Uploads(options.upload)


def _data_port(state: Coordinator) -> int:
    """Where clients will look for the data."""
    location = state.model.data_location
    port = location.address.rpartition(":")[2] if isinstance(location, ServerData) else ""
    if not port.isascii() or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise ConfigurationError(
            "--data needs to know where clients will look for it: set model.LLM.data_location in the state file to "
            f"{{ Server = 'host:port' }}, not {location}",
            name="data",
        )
    return int(port)


def _look_at_guests(guests: GuestList, service: CoordinatorService, reporter: Reporter) -> None:
    """Takes a new list of who may join, and out of the run who is not on it."""
    try:
        if not guests.has_changed():
            return
    except ConfigurationError as error:
        reporter.tell(f"{error}; the list from before counts")
        return
    service.let_in(guests.keys, time.monotonic())
    reporter.tell(f"{len(guests.keys or ())} keys may join now")


async def _report_until(
    stop: asyncio.Event, server: CoordinatorServer, reporter: Reporter, on_look: Callable[[RunStatus], None]
) -> None:
    """Reports until the server is to stop, the run is finished, or the server breaks."""
    ends = [asyncio.create_task(end) for end in (stop.wait(), server.wait_finished(), server.wait_failed())]
    try:
        done: set[asyncio.Task[Any]] = set()
        while not done:
            status = status_of(server.service, time.monotonic())
            reporter.status(status)
            on_look(status)
            done, _ = await asyncio.wait(ends, timeout=TICK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        for end in done:
            end.result()
    finally:
        for end in ends:
            end.cancel()


def _toggle_pause(service: CoordinatorService, reporter: Reporter) -> None:
    now = time.monotonic()
    host = service.host
    try:
        if host.state.run_state is RunState.PAUSED:
            service.note(host.resume(service.unix_time(now)), now)
        else:
            service.note(host.pause(service.unix_time(now)), now)
            reporter.tell("pausing" if host.state.pending_pause else "paused")
    except CoordinatorError as error:
        reporter.tell(str(error))


@contextlib.contextmanager
def _signals(on_stop: Callable[[], None], on_pause: Callable[[], None]) -> Iterator[None]:
    """Handles signals for as long as it is entered; where the system has no such handlers, Ctrl-C cancels the task."""
    loop = asyncio.get_running_loop()
    handled = [(signal.SIGINT, on_stop), (signal.SIGTERM, on_stop)]
    if hasattr(signal, "SIGUSR1"):
        handled.append((signal.SIGUSR1, on_pause))
    added = []
    try:
        for number, handler in handled:
            # Only the main thread's loop has signals, and only on POSIX.
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                loop.add_signal_handler(number, handler)
                added.append(number)
        yield
    finally:
        for number in added:
            loop.remove_signal_handler(number)
