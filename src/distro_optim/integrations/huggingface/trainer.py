"""SwarmTrainer: an existing script with ``transformers.Trainer`` hosts a run, or joins one; see the package."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint
from typing_extensions import override

from ...errors import ConfigurationError, DistroError
from ...optimizer import DisTrO
from ...strategy.config import RunConfig
from ...strategy.environment import RunEnvironment
from ...strategy.frameworks.first_sample import look_at_first_sample
from ...strategy.frameworks.framework_session import Ended, FrameworkSession, split_options
from ...strategy.frameworks.hosting_defaults import complete_config, default_batch_size, rounds_per_pass
from ...strategy.frameworks.run_ahead import RunAhead
from ...strategy.frameworks.samples import Samples, samples_of, warn
from ...strategy.model.resuming import StartingPoint
from ...strategy.model.schedules import FollowingSchedulers
from ...strategy.network.on_solana import check_run
from ...strategy.one_line import tell_mistakes_in_one_line
from ...strategy.options import STRATEGY_DEFAULTS, StrategyOptions, TrainingOptions, shows
from ...strategy.port import RunView
from ...strategy.ranks.local_ranks import LocalRanks
from ...strategy.round import Round
from .checks import check_optimizer, check_trainer, unused_optimizer
from .following import FollowsRun, saved_place, starting_point
from .hub import PushFrom, TrainedInRun, check_push_from, with_section
from .rounds import EpochsOfRounds, RoundInputs

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object  # whichever trainer comes after it in the bases of a class

__all__ = ["SwarmTrainer", "SwarmTraining"]

_ITEMS: Final = "num_items_in_batch"
"""Argument of ``Trainer.training_step``, since transformers 4.46: tokens of the whole step that count in its loss."""


class _TrainerSession(FrameworkSession):
    """A session whose rounds are told the loss, which ``Trainer`` does not pass to ``optimizer.step()``."""

    loss: Tensor | None = None

    @override
    def _optimizer_step(self, closure: Callable[[], float] | None) -> float | None:
        loss = self.loss
        return super()._optimizer_step(closure if closure is not None or loss is None else lambda: float(loss))


class SwarmTraining(_Trainer):
    """Trains with peers over the internet: hosts a run, or joins one. Stands before a trainer in the bases of a class.

    Everybody runs the same script. Which samples a peer trains is for the run to say, so ``train_dataset`` is the same
    on all peers, and ``per_device_train_batch_size`` may differ: it is how many samples one forward pass takes. Several
    processes of ``torchrun`` or ``accelerate launch`` on one machine are one peer. Evaluation goes without the network,
    and every peer writes its own checkpoints, of true weights. ``train(resume_from_checkpoint=...)`` hosts the run from
    there on, or joins with the momentum of the checkpoint.

    Without ``optimizers`` there is a :class:`~distro_optim.DisTrO` with ``learning_rate`` and ``weight_decay`` of the
    ``TrainingArguments``; with LoRA it trains what has gradients. The learning rate is the size of a weight's change
    in a step.

    Args:
        run: a ticket or ``"host:port/run-id"``; None hosts.
        push_from: which peer pushes to the hub, by ``push_to_hub`` or as the ``TrainingArguments`` say: ``"host"``, the
            one that hosts the run, or ``"here"``, this one. The others push nothing and create no repository.
        **options: see :class:`~.options.TrainingOptions` and :class:`~.options.ConnectionOptions`. What ``config``
            leaves open is taken from the ``TrainingArguments``: ``total_steps`` from ``max_steps`` or
            ``num_train_epochs``, ``global_batch_size`` from the batch size, times ``gradient_accumulation_steps``,
            devices and ``min_peers``. The others go to the trainer.

    Raises:
        ConfigurationError: an argument is wrong.
    """

    @shows(TrainingOptions, STRATEGY_DEFAULTS, and_more=True)
    def __init__(self, *args: Any, run: str | None = None, push_from: PushFrom = "host", **options: Any) -> None:
        tell_mistakes_in_one_line()
        self._run_options, others = split_options(cast(StrategyOptions, options), of=type(self).__name__)
        if run is not None:
            check_run(run, self._run_options.get("solana"))
        self.run = run
        self.push_from = check_push_from(push_from)
        self._hosts: bool | None = None  # as far as it has been in a run
        self._trained: TrainedInRun | None = None
        self._last = Ended()
        self._forget()
        super().__init__(*args, **others)
        # Before the trainer's own callbacks, which look at the counters that it sets.
        self.callback_handler.callbacks.insert(0, FollowsRun(self))

    def _forget(self) -> None:
        """What exists only while ``train`` runs."""
        self._ahead: RunAhead | None = None
        self._session: _TrainerSession | None = None
        self._has_left = False
        self._rounds: EpochsOfRounds | None = None
        self._follower: FollowingSchedulers | None = None
        self._round: Round | None = None
        self._round_waits = False
        self._weight = 1.0
        self._losses: list[float] = []
        self._place: object = None
        self._next_data_index: int | None = None
        self._accumulate = 1
        self._own_max_steps = -1

    # -- what there is to know -----------------------------------------------------------------------------------------

    @property
    def session(self) -> FrameworkSession | None:
        """Our part in the run; None but during ``train``."""
        return self._session

    @property
    def num_peers(self) -> int:
        """Peers of the run's present epoch, ourselves included; 1 while we are in no run."""
        return 1 if self._session is None else max(1, self._session.num_peers)

    @property
    def ticket(self) -> str | None:
        """What others pass as ``run``."""
        return None if self._session is None else self._session.ticket

    def view(self) -> RunView | None:
        """A snapshot of the run for logs and live tables, from any thread; after ``train`` the last; None before it."""
        return self._last.view if self._session is None else self._session.view()

    def summary(self) -> str | None:
        """What remains of the run in a few lines: peers, bytes, time, and the hash of the weights; None before one."""
        return self._last.summary if self._session is None else self._session.summary()

    @property
    def trains_in_run(self) -> bool:
        """Whether ``train`` is at work."""
        return self._ahead is not None

    # -- train ---------------------------------------------------------------------------------------------------------

    @override
    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As of the trainer. Returns when the run is over, or after ``max_steps`` where the run is longer."""
        if self.trains_in_run:
            raise DistroError("train() was called while it trains")
        check_trainer(self)
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(str(self.args.output_dir))  # type: ignore[no-untyped-call]
        if checkpoint:
            self._place = saved_place(checkpoint)
        several = self.args.world_size > 1
        self._ahead = RunAhead.look(
            self.run, self._run_options, interrupt=lambda: None, ranks=LocalRanks() if several else None
        )
        try:
            with self._settings_of_a_run(), self._weighted_backward():
                output = super().train(resume_from_checkpoint, *args, **kwargs)
            return output._replace(training_loss=self._mean_loss) if hasattr(output, "_replace") else output
        finally:
            try:
                self.leave_run()
            finally:
                self._forget()

    @contextmanager
    def _settings_of_a_run(self) -> Iterator[None]:
        """A step of the trainer is one round: how many batches and steps there are is not for the trainer to say."""
        args = self.args
        before = args.max_steps, args.gradient_accumulation_steps, args.ignore_data_skip, args.max_grad_norm
        accelerator_steps = self.accelerator.gradient_accumulation_steps
        self._own_max_steps, self._accumulate = args.max_steps, args.gradient_accumulation_steps
        args.gradient_accumulation_steps, args.ignore_data_skip = 1, True
        self.accelerator.gradient_accumulation_steps = 1
        try:
            yield
        finally:
            args.max_steps, args.gradient_accumulation_steps, args.ignore_data_skip, args.max_grad_norm = before
            self.accelerator.gradient_accumulation_steps = accelerator_steps

    @contextmanager
    def _weighted_backward(self) -> Iterator[None]:
        """Lets each backward pass count what its batch does in the round, whatever class computes the loss."""
        accelerator: Any = self.accelerator
        backward = accelerator.backward
        accelerator.backward = lambda loss, *args, **kwargs: backward(loss * self._weight, *args, **kwargs)
        try:
            yield
        finally:
            del accelerator.backward

    @override
    def get_train_dataloader(self) -> Any:
        """While it trains, the rounds of the run; otherwise the trainer's own."""
        loader = super().get_train_dataloader()
        ahead = self._ahead
        if ahead is None:
            return loader
        self._rounds = EpochsOfRounds(samples_of(loader), self, getattr(loader, "dataset", None))
        self.args.max_steps = ahead.last_step or self._own_last_step
        return self._rounds

    @property
    def _own_last_step(self) -> int:
        if self._own_max_steps > 0:
            return self._own_max_steps
        return max(1, math.ceil(self.args.num_train_epochs * self.rounds_per_epoch))

    @override
    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """A DisTrO, if the script has given no optimizer."""
        if self.optimizer is None:
            model: Any = (args[0] if args else kwargs.get("model")) or self.model
            decaying = set(self.get_decay_parameter_names(model)) if self.args.weight_decay else set()
            named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
            groups = [
                {"params": [p for n, p in named if n in decaying], "weight_decay": self.args.weight_decay},
                {"params": [p for n, p in named if n not in decaying], "weight_decay": 0.0},
            ]
            if not named:
                raise ConfigurationError(
                    "no parameter of the model has requires_grad, so there is nothing to train: unfreeze some, or add "
                    "a LoRA (peft.get_peft_model)",
                    name="model",
                )
            if unused := unused_optimizer(self.args):
                warn(unused)
            self.optimizer = DisTrO([group for group in groups if group["params"]], lr=self.args.learning_rate)
        else:
            super().create_optimizer(*args, **kwargs)
        return self.optimizer

    @override
    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            raise ConfigurationError(
                f"the optimizer that is saved in {checkpoint} is not this one ({error}). To train on with its weights "
                "alone, load them, model = AutoModel....from_pretrained(<that folder>), and call train() without "
                "resume_from_checkpoint",
                name="resume_from_checkpoint",
                value=checkpoint,
            ) from error

    @override
    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        scheduler = super().create_scheduler(*args, **kwargs)
        if self.trains_in_run:
            self._follower = FollowingSchedulers([scheduler])  # before a checkpoint moves it on
        return scheduler

    # -- the run -------------------------------------------------------------------------------------------------------

    def join_run(self, state: Any) -> None:
        """Hosts the run or joins it; ``state`` is the trainer's, which says after which step it goes on."""
        ahead, rounds, model = self._ahead, self._rounds, self.model
        if ahead is None or rounds is None or model is None:
            raise DistroError("the trainer is not in train()")
        resumed = int(state.global_step)
        self._session = session = _TrainerSession(
            model,
            check_optimizer(self.optimizer),
            dataset_size=rounds.samples.size,
            run=self.run,
            complete=self._completed,
            interrupt=lambda: None,
            ranks=ahead.ranks,
            ahead=ahead,
            begin_at=starting_point(self._place, resumed),
            audit_loss=self._audit_loss(model, rounds.samples),
            **self._run_options,
        )
        session.audit_size = rounds.samples.micro_batch_size
        look = look_at_first_sample(session, rounds.samples, model)

        def look_over(run: Any) -> None:
            if run.progress.step <= resumed:
                raise ConfigurationError(
                    f"the checkpoint is of step {resumed}, and the run is at step {run.progress.step}: join it without "
                    "resume_from_checkpoint, which gives the run's weights",
                    name="resume_from_checkpoint",
                )
            look(run)

        session.by_data_index = rounds.samples.by_data_index
        session.look_over = look_over
        session.follow_schedule = self._follower
        session.start()
        if session.clip_grad_norm is not None and self.args.max_grad_norm:
            warn(f"the run clips gradients to a norm of {session.clip_grad_norm:g}, in place of max_grad_norm")
            self.args.max_grad_norm = 0.0
        self._hosts = session.is_host
        state.max_steps = session.total_steps
        if self._own_max_steps > 0:
            state.max_steps = min(state.max_steps, self._own_max_steps)
        if self.args.process_index == 0:
            session.invite("trainer = SwarmTrainer(..., run={ticket!r})")

    def _completed(self, config: RunConfig) -> RunConfig:
        return complete_config(config, batch_size=self._own_batch_size(config), max_steps=self._own_last_step)

    def _own_batch_size(self, config: RunConfig) -> int:
        """Samples of a round that we host."""
        samples = self._samples
        share = samples.micro_batch_size * self._accumulate * self.args.world_size
        return default_batch_size(config, peer_batch_size=share, dataset_size=samples.size)

    @property
    def _samples(self) -> Any:
        if self._rounds is None:
            raise DistroError("the trainer has training data only in train()")
        return self._rounds.samples

    def place_of(self, global_step: int) -> StartingPoint | None:
        """Where the run is after ``global_step`` of its steps; None outside of a run."""
        if self._session is None:
            return None
        return StartingPoint(
            run_id=self._session.run_id,
            step=global_step + 1,
            data_index=self._next_data_index,
            dataset_size=self._samples.size,
        )

    def leave_run(self) -> None:
        """Leaves the run, if we are in it. The model has its true weights then."""
        if self._session is not None and not self._has_left:
            self._has_left = True
            self._last = self._session.end()
            self._trained = TrainedInRun.of(self._session)
        if self._ahead is not None:
            self._ahead.close()
        if self._rounds is not None:
            self._rounds.samples.close()

    # -- rounds --------------------------------------------------------------------------------------------------------

    def wait_for_round(self) -> Round | None:
        """Of :class:`~.rounds.TrainerRounds`."""
        session = self._session
        if session is None:
            raise DistroError("there are no rounds before the run is joined")
        if not self._round_waits:
            self._round, self._round_waits = session.next_round(), True
        if self._round is None:
            self.control.should_training_stop = True
            return None
        if missed := self._round.step - 1 - self.state.global_step:
            self.state.global_step += missed
            # Means over steps, and steps a second, are of those that we trained.
            self._globalstep_last_logged += missed
            if hasattr(self, "_initial_global_step"):  # since transformers 5
                self._initial_global_step += missed
        if (state := session.state) is not None:
            self._next_data_index = state.current_round.data_index + state.config.global_batch_size_end
        return self._round

    def next_round(self) -> Round | None:
        """Of :class:`~..round_loader.RoundSource`."""
        round_ = self.wait_for_round()
        self._round_waits = False
        return round_

    @property
    def main_input(self) -> str:
        """Of :class:`~.rounds.TrainerRounds`."""
        return str(getattr(self.model, "main_input_name", "input_ids"))

    @property
    def rounds_per_epoch(self) -> int:
        """Of :class:`~..round_loader.RoundSource`: those in which the whole swarm goes through the dataset once."""
        ahead, size = self._ahead, self._samples.size
        source = self._session if self._session is not None else ahead
        state = source.state if source is not None else None
        if size is not None:
            own = (
                None if state is not None else self._own_batch_size(ahead.config if ahead is not None else RunConfig())
            )
            return rounds_per_pass(size, own or (state.config.global_batch_size_end if state is not None else 1))
        steps = (ahead.last_step if ahead is not None else None) or self._own_max_steps
        if steps < 1:
            raise ConfigurationError(
                "the training dataset has no length, so nobody knows how long an epoch is: set "
                "TrainingArguments(max_steps=...) or RunConfig(total_steps=...)",
                name="max_steps",
            )
        return int(steps)

    @property
    def place_among_peers(self) -> tuple[int, int]:
        """Of :class:`~..round_loader.RoundSource`."""
        return (self._session.peer_index if self._session is not None else None) or 0, self.num_peers

    @property
    def place_among_devices(self) -> tuple[int, int]:
        """Of :class:`~..round_loader.RoundSource`."""
        return self.args.process_index, self.args.world_size

    @override
    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, *args: Any, **kwargs: Any) -> Any:
        """A round, and the tokens that count in its loss, as of so many batches that are accumulated."""
        if not self.trains_in_run:
            return super().get_batch_samples(epoch_iterator, num_batches, *args, **kwargs)
        for inputs in epoch_iterator:
            batches = [batch for batch, _ in inputs.pieces]
            _, items = super().get_batch_samples(iter(batches), len(batches), *args, **kwargs)
            return [inputs], items
        return [], None

    @override
    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Forward and backward passes over the batches of a round."""
        if not isinstance(inputs, RoundInputs) or self._round is None or self._session is None:
            return super().training_step(model, inputs, *args, **kwargs)
        by_items = self._loss_is_by_items((*args, kwargs.get(_ITEMS))[0])
        total: Any = torch.zeros((), device=self.args.device)
        for number, (piece, weight) in enumerate(inputs.pieces, start=1):
            self._weight = 1.0 if by_items else weight
            with self._gradients_stay_here(model, last=number == len(inputs.pieces)):
                loss = super().training_step(model, piece, *args, **kwargs)
            total = total + loss * self._weight
            if self._round.cancelled:
                break
        self._session.loss = total
        self._losses.append(float(total))
        return total

    def _audit_loss(self, model: Any, samples: Samples) -> Callable[[list[int]], Tensor] | None:
        """The mean loss of samples, as :meth:`compute_loss` has it; None where samples have no indices."""
        if not samples.can_load:
            return None

        def loss(indices: list[int]) -> Tensor:
            inputs = self._prepare_inputs(samples.load(indices))
            with self.compute_loss_context_manager():
                return cast(Tensor, self.compute_loss(model, inputs))

        return loss

    def _loss_is_by_items(self, items: object) -> bool:
        """Whether a loss is a sum over its batch, divided by the tokens of the whole round."""
        if (said := getattr(self, "loss_is_scaled_for_ga", None)) is not None:
            return bool(said)
        uses_items = getattr(self, "model_accepts_loss_kwargs", False) or getattr(self, "compute_loss_func", None)
        return items is not None and bool(uses_items)

    def _gradients_stay_here(self, model: Any, *, last: bool) -> AbstractContextManager[Any]:
        """No reduction among the devices of this machine until the last batch of the round."""
        return nullcontext() if last else self.accelerator.no_sync(model)

    def end_round(self) -> None:
        """A step is done."""
        round_, session = self._round, self._session
        if round_ is None or session is None:
            return
        # Still open if the scaler of fp16 found an overflow: the others need not wait for us.
        round_.skip()
        if round_.step >= session.total_steps:
            # What the end of the run does to the weights should be done before they are evaluated and saved.
            self._round, self._round_waits = session.next_round(), True
            if self._round is None:
                session.close()
                self.control.should_training_stop = True

    # -- tokens, losses, weights ---------------------------------------------------------------------------------------

    @property
    def _mean_loss(self) -> float:
        return sum(self._losses) / len(self._losses) if self._losses else 0.0

    @override
    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.trains_in_run and "train_loss" in logs:
            logs["train_loss"] = self._mean_loss  # of the steps that we trained, not of all that the run has had
        super().log(logs, *args, **kwargs)

    @override
    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """As of the trainer; in the middle of a round, too, the true weights, and so does ``push_to_hub``."""
        if self._session is not None:
            check_optimizer(self.optimizer).undo_lookahead()
        super().save_model(*args, **kwargs)

    # -- the hub -------------------------------------------------------------------------------------------------------

    @property
    def pushes(self) -> bool:
        """Whether this peer is the one that pushes."""
        if self.push_from == "here":
            return True
        return self._hosts if self._hosts is not None else self.run is None and RunEnvironment.read().run is None

    @override
    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """As of the trainer, on the peer that pushes."""
        if self.pushes:
            super().init_hf_repo(*args, **kwargs)

    @override
    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As of the trainer, on the peer that pushes, with true weights; on the others None."""
        if self.pushes:
            return super().push_to_hub(*args, **kwargs)
        if self.args.process_index == 0:
            warn('nothing is pushed from here: the peer that hosts the run does it, or one with push_from="here"')
        return None

    @override
    def _push_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self.pushes:
            super()._push_from_checkpoint(*args, **kwargs)

    @override
    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As of the trainer, and says how the model was trained, if it was in a run."""
        super().create_model_card(*args, **kwargs)
        trained = TrainedInRun.of(self._session) if self._session is not None else self._trained
        card = Path(str(self.args.output_dir)) / "README.md"
        if trained is not None and self.is_world_process_zero() and card.is_file():
            card.write_text(with_section(card.read_text(encoding="utf-8"), trained.section()), encoding="utf-8")


class SwarmTrainer(SwarmTraining, Trainer):
    """``transformers.Trainer`` that trains with peers over the internet; see :class:`SwarmTraining`."""
