"""``distro-optim join``: everything put together, from connecting to leaving."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

import torch

from ..callbacks import SafeCallback
from ..comm.iroh.keys import load_secret_key
from ..comm.signing import SecretKey
from ..console import Display, display_for, narrated, printable
from ..coordinator.model import DummyData
from ..coordinator.rules.outlook import check_newcomer
from ..coordinator.rules.steps import counted_steps
from ..coordinator.types import Coordinator, RunState
from ..errors import ConfigurationError, RunError
from ..logs import LogOptions, logging_to
from ..models.batches import TokenBatch
from ..models.building import sorted_parameters
from ..strategy.monitor.figures import Figures, Progress
from ..strategy.monitor.metrics import MetricsServer, load_prometheus, metrics_of
from ..strategy.monitor.page import PageServer
from ..strategy.monitor.picture import picture_of
from ..strategy.network.runtime import Runtime
from ..strategy.network.upload_carriers import carrier_of
from ..strategy.port import RunPort, RunView
from ..strategy.round import Round
from ..strategy.session import SwarmSession
from ..verify.recompute import Evidence
from .devices import LocalTrainers, parse_devices
from .display import FORMS
from .dummy import train_dummy
from .keeping import kept_in
from .options import JoinOptions
from .preparing import advised, beginning_rate, is_without_tensors, load_libraries, prepare
from .recording import Recorder
from .several.member import follow
from .several.processes import ctrl_c_noted
from .several.team import ShardTrainers, Team, Train
from .training import audit_loss, read_round, train_language_model

__all__ = ["Onlooker", "join"]

REDRAW_SECONDS: Final = 0.5
"""Between two updates of the display."""

_log = logging.getLogger(__name__)


class Onlooker(Protocol):
    """One for whom a run is only looked at.

    Attributes:
        tell: told each finding, in a sentence and as facts; set by :func:`join`.
        view: of the run, likewise.
    """

    tell: Callable[..., None]
    view: Callable[[], RunView] | None

    def audited(self, step: int, peer: bytes, found: Evidence) -> None:
        """A result of a peer was audited, in the thread that audits."""


def join(options: JoinOptions, display: Display[Figures] | None = None, *, watcher: Onlooker | None = None) -> None:
    """Takes part in a run until it ends. Ctrl-C (KeyboardInterrupt) leaves the run cleanly.

    Args:
        options: what was asked for.
        display: where the news goes, in place of what ``options.logs`` says; whatever fails there, training goes on.
        watcher: told what audits find; then we are not in the run, and only look at it, which its host has to permit.

    Raises:
        ConfigurationError: an option cannot work, or the run has something that is not supported.
        MissingDependencyError: something that an option needs is not installed; says how to install it.
        JoinRefusedError, CoordinatorLinkError, ProtocolError: the coordinator does not take us; says why.
        ModelWeightsError, ModelTooLargeError, DataError: the run's model or data are not available.
        RunError: the run cannot go on with us.
    """
    if options.metrics_port is not None:
        load_prometheus("--metrics-local-port")
    if (upload := options.upload_to) is not None:
        carrier_of(upload)  # whether there is such a command or store
    devices = parse_devices(options.device, options.data_parallelism * options.tensor_parallelism)
    key_file = options.identity_secret_key_path
    access = Runtime.connect(
        options.run,
        secret_key=None if key_file is None else _key(key_file),
        solana=options.solana,
        relay=options.relay,
        discovery=options.discovery,
        external_addr=options.external_addr,
        bind_addr=options.bind_addr,
        peers=options.peers,
        give_up_seconds=options.give_up_seconds,
        watch=watcher is not None,
    )
    access.audit_alone = options.audit
    if watcher is not None:
        access.on_audited, watcher.view = watcher.audited, access.view
    key = access.secret_key
    progress = Progress(key.public)
    with ExitStack() as stack:
        log = LogOptions(file=options.write_log) if options.write_log is not None else None
        stack.enter_context(logging_to(log, option="--write-log"))
        display = stack.enter_context(display if display is not None else display_for(options.logs, FORMS))
        news = _News(progress, display)
        stack.callback(access.close)
        if watcher is not None:
            watcher.tell = news.tell
        monitor = stack.enter_context(_Monitor(access, progress, display))
        if options.metrics_port is not None:
            server = stack.enter_context(
                MetricsServer(
                    options.metrics_port, lambda: metrics_of(monitor.figures()), option="--metrics-local-port"
                )
            )
            news.tell(f"metrics at http://127.0.0.1:{server.port}/metrics", metrics_port=server.port)
        if options.web is not None:
            page = stack.enter_context(PageServer(options.web, lambda: _picture(monitor.figures(), options.run)))
            news.tell(f"the run is shown at {page.url}", web=page.url)
        news.tell(f"we are {key.public.hex()}", key=key.public.hex())
        news.tell(f"looking at {options.run[:60]}")
        with narrated("opening our endpoint and looking for the run", news.tell):
            access.look()
        state = access.state
        if state is None:
            raise RunError("the coordinator took our connection but sent no state")
        step, total_steps = counted_steps(state)
        news.tell(f"the run {state.run_id!r} is at step {step} of {total_steps}")
        if state.run_state is RunState.FINISHED:
            news.tell("the run is finished already")
            return
        if watcher is not None:
            _watch(access, state, options, devices[0], key, progress, news, stack)
            news.tell("the run is finished")
            return
        check_newcomer(state)
        if is_without_tensors(state):
            with narrated("asking to be let into the run", news.tell):
                access.start()
            news.tell_wait(access)
            train_dummy(access, progress, seconds=options.dummy_training_delay_secs, tell=news.tell)
        else:
            recorder = None
            if options.write_gradients_dir is not None:
                folder, keep = options.write_gradients_dir, options.gradients
                recorder = stack.enter_context(Recorder(folder, key, keep=keep, tell=news.tell))
                access.on_result = recorder.see
            _train(access, state, options, devices, key, progress, news, stack, recorder)
        news.tell("the run is finished")


def _train(
    access: RunPort,
    state: Coordinator,
    options: JoinOptions,
    devices: list[torch.device],
    key: SecretKey,
    progress: Progress,
    news: _News,
    stack: ExitStack,
    recorder: Recorder | None,
) -> None:
    with narrated("loading transformers", news.tell):
        load_libraries()
    stack.enter_context(advised(state.model.data_location, options.data_mirrors, news.tell))
    folder = stack.enter_context(kept_in(options, state.run_id))
    news.tell(
        "the model is not kept: --no-checkpoints"
        if folder is None
        else f"the model is kept in {printable(str(folder))}: the last {options.keep_steps} checkpoints, one an epoch"
    )
    team = None
    if options.in_shards:
        with narrated(f"starting {len(devices)} processes that hold the model together", news.tell):
            team = stack.enter_context(Team.started(options, devices, follow))
    prepared = prepare(
        access,
        state,
        key=key,
        device=devices[0],
        make=None if team is None else partial(team.make, state.model),
        devices=1 if team is None else team.count,
        folder=options.model,
        data=options.data,
        mirrors=options.data_mirrors,
        progress=progress.downloaded,
        tell=news.tell,
    )
    stack.callback(prepared.data.close)
    data = prepared.data
    read: Callable[[Round], TokenBatch]
    trainers: ShardTrainers | LocalTrainers
    with narrated("preparing the devices", news.tell):
        if team is not None:
            in_shards = trainers = ShardTrainers(prepared.model, team, micro_batch_size=options.micro_batch_size)
            read = lambda round_: in_shards.read(lambda: read_round(round_, data))  # noqa: E731
        else:
            trainers = LocalTrainers(prepared.model, devices, micro_batch_size=options.micro_batch_size)
            stack.callback(trainers.close)
            read = lambda round_: read_round(round_, data)  # noqa: E731
    count = sum(parameter.numel() for parameter in prepared.model.parameters())
    news.tell(f"the model has {count:,} parameters, on {', '.join(map(str, devices))}", parameters=count)
    port = prepared.access
    if team is not None:
        port = team.leaving_together(port, stack.enter_context(ctrl_c_noted()))
        theirs = {"checkpoint_dir": folder, "learning_rates": "run"}
        rate, definition = beginning_rate(state), state.model.optimizer
        team.train(Train(definition, rate, theirs, options.micro_batch_size))
    session = SwarmSession(
        prepared.model,
        prepared.optimizer,
        port=port,
        checkpoint_dir=folder,
        keep_checkpoints=options.keep_steps,
        keep_every=options.keep_every if folder is not None else None,
        upload=options.upload_to if folder is not None else None,
        learning_rates="run",
        on_event=news.tell,
        audit_loss=audit_loss(prepared.model, prepared.data, devices[0]) if options.audit else None,
    )
    session.audit_size = options.micro_batch_size
    session.resumes_at_its_step = True
    stack.callback(session.close)
    if folder is not None and options.upload is not None:
        progress.uploads = lambda: asdict(session.uploads)
    session.start()  # which joins, if the model has not made us join already

    def begins(step: int) -> None:
        if recorder is not None:
            parameters = sorted_parameters(prepared.model)
            recorder.begin(state, prepared.model.config.to_json(), parameters, prepared.optimizer, step)

    train_language_model(session, trainers, read, progress, tell=news.tell, begins=begins)


def _watch(
    access: RunPort,
    state: Coordinator,
    options: JoinOptions,
    device: torch.device,
    key: SecretKey,
    progress: Progress,
    news: _News,
    stack: ExitStack,
) -> None:
    """Follows the run with a model of our own, and audits what its members send."""
    if is_without_tensors(state) or isinstance(state.model.data_location, DummyData):
        raise ConfigurationError(
            "the run names no data, as one whose model and data are in its script: watch it with that script, by "
            "DISTRO_OPTIM_WATCH=1 beside DISTRO_OPTIM_RUN=TICKET",
            name="run",
        )
    with narrated("loading transformers", news.tell):
        load_libraries()
    stack.enter_context(advised(state.model.data_location, options.data_mirrors, news.tell))
    prepared = prepare(
        access,
        state,
        key=key,
        device=device,
        folder=options.model,
        data=options.data,
        mirrors=options.data_mirrors,
        progress=progress.downloaded,
        tell=news.tell,
    )
    stack.callback(prepared.data.close)
    session = SwarmSession(
        prepared.model,
        prepared.optimizer,
        port=prepared.access,
        learning_rates="run",
        on_event=news.tell,
        audit_loss=audit_loss(prepared.model, prepared.data, device),
    )
    session.audit_size = options.micro_batch_size
    stack.callback(session.close)
    session.start()
    news.tell("watching the run")
    for round_ in session.rounds():
        raise RunError(f"the run gave {round_.batch} to one that only watches")


def _picture(figures: Figures, run: str) -> dict[str, object]:
    """What the page shows."""
    return picture_of(figures, ticket=run, is_host=False, how_to_join=f"distro-optim join {run}")


class _News:
    """News for the display, for those who scrape, and for the log."""

    def __init__(self, progress: Progress, display: Display[Figures]) -> None:
        self._progress = progress
        self._show = SafeCallback(display.tell, "the display")

    def tell(self, text: str, **facts: object) -> None:
        """Something happened, in a sentence; ``facts`` are the same for machines."""
        self._progress.tell(text)
        self._show(text, facts)
        _log.info("%s", text)

    def tell_wait(self, access: RunPort) -> None:
        """What the run keeps us waiting for, if it does."""
        if (wait := access.view().waits_for) is not None:
            self.tell(f"waiting for {wait}")


class _Monitor:
    """Shows the figures twice a second, from a thread of its own, since the training thread computes."""

    def __init__(self, access: RunPort, progress: Progress, display: Display[Figures]) -> None:
        self._access = access
        self._progress = progress
        self._show = SafeCallback(lambda: display.update(self.figures()), "the display")
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._keep_showing, name="distro-optim-display", daemon=True)

    def figures(self) -> Figures:
        """The present ones; for any thread."""
        with self._lock:
            return self._progress.figures(self._access.view(), self._access.state)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._show()

    def _keep_showing(self) -> None:
        while not self._stop.wait(REDRAW_SECONDS):
            self._show()


def _key(path: Path) -> SecretKey:
    try:
        return load_secret_key(path)
    except OSError as error:
        raise ConfigurationError(
            f"--identity-secret-key-path {path}: {error.strerror or error}", name="identity_secret_key_path", value=path
        ) from None
