"""Carries out what a run wants done to the model. The other half of the promises in :mod:`.actions`.

All peers must come out with the same weights, bit for bit, whatever each of them did in a round:

====================  =================================================================================================
trained to the end    lookahead on, gradients, lookahead off, decay, generate
was cancelled         lookahead on, some gradients, lookahead off, decay
had no batch          decay
====================  =================================================================================================

So the lookahead is taken off by copying the weights back, weight decay is the same operation on the same tensors in
all three, and what differs between peers stays in the momentum, which is private.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from ...compress import CompressedUpdate, TilePlan, make_plan
from ...coordinator.rules.schedule import cold_start_factor
from ...errors import ConfigurationError, DistroError
from ...optim.state import COEFFICIENTS, DELTA, MOMENTUM_BUFFER, WEIGHT, momentum
from ...optimizer import DisTrO
from ..rounds.actions import ApplyResults, DecayWeights, TrainBatch
from ..rounds.weights import TensorDigest
from .named_tensors import NamedTensors
from .still_weights import StillWeights

__all__ = ["SwarmTrainer", "check_overlap"]

_BUFFERS: Final = "momentum_buffer/"
"""Before a tensor's name: its momentum of gradients, with ``direction="orthogonal"``."""

_KEPT_RATES: Final = 4
"""The lookahead wants the rates of the step before, and audits those of the three steps before."""

_KEPT_CHANGES: Final = 3
"""Steps for which it is remembered how weights have changed, if :attr:`SwarmTrainer.remembers`."""


def check_overlap(optimizer: DisTrO) -> None:
    """Raises :class:`~distro_optim.errors.ConfigurationError` if rounds cannot drive the optimizer."""
    if not optimizer.overlap:
        raise ConfigurationError(
            "overlap=False: in a run, updates travel while the next step computes; leave overlap out",
            name="overlap",
            value=False,
        )


@dataclass(frozen=True)
class _Change:
    """Of the weights.

    Attributes:
        rates: of the parameter groups.
        updates: that were applied; None for a decay.
    """

    rates: list[float]
    updates: tuple[CompressedUpdate, ...] | None


class SwarmTrainer:
    """Trainer actions on a model and its optimizer. Belongs to one thread.

    Args:
        tensors: of the model.
        optimizer: of its trained parameters, with ``overlap=True``.
        script_rates: learning rates are those of the parameter groups, times the factor of a cold start; otherwise
            those that the actions name.
        sorted_by_name: results have their tensors in the order of their names' bytes, as Psyche's have, and not in
            the optimizer's.
        clip_grad_norm: Euclidean norm to which gradients are scaled down; None leaves them.

    Attributes:
        still: where other threads may read the weights of a step, from :meth:`lay_down` until they change.
        before_change: called before weights change that others may be reading, to wait for those who must finish.
        before_momentum: likewise, before the momentum changes.
        remembers: how the weights of the last steps have changed, for :meth:`weights_of`.

    Raises:
        ConfigurationError: the optimizer cannot be driven by rounds.
    """

    def __init__(
        self,
        tensors: NamedTensors,
        optimizer: DisTrO,
        *,
        script_rates: bool = True,
        sorted_by_name: bool = False,
        clip_grad_norm: float | None = None,
    ) -> None:
        check_overlap(optimizer)
        self.tensors = tensors
        self.optimizer = optimizer
        self.still = StillWeights()
        self.before_change: Callable[[], object] = lambda: None
        self.before_momentum: Callable[[], object] = lambda: None
        self.remembers = False
        self._script_rates = script_rates
        self.clip_grad_norm = clip_grad_norm
        names = list(tensors.trained)
        order = (
            sorted(range(len(names)), key=lambda n: names[n].encode()) if sorted_by_name else list(range(len(names)))
        )
        self._order = order if order != list(range(len(names))) else None
        self.names = tuple(names[n] for n in order)
        self._plan: TilePlan | None = None
        self._rates: dict[int, list[float]] = {}
        self._training: TrainBatch | None = None
        self._generated: int | None = None  # step in which the optimizer's own part was made
        self._changes: dict[int, list[_Change]] = {}  # since the beginning of each step

    # -- what results look like ----------------------------------------------------------------------------------------

    @property
    def plan(self) -> TilePlan:
        """How the tensors of results are tiled, in the order of :attr:`names`."""
        plan = self.optimizer.plan
        if self._order is None:
            return plan
        if self._plan is None:
            specs = [plan.specs[n] for n in self._order]
            self._plan = make_plan(specs, self.optimizer.tiling, arithmetic=plan.arithmetic)
        return self._plan

    def _outgoing(self, update: CompressedUpdate) -> CompressedUpdate:
        # Other threads encode it, and those touch no device.
        update = self.optimizer.download(update)
        if self._order is None:
            return update
        entries = update.tensors()
        return CompressedUpdate.from_tensors(self.plan, [entries[n] for n in self._order])

    def _incoming(self, update: CompressedUpdate) -> CompressedUpdate:
        if self._order is None:
            return update
        entries = dict(zip(self._order, update.tensors(), strict=True))
        return CompressedUpdate.from_tensors(self.optimizer.plan, [entries[n] for n in range(len(entries))])

    # -- actions -------------------------------------------------------------------------------------------------------

    @property
    def training(self) -> TrainBatch | None:
        """What :meth:`begin` was called with, until :meth:`finish` or :meth:`cancel`."""
        return self._training

    def begin(self, action: TrainBatch) -> None:
        """Ready for gradients: none are there, and the weights look ahead."""
        if self._training is not None:
            raise DistroError(f"training of step {action.step} begins, that of {self._training.step} is not over")
        if action.own_previous is None or action.own_previous != self._generated:
            self.optimizer.keep_own()
        if action.zero_optim:
            self.before_momentum()
            self.optimizer.reset()
        self.optimizer.zero_grad()
        rates = self._rates_of(action.step, action.lr, action.bounds)
        previous = self._rates.get(action.step - 1, rates) if self._script_rates else action.previous_lr
        if self.still.step == action.step:
            with self.still.moving(to=self._set_aside):
                self.optimizer.lookahead(previous)
        else:
            self._leave_still()  # what is set aside is of an earlier step, and is overwritten
            self.optimizer.lookahead(previous)
        self._training = action

    def finish(self, *, skip: bool = False) -> tuple[CompressedUpdate, object]:
        """The training is done: what to send, and what ``own_previous`` is to be in the next round if it is sent.

        Args:
            skip: use no gradients, and say nothing about any tensor.
        """
        action = self._take_training()
        if skip:
            self.optimizer.zero_grad()
        elif self.clip_grad_norm:
            self.tensors.holders.clip(self.tensors.trained.values(), self.clip_grad_norm)
        rates = self._rates_of(action.step, action.lr, action.bounds)
        self._decay(rates)
        self.before_momentum()
        update = self.optimizer.generate(rates, decay_weights=False)
        self.optimizer.zero_grad()
        self._generated = action.step
        return self._outgoing(update), action.step

    def finish_with_hooks(self) -> tuple[CompressedUpdate, object]:
        """As :meth:`finish`, as a step of the optimizer: its step hooks are called, and those of all optimizers."""
        with_hooks = torch.optim.Optimizer.profile_hook_step(lambda _: self.finish())
        return with_hooks(self.optimizer)

    def cancel(self) -> None:
        """The training is stopped. Gradients are lost; the weights are as if it had completed."""
        action = self._take_training()
        self.optimizer.zero_grad()
        self.before_momentum()
        self.optimizer.remove_own()
        self._decay(self._rates_of(action.step, action.lr, action.bounds))

    def decay(self, action: DecayWeights) -> None:
        """The others train a step, and we do not."""
        self._change_parameters()
        if action.own_previous is not None and action.own_previous == self._generated:
            self.before_momentum()
            self.optimizer.remove_own()
        else:
            self.optimizer.keep_own()
        self._decay(self._rates_of(action.step, action.lr, action.bounds))

    def apply(self, action: ApplyResults) -> None:
        """Everybody's results, in the order in which they are."""
        rates = self._rates_of(action.step, action.lr, action.bounds)
        self._change_parameters()
        updates = [self._incoming(update) for update in action.updates]
        self.optimizer.apply(updates, rates)
        self._remember(_Change(rates, tuple(updates)))

    def digests(self) -> list[bytes]:
        """The digest of each tensor that is trained as it is now, in the order of :attr:`names`."""
        return self.tensors.holders.digests({name: self.tensors.trained[name] for name in self.names})

    def fresh_digests(self) -> list[TensorDigest]:
        """As :meth:`digests`, of tensors whose elements are still to be read."""
        return [TensorDigest(name, self.tensors.trained[name]) for name in self.names]

    def lay_down(self, step: int) -> None:
        """The weights are those of ``step`` now: others may read them until they change (:attr:`still`)."""
        self._leave_still()
        if not self.tensors.holders.several:  # nobody could read whole tensors by himself
            self.still.lay_down(step, self.tensors.trained)
        if self.remembers:
            self._changes[step] = []
            for old in [known for known in self._changes if known <= step - _KEPT_CHANGES]:
                del self._changes[old]

    def _set_aside(self) -> Mapping[str, Tensor]:
        """Where the optimizer keeps the true weights while they look ahead."""
        return {name: self.optimizer.state[tensor][WEIGHT] for name, tensor in self.tensors.trained.items()}

    def _change_parameters(self) -> None:
        if not self.still.set_aside:
            self._leave_still()

    def _leave_still(self) -> None:
        if self.still.step is not None:
            self.before_change()
            self.still.take_up()

    def abandon(self) -> None:
        """Whatever is under way ends here; the weights do not look ahead. To be called before the model is left."""
        self._training = None
        self.optimizer.undo_lookahead(discard_edits=True)

    # -- what was ------------------------------------------------------------------------------------------------------

    def live_momentum(self) -> list[Tensor]:
        """The momentum of each tensor, in the optimizer's order, as it changes with the next step."""
        return [momentum(self.optimizer.state[p]) for group in self.optimizer.param_groups for p in group["params"]]

    def known_rates(self, step: int) -> list[float] | None:
        """Learning rates of the parameter groups at ``step``; None if that was not one of the last few."""
        return self._rates.get(step)

    @torch.no_grad()
    def weights_of(self, step: int) -> dict[str, Tensor] | None:
        """What the weights were at the beginning of ``step``, in new tensors, up to the rounding of what was done
        since; None if that is not known. Between two rounds, for results in the optimizer's own order."""
        if step not in self._changes or self._order is not None:
            return None
        weights = {name: self.tensors.trained[name].detach().clone() for name in self.names}
        changes = [change for known in sorted(self._changes) if known >= step for change in self._changes[known]]
        for change in reversed(changes):
            self.optimizer.take_back(
                list(weights.values()), change.updates or (), change.rates, decayed=change.updates is None
            )
        return weights

    def _decay(self, rates: list[float]) -> None:
        self.optimizer.decay_weights(rates)
        self._remember(_Change(rates, None))

    def _remember(self, change: _Change) -> None:
        if self._changes:
            self._changes[max(self._changes)].append(change)

    # -- loading -------------------------------------------------------------------------------------------------------

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Other values for the tensors that are named; they were checked. The momentum stays."""
        self.abandon()
        self._leave_still()
        self._changes.clear()
        self.tensors.load(values)

    def momentum(self) -> dict[str, Tensor]:
        """Copies of the momentum of each tensor, on the CPU, and of Muon's where it has one (:data:`_BUFFERS`).

        Of a model that several processes hold, whole for the one that keeps it; the others give their part and get
        nothing.
        """
        copies = {}
        for number, name in enumerate(self.tensors.trained):
            for key, part in self.optimizer.momenta_of(number).items():
                if self.tensors.holders.keeps:
                    copies[_kept_as(name, key)] = part.to("cpu", copy=True)
        return copies

    @torch.no_grad()
    def load_momentum(self, values: Mapping[str, Tensor]) -> None:
        """What :meth:`momentum` gave; tensors without a value start at zero.

        Raises:
            ConfigurationError: a value has another shape than its tensor.
        """
        self.forget_momentum()
        for number, (name, tensor) in enumerate(self.tensors.trained.items()):
            state = self.optimizer.state[tensor]
            for key in (DELTA, COEFFICIENTS, MOMENTUM_BUFFER):
                kept = values.get(_kept_as(name, key))
                if key not in state or kept is None:
                    continue
                if kept.shape != tensor.shape:
                    raise ConfigurationError(
                        f"the saved momentum of {name} has shape {tuple(kept.shape)}, the tensor {tuple(tensor.shape)}",
                        name="momentum",
                    )
                self.optimizer.load_momenta(number, {key: self.tensors.holders.spread(kept)})

    def forget_momentum(self) -> None:
        """Momentum starts at zero again."""
        self.abandon()
        self.before_momentum()
        self.optimizer.zero_grad()
        self.optimizer.reset()
        self._generated = None
        self._rates.clear()

    @torch.no_grad()
    def round_to_bfloat16(self) -> None:
        """As Psyche's clients do at the end of an epoch, so that all go on from what joiners get."""
        self._change_parameters()
        for tensor in self.tensors.trained.values():
            tensor.copy_(tensor.to(torch.bfloat16))

    # -- inside --------------------------------------------------------------------------------------------------------

    def _take_training(self) -> TrainBatch:
        if self._training is None:
            raise DistroError("no training is under way")
        action, self._training = self._training, None
        # What the script wrote to the weights meanwhile would be in ours alone.
        self.optimizer.undo_lookahead(discard_edits=True)
        return action

    def _rates_of(self, step: int, lr: float, bounds: tuple[int, int] | None) -> list[float]:
        """Learning rates of the parameter groups at ``step``.

        Those of the script are read once in a step: a scheduler that moves on in mid-step must not make what is
        applied differ from what is decayed.
        """
        if step in self._rates:
            return self._rates[step]
        groups = self.optimizer.param_groups
        if self._script_rates:
            factor = cold_start_factor(step, bounds)
            rates = [float(group["lr"]) * factor for group in groups]
        else:
            rates = [lr] * len(groups)
        self._rates[step] = rates
        while len(self._rates) > _KEPT_RATES:
            del self._rates[min(self._rates)]
        return rates


def _kept_as(name: str, key: str) -> str:
    """Name of a part of the state of a tensor among what is saved."""
    return _BUFFERS + name if key == MOMENTUM_BUFFER else name
