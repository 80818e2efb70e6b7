"""PsycheStrategy: an existing Lightning script hosts a run, or joins one.

::

    Trainer(strategy=PsycheStrategy())  # hosts, and prints a ticket
    Trainer(strategy=PsycheStrategy(run="psyche1..."))  # joins, from anywhere
    Trainer(strategy=PsycheStrategy(run="host:20000/my-run"))  # joins at a Psyche coordinator
    Trainer(strategy=PsycheStrategy(run="solana:my-run"))  # joins a run that Solana coordinates

One batch of Lightning's is one round of the run and one step of the optimizer, so ``max_steps``, ``global_step``,
schedules and checkpoints mean what they mean elsewhere, and all peers agree on them::

    RoundLoader.__next__   waits for the round, puts the counters where the run is, loads the assigned samples
    training_step          forward passes; all but the last also backward, where the share is more than one batch
    backward               the last one
    optimizer_step         all of it, as the closure of DisTrO.step, which publishes the contribution

============================  ====================================================================================
``psyche``                    :class:`PsycheStrategy`, all that it does in Lightning's hooks
``psyche_lightning``,         the class itself: Lightning has two names, whose classes have nothing in common, so there
``psyche_pytorch_lightning``  is one for each
``lightning_machine``         one device, or several that are one peer
``lightning_passes``          a round of several batches as one step
``lightning_checks``          what of a script cannot work in a run
``lightning_progress``        counters and schedules follow the run
``round_loader``, ``samples`` the data
``session``                   everything else
============================  ====================================================================================
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, Final, Self, Unpack

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from ..errors import ConfigurationError, DistroError
from .config import RunConfig
from .frameworks.batch_hooks import BatchHooks
from .frameworks.first_sample import look_at_first_sample
from .frameworks.framework_session import Ended, FrameworkSession, check_for_ddp, split_options
from .frameworks.hosting_defaults import complete_config, default_batch_size, rounds_per_pass
from .frameworks.lightning_checks import check_fit, check_optimizers, compile_advice, with_one_optimizer
from .frameworks.lightning_passes import RoundPasses
from .frameworks.lightning_progress import (
    RunLimits,
    ScheduleFollower,
    align_counters,
    end_training,
    make_room_beside,
    rounds_in_epoch,
    rounds_within,
    whole_epoch_shown,
    whole_peers,
)
from .frameworks.round_loader import RoundLoader
from .frameworks.run_ahead import RunAhead
from .frameworks.samples import Samples, samples_of, warn
from .frameworks.shards import ShardSizes
from .frameworks.whole_file import whole_file
from .model.resuming import StartingPoint
from .monitor.figures import run_numbers
from .network.on_solana import check_run
from .one_line import tell_mistakes_in_one_line
from .options import STRATEGY_DEFAULTS, StrategyOptions, TrainingOptions, shows
from .port import RunView
from .ranks.local_ranks import LocalRanks
from .round import Round
from .session import SwarmSession

__all__ = ["PsycheStrategy"]

_CLASSES: Final = {
    "lightning.pytorch": "psyche_lightning.LightningPsycheStrategy",
    "pytorch_lightning": "psyche_pytorch_lightning.PytorchLightningPsycheStrategy",
}
"""Lightning's two names, and the class for each, in a module beside this one."""

_PLACE_KEY: Final = "distro_optim"
"""Of a checkpoint: where the run was."""

_REGISTERED: Final = {"psyche": "popen", "psyche_spawn": "spawn", "psyche_fork": "fork"}
"""What ``Trainer(strategy=...)`` takes, and how the processes of several devices start then."""


class PsycheStrategy(RoundPasses):
    """Trains with peers over the internet: hosts a run, or joins one.

    Makes the class for ``lightning.pytorch`` or for ``pytorch_lightning``, whichever the script has imported; with both
    imported, the former. To choose, or to derive a class, take ``LightningPsycheStrategy`` or
    ``PytorchLightningPsycheStrategy``.

    The module's ``configure_optimizers`` returns a :class:`~distro_optim.DisTrO`. Everybody runs the same script.
    Several devices of this machine (``Trainer(devices=2)``) are one peer. ``global_rank`` and ``world_size`` are about
    them; the run has :attr:`num_peers` and :attr:`peer_index`. Reductions and logs with ``sync_dist`` stay on this
    machine, and every peer writes its own checkpoints. Validation, testing and prediction go without the network.

    Args:
        run: a ticket, ``"host:port/run-id"`` or ``"solana:run-id"``; None hosts.
        data_parallel_size, tensor_parallel_size: of a model that the devices hold together, as for Lightning's
            ``ModelParallelStrategy``: ``configure_model`` shards it over ``self.device_mesh``. One of them follows from
            the other; with neither, each device has the whole model.
        **options: see :class:`~.options.TrainingOptions` and :class:`~.options.ConnectionOptions`. What
            ``config`` leaves open is taken from the trainer: ``total_steps`` from ``max_steps`` or ``max_epochs``,
            ``global_batch_size`` from the batch size, times ``accumulate_grad_batches``, devices and ``min_peers``.
            ``checkpoint_dir`` is for the run's own checkpoints; Lightning writes its own as ever, and
            ``fit(ckpt_path=...)`` goes on from one of those. Other arguments go to ``DDPStrategy``; they matter with
            several devices.

    Raises:
        ConfigurationError: an argument is wrong.
    """

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        if cls is PsycheStrategy:
            loaded = [name for name in _CLASSES if name in sys.modules]
            cls = _class_for(loaded[0] if loaded else "lightning.pytorch")
        return super().__new__(cls)

    @shows(TrainingOptions, STRATEGY_DEFAULTS, and_more=True)
    def __init__(
        self,
        run: str | None = None,
        *,
        data_parallel_size: int | None = None,
        tensor_parallel_size: int | None = None,
        **options: Unpack[StrategyOptions],
    ) -> None:
        tell_mistakes_in_one_line()
        self._options, others = split_options(options, of=type(self).__name__)
        check_for_ddp(others, of="PsycheStrategy", ddp=type(self))
        super().__init__(**others)
        if run is not None:
            check_run(run, self._options.get("solana"))
        self._shard_sizes = ShardSizes.of(data_parallel_size, tensor_parallel_size)
        self.run = run
        self.config = options.get("config")
        self._accumulate: int | None = None  # these two: what the trainer had, to be given back
        self._clip: float | None = None
        self._last = Ended()
        self._loader: RoundLoader | None = None  # Lightning asks it for its length also after the end of fit
        self._length = 0
        self._forget()

    def _forget(self) -> None:
        """What exists only while ``fit`` runs."""
        self._session: FrameworkSession | None = None
        self._ahead: RunAhead | None = None
        self._limits: RunLimits | None = None  # while the script is set up
        self._saved_place: object = None
        self._next_data_index: int | None = None
        self._round = None
        self._round_waits = False
        self._set_aside = []
        self._shown = None
        self._beside_batch = (0,)
        self._batch_hooks = BatchHooks(self._shown_of)

    @override
    def __getstate__(self) -> dict[str, Any]:
        if self._session is not None:
            raise DistroError("a strategy cannot be pickled or copied while it trains: its connections cannot be")
        return super().__getstate__()

    @override
    def __repr__(self) -> str:
        # Lightning prints this when it is handed the class of its other name, and says nothing else that would help.
        other = next(name for name in _CLASSES if name != self._namespace)
        its_class = _CLASSES[other].rpartition(".")[2]
        return f"<PsycheStrategy for {self._namespace}; a Trainer of {other} takes distro_optim.{its_class}>"

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Under ``"psyche"``, and with other ways to start the processes of several devices."""
        for name, start_method in _REGISTERED.items():
            if name not in strategy_registry:
                strategy_registry.register(
                    name,
                    cls,
                    description=f"hosts a run for peers; start_method={start_method!r}",
                    start_method=start_method,
                )

    # -- the run -------------------------------------------------------------------------------------------------------

    @property
    def session(self) -> SwarmSession | None:
        """Our part in the run; None but during ``fit``."""
        return self._session

    @property
    def _joined(self) -> FrameworkSession:
        if self._session is None:
            raise DistroError("the strategy is in a run only during fit()")
        return self._session

    @property
    def _samples(self) -> Samples:
        if self._loader is None:
            raise DistroError("the strategy has no training data: give fit() a DataLoader for training")
        return self._loader.samples

    @property
    def num_peers(self) -> int:
        """Peers of the run's present epoch, ourselves included; 1 while we are in no run."""
        return 1 if self._session is None else max(1, self._session.num_peers)

    @property
    def peer_index(self) -> int | None:
        """Our place among them; None while we are not in the epoch."""
        return None if self._session is None else self._session.peer_index

    @property
    def ticket(self) -> str | None:
        """What others pass as ``run``."""
        return None if self._session is None else self._session.ticket

    def view(self) -> RunView | None:
        """A snapshot of the run for logs and live tables, from any thread; after ``fit`` the last; None before one."""
        return self._last.view if self._session is None else self._session.view()

    def summary(self) -> str | None:
        """What remains of the run in a few lines: peers, bytes, time, and the hash of the weights; None before one."""
        return self._last.summary if self._session is None else self._session.summary()

    # -- set-up --------------------------------------------------------------------------------------------------------

    @override
    def setup_environment(self) -> None:
        """Looks at the run, if one is to be joined: what the script sets up next may depend on its steps."""
        super().setup_environment()
        trainer = self._trainer
        if trainer.state.fn != "fit":
            return
        # How many batches make a step is for the run to say: see `RunConfig.global_batch_size`.
        if self._accumulate is None:
            self._accumulate, trainer.accumulate_grad_batches = trainer.accumulate_grad_batches, 1
        ranks = None if self._alone else LocalRanks()
        self._ahead = RunAhead.look(self.run, self._options, interrupt=self._heed_sigterm, ranks=ranks)
        self._limits = RunLimits(trainer, self._ahead.last_step)

    @override
    def setup(self, trainer: Any) -> None:
        if trainer.state.fn == "fit":
            check_fit(trainer)
        super().setup(trainer)
        self._end_set_up()

    def _end_set_up(self) -> None:
        if self._limits is not None:
            self._limits.remove()
            self._limits = None

    @override
    def setup_optimizers(self, trainer: Any) -> None:
        with_one_optimizer(super().setup_optimizers, trainer)
        check_optimizers(self.optimizers)

    @override
    def process_dataloader(self, dataloader: object) -> object:
        trainer = self._trainer
        if trainer.state.fn != "fit" or not trainer.training:
            return super().process_dataloader(dataloader)
        by_index = trainer._accelerator_connector.use_distributed_sampler
        self._loader = RoundLoader(samples_of(dataloader, by_index=by_index), self)
        self._length = len(self._loader)
        if self._limits is not None:
            self._limits.rounds_known(rounds_within(self._length, trainer.limit_train_batches))
        return self._loader

    # -- joining -------------------------------------------------------------------------------------------------------

    @override
    def on_train_start(self) -> None:
        """Hosts or joins the run, and waits for the first round: only then is it known where the run stands."""
        super().on_train_start()
        trainer, loader, module = self._trainer, self._loader, self._module
        if loader is None or len(trainer.fit_loop._combined_loader.flattened) != 1:
            raise ConfigurationError(
                "PsycheStrategy needs exactly one training DataLoader, since the run assigns samples of one dataset: "
                "combine yours with torch.utils.data.ConcatDataset or StackDataset",
                name="train_dataloader",
            )
        if (ahead := self._ahead) is None:
            raise DistroError("the strategy's environment was not set up: fit() of a Trainer does so")
        self._session = session = FrameworkSession(
            module,
            self._optimizer,
            run=self.run,
            dataset_size=loader.samples.size,
            complete=self._completed,
            interrupt=self._heed_sigterm,
            ranks=ahead.ranks,
            ahead=ahead,
            begin_at=StartingPoint.of(self._saved_place, trainer.global_step + 1) if trainer.global_step else None,
            audit_loss=self._audit_loss_of_samples if loader.samples.can_load and not self._shard_sizes else None,
            **self._options,
        )
        session.by_data_index = loader.samples.by_data_index
        session.audit_size = loader.samples.micro_batch_size
        session.look_over = look_at_first_sample(session, loader.samples, module)
        if self.lr_scheduler_configs:
            follower = ScheduleFollower(self.lr_scheduler_configs, self._optimizer, self._advance_schedule)
            session.follow_schedule = partial(self._follow_schedule, follower)
        session.start()
        if len(loader) != self._length:
            # Lightning asked for the length before we knew the batch size of the run that we join.
            trainer.fit_loop._combined_loader = None
            trainer.fit_loop.setup_data()
        self._spare_rounds_from_hooks(module)
        self._batch_hooks.stand_in([*trainer.callbacks, module])
        for bar in trainer.callbacks:
            if hasattr(type(bar), "total_train_batches"):
                self._batch_hooks.within(
                    bar, "on_train_epoch_start", lambda: whole_epoch_shown(trainer, session.total_steps)
                )
                self._batch_hooks.after(bar, "get_metrics", whole_peers)
                make_room_beside(bar)
        if session.clip_grad_norm is not None and trainer.gradient_clip_val is not None:
            warn(
                f"the run clips gradients to a norm of {session.clip_grad_norm:g}, in place of "
                f"Trainer(gradient_clip_val={trainer.gradient_clip_val})"
            )
            self._clip, trainer.gradient_clip_val = trainer.gradient_clip_val, None
        if self.is_global_zero:
            session.invite("Trainer(strategy=PsycheStrategy(run={ticket!r}))")
        self._round, self._round_waits = session.next_round(), True
        if self._round is not None:
            align_counters(trainer, self._round.step)

    def _completed(self, config: RunConfig) -> RunConfig:
        trainer = self._trainer
        steps = [trainer.max_steps] if trainer.max_steps != -1 else []
        if trainer.fit_loop.max_epochs not in (None, -1):
            steps.append(trainer.fit_loop.max_epochs * rounds_in_epoch(trainer))
        return complete_config(config, batch_size=self._own_batch_size(config), max_steps=min(steps, default=None))

    @property
    def _batch_size(self) -> int:
        """Samples of a round: the run's, or before we know it, what we would host."""
        source = self._session if self._session is not None else self._ahead
        if source is not None and (state := source.state) is not None:
            return state.config.global_batch_size_end
        return self._own_batch_size(self._ahead.config if self._ahead is not None else self.config or RunConfig())

    def _own_batch_size(self, config: RunConfig) -> int:
        """Of a round that we host."""
        samples = self._samples
        return default_batch_size(
            config,
            peer_batch_size=samples.micro_batch_size * (self._accumulate or 1) * self.place_among_devices[1],
            dataset_size=samples.size,
        )

    def _follow_schedule(self, follower: ScheduleFollower, step: int) -> None:
        # What ends the run happens within the last step, after which Lightning will step the schedulers once more.
        follower.follow(step - 1, rounds_in_epoch(self._trainer))

    def _advance_schedule(self, scheduler: Any) -> None:
        self._module.lr_scheduler_step(scheduler, None)

    # -- rounds --------------------------------------------------------------------------------------------------------

    def next_round(self) -> Round | None:
        """Of :class:`~.round_loader.RoundSource`: waits for the next round in which we train; None at the end."""
        session = self._joined
        if not self._round_waits:
            self._round = session.next_round()
        self._round_waits = False
        if self._round is None:
            end_training(self._trainer)
        else:
            align_counters(self._trainer, self._round.step)
            if (state := session.state) is not None:
                self._next_data_index = state.current_round.data_index + state.config.global_batch_size_end
        return self._round

    def _audit_loss_of_samples(self, indices: list[int]) -> Tensor:
        return self._audit_loss(self._samples.load(indices))

    @property
    def rounds_per_epoch(self) -> int:
        """Of :class:`~.round_loader.RoundSource`: those in which the whole swarm goes through the dataset once."""
        trainer, size = self._trainer, self._samples.size
        if size is not None:
            return rounds_per_pass(size, self._batch_size)
        if isinstance(trainer.limit_train_batches, int):
            return int(trainer.limit_train_batches)
        if self._session is not None and self._session.total_steps:
            return self._session.total_steps
        configured = self._ahead.last_step if self._ahead is not None else None
        if configured is None and trainer.max_steps == -1:
            raise ConfigurationError(
                "the training dataset has no length, so nobody knows how long an epoch is: set Trainer(max_steps=...), "
                "Trainer(limit_train_batches=<a whole number>) or RunConfig(total_steps=...)",
                name="total_steps",
            )
        return int(trainer.max_steps if configured is None else configured)

    @property
    def place_among_peers(self) -> tuple[int, int]:
        """Of :class:`~.round_loader.RoundSource`."""
        return self.peer_index or 0, self.num_peers

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """A step is a contribution to the round: the session has taken over ``DisTrO.step``."""
        session, round_ = self._joined, self._open_round
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        # Still open if the scaler of 16-mixed found an overflow, or there was no loss: the others need not wait for us.
        round_.skip()
        self._log_run(session)
        if round_.step >= session.total_steps:
            # What the end of the run does to the weights should be done before validation and checkpoints.
            self._round, self._round_waits = session.next_round(), True
            if self._round is None:
                end_training(self._trainer)
        return output

    def _log_run(self, session: FrameworkSession) -> None:
        """Numbers of the run for the progress bar and the script's loggers, as if the module had logged them."""
        trainer = self._trainer
        if trainer.barebones:
            return
        numbers = run_numbers(session.figures())
        self._module.log("peers", numbers["run/peers"], prog_bar=True, logger=False, batch_size=1)
        if trainer.loggers:
            self._module.log_dict(numbers, batch_size=1)

    # -- checkpoints and the end ---------------------------------------------------------------------------------------

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Also where the run is, so that ``fit(ckpt_path=...)`` can host it from there on."""
        if self._session is not None:
            step = checkpoint.get("global_step", 0) + 1
            place = StartingPoint(
                run_id=self._session.run_id,
                step=step,
                data_index=self._next_data_index,
                dataset_size=self._samples.size,
            )
            checkpoint[_PLACE_KEY] = place.saved()
        try:
            with whole_file(filepath, self.checkpoint_io) as file:
                super().save_checkpoint(checkpoint, file, storage_options)
        except OSError as error:
            # Not to be passed over: ModelCheckpoint would remove an older one for it.
            raise DistroError(
                f"the checkpoint {filepath} could not be saved: {error.strerror or error}. Those before are as they "
                "were: make room or choose another folder, ModelCheckpoint(dirpath=...), and go on with "
                "fit(ckpt_path=...), or join the run again if others go on with it"
            ) from error

    @override
    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            checkpoint = super().load_checkpoint(checkpoint_path, *args, **kwargs)
        except (OSError, DistroError):
            raise
        except Exception as error:  # whatever torch says of bytes that are something else, KeyError: 101 for one
            raise ConfigurationError(
                f"{checkpoint_path} cannot be read as a checkpoint of Lightning's ({type(error).__name__}: {error}): "
                "it is damaged, or something else; name another one, or begin without ckpt_path",
                name="ckpt_path",
                value=checkpoint_path,
            ) from error
        self._saved_place = checkpoint.get(_PLACE_KEY)
        return checkpoint

    @override
    def load_model_state_dict(self, checkpoint: Any, *args: Any, **kwargs: Any) -> None:
        try:
            super().load_model_state_dict(checkpoint, *args, **kwargs)
        except RuntimeError as error:
            if "state_dict" not in str(error):
                raise
            raise ConfigurationError(
                f"the checkpoint is of another model: {error}\nBuild the same model, or begin without ckpt_path",
                name="ckpt_path",
            ) from error

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        if self._session is not None:
            self._optimizer.undo_lookahead()
        return super().lightning_module_state_dict()

    @override
    def on_exception(self, exception: BaseException) -> None:
        module = self.lightning_module
        if advice := compile_advice(exception, getattr(module, "_compiler_ctx", None) is not None):
            exception.add_note(advice)
        if self._loader is None and isinstance(exception, TypeError) and "has no len()" in str(exception):
            exception.add_note("samples are assigned by index: give the dataset of the training loader a __len__")
        super().on_exception(exception)

    @override
    def teardown(self) -> None:
        session, module = self._session, self.lightning_module
        self._session = None
        try:
            if session is not None:
                self._last = session.end()
            if self._ahead is not None:
                self._ahead.close()
        finally:
            self._end_set_up()
            self._batch_hooks.remove()
            if module is not None:
                vars(module).pop("_on_before_batch_transfer", None)
                if (trainer := module._trainer) is not None and self._accumulate is not None:
                    trainer.accumulate_grad_batches, self._accumulate = self._accumulate, None
                    if self._clip is not None:
                        trainer.gradient_clip_val, self._clip = self._clip, None
            if self._loader is not None:
                self._loader.samples.close()
            self._forget()
            super().teardown()


def _class_for(namespace: str) -> Any:
    module, _, name = _CLASSES[namespace].rpartition(".")
    return getattr(import_module(f".{module}", __package__), name)


for _namespace in _CLASSES:
    # `Trainer(strategy="psyche")` finds what was registered when the Trainer is made. Lightning knows no entry points.
    if _namespace in sys.modules:
        import_module(f".{_CLASSES[_namespace].partition('.')[0]}", __package__)
