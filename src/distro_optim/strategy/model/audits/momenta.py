"""Test 2 in the training thread: our momentum is committed to and shown, that of others is computed again.

What is audited was made two rounds ago, at the weights of then. They are taken back from the present ones by what was
applied and decayed since, which is right to the last bit or two, and kept until the opening is here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from torch import Tensor

from ....compress import CompressedUpdate, TilePlan
from ....coordinator.rules.checkpoints import audits_momentum
from ....coordinator.types import BatchId, Coordinator
from ....errors import ConfigurationError, ProtocolError
from ....optim.rules import is_orthogonal
from ....verify.audit import Challenge, Verdict, check, looking_ahead
from ....verify.calibrate import LOOSEST
from ....verify.momentum import MomentumCommitment
from ....verify.opening import Opening, decode_opening, make_opening
from ...port import AuditAnswers
from ...rounds.actions import AuditMomentum, OpenMomentum, PrepareAudit
from ...rounds.audits.docket import DRAWN_AFTER
from ...rounds.audits.momentum_watch import OPENING_ROUNDS, commits_momentum
from ..trainer import SwarmTrainer
from .keeper import MomentumKeeper

__all__ = ["MomentumAuditor", "check_shows_momentum", "why_momenta_are_not_audited"]

MAX_PAST: Final = 3
"""Steps whose weights are kept for audits that wait for their openings; older ones are not audited by this peer.
Chosen so that the memory is that of three models at most: of one, at the usual share of audits."""

PAST_ROUNDS: Final = DRAWN_AFTER + OPENING_ROUNDS
"""From an audited step to the last one in which its opening may be here to be computed again."""

Gradients = Callable[..., list[Tensor | None] | None]
"""Of a batch, at weights, cancelled with a step, in pieces of so many samples; None if that is over."""

_NO_LIMITS: Final = replace(LOOSEST, jaccard=1.0, hamming=1.0, manhattan=float("inf"))
"""An auditor reports numbers, and what they mean is for everybody to say."""


def check_shows_momentum(state: Coordinator, plan: TilePlan, *, is_in_shards: bool) -> None:
    """Raises :class:`~distro_optim.errors.ConfigurationError` if a peer of a run could not show its momentum.

    Args:
        state: of the run.
        plan: of the whole model.
        is_in_shards: no process of the peer has a whole momentum.
    """
    if is_in_shards and commits_momentum(state, plan):
        raise ConfigurationError(
            "peers of this run show parts of their momentum when they are audited, which one with a sharded model "
            "(DTensor) cannot do: host the run with RunConfig(audit_momentum=False), which leaves the other test",
            name="audit_momentum",
        )


def why_momenta_are_not_audited(state: Coordinator, groups: Sequence[Mapping[str, Any]]) -> str | None:
    """In words, why peers of a run that would audit momenta do not; None if they do, or are not to.

    Args:
        state: of the run.
        groups: parameter groups of the optimizer.
    """
    if not audits_momentum(state.model.checkpoint) or not any(map(is_orthogonal, groups)):
        return None
    return (
        'momenta are not audited in this run, since with direction="orthogonal" parts of them prove nothing: results '
        'are compared with gradients alone, which does not find half of a batch. direction="momentum" has both tests, '
        "and audit_momentum=False says that one is meant"
    )


@dataclass
class _Past:
    """A step that is audited.

    Attributes:
        weights: at its beginning, by name.
        rates: of its parameter groups.
        rates_before: of the step before.
    """

    weights: dict[str, Tensor]
    rates: list[float]
    rates_before: list[float]


class MomentumAuditor:
    """See the module. Belongs to the training thread.

    Args:
        trainer: of the model.
        answers: to the run.
        gradients: by the script's loss function.
    """

    def __init__(self, trainer: SwarmTrainer, answers: AuditAnswers, gradients: Gradients) -> None:
        self._trainer = trainer
        self._answers = answers
        self._gradients = gradients
        self._past: dict[int, _Past] = {}
        self.keeper = MomentumKeeper(answers.momentum_committed, answers.momentum_opened)

    # -- our own -------------------------------------------------------------------------------------------------------

    def commit(self, step: int) -> None:
        """Our update of ``step`` was just generated."""
        self._past = {old: past for old, past in self._past.items() if old >= step - PAST_ROUNDS}
        optimizer = self._trainer.optimizer
        self.keeper.commit(
            step,
            optimizer.plan,
            self._trainer.live_momentum(),
            [float(group["compression_decay"]) for group in optimizer.param_groups],
        )

    def open(self, action: OpenMomentum) -> None:
        """Shows what is asked for."""
        self.keeper.open(action.step, action.leaves)

    # -- others' -------------------------------------------------------------------------------------------------------

    def prepare(self, action: PrepareAudit) -> None:
        """Remembers the weights of then, and looks at ourselves."""
        weights = self._trainer.weights_of(action.of_step)
        if weights is None:
            return
        rates, rates_before = (self._trainer.known_rates(step) for step in (action.of_step, action.of_step - 1))
        if rates is None or rates_before is None:
            return
        while len(self._past) >= MAX_PAST:
            del self._past[min(self._past)]
        past = self._past[action.of_step] = _Past(weights, rates, rates_before)
        pair = self.keeper.pair(action.of_step)
        if action.own is None or pair is None:
            return
        own, (before, after) = action.own, pair
        verdict = self._check(
            past,
            action.step,
            make_opening(action.of_step, own.leaves, before, after),
            batch=own.batch,
            challenge=Challenge(b"", (), own.leaves),
            before=before.commitment(action.of_step - 1),
            after=after.commitment(action.of_step),
            decays=[float(group["compression_decay"]) for group in self._trainer.optimizer.param_groups],
            previous=own.previous,
            sent=own.sent,
            halved=True,
        )
        if verdict is not None and verdict.coefficients:
            self._answers.own_momentum_audited(action.of_step, verdict.noise())

    def audit(self, action: AuditMomentum) -> None:
        """Computes again what another peer has opened."""
        past = self._past.get(action.of_step)
        if past is None:
            return
        groups = len(self._trainer.optimizer.param_groups)
        try:
            opening = decode_opening(action.opening, action.sent.plan)
            if len(action.decays) != groups:
                raise ProtocolError(f"{len(action.decays)} decays of the momentum for {groups} parameter groups")
        except ProtocolError as error:
            self._answers.momentum_audited(action.of_step, action.challenge.trainer, Verdict(reasons=(str(error),)))
            return
        verdict = self._check(
            past,
            action.step,
            opening,
            batch=action.batch,
            challenge=action.challenge,
            before=action.before,
            after=action.after,
            decays=action.decays,
            previous=action.previous,
            sent=action.sent,
        )
        if verdict is not None:
            self._answers.momentum_audited(action.of_step, action.challenge.trainer, verdict)

    def forget_weights(self) -> None:
        """The weights were wrong, and so were those that were remembered."""
        self._past.clear()

    def forget(self) -> None:
        """The model was loaded again."""
        self.forget_weights()
        self.keeper.forget()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _check(
        self,
        past: _Past,
        step: int,
        opening: Opening,
        *,
        batch: BatchId,
        challenge: Challenge,
        before: MomentumCommitment,
        after: MomentumCommitment,
        decays: Sequence[float],
        previous: CompressedUpdate,
        sent: CompressedUpdate,
        halved: bool = False,
    ) -> Verdict | None:
        specs = self._trainer.optimizer.plan.specs
        there = looking_ahead(past.weights, opening.signs, [past.rates_before[spec.group] for spec in specs])
        gradients = self._gradients(batch, step, weights=there, halved=halved)
        if gradients is None:
            return None
        # What is not finite a trainer leaves out, too.
        usable = [None if g is None or not bool(g.isfinite().all()) else g for g in gradients]
        try:
            return check(
                opening,
                challenge=challenge,
                step=opening.step,
                before=before,
                after=after,
                previous=previous,
                sent=sent,
                gradients=usable,
                rates=past.rates,
                decays=decays,
                limits=_NO_LIMITS,
            )
        except ConfigurationError:
            return None  # the script's model is another one by now
