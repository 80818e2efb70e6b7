"""One peer's part in a run, once it has joined: carries out what the run wants done to the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Self

from torch import nn

from ...console import narrated
from ...coordinator.model import Distro
from ...coordinator.rules.checkpoints import audits_momentum, is_run_of_psyche
from ...coordinator.rules.steps import last_trained_step
from ...coordinator.types import Coordinator
from ...errors import RunError
from ...optimizer import DisTrO
from ..news import News
from ..port import RunAccess
from ..round import Round
from ..rounds import actions as act
from ..sample_order import SampleOrder
from .audits.results import AuditLoss, ResultAuditor
from .between_epochs import BetweenEpochs
from .checkpoint import Checkpoint
from .checkpoint_keeper import CheckpointKeeper
from .handover import ModelHandover
from .held_interrupts import interrupts_held
from .loading import ModelLoader
from .named_tensors import NamedTensors
from .psyche_settings import adopt_settings, changes_of_schedule
from .repair import WeightsRepair
from .resuming import StartingPoint
from .schedules import FIRST_STEP
from .trainer import SwarmTrainer
from .weights_hash import WeightsHasher

__all__ = ["LocalModel", "Participant", "RunTerms"]


@dataclass(frozen=True, kw_only=True)
class RunTerms:
    """What depends on the kind of run: one of our own, whose peers run the same script, or one of Psyche's.

    Attributes:
        as_psyche: the run is one of Psyche's clients.
        script_rates: learning rates are those of the script's parameter groups, not the run's.
        clip_grad_norm: Euclidean norm to which gradients are scaled down; None leaves them.
    """

    as_psyche: bool
    script_rates: bool
    clip_grad_norm: float | None = None

    @classmethod
    def adopt(
        cls,
        state: Coordinator | None,
        optimizer: DisTrO,
        *,
        learning_rates: str | None,
        tell: Callable[[str], None],
    ) -> Self:
        """Those of the run whose state this is. In a run of Psyche's the optimizer takes on the run's settings.

        Args:
            state: of the run's coordinator.
            optimizer: is changed.
            learning_rates: whose count, ``"script"`` or ``"run"``; None goes by the kind of run.
            tell: told each setting that changes.
        """
        as_psyche = state is not None and is_run_of_psyche(state)
        script_rates = learning_rates == "script" or (learning_rates is None and not as_psyche)
        if not as_psyche or state is None or not isinstance(state.model.optimizer, Distro):
            return cls(as_psyche=as_psyche, script_rates=script_rates)
        clip = state.model.optimizer.clip_grad_norm
        changes = adopt_settings(optimizer, state.model.optimizer)
        if learning_rates is None:  # otherwise the script knows that the rates differ
            changes += changes_of_schedule(optimizer, state.model.lr_schedule, clip)
        for change in changes:
            tell(f"the run's settings count: {change}")
        return cls(as_psyche=as_psyche, script_rates=script_rates, clip_grad_norm=clip)


@dataclass(frozen=True, kw_only=True)
class LocalModel:
    """What a peer brings to a run.

    Attributes:
        model: unwrapped.
        optimizer: of its parameters.
        tensors: of the model, by name.
        keeper: saves the model.
        resumes_from: checkpoints that the model may take its weights from.
        restored: the one whose weights it has, and whose momentum is still to be loaded.
        begin_at: where a hosted run goes on whose weights and momentum the model has already.
        order: of the samples; None where the script assigns them itself.
        between: saves the model in mid-epoch, while this peer hosts; None does not.
        audit_loss: of samples, for audits; None where the script gave none.
        audit_size: samples that it takes at a time; None for as many as the script's pieces of a round.
    """

    model: nn.Module
    optimizer: DisTrO
    tensors: NamedTensors
    keeper: CheckpointKeeper
    resumes_from: CheckpointKeeper
    restored: Checkpoint | None
    begin_at: StartingPoint | None
    order: SampleOrder | None
    between: BetweenEpochs | None = None
    audit_loss: AuditLoss | None = None
    audit_size: int | None = None


class Participant:
    """Carries out a run's actions, and answers them. Made once the run is joined; belongs to the training thread.

    Args:
        access: to the run; started.
        local: the model.
        terms: of the run.
        news: told what happens in rounds.
        tell: told what a person should know, one sentence each.
        follow_schedule: called with each new step, before any of it is carried out, so that the script's learning rates
            are those of the step; never with a step after the last that is trained.
        progress: called with parameters of the model that have come from peers, and in all.

    Attributes:
        trainer: the model and its optimizer.
        step: the run's step that the model is at: weights have everything applied that came before it.
        round: in which we train; None between rounds.
        ended: the run is over.
    """

    def __init__(
        self,
        access: RunAccess,
        local: LocalModel,
        terms: RunTerms,
        *,
        news: News,
        tell: Callable[[str], None],
        follow_schedule: Callable[[int], None],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._facts = access.facts
        self._actions = access.actions
        self._answers = access.answers
        self._life = access.life
        self._news = news
        self._tell = tell
        self._follow_schedule = follow_schedule
        self._order = local.order
        self._between = local.between
        self._keeper = local.keeper
        self._together = local.tensors.holders
        self._model = local.model
        self._as_psyche = terms.as_psyche
        self.trainer = SwarmTrainer(
            local.tensors,
            local.optimizer,
            script_rates=terms.script_rates,
            sorted_by_name=terms.as_psyche,
            clip_grad_norm=terms.clip_grad_norm,
        )
        self._hasher = WeightsHasher(self.trainer.still, access.answers.weights_hashed)
        self.trainer.before_change = self._hasher.wait
        self._repair = WeightsRepair(access.sharing, access.answers, self.trainer, self._hasher, tell=tell)
        self._handover = ModelHandover(
            access.sharing,
            self.trainer,
            local.model,
            script_rates=terms.script_rates,
            data={} if local.order is None else local.order.in_common,
            as_psyche=terms.as_psyche,
            tell=tell,
            progress=progress,
        )
        self._loader = ModelLoader(
            access.facts,
            access.answers,
            self.trainer,
            self._handover,
            checkpoints=local.resumes_from,
            restored=local.restored,
            begin_at=local.begin_at,
            as_psyche=terms.as_psyche,
            tell=tell,
        )
        self._audit_size = local.audit_size
        self._auditor = ResultAuditor(
            local.model,
            self.trainer,
            access.audit_answers,
            order=local.order,
            loss=local.audit_loss,
            is_cancelled=self.is_cancelled,
            tell=tell,
        )
        self.trainer.before_momentum = self._auditor.momenta.keeper.before_change
        state = access.facts.state
        audits = state is not None and audits_momentum(state.model.checkpoint)
        self.trainer.remembers = audits and local.audit_loss is not None
        self._commits = False
        for saves in (self._keeper, self._between):
            if saves is not None:
                saves.audit_limits = lambda: access.facts.view().audit_limits
        self.step = local.restored.step if local.restored is not None else FIRST_STEP
        self.round: Round | None = None
        self.ended = False
        self._not_finite, self._rounds_not_finite = local.optimizer.quarantined, 0
        self._scheduled_step: int | None = None
        self._hosts_a_checkpoint = access.facts.is_host and (local.restored or local.begin_at) is not None
        self._stopped = False
        self._torn = False  # the weights are between two states that mean something: an action is under way, or broke

    # -- actions -------------------------------------------------------------------------------------------------------

    def carry_out(self, action: act.Action) -> None:
        """Does to the model what the run wants.

        Raises:
            ModelMismatchError: our model is not the run's.
            RunError: the run has ended with an error, or cannot go on with us.
        """
        if isinstance(action, act.AuditResults | act.PrepareAudit | act.AuditMomentum | act.OpenMomentum):
            self._auditor.carry_out(action)  # changes nothing
            return
        self._together.settle(self._model)
        # What waits for others can be interrupted: then there is nothing of ours to lose, or it is known to be wrong.
        waits = isinstance(action, act.Initialize | act.RepairWeights)
        with nullcontext() if waits else interrupts_held(), self._tearing():
            match action:
                case act.Initialize():
                    self._reach(action.step)
                    self._auditor.momenta.forget()
                    with narrated(f"step {action.step}: loading the weights of the run", self._tell):
                        self._loader.load(action)
                case act.TrainBatch():
                    self._reach(action.step)
                    self.trainer.begin(action)
                    self.round = Round(action, self, self._order)
                    self._commits = action.commits
                case act.ApplyResults():
                    self._reach(action.step)
                    self.trainer.apply(action)
                case act.DecayWeights():
                    self._reach(action.step)
                    self.trainer.decay(action)
                    self._news.round(self._facts, action.step, None, self._hasher.wait)
                case act.HashWeights():
                    self._hash(action.step)
                    self._save_between(action.step)
                case act.RepairWeights():
                    self._auditor.momenta.forget_weights()
                    with narrated("fetching the tensors that differ", self._tell):
                        self._repair.carry_out(action)
                case act.FinishEpoch():
                    self._finish_epoch(action.step + 1)
        if isinstance(action, act.RunEnded):
            self._end(action)

    def _reach(self, step: int) -> None:
        """Everything of a step begins here."""
        self.step = step
        # Results applied after the last training have that training's rates: a schedule has no rates beyond it.
        state = self._facts.state
        last = FIRST_STEP if state is None else max(FIRST_STEP, last_trained_step(state.config))
        scheduled = min(step, last)
        if scheduled != self._scheduled_step:
            self._follow_schedule(scheduled)
        self._scheduled_step = scheduled
        self._handover.passed(step)

    def _finish_epoch(self, step: int) -> None:
        self._reach(step)
        if self._as_psyche:
            self.trainer.round_to_bfloat16()
        state = self._facts.state
        with narrated(f"step {step}: hashing and saving the weights", self._tell):
            values, identity = self._handover.snapshot(_epoch_of(state), step)
            if not self._facts.view().watches:
                self._handover.offer(identity, values)
            self._keeper.save(self.trainer, values, run_id=self._facts.run_id, identity=identity, state=state)

    def _hash(self, step: int) -> None:
        """The weights are those of the start of ``step``."""
        if self._together.several:
            # At once, since all processes have to read their shards for it at the same time.
            self._hasher.take(step, self.trainer.digests())
        else:
            self.trainer.lay_down(step)
            self._hasher.start(step, self.trainer.fresh_digests())

    def _save_between(self, step: int) -> None:
        """Now that the weights are those of the start of ``step``, and nothing is known against them."""
        if not self._together.decide(self._is_due_between):
            return
        state = self._facts.state
        values, identity = self._handover.snapshot(_epoch_of(state), step)
        if self._between is None:
            self.trainer.momentum()  # our part of what another process saves
        else:
            self._between.save(self.trainer, values, run_id=self._facts.run_id, identity=identity, state=state)

    def _is_due_between(self) -> bool:
        between = self._between
        if between is None or not between.is_due or not self._loader.loaded or self._facts.view().fault is not None:
            return False
        return self._life.acts is not None  # otherwise somebody else hosts, and does it

    def _end(self, action: act.RunEnded) -> None:
        self.ended = True
        if action.error is not None:
            raise RunError(f"the run ended at step {action.step}: {action.error}")
        if self._hosts_a_checkpoint and not self._loader.loaded:
            state = self._facts.state
            last = "" if state is None else f", {last_trained_step(state.config)}"
            self._tell(
                f"nothing is left to train: what we went on from has the run's last step{last}, in it, and its weights "
                "are here. To train on give a later end, as max_steps or RunConfig(total_steps=...)"
            )
        elif self._facts.view().fault is not None or not self._loader.loaded:
            self._tell(
                "the run is over, and the weights here are not those it ended with: "
                "take them from a peer that was in it to the end"
            )

    # -- the open round ------------------------------------------------------------------------------------------------

    def is_cancelled(self, step: int) -> bool:
        """See :attr:`.Round.cancelled`."""
        return self._stopped or self._actions.is_cancelled(step)

    def finish_round(self, round_: Round, *, loss: float | None, skip: bool, in_step: bool) -> bool:
        """See :meth:`.Round.finish` and :meth:`.Round.skip`."""
        if not round_.open or round_ is not self.round:
            return False
        self._auditor.size = self._audit_size or round_.piece_size
        published = not self._actions.is_cancelled(round_.step)
        with interrupts_held(), self._tearing():
            round_.open, self.round = False, None
            if published:
                has_hooks = not (skip or in_step)
                update, own = self.trainer.finish_with_hooks() if has_hooks else self.trainer.finish(skip=skip)
                if self._commits:
                    self._auditor.momenta.commit(round_.step)
                self._answers.trained(round_.step, update, own, loss=loss)
                self._look_for_not_finite(round_.step, loss)
            else:
                self.trainer.cancel()
                self._answers.cancelled(round_.step)
        self._news.round(self._facts, round_.step, loss, self._hasher.wait)
        return published

    def _look_for_not_finite(self, step: int, loss: float | None) -> None:
        """Says when gradients were left out, at rounds 1, 2, 4, 8 and so on of those in which that was so."""
        before, self._not_finite = self._not_finite, self.trainer.optimizer.quarantined
        if (count := self._not_finite - before) <= 0:
            return
        self._rounds_not_finite += 1
        if self._rounds_not_finite & (self._rounds_not_finite - 1):
            return
        of_loss = "" if loss is None else f", with a loss of {loss:.4g}"
        times = f"; it is round {self._rounds_not_finite} of this kind" if self._rounds_not_finite > 1 else ""
        self._tell(
            f"step {step}: the gradients of {count} tensors are not finite{of_loss}, and were left out{times}. Once in "
            "a while that is no harm; otherwise nothing is learned: lower the learning rate, or look for samples that "
            "cause it"
        )

    # -- the end -------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ends what is under way. The model has its true weights then."""
        self._stopped = True
        self._repair.stop()
        self._hasher.stop()
        self._auditor.momenta.forget()
        self.trainer.abandon()
        if self.round is not None:
            self.round.open, self.round = False, None

    def save_at_the_end(self, run_id: str, state: Coordinator | None, *, is_right: bool) -> None:
        """Saves what was trained since the last checkpoint, if the weights are those of a step of the run.

        Args:
            is_right: nothing is known against the weights.
        """
        wants = is_right and not self._torn and self._loader.loaded and self._keeper.wants(self.step)
        if not self._together.all_want(wants):
            return
        with narrated("saving what was trained", self._tell):
            values, identity = self._handover.snapshot(_epoch_of(state), self.step)
            self._keeper.save(self.trainer, values, run_id=run_id, identity=identity, state=state)

    @contextmanager
    def _tearing(self) -> Iterator[None]:
        """Weights change; if an exception comes out, they stay between two states for good."""
        self._torn = True
        yield
        self._torn = False


def _epoch_of(state: Coordinator | None) -> int:
    return state.progress.epoch if state is not None else 0
