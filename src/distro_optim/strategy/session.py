"""A training loop in a run: the object that a script, Fabric or Lightning trains through.

::

    with SwarmSession(model, DisTrO(model.parameters(), lr=1e-3), run=ticket, dataset_size=len(data)) as session:
        for round in session.rounds():
            for indices in round.micro_batches(32):
                loss = loss_of(model, data, indices)
                (loss * len(indices) / len(round.indices)).backward()
            round.finish(loss=loss)

What the run wants done to the model besides, the session does while the script waits for its next round: loading it,
applying everybody's results, weight decay, hashes, checkpoints. All of it happens in the thread of the script.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any, Final, Self, Unpack

import torch
from torch import nn

from ..console import narrated
from ..coordinator.rules.checkpoints import is_run_of_psyche
from ..coordinator.rules.outlook import check_newcomer
from ..coordinator.rules.steps import last_trained_step
from ..coordinator.server.acting import HostActs
from ..coordinator.types import Coordinator
from ..errors import ConfigurationError, DistroError
from ..logs import start_logging
from ..optimizer import DisTrO
from .config import RunConfig
from .connecting import connect_to_run, settings_to_host
from .environment import RunEnvironment, write_ticket
from .model.audits.momenta import check_shows_momentum, why_momenta_are_not_audited
from .model.checkpoint import Checkpoint
from .model.checkpoint_keeper import CheckpointKeeper, NoCheckpoints
from .model.named_tensors import NamedTensors
from .model.participant import LocalModel, Participant, RunTerms
from .model.psyche_settings import schedule_of, settings_of
from .model.resuming import StartingPoint, other_dataset, saved_step, state_to_resume
from .model.schedules import FIRST_STEP, FollowingSchedulers
from .monitor.figures import Figures, Progress
from .monitor.narration import Narration
from .monitor.summary import summary
from .monitor.windows import Windows
from .network.upload_queue import UploadCounts
from .news import News
from .options import SESSION_DEFAULTS, LearningRates, SessionOptions, complete, shows
from .port import RunAccess, RunFacts, RunView
from .ranks.holders import Holders, ShardHolders
from .ranks.local_ranks import LocalRanks, by_leader
from .ranks.one_peer import FollowerPort, is_shared, leading
from .round import Round
from .sample_order import HOW_TO_TAKE_BY_DATA_INDEX, SampleOrder, check_dataset_size, shuffle_seed
from .session_checkpoints import SessionCheckpoints
from .session_checks import check_session, check_sharded, is_in_shards, ranks_of_mesh, refuse_wrapper

__all__ = ["LearningRates", "Round", "SwarmSession"]


EVENT_SECONDS: Final = 1.0
"""How often the session looks for news while there is nothing to do. Chosen arbitrarily."""

_log = logging.getLogger(__name__)


class SwarmSession:
    """One participant in a run, from :meth:`start` to :meth:`close`, or as a context manager.

    Hosting (``run=None``) begins a run and makes :attr:`ticket`; joining takes one, or ``"host:port/run-id"``. In a
    run of our own kind all peers run the same script: model, optimizer settings, schedule, dataset size; a peer that
    joins with something else gets :class:`~distro_optim.errors.ModelMismatchError`, which names the first difference.
    In a run of Psyche's the coordinator's settings of the optimizer and its learning rates count; what they change is
    told.

    What the arguments leave open, the environment may say; see :mod:`.environment`.

    Args:
        model: unwrapped; on the device on which it trains.
            If its parameters are sharded (DTensors), every rank of their mesh makes a session, and all of them
            together are one peer; see ``docs/gpu.md``.
        optimizer: of its parameters, with ``overlap=True``. Between :meth:`start` and :meth:`close`, its ``step()``
            does what :meth:`Round.finish` does.
        run: a ticket or an address; None hosts.
        begin_at: where a hosted run goes on whose weights and momentum the model has already; None starts at the first
            step.
        **options: each is explained in :class:`~.options.SessionOptions`, :class:`~.options.TrainingOptions` and
            :class:`~.options.ConnectionOptions`.

    Raises:
        ConfigurationError: an argument is wrong, or the optimizer is not a DisTrO of this model's parameters.

    Attributes:
        audit_size: samples that ``audit_loss`` is given at a time; None gives it as many as :meth:`Round.micro_batches`
            gave last, or all of a batch. Set it before :meth:`start`.
        look_over: called by :meth:`start` with the state of a run that is to be joined, before we ask to be in it;
            raises if we should not be.
        follow_schedule: called with the step before anything of a new step is carried out, so that the script's
            learning rates are those of the step; see :meth:`follow`. Not with a step after the last that is trained.
        by_data_index: in a run of Psyche's the samples of the dataset are those of the run by its data index, as its
            clients take them; False, the default, orders them by ``data_seed`` there as in runs of our own kind.
        resumes_at_its_step: where no peer of the run is left, go on from a checkpoint in ``checkpoint_dir`` if there is
            one of the run's very step, without ``resume``; False by default. Set it before :meth:`start`.
    """

    @shows(SessionOptions, SESSION_DEFAULTS)
    def __init__(
        self,
        model: nn.Module,
        optimizer: DisTrO,
        *,
        run: str | None = None,
        begin_at: StartingPoint | None = None,
        **options: Unpack[SessionOptions],
    ) -> None:
        given = complete(options, SESSION_DEFAULTS, of="SwarmSession")
        check_session(model, optimizer, given)
        in_shards = is_in_shards(optimizer)
        if in_shards:
            check_sharded(given)
        ranks = self.local_ranks()
        self._ranks = ranks_of_mesh(optimizer) if ranks is None and in_shards else ranks
        if self._ranks is None:
            refuse_wrapper(model, optimizer)
        self.audit_size: int | None = None
        self.look_over: Callable[[Coordinator], None] | None = None
        self.follow_schedule: Callable[[int], None] | None = None
        self.by_data_index = False
        self.resumes_at_its_step = False
        self._model = model
        self._optimizer = optimizer
        self._options = given
        self._begin_at = begin_at
        self._environment = RunEnvironment.read() if self.speaks_for_the_peer else RunEnvironment()
        self._run = run if run is not None or given["port"] is not None else self._environment.run
        self._news = News(
            given["on_event"] if self.speaks_for_the_peer else None,
            self._environment,
            quiet=not self.speaks_for_the_peer,
        )
        holders = ShardHolders(self._ranks) if self._ranks is not None and in_shards else Holders()
        self._tensors = NamedTensors.of(model, optimizer, holders)
        self._num_parameters = sum(tensor.numel() for tensor in self._tensors.trained.values())
        self._restored: Checkpoint | None = None
        self._access: RunAccess | None = None
        self._participant: Participant | None = None
        self._closed = False
        self._narration = Narration(self._tell)
        self._last_view: RunView | None = None
        self._progress: Progress | None = None
        self._windows = Windows(self.figures, lambda: self.ticket, lambda: self.is_host, self._tell)
        self._checkpoints = SessionCheckpoints(given, self._ranks, clock=self._narration.clock, tell=self._tell)

    # -- hooks for sessions inside of a framework ----------------------------------------------------------------------

    def local_ranks(self) -> LocalRanks | None:
        """The processes that are this peer, if they are several and each has the whole model.

        Override it to say otherwise. It is asked for once, before the session is complete. Those that hold a sharded
        model together need not be named: they are the ranks of its mesh.
        """
        return None

    @property
    def speaks_for_the_peer(self) -> bool:
        """Whether this process reports, saves, and writes the ticket; of several that are one peer, only one does."""
        return self._ranks is None or self._ranks.leads

    def connect(self) -> RunAccess:
        """The access to the run, not started, of this process. Raises what :meth:`open_access` does."""
        ranks, given = self._ranks, self._options["port"]
        if ranks is None:
            return self.open_access() if given is None else given
        if given is not None and is_shared(given):
            return given
        access = by_leader(ranks, self.open_access if given is None else lambda: given)
        return FollowerPort(ranks) if access is None else leading(access, ranks)

    def open_access(self) -> RunAccess:
        """The access to the run, not started. Override it to put something between the run and the session.

        Raises:
            ConfigurationError: an argument is wrong, or the dataset is shorter than a round.
        """
        options = self._options
        config = self.hosting_config() if self._run is None else None
        if config is not None and config.global_batch_size is not None:
            check_dataset_size(options["dataset_size"], config.global_batch_size)
        state = self.state_to_host(config) if config is not None else None
        return connect_to_run(
            self._run,
            options,
            self._environment,
            config=config,
            state=state,
            folder=self._checkpoints.directory,
            saved=saved_step(self._restored),
        )

    def hosting_config(self) -> RunConfig:
        """The settings of a hosted run. Override it to fill in what they leave open.

        Raises:
            ConfigurationError: the environment has a setting that no run has.
        """
        config = settings_to_host(self._options["config"], self._environment)
        if config.optimizer is None:
            config = replace(config, optimizer=settings_of(self._optimizer))
        if config.lr_schedule is None:
            config = replace(config, lr_schedule=schedule_of(self._optimizer))
        return config

    def state_to_host(self, config: RunConfig) -> Coordinator | None:
        """Where a run hosted with ``config`` begins; None at its beginning."""
        state = state_to_resume(self._restored, config)
        return self._begin_at.state(config) if state is None and self._begin_at is not None else state

    # -- beginning and end ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Loads the checkpoint to resume from, and hosts or joins the run. Blocks until the coordinator has taken us.

        A run that is joined is looked at first: what stands in our way is found before anybody there knows of us.

        Raises:
            ConfigurationError: the checkpoint folder cannot be written to, what is to be resumed cannot be read, the
                dataset is shorter than a round, or the run has something that is not supported.
            JoinRefusedError: the coordinator hosts another run, is full, or does not want this key.
            CoordinatorLinkError: it cannot be reached.
            ExchangeError: our own endpoint cannot be opened.
        """
        if self._closed:
            raise DistroError("a session is in a run once; make a new one")
        if self._participant is not None:
            return
        start_logging(self._environment.log)
        try:
            self._begin()
        except BaseException:
            self._checkpoints.release()
            raise

    def _begin(self) -> None:
        self._optimizer.flush()
        self._checkpoints.open(self._model, self._tensors, self._optimizer)
        checkpoints = self._checkpoints.kept
        resumes_from = checkpoints if self._options["resume"] or self.resumes_at_its_step else NoCheckpoints()
        if self._options["resume"]:
            with narrated("reading the checkpoint", self._tell):
                self._restored = checkpoints.restore()
        if self._restored is not None:
            size_before = self._restored.identity.data.get("size")
        else:
            size_before = self._begin_at.dataset_size if self._begin_at is not None else None
        if (change := other_dataset(size_before, self._options["dataset_size"])) is not None:
            self._tell(change)
        if self._access is None:
            self._access = self.connect()
        access = self._access
        try:
            with narrated("opening our endpoint" if self._run is None else "looking for the run", self._tell):
                access.life.look()
            # Only now does every process of this peer know whose it is.
            self._progress = self._news.progress = Progress(access.facts.identity.p2p_identity)
            if self._checkpoints.uploads:
                self._progress.uploads = lambda: asdict(self.uploads)
            by_leader(self._ranks, lambda: self._open_windows(access))
            if (state := access.facts.state) is not None and not access.facts.is_host:
                self._check_before_joining(state)
                self._narration.found(access.facts.view())
            if self._restored is not None:
                access.life.judge_by(self._restored.audit_limits())
            with narrated("asking to be let into the run", self._tell):
                access.life.start()
            if not access.facts.is_host:
                self._look_around(access)
            participant = self._take_part(access, resumes_from)
            by_leader(self._ranks, lambda: self._say_joined(access.facts))
        except BaseException:
            self._windows.close()
            access.life.close()
            raise
        self._participant = participant
        self._optimizer.hand_over(self._optimizer_step)

    def _say_joined(self, facts: RunFacts) -> None:
        """We are in the run: writes that down.

        Raises:
            ConfigurationError: the ticket cannot be written.
        """
        if facts.is_host and facts.ticket is not None and self._environment.ticket_file is not None:
            write_ticket(self._environment.ticket_file, facts.ticket)
        self._news.joined(facts, self._num_parameters)

    def _open_windows(self, access: RunAccess) -> None:
        web = self._options["web"] if self._options["web"] is not None else self._environment.web
        self._windows.open(web, self._options["metrics_port"], access.life.acts)

    def _check_before_joining(self, state: Coordinator) -> None:
        """Finds what stands in our way.

        Raises:
            ConfigurationError: something does; says what.
        """
        check_newcomer(state)
        check_dataset_size(self._options["dataset_size"], state.config.global_batch_size_end)
        check_shows_momentum(state, self._optimizer.plan, is_in_shards=self._tensors.holders.several)
        if self.look_over is not None:
            self.look_over(state)

    def sample_of(self, data_index: int) -> int | None:
        """The sample of the dataset that an index of the coordinator means; None if the dataset has no length."""
        order = self._sample_order(self._access) if self._access is not None else None
        return None if order is None else order.samples(range(data_index, data_index + 1))[0]

    def _sample_order(self, access: RunAccess) -> SampleOrder | None:
        size, seed = self._options["dataset_size"], self._options["data_seed"]
        if size is None:
            return None
        if self.by_data_index and (state := access.facts.state) is not None and is_run_of_psyche(state):
            return SampleOrder(size, None)
        return SampleOrder(size, shuffle_seed(access.facts.run_id) if seed is None else seed)

    def _take_part(self, access: RunAccess, resumes_from: CheckpointKeeper) -> Participant:
        """What exists while we are in the run."""
        state = access.facts.state
        if state is not None:
            check_dataset_size(self._options["dataset_size"], state.config.global_batch_size_end)
            check_shows_momentum(state, self._optimizer.plan, is_in_shards=self._tensors.holders.several)
            if (reason := why_momenta_are_not_audited(state, self._optimizer.param_groups)) is not None:
                self._tell(reason)
        terms = RunTerms.adopt(state, self._optimizer, learning_rates=self._options["learning_rates"], tell=self._tell)
        order = self._sample_order(access)
        if terms.as_psyche and order is not None and order.seed is not None:
            self._tell(
                "samples are taken in this script's own order, so that all peers must run this script: "
                f"{HOW_TO_TAKE_BY_DATA_INDEX}"
            )
        local = LocalModel(
            model=self._model,
            optimizer=self._optimizer,
            tensors=self._tensors,
            keeper=self._checkpoints.keeper(self._tensors),
            resumes_from=resumes_from,
            restored=self._restored,
            begin_at=self._begin_at,
            order=order,
            between=self._checkpoints.between,
            audit_loss=self._options["audit_loss"],
            audit_size=self.audit_size,
        )
        return Participant(
            access,
            local,
            terms,
            news=self._news,
            tell=self._tell,
            follow_schedule=self._follow_schedule,
            progress=self._narration.downloaded if self.speaks_for_the_peer else None,
        )

    def close(self, timeout: float = 5.0) -> None:
        """Leaves the run and releases everything. The model has its true weights then. May be called again.

        What was trained since the last checkpoint is saved. The others of a run that is hosted here elect another host,
        if it may go on without us (``RunConfig(succession=True)``).

        Args:
            timeout: seconds that leaving cleanly may take. What is still to be uploaded is waited for besides, as long
                as ``upload`` says.
        """
        if self._closed:
            return
        self._closed = True
        self._windows.close()
        self._optimizer.hand_over(None)
        self._optimizer.undo_lookahead(discard_edits=True)
        try:
            self._end(timeout)
        finally:
            self._checkpoints.release()

    def _end(self, timeout: float) -> None:
        access, participant = self._access, self._participant
        if access is None:
            return
        if participant is None:
            self._leave(access, timeout)
            return
        participant.stop()
        facts = access.facts
        state, run_id, fault = facts.state, facts.run_id, facts.view().fault
        self._leave(access, timeout)
        participant.save_at_the_end(run_id, state, is_right=fault is None)
        self._last_view = facts.view()
        self._checkpoints.finish_uploads()
        text = "" if participant.ended else "left before the end"
        self._news.ended(facts, participant.step, self._last_digests(participant), text)

    def _last_digests(self, participant: Participant) -> Callable[[], Sequence[bytes]]:
        """Gives those of the weights as they are. Processes that hold them together take them together, or not."""
        holders = self._tensors.holders
        if not holders.several:
            return participant.trainer.digests
        wanted = holders.all_want(self._news.is_reporting or not self.speaks_for_the_peer)
        digests = participant.trainer.digests() if wanted else []
        return lambda: digests

    def _leave(self, access: RunAccess, timeout: float) -> None:
        with narrated("leaving the run", self._tell):
            access.life.close(timeout)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # -- rounds --------------------------------------------------------------------------------------------------------

    def rounds(self) -> Iterator[Round]:
        """The rounds in which we train, to the end of the run."""
        while (round_ := self.next_round()) is not None:
            yield round_

    def next_round(self) -> Round | None:
        """Waits for the next round in which we train, doing what the run wants done meanwhile; None at its end.

        Finishes the round before if that is still open.

        Raises:
            ModelMismatchError: our model is not the run's.
            RunLostError: the coordinator is gone for good.
            RunError: the run cannot go on with us for another reason.
        """
        participant, access = self._participant, self._access
        if participant is None or access is None:
            raise DistroError(
                'the session is not in a run: call start(), or write "with SwarmSession(...) as session:"'
            )
        if participant.round is not None:
            participant.round.finish()
        while not participant.ended:
            action = access.actions.next_action(EVENT_SECONDS)
            for event in access.actions.take_events():
                self._news.event(event)
            if action is not None:
                participant.carry_out(action)
            if participant.round is not None:
                self._enter(access, participant.round)
                return participant.round
            self._look_around(access)
        return None

    def _enter(self, access: RunAccess, round_: Round) -> None:
        """A round begins."""
        self._checkpoints.tell_of_uploads()
        self._checkpoints.keep_ticket(self.ticket, self._environment.ticket_file)
        view = access.facts.view()
        if self._progress is not None:
            self._progress.begins(
                round_.step, round_.batch, num_parameters=self._num_parameters, num_peers=view.num_peers
            )
        if self.speaks_for_the_peer:
            self._narration.entered(view, round_.step, is_host=access.facts.is_host)

    def _look_around(self, access: RunAccess) -> None:
        """Nothing is to be done: what is there to say?"""
        if not self.speaks_for_the_peer:
            return
        self._checkpoints.tell_of_uploads()
        self._narration.look(access.facts.view(), access.facts.identity.p2p_identity)

    @property
    def round(self) -> Round | None:
        """The open round; None between rounds."""
        return self._participant.round if self._participant is not None else None

    def _optimizer_step(self, closure: Callable[[], float] | None) -> float | None:
        """What ``optimizer.step(closure)`` does in a run."""
        round_ = self.round
        if round_ is None:
            raise DistroError(
                "optimizer.step() outside of a round: in a run, steps are taken in rounds; ask session.next_round()"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        round_.finish_in_step(loss)
        return loss

    # -- what there is to know -----------------------------------------------------------------------------------------

    def follow(self, *schedulers: Any) -> None:
        """Lets ``torch.optim.lr_scheduler`` schedulers of the optimizer follow the run's step; do not step them.

        Raises:
            ConfigurationError: a scheduler that depends on more than the step, such as ReduceLROnPlateau.
        """
        self.follow_schedule = FollowingSchedulers(schedulers)

    def _follow_schedule(self, step: int) -> None:
        if self.follow_schedule is not None:
            self.follow_schedule(step)

    def _tell(self, text: str) -> None:
        self._news.tell(text, self.step)

    @property
    def ended(self) -> bool:
        """The run is over."""
        return self._participant is not None and self._participant.ended

    @property
    def step(self) -> int:
        """The run's step that the model is at: weights have everything applied that came before it."""
        if self._participant is not None:
            return self._participant.step
        return self._restored.step if self._restored is not None else FIRST_STEP

    @property
    def epoch(self) -> int:
        """The run's epoch, in the coordinator's sense: what is between two pauses in which peers come and go."""
        return self.view().epoch

    @property
    def state(self) -> Coordinator | None:
        """The coordinator's latest state; None before :meth:`start`."""
        return self._access.facts.state if self._access is not None else None

    @property
    def total_steps(self) -> int:
        """The run's last step that is trained, counted from 1; 0 before :meth:`start`."""
        state = self.state
        return 0 if state is None else last_trained_step(state.config)

    @property
    def clip_grad_norm(self) -> float | None:
        """The norm to which a run of Psyche's has gradients clipped, as this session does; None where none is."""
        return self._participant.trainer.clip_grad_norm if self._participant is not None else None

    @property
    def num_peers(self) -> int:
        """Clients of the present epoch."""
        return self.view().num_peers

    @property
    def peer_index(self) -> int | None:
        """Our place among them; None while we are not in the epoch."""
        return self.view().peer_index

    @property
    def is_host(self) -> bool:
        """Whether we began the run, and so decide who is in it."""
        return self._access is not None and self._access.facts.is_host

    @property
    def ticket(self) -> str | None:
        """What others pass as ``run`` to join."""
        return self._access.facts.ticket if self._access is not None else None

    @property
    def run_id(self) -> str:
        """The run's name."""
        return self.view().run_id

    @property
    def uploads(self) -> UploadCounts:
        """What became of the uploads of checkpoints. For any thread."""
        return self._checkpoints.counts

    def kick(self, peer: bytes | str) -> None:
        """Takes a peer out of the run that we host, by its key, or the first eight digits of it. It may come again.

        Raises:
            ConfigurationError: no peer has this key, or we do not host the run.
        """
        self._acts("kick").kick(peer)

    def ban(self, peer: bytes | str) -> None:
        """Takes a peer out of the run that we host for good: with ``checkpoint_dir``, also when the host was restarted.

        Raises what :meth:`kick` does.
        """
        self._acts("ban").ban(peer)

    def unban(self, peer: bytes | str) -> None:
        """Takes a ban back. Raises what :meth:`kick` does."""
        self._acts("unban").unban(peer)

    def allow(self, peers: Collection[bytes | str] | None) -> None:
        """From now on only these and we may be in the run that we host; None lets everybody in that is not banned.

        Raises what :meth:`kick` does.
        """
        self._acts("allow").allow(peers)

    def _acts(self, act: str) -> HostActs:
        acts = self._access.life.acts if self._access is not None else None
        if acts is None:
            raise ConfigurationError(
                f"{act}() is for the host of a run, once it has started: only who hosts decides who is in it", name=act
            )
        return acts

    def figures(self) -> Figures:
        """How it goes, in numbers: those of the view and more. For any thread, after :meth:`start`."""
        if self._progress is None:
            raise DistroError("a session has figures from start() on")
        return self._progress.figures(self.view(), self.state)

    def summary(self) -> str:
        """What remains of the run in a few lines: peers, bytes, time, and the hash of the weights."""
        ddp_bytes = self._progress.ddp_bytes if self._progress is not None else 0
        return summary(self.view(), ddp_bytes=ddp_bytes, is_host=self.is_host)

    def view(self) -> RunView:
        """A snapshot for logs and live tables, after :meth:`close` the last one. For any thread."""
        if self._last_view is not None:
            return self._last_view
        return self._access.facts.view() if self._access is not None else RunView(run_id="")
