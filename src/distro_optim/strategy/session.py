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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from os import PathLike
from types import TracebackType
from typing import Any, Final, Literal

import torch
from torch import nn

from ..comm.signing import SecretKey
from ..coordinator.model import Distro
from ..coordinator.rules.checkpoints import is_shared_by_peers
from ..coordinator.rules.steps import last_trained_step
from ..coordinator.types import Coordinator
from ..errors import ConfigurationError, DistroError, RunError
from ..optimizer import DisTrO
from .config import RunConfig
from .environment import RunEnvironment, write_ticket
from .model.checkpoint import Checkpoint, CheckpointStore
from .model.checkpoint_keeper import CheckpointKeeper
from .model.handover import ModelHandover
from .model.loading import ModelLoader
from .model.named_tensors import NamedTensors
from .model.psyche_settings import adopt_settings, changes_of_schedule, schedule_of, settings_of
from .model.resuming import StartingPoint, state_to_resume
from .model.schedules import FIRST_STEP, FollowingSchedulers
from .model.trainer import SwarmTrainer
from .news import News
from .port import RunPort, RunView
from .round import Round, SampleOrder
from .rounds import actions as act
from .sample_order import check_dataset_size, shuffle_seed

__all__ = ["LearningRates", "Round", "SwarmSession"]

LearningRates = Literal["script", "run"]

EVENT_SECONDS: Final = 1.0
"""How often news are looked for while there is nothing to do. Chosen arbitrarily."""

_log = logging.getLogger(__name__)


class SwarmSession:
    """One participant in a run, from :meth:`start` to :meth:`close`, or as a context manager.

    Hosting (``run=None``) begins a run and makes :attr:`ticket`; joining takes one, or ``"host:port/run-id"``. In a
    run of our own kind all peers run the same script: model, optimizer settings, schedule, dataset size; who joins
    with another one gets :class:`~distro_optim.errors.ModelMismatchError`, which names the first difference. In a run
    of Psyche's the coordinator's settings of the optimizer and its learning rates count; what they change is told.

    What the arguments leave open, the environment may say; see :mod:`.environment`.

    Args:
        model: unwrapped; on the device on which it trains.
        optimizer: of its parameters, with ``overlap=True``. Between :meth:`start` and :meth:`close`, its ``step()``
            does what :meth:`Round.finish` does.
        run: a ticket or an address; None hosts.
        config: of a hosted run.
        dataset_size: samples in the dataset; the same on all peers. Not needed if only :attr:`Round.batch` is used.
        data_seed: of the order of samples; by default made from the run's name.
        secret_key: who we are; by default somebody new each time.
        relay: ``"default"``, ``"none"`` or addresses of relays.
        checkpoint_dir: folder for checkpoints, one at the end of each epoch and one at the end; None saves nothing.
        keep_checkpoints: how many stay.
        resume: go on from the newest checkpoint there, if there is one. Who joins takes the run's weights if those
            differ, and says so. Where nobody shares them, whoever has a checkpoint of the run's step brings it.
        learning_rates: ``"script"``: the parameter groups' own, which must be the same on all peers; ``"run"``: the
            coordinator's. None takes "script" in runs of our own kind.
        on_event: called with news in words, one sentence each; they are logged besides.
        port: instead of the connection made from ``run``, ``config``, ``secret_key`` and ``relay``.
        **connection: more for :meth:`.runtime.Runtime.connect`, such as ``bind_addr``, ``tcp``, ``peers``, ``allow``.

    Raises:
        ConfigurationError: an argument is wrong, or the optimizer is no DisTrO of this model's parameters.

    Attributes:
        follow_schedule: called with the step before anything of a new step is carried out, so that the script's
            learning rates are those of the step; see :meth:`follow`. Not with a step after the last that is trained.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: DisTrO,
        *,
        run: str | None = None,
        config: RunConfig | None = None,
        dataset_size: int | None = None,
        data_seed: int | None = None,
        secret_key: SecretKey | bytes | str | PathLike[str] | None = None,
        relay: str | Sequence[str] = "default",
        checkpoint_dir: str | PathLike[str] | None = None,
        keep_checkpoints: int = 3,
        resume: bool = False,
        learning_rates: LearningRates | None = None,
        on_event: Callable[[str], None] | None = None,
        port: RunPort | None = None,
        **connection: Any,
    ) -> None:
        if not isinstance(optimizer, DisTrO):
            raise ConfigurationError(
                f"a run needs the optimizer DisTrO, got {type(optimizer).__name__}: write "
                "optimizer = distro_optim.DisTrO(model.parameters(), lr=...)",
                name="optimizer",
                value=optimizer,
            )
        if learning_rates not in (None, "script", "run"):
            raise ConfigurationError(
                f'learning_rates={learning_rates!r}: give "script", "run" or None', name="learning_rates"
            )
        if dataset_size is not None and dataset_size < 1:
            raise ConfigurationError(
                f"dataset_size={dataset_size}: a run needs samples", name="dataset_size", value=dataset_size
            )
        if resume and checkpoint_dir is None:
            raise ConfigurationError("resume=True needs the folder to resume from: give checkpoint_dir", name="resume")
        self.follow_schedule: Callable[[int], None] | None = None
        self._model = model
        self._optimizer = optimizer
        self._environment = RunEnvironment.read()
        self._run = run if run is not None or port is not None else self._environment.run
        self._config = config
        self._dataset_size = dataset_size
        self._data_seed = data_seed
        self._secret_key = secret_key
        self._relay = relay if relay != "default" else self._environment.relay or relay
        self._checkpoint_dir = checkpoint_dir
        self._keep_checkpoints = keep_checkpoints
        self._resume = resume
        self._learning_rates = learning_rates
        self._news = News(on_event, self._environment)
        self._port = port
        self._connection = connection
        # Checks what can be checked without a network.
        self._trainer = SwarmTrainer(NamedTensors.of(model, optimizer), optimizer)
        self._handover: ModelHandover | None = None
        self._keeper: CheckpointKeeper | None = None
        self._loader: ModelLoader | None = None
        self._resumes_from: CheckpointKeeper | None = None
        self._restored: Checkpoint | None = None
        # Where a hosted run goes on whose weights and momentum the model has already; None begins anew.
        self._begin_at: StartingPoint | None = None
        self._order: SampleOrder | None = None
        self._as_psyche = False
        self._round: Round | None = None
        self._started = self._closed = self._ended = False
        # Whether the weights are between two states that mean something: an action is being carried out, or broke.
        self._torn = False
        self._step = FIRST_STEP
        self._schedule_step: int | None = None
        self._digests: list[bytes] = []

    # -- beginning and end ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Loads the checkpoint to resume from, and hosts or joins the run. Blocks until the coordinator has taken us.

        Raises:
            ConfigurationError: the checkpoint folder cannot be written to, what is to be resumed cannot be read, or the
                dataset is shorter than a round.
            JoinRefusedError: the coordinator hosts another run, is full, or does not want this key.
            CoordinatorLinkError: it cannot be reached.
            ExchangeError: our own endpoint cannot be opened.
        """
        if self._closed:
            raise DistroError("a session is in a run once; make a new one")
        if self._started:
            return
        self._optimizer.flush()
        if self._checkpoint_dir is not None:
            store = CheckpointStore(self._checkpoint_dir, keep=self._keep_checkpoints)
            self._keeper = CheckpointKeeper(store, self._model, self._tell)
            if self._resume:
                self._resumes_from = self._keeper
                self._restored = self._keeper.restore(self._trainer)
                self._step = self._restored.step if self._restored is not None else self._step
        if self._port is None:
            self._port = self._connect()
        try:
            self._port.start()
            self._started = True
            self._settle(self._port)
        except BaseException:
            self._port.close()
            self._started = False
            raise
        self._optimizer.hand_over(self._optimizer_step)

    def close(self, timeout: float = 5.0) -> None:
        """Leaves the run and releases everything. The model has its true weights then. May be called again.

        What was trained since the last checkpoint is saved. A run that is hosted here ends.

        Args:
            timeout: seconds that leaving politely may take.
        """
        if self._closed:
            return
        self._closed = True
        port = self._port
        self._optimizer.hand_over(None)
        self._trainer.abandon()
        if self._round is not None:
            self._round.open, self._round = False, None
        if port is None:
            return
        state, run_id, fault = port.state, port.run_id, port.view().fault
        port.close(timeout)
        if self._started:
            if fault is None and not self._torn:
                self._save_at_the_end(run_id, state)
            text = "" if self._ended else "left before the end"
            self._news.ended(port, self._step, self._trainer.digests, text)

    def __enter__(self) -> SwarmSession:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _connect(self) -> RunPort:
        from .network.runtime import Runtime

        config = self._hosting_config() if self._run is None else None
        if config is not None and config.global_batch_size is not None:
            check_dataset_size(self._dataset_size, config.global_batch_size)
        return Runtime.connect(
            self._run,
            config=config,
            secret_key=self._secret_key,
            relay=self._relay,
            state=self._state_to_host(config) if config is not None else None,
            **self._connection,
        )

    def _state_to_host(self, config: RunConfig) -> Coordinator | None:
        """Where a hosted run begins; None at its beginning."""
        state = state_to_resume(self._restored, config)
        return self._begin_at.state(config) if state is None and self._begin_at is not None else state

    def _hosting_config(self) -> RunConfig:
        config = self._config or RunConfig()
        untouched = RunConfig()
        known = {field.name for field in fields(RunConfig)}
        for name, value in self._environment.config.items():
            if name not in known:
                raise ConfigurationError(f"a run has no setting {name!r}; it has {', '.join(sorted(known))}", name=name)
            if getattr(config, name) == getattr(untouched, name):
                config = replace(config, **{name: value})
        if config.optimizer is None:
            config = replace(config, optimizer=settings_of(self._optimizer))
        if config.lr_schedule is None:
            config = replace(config, lr_schedule=schedule_of(self._optimizer))
        return config

    def _settle(self, port: RunPort) -> None:
        """What depends on the run that we are in."""
        state = port.state
        own_kind = state is None or is_shared_by_peers(state.model.checkpoint)
        script_rates = self._learning_rates == "script" or (self._learning_rates is None and own_kind)
        self._as_psyche = not own_kind
        clip = None
        if state is not None:
            check_dataset_size(self._dataset_size, state.config.global_batch_size_end)
        if self._as_psyche and state is not None and isinstance(state.model.optimizer, Distro):
            clip = state.model.optimizer.clip_grad_norm
            changes = adopt_settings(self._optimizer, state.model.optimizer)
            if self._learning_rates is None:  # else the script says that it knows
                changes += changes_of_schedule(self._optimizer, state.model.lr_schedule, clip)
            for change in changes:
                self._tell(f"the run's settings count: {change}")
        self._trainer = SwarmTrainer(
            self._trainer.tensors,
            self._optimizer,
            script_rates=script_rates,
            sorted_by_name=self._as_psyche,
            clip_grad_norm=clip,
        )
        data = {}
        if self._dataset_size is not None:
            seed = shuffle_seed(port.run_id) if self._data_seed is None else self._data_seed
            self._order = (self._dataset_size, seed)
            data = {"size": self._dataset_size, "seed": seed}
        self._handover = ModelHandover(
            port,
            self._trainer,
            self._model,
            script_rates=script_rates,
            data=data,
            as_psyche=self._as_psyche,
            tell=self._tell,
        )
        self._loader = ModelLoader(
            port,
            self._trainer,
            self._handover,
            checkpoints=self._resumes_from,
            restored=self._restored,
            begin_at=self._begin_at,
            as_psyche=self._as_psyche,
            tell=self._tell,
        )
        if port.is_host and port.ticket is not None and self._environment.ticket_file is not None:
            write_ticket(self._environment.ticket_file, port.ticket)
        self._news.joined(port, sum(tensor.numel() for tensor in self._trainer.tensors.trained.values()))

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
        port = self._require_port()
        if self._round is not None:
            self._round.finish()
        while not self._ended:
            action = port.next_action(EVENT_SECONDS)
            for event in port.take_events():
                self._news.event(event)
            if action is not None:
                self._torn = True
                self._carry_out(port, action)
                self._torn = False
            if self._round is not None:
                return self._round
        return None

    @property
    def round(self) -> Round | None:
        """The open round; None between rounds."""
        return self._round

    def is_cancelled(self, step: int) -> bool:
        """See :attr:`Round.cancelled`."""
        return self._closed or self._port is None or self._port.is_cancelled(step)

    def finish_round(self, round_: Round, *, loss: float | None, skip: bool) -> bool:
        """See :meth:`Round.finish` and :meth:`Round.skip`."""
        if not round_.open or round_ is not self._round:
            return False
        port = self._require_port()
        round_.open, self._round = False, None
        published = not port.is_cancelled(round_.step)
        self._torn = True
        if published:
            update, own = self._trainer.finish(skip=skip)
            port.trained(round_.step, update, own, loss=loss)
        else:
            self._trainer.cancel()
            port.cancelled(round_.step)
        self._torn = False
        self._news.round(port, round_.step, loss, self._digests)
        return published

    def _optimizer_step(self, closure: Callable[[], float] | None) -> float | None:
        """What ``optimizer.step(closure)`` does in a run."""
        if self._round is None:
            raise DistroError(
                "optimizer.step() outside of a round: in a run, steps are taken in rounds; ask session.next_round()"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._round.finish(loss)
        return loss

    # -- actions -------------------------------------------------------------------------------------------------------

    def _carry_out(self, port: RunPort, action: act.Action) -> None:
        match action:
            case act.Initialize():
                self._at_step(action.step)
                self._loader_of().load(action)
            case act.TrainBatch():
                self._at_step(action.step)
                self._trainer.begin(action)
                self._round = Round(action, self, self._order)
            case act.ApplyResults():
                self._at_step(action.step)
                self._trainer.apply(action)
            case act.DecayWeights():
                self._at_step(action.step)
                self._trainer.decay(action)
                self._news.round(port, action.step, None, self._digests)
            case act.HashWeights():
                self._digests = self._trainer.digests()
                port.weights_hashed(action.step, self._digests)
            case act.FinishEpoch():
                self._finish_epoch(port, action.step + 1)
            case act.RunEnded():
                self._ended, self._torn = True, False
                if action.error is not None:
                    raise RunError(f"the run ended at step {action.step}: {action.error}")
                if port.view().fault is not None or not self._loader_of().loaded:
                    self._tell(
                        "the run is over, and the weights here are not those it ended with: "
                        "take them from a peer that was in it to the end"
                    )

    def _at_step(self, step: int) -> None:
        """Everything of a step begins here."""
        self._step = step
        # What is applied after the last training has its rates: a schedule of so many steps has no more of them.
        scheduled = min(step, max(FIRST_STEP, self.total_steps))
        if self.follow_schedule is not None and scheduled != self._schedule_step:
            self.follow_schedule(scheduled)
        self._schedule_step = scheduled
        self._handover_of().passed(step)

    def _finish_epoch(self, port: RunPort, step: int) -> None:
        self._at_step(step)
        if self._as_psyche:
            self._trainer.round_to_bfloat16()
        state = port.state
        values, identity = self._handover_of().snapshot(_epoch_of(state), step)
        self._handover_of().offer(identity, values)
        if self._keeper is not None:
            self._keeper.save(self._trainer, values, run_id=port.run_id, identity=identity, state=state)

    def _save_at_the_end(self, run_id: str, state: Coordinator | None) -> None:
        # Who never had the run's weights has nothing of it to save.
        if self._keeper is None or not self._loader_of().loaded or self._keeper.saved_step == self._step:
            return
        values, identity = self._handover_of().snapshot(_epoch_of(state), self._step)
        self._keeper.save(self._trainer, values, run_id=run_id, identity=identity, state=state)

    def _tell(self, text: str) -> None:
        self._news.tell(text, self._step)

    # -- what there is to know -----------------------------------------------------------------------------------------

    def follow(self, *schedulers: Any) -> None:
        """Lets ``torch.optim.lr_scheduler`` schedulers of the optimizer follow the run's step; do not step them.

        Raises:
            ConfigurationError: a scheduler that depends on more than the step, such as ReduceLROnPlateau.
        """
        self.follow_schedule = FollowingSchedulers(schedulers)

    @property
    def ended(self) -> bool:
        """The run is over."""
        return self._ended

    @property
    def step(self) -> int:
        """The run's step that the model is at: weights have everything applied that came before it."""
        return self._step

    @property
    def epoch(self) -> int:
        """The run's epoch, in the coordinator's sense: what is between two pauses in which peers come and go."""
        return self.view().epoch

    @property
    def total_steps(self) -> int:
        """The run's last step that is trained, counted from 1; 0 before :meth:`start`."""
        state = self._port.state if self._port is not None else None
        return 0 if state is None else last_trained_step(state.config)

    @property
    def clip_grad_norm(self) -> float | None:
        """The norm to which a run of Psyche's has gradients clipped, as this session does; None where none is."""
        return self._trainer.clip_grad_norm

    @property
    def num_peers(self) -> int:
        """Clients of the present epoch."""
        return self.view().num_peers

    @property
    def peer_index(self) -> int | None:
        """Our place among them; None while we are not in the epoch."""
        return self.view().peer_index

    @property
    def ticket(self) -> str | None:
        """What others pass as ``run`` to join."""
        return self._port.ticket if self._port is not None else None

    @property
    def run_id(self) -> str:
        """The run's name."""
        return self.view().run_id

    def view(self) -> RunView:
        """A snapshot for logs and live tables. For any thread."""
        return self._port.view() if self._port is not None else RunView(run_id="")

    def _require_port(self) -> RunPort:
        if self._port is None or not self._started:
            raise DistroError(
                'the session is not in a run: call start(), or write "with SwarmSession(...) as session:"'
            )
        return self._port

    def _handover_of(self) -> ModelHandover:
        assert self._handover is not None
        return self._handover

    def _loader_of(self) -> ModelLoader:
        assert self._loader is not None
        return self._loader


def _epoch_of(state: Coordinator | None) -> int:
    return state.progress.epoch if state is not None else 0
