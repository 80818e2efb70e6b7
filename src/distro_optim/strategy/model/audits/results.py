"""Audits others' results in the training thread: gradients of their batches beside the training, without a trace in it.

The loss function is the script's own, called with the model as it is between two rounds; :mod:`~....verify.quiet` lists
what stays as it was. Which samples a batch means, everybody knows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Final

from torch import Tensor, nn

from ....coordinator.types import BatchId
from ....verify.quiet import mean_of, quiet_gradients
from ....verify.recompute import compare
from ...port import AuditAnswers
from ...rounds.actions import AuditMomentum, AuditResults, OpenMomentum, PrepareAudit
from ...sample_order import SampleOrder
from ..trainer import SwarmTrainer
from .momenta import MomentumAuditor

__all__ = ["AuditLoss", "ResultAuditor"]

AuditLoss = Callable[[list[int]], Tensor]
"""The mean loss of samples of the dataset, by the model that trains, as a scalar with its graph."""

_log: Final = logging.getLogger(__name__)


class ResultAuditor:
    """See the module. Belongs to the training thread.

    Args:
        model: computes the loss.
        trainer: of the model.
        answers: to the run.
        order: of the samples; None where the loss function is given the run's own data indices.
        loss: the script's; None if it gave none.
        is_cancelled: whether the round of a step is over.
        tell: told what a person should know.

    Attributes:
        size: samples that the loss function is given at a time; None gives it a whole batch.
        momenta: what it does for test 2.
    """

    def __init__(
        self,
        model: nn.Module,
        trainer: SwarmTrainer,
        answers: AuditAnswers,
        *,
        order: SampleOrder | None,
        loss: AuditLoss | None,
        is_cancelled: Callable[[int], bool],
        tell: Callable[[str], None],
    ) -> None:
        self.size: int | None = None
        self._model = model
        self._trainer = trainer
        self._answers = answers
        self._order = order
        self._loss = loss
        self._is_cancelled = is_cancelled
        self._tell = tell
        self._told = False
        self.momenta = MomentumAuditor(trainer, answers, self._gradients)

    def carry_out(self, action: AuditResults | PrepareAudit | AuditMomentum | OpenMomentum) -> None:
        """Audits, if it can; otherwise says so, once. Shows our momentum in any case."""
        if isinstance(action, OpenMomentum):
            self.momenta.open(action)
            return
        if self._loss is None:
            self._give_up("the loop gives no loss function for audits (audit_loss=...)")
            return
        try:
            match action:
                case AuditResults():
                    self._audit(action)
                case PrepareAudit():
                    self.momenta.prepare(action)
                case AuditMomentum():
                    self.momenta.audit(action)
        except Exception as error:
            # An audit is for the others; nothing that is wrong with it may end our own training.
            _log.warning("an audit failed", exc_info=error)
            self._loss = None
            self._give_up(f"its loss function failed: {type(error).__name__}: {error}")

    def _give_up(self, reason: str) -> None:
        if not self._told:
            self._told = True
            self._tell(f"this run audits results, and this peer audits none: {reason}")

    def _audit(self, action: AuditResults) -> None:
        control = self._gradients(action.control, action.step)
        if control is None:
            return
        for each in action.audited:
            assigned = self._gradients(each.batch, action.step)
            if assigned is None:
                return
            found = compare(each.update, assigned, control)
            own = None if action.own is None else compare(action.own, control, assigned)
            self._answers.audited(action.of_step, each.trainer, found, own)

    def _gradients(
        self,
        batch: BatchId,
        step: int,
        *,
        weights: Mapping[str, Tensor] | None = None,
        halved: bool = False,
    ) -> list[Tensor | None] | None:
        """Of a batch, in the order of the results' tensors; None if the round is over before.

        Args:
            batch: data indices.
            step: of the round.
            weights: by name, in place of those that the model has.
            halved: in pieces of half of the usual size, which is another way of computing the same.
        """
        loss = self._loss
        if loss is None:
            return None
        indices = self._samples_of(batch)
        size = self.size or len(indices)
        if halved:
            size = -(-size // 2)
        parameters = {name: self._trainer.tensors.trained[name] for name in self._trainer.names}
        total: list[Tensor | None] | None = None
        for start in range(0, len(indices), size):
            if self._is_cancelled(step):
                return None
            piece = indices[start : start + size]
            # One piece after the other: all gradients at once would be as many models.
            (found,) = quiet_gradients(self._model, parameters, loss, [piece], weights=weights)
            total = found if total is None else mean_of([total, found], [start, len(piece)])
        if total is None:
            return None
        # Parameters that are frozen may be the optimizer's all the same: nobody sends anything of them.
        trains = [parameter.requires_grad for parameter in parameters.values()]
        return [gradient if trained else None for gradient, trained in zip(total, trains, strict=True)]

    def _samples_of(self, batch: BatchId) -> list[int]:
        indices = range(batch.start, batch.end + 1)
        return list(indices) if self._order is None else self._order.samples(indices)
