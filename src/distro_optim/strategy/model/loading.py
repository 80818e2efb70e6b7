"""The weights with which a peer begins to train: the script's own, those of a checkpoint, or those of the peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from ...comm.model_exchange import Patience
from ...coordinator.model import Checkpoint as CheckpointOfRun
from ...coordinator.model import Gcs, Hub
from ...coordinator.rules.checkpoints import is_shared_by_peers
from ...coordinator.rules.steps import DRAIN_ROUNDS
from ...errors import ExchangeError, ProtocolError, RunError
from ..port import RunAnswers, RunFacts
from ..rounds import actions as act
from .checkpoint import Checkpoint
from .checkpoint_keeper import CheckpointKeeper
from .handover import ModelHandover
from .identity import ModelIdentity, weights_root
from .resuming import StartingPoint
from .schedules import FIRST_STEP
from .trainer import SwarmTrainer

__all__ = ["ModelLoader"]


class ModelLoader:
    """Answers :class:`~.actions.Initialize`, as often as the run asks. Belongs to the training thread.

    Args:
        facts: about the run.
        answers: told that the model is loaded, or why not.
        trainer: has the model's tensors and the momentum.
        handover: gets the weights of peers, and offers ours.
        checkpoints: those that may be resumed from.
        restored: the one that the model has the weights of, and whose momentum is still to be loaded.
        begin_at: where a hosted run goes on whose weights and momentum the model has already.
        as_psyche: the run is one of Psyche's clients.
        tell: told what happens, in words.

    Attributes:
        loaded: the model has had the run's weights.
    """

    def __init__(
        self,
        facts: RunFacts,
        answers: RunAnswers,
        trainer: SwarmTrainer,
        handover: ModelHandover,
        *,
        checkpoints: CheckpointKeeper,
        restored: Checkpoint | None,
        begin_at: StartingPoint | None,
        as_psyche: bool,
        tell: Callable[[str], None],
    ) -> None:
        self.loaded = False
        self._facts = facts
        self._answers = answers
        self._trainer = trainer
        self._handover = handover
        self._checkpoints = checkpoints
        self._restored = restored
        self._begin_at = begin_at
        self._as_psyche = as_psyche
        self._tell = tell
        self._failures = 0

    def load(self, action: act.Initialize) -> None:
        """Gives the model the weights of the run and offers them, and tells the run that it has them, or why not.

        Raises:
            ModelMismatchError: the run trains something else.
            RunError: nobody in the run has its weights.
            ConfigurationError: our own checkpoint is damaged.
        """
        if self._facts.view().watches:
            self._follow(action)
            return
        restored, self._restored = self._restored, None
        # A peer that joins with a framework's checkpoint keeps its momentum if the run has the weights that go with it.
        together = self._trainer.tensors.holders
        is_host = together.decide(lambda: self._facts.is_host)
        ours = weights_root(self._trainer.tensors) if self._begin_at is not None and not is_host else None
        own = self._own_checkpoint(action)
        may_begin = together.decide(lambda: own is not None or self._may_begin_the_run(action, restored))
        if not action.providers and may_begin:
            if own is not None and (restored is None or restored.step != own.step):
                restored = self._load_checkpoint(own)
            values, identity = self._handover.snapshot(action.epoch, action.step)
            if self.loaded and is_shared_by_peers(action.checkpoint) and self._others_in_the_epoch():
                self._tell(f"nobody else has the weights of step {action.step}: the run goes on with ours")
            if own is not None and not is_shared_by_peers(action.checkpoint):
                self._tell(f"no peer of the run is left: it goes on from {own.path}")
            elif self._as_psyche and (place := _place_of(action.checkpoint)) is not None:
                self._tell(_begins_with(place, action.step))
        else:
            try:
                values, identity = self._download(action, Patience.ONCE if own is not None else action.patience)
            except (ExchangeError, ProtocolError) as error:
                if not action.providers:
                    raise self._weights_are_lost(action.step) from error
                if own is None:
                    self._failures += 1
                    self._restored = restored
                    self._tell(f"the model could not be loaded from peers: {error}")
                    self._answers.initialization_failed(str(error))
                    return
                self._tell(f"nobody shares the model of step {action.step} yet; {own.path} has it")
                restored = self._load_checkpoint(own)
                values, identity = self._handover.snapshot(action.epoch, action.step)
            else:
                restored = own or restored  # the momentum of the newest one is of a later step
            self._failures = 0
        self._begin_momentum(restored, identity, ours, is_host=is_host)
        self._handover.offer(identity, values)
        self.loaded = True
        self._answers.initialized(self._trainer.plan, self._trainer.names)

    def _follow(self, action: act.Initialize) -> None:
        """As one that watches: no epoch waits for it. So the run goes on at once, and what there is to apply waits in
        line behind this until the weights are here."""
        self._answers.initialized(self._trainer.plan, self._trainer.names)
        try:
            self._download(action, action.patience)
        except (ExchangeError, ProtocolError) as error:
            self._failures += 1
            self._tell(f"the model could not be loaded from peers: {error}")
            self._answers.initialization_failed(str(error))
            return
        self._failures = 0
        self._trainer.forget_momentum()
        self.loaded = True

    def _download(self, action: act.Initialize, patience: Patience) -> tuple[dict[str, Tensor], ModelIdentity]:
        others = self._trainer.tensors.holders.decide(lambda: action.providers or self._others(action.step))
        asked = replace(action, providers=others)
        values, identity = self._handover.download(asked, attempt=self._failures, patience=patience)
        self._trainer.load(values)
        return values, identity

    # -- our own -------------------------------------------------------------------------------------------------------

    def _own_checkpoint(self, action: act.Initialize) -> Checkpoint | None:
        """What we have saved of the run at this very step, until we have had the run's weights once.

        In a run of Psyche's, too, when its peers are all new: what it calls its checkpoint is then what it began with,
        unless somebody has uploaded this step, which has the weights that we have.
        """
        if self.loaded or (action.providers and not is_shared_by_peers(action.checkpoint)):
            return None
        return self._checkpoints.of_step(self._facts.run_id, action.step)

    def _load_checkpoint(self, checkpoint: Checkpoint) -> Checkpoint:
        self._trainer.load(self._checkpoints.weights(checkpoint))
        return checkpoint

    def _may_begin_the_run(self, action: act.Initialize, restored: Checkpoint | None) -> bool:
        """Whether our weights can be those of the run, as whose first client we were told to give ours."""
        # What the first step makes is applied two steps later.
        is_untrained = action.epoch == 0 or action.step <= FIRST_STEP + DRAIN_ROUNDS
        return (
            is_untrained
            or self._facts.is_host
            or not is_shared_by_peers(action.checkpoint)
            or self._were_trained_in_this_run(restored)
        )

    def _were_trained_in_this_run(self, restored: Checkpoint | None) -> bool:
        is_restored = restored is not None and restored.run_id == self._facts.run_id
        return self.loaded or is_restored or self._begin_at is not None

    def _begin_momentum(
        self, restored: Checkpoint | None, identity: ModelIdentity, ours: bytes | None, *, is_host: bool
    ) -> None:
        """Momentum starts at zero, unless the run goes on from the very weights that ours belongs to."""
        begin_at, self._begin_at = self._begin_at, None
        if begin_at is not None and restored is None:
            is_there = begin_at.step == identity.step and ours == identity.weights
            if is_host or is_there:
                return  # it has its momentum already
        if begin_at is not None and not is_host:
            self._tell(
                f"the run is at step {identity.step}: its weights and its step count, not those of the checkpoint of "
                f"step {begin_at.step - 1}"
            )
        if restored is None:
            self._trainer.forget_momentum()
        elif restored.identity.weights == identity.weights:
            self._trainer.load_momentum(self._trainer.tensors.holders.read(restored.momentum))
        else:
            self._trainer.forget_momentum()
            self._tell(
                f"the run is at step {identity.step} with other weights than our checkpoint of step {restored.step}; "
                "the run's count"
            )

    # -- the peers' ----------------------------------------------------------------------------------------------------

    def _others(self, step: int) -> tuple[bytes, ...]:
        """The other clients of the epoch; raises RunError if there are none."""
        others = self._others_in_the_epoch()
        if not others:
            raise self._weights_are_lost(step)
        return others

    def _others_in_the_epoch(self) -> tuple[bytes, ...]:
        state = self._facts.state
        clients = state.epoch_state.clients if state is not None else ()
        return tuple(client.id.p2p_identity for client in clients if client.id != self._facts.identity)

    def _weights_are_lost(self, step: int) -> RunError:
        return RunError(
            f"the run {self._facts.run_id!r} is at step {step}, and none of its peers has its weights: start a peer "
            "that has a checkpoint of it (checkpoint_dir=..., resume=True), or begin another run"
        )


def _place_of(checkpoint: CheckpointOfRun) -> str | None:
    """What the run calls its stored weights; None if it stores none."""
    match checkpoint:
        case Hub(repo):
            return repo.repo_id
        case Gcs(repo):
            return repo.bucket
    return None


def _begins_with(place: str, step: int) -> str:
    if step <= FIRST_STEP + DRAIN_ROUNDS:
        return f"the run begins with the weights of {place}; the model must have them already"
    return (
        f"the run is at step {step}, and no peer of it is left: it goes on with the weights of {place}, which the "
        "model must have already; if those are of its beginning, name a folder with the weights of this step instead "
        "(join: --model), or what was trained is lost"
    )
