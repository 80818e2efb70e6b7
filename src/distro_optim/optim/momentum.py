"""The mathematics of :class:`~distro_optim.optimizer.DisTrO` as verbs on a model's parameters, without any peers.

``lookahead``, ``generate``, ``apply``: a training loop that carries the updates itself calls these; ``step()`` only
composes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from ..compress import Arithmetic, CompressedUpdate, OwnPart, TilePlan
from ..compress.engine import Intake
from ..compress.exact.precision import true_float32
from ..compress.tiling import Tiling
from ..errors import ConfigurationError, DistroError
from .arguments import check_param, normal_settings, unique_params
from .lookahead import Edits
from .orthogonal import look_ahead, orthogonalize, take_direction
from .planned import PlannedParameters, Rates
from .quarantine import unseen_gradients, usable_gradients
from .rules import is_orthogonal
from .run import ARITHMETIC, PROGRESS
from .state import COEFFICIENTS, DELTA, DIRECTION, MOMENTUM_BUFFER, OWN_INDEX, OWN_VALUE, QUARANTINED, WEIGHT, momentum
from .uncompiled import excluded_by_torch, uncompiled
from .weight_decay import shrink_all

__all__ = ["DecoupledMomentum"]

_add_param_group = excluded_by_torch(Optimizer.add_param_group)


class DecoupledMomentum(PlannedParameters):
    """Momentum that leaves a peer only in compressed updates, and the verbs that make and apply them."""

    # -- parameters and settings that change ---------------------------------------------------------------------------

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for any optimizer, also in mid-training: the new parameters join the next step, on every peer alike.

        Raises:
            DistroError: a session takes the steps, since the parameters of its run are settled when it begins.
        """
        if self._run.takes_step is not None:
            raise DistroError(
                "add_param_group() in a run, whose parameters are settled when it begins: give DisTrO all of them from "
                "the start, and those that wait a group of their own whose learning rate is 0 until then"
            )
        if not isinstance(param_group, dict):
            raise TypeError(f'param_group={param_group!r}: give a dict with the key "params"')
        [group] = unique_params([param_group])
        group.update(normal_settings({**self.defaults, **group}))
        for member in group["params"]:
            check_param(member[1] if isinstance(member, tuple) else member)
        ahead = self._run.lookahead.on
        self.undo_lookahead()
        try:
            _add_param_group(self, group)
            if len(self.param_groups) > 1:
                group.update({key: self.param_groups[0][key] for key in (*PROGRESS, ARITHMETIC)})
            self._run.forget_plan()
            plan = self.plan
            first = len(plan) - len(group["params"])
            for number, param in enumerate(group["params"], start=first):
                self.state[param] = self._restored({}, number, param)
        finally:
            if ahead:
                self._look_ahead_again()

    @torch.no_grad()
    @true_float32()
    def reconfigure(
        self,
        *,
        tiling: Tiling,
        quantize_1bit: bool,
        arithmetic: Arithmetic | None = None,
        **settings: float | int | str,
    ) -> None:
        """Other settings for all parameter groups. The momentum stays; what was sent last is forgotten.

        Of DTensors all ranks that hold the model must call.

        Args:
            tiling, quantize_1bit: as for the constructor.
            arithmetic: as for the constructor; None keeps what it is.
            settings: of the parameter groups, such as ``compression_topk``.

        Raises:
            ConfigurationError: a setting is out of its range. Nothing has changed then.
        """
        self.undo_lookahead()
        groups = [normal_settings({**_fitting(group, settings), **settings}) for group in self.param_groups]
        deltas, before = [self._delta(number, param) for number, param in enumerate(self._params())], self._sharding
        self._tiling, self._quantize, self._arithmetic = tiling, quantize_1bit, arithmetic or self._arithmetic
        for group, changed in zip(self.param_groups, groups, strict=True):
            group.update(changed, **{ARITHMETIC: self._arithmetic})
        self._run.forget_plan()
        for number, (param, delta) in enumerate(zip(self._params(), deltas, strict=True)):
            kept = {DELTA: delta, QUARANTINED: self.state[param][QUARANTINED]}
            if before is not None and self._sharding is not None:
                kept = self._sharding.part_of_state(number, before.whole_state(number, kept))
            self.state[param] = self._restored(kept, number, param)

    # -- the verbs -----------------------------------------------------------------------------------------------------

    @uncompiled
    @torch.no_grad()
    def lookahead(self, lr: Rates = None) -> None:
        """Shifts the weights by ``-lr * sign(delta)`` for the forward and backward pass, unless they are shifted.

        With ``direction="orthogonal"`` by ``-lr * direction``, of what this peer sent last, or with ``ahead="delta"``
        by ``-delta``, in which each direction has the learning rate of its own step.

        Args:
            lr: for all groups, or one for each; by default each group's own. Psyche uses that of the round before.

        Raises:
            DistroError: there is no lookahead without overlap.
            ConfigurationError: a learning rate is not a finite number, or the number of them is wrong.
        """
        if not self._overlap:
            raise DistroError("lookahead() is for overlap=True: without overlap nothing is on its way")
        if self._run.lookahead.on:
            return
        self._ready_engine()
        for group, rate in zip(self.param_groups, self._rates(lr), strict=True):
            group["lookahead_lr"] = rate
        self._look_ahead_again()

    @uncompiled
    @torch.no_grad()
    def undo_lookahead(self, *, discard_edits: bool = False) -> None:
        """Puts the weights back, bit for bit. Does nothing if they are not shifted.

        Weights that were written to meanwhile (clipped, or loaded from a checkpoint) keep what was written. Where only
        some elements of a tensor were written to, the others are put back. What is written through ``.data`` goes
        unnoticed: use ``torch.no_grad()``, or call :meth:`eval` before.

        Args:
            discard_edits: put all of them back, whatever was written to them.

        Raises:
            DistroError: there are other peers, and some elements of a tensor were written to.
        """
        self._undo_lookahead(Edits.DISCARD if discard_edits else Edits.MERGE)

    def _undo_lookahead(self, edits: Edits) -> None:
        if self._run.lookahead.on:
            exchange = self._run.exchange
            alone = exchange is None or exchange.num_peers == 1
            self._run.lookahead.take_off(*self._lookahead_args(), edits=edits, alone=alone, engine=self._run.engine)
            for group in self.param_groups:
                group["looks_ahead"] = False

    @uncompiled
    @torch.no_grad()
    def generate(self, lr: Rates = None, *, decay_weights: bool = True) -> CompressedUpdate:
        """Takes the gradients into the momentum and returns this peer's contribution to the step.

        Weight decay first, then ``delta = decay * delta + lr * grad``. A parameter without gradient, or whose
        gradient is not finite, adds nothing to ``delta`` and is absent from the update. Its weight decays all the same
        if it requires a gradient, since other peers may have one and must end up with the same weights.
        Undoes the lookahead.

        Args:
            lr: for all groups, or one for each; by default each group's own.
            decay_weights: False leaves weight decay out, for callers that use :meth:`decay_weights`.

        Raises:
            DistroError: a gradient is sparse, or a parameter has changed its shape.
            ConfigurationError: a learning rate or a setting cannot be used.
        """
        return self._generate(lr, alone=False, at_once=False, decay_weights=decay_weights)

    @true_float32()
    def _generate(self, lr: Rates, *, alone: bool, at_once: bool, decay_weights: bool = True) -> CompressedUpdate:
        """:meth:`generate`; ``alone``, a parameter without gradient keeps its weight, as in torch.optim.

        With ``at_once`` the weights take the update in the same pass.
        """
        if not self._stays_ahead():
            self.undo_lookahead()
        engine = self._ready_engine()
        params, rates = self._params(), self._rates(lr)
        if self._sharding is not None and getattr(self, "found_inf", None) is not None:
            raise DistroError(
                "a GradScaler leaves the unscaling of sharded gradients (DTensor) to the optimizer, whose ranks do not "
                "see each other's overflows: train in bfloat16, or call scaler.unscale_(optimizer) before the step"
            )
        # Both set by GradScaler, if it leaves the unscaling to us.
        scaling = (getattr(self, "found_inf", None), getattr(self, "grad_scale", None))
        usable, all_grads = None, [p.grad for p in params]
        if engine.defers and not self._must_see_gradients(rates, alone, decay_weights):
            usable = unseen_gradients(all_grads, *scaling, look=engine.finite)
        if usable is None:
            usable = usable_gradients(all_grads, *scaling, look=engine.finite)
        if usable.finite is not None:
            self._run.quarantine.add(all_grads, usable.finite, self._quarantine_counters())
        grads, scale = usable.grads, usable.scale
        for number in usable.bad:
            self.state[params[number]][QUARANTINED].add_(1)
        if decay_weights:
            self._shrink(
                rates, [g is not None or (p.requires_grad and not alone) for p, g in zip(params, grads, strict=True)]
            )
        own = self._own_parts() if self._overlap else None
        directions = self._directions(grads, scale)
        return engine.extract(
            Intake(
                directions,
                [momentum(self.state[p]) for p in params],
                in_coefficients=[COEFFICIENTS in self.state[p] for p in params],
                # A direction has its size already.
                lr=[
                    rate if is_orthogonal(group) else rate / scale
                    for group, rate in zip(self.param_groups, rates, strict=True)
                ],
                decay=[group["compression_decay"] for group in self.param_groups],
                quantize=self._quantize,
                own=own,
                step=(self._held(), rates) if at_once else None,
                usable=usable.flags,
                scale=usable.divisor,
            )
        )

    def _must_see_gradients(self, rates: Sequence[float], alone: bool, decay_weights: bool) -> bool:
        """Whether more depends on which gradients are finite than the engine's first half of a step."""
        decays = decay_weights and any(
            rate * group["weight_decay"] for group, rate in zip(self.param_groups, rates, strict=True)
        )
        by_gradient = alone or not all(param.requires_grad for param in self._params())
        return any(self._is_orthogonal()) or (decays and by_gradient)

    def _quarantine_counters(self) -> list[Tensor | None]:
        return [self.state.get(param, {}).get(QUARANTINED) for param in self._params()]

    def _settle_quarantine(self) -> None:
        self._run.quarantine.settle(self._quarantine_counters())

    def _directions(self, grads: Sequence[Tensor | None], scale: float) -> list[Tensor | None]:
        """What goes into ``delta``: the gradients, or what Muon makes of them, in place in the state."""
        taken, sharding = list(grads), self._sharding
        momenta = [group["momentum"] for group in self.param_groups for _ in group["params"]]
        chosen = [number for number, orthogonal in enumerate(self._is_orthogonal()) if orthogonal]
        boxed = grads
        if sharding is not None and chosen:
            boxed = sharding.gradients([grad if n in chosen else None for n, grad in enumerate(grads)])
        matrices, looks = [], {}
        for number, param in ((number, self._params()[number]) for number in chosen):
            state, grad = self.state[param], boxed[number]
            if grad is None:
                self._forget_direction(param)
                continue
            buffer = state[MOMENTUM_BUFFER]
            taken[number] = out = state[DIRECTION] if DIRECTION in state else torch.empty_like(buffer)
            if sharding is not None:
                look_ahead(grad, buffer, out, momentum=momenta[number], scale=scale)
                looks[number] = out
                continue
            matrix = take_direction(
                grad, buffer, out, momentum=momenta[number], scale=scale, grid=self.plan.grids[number]
            )
            if matrix is not None:
                matrices.append(matrix)
        if sharding is not None and chosen:
            sharding.orthogonalize(looks)
        orthogonalize(matrices)
        return taken

    def _forget_direction(self, param: Tensor) -> None:
        """Nothing of ours is on its way, so there is nothing to look ahead to."""
        if DIRECTION in self.state[param]:
            self.state[param][DIRECTION].zero_()

    @torch.no_grad()
    def decay_weights(self, lr: Rates = None) -> None:
        """The weight decay of :meth:`generate` alone, for a step in which others train and we do not.

        Decays what requires a gradient, so that it does not depend on which gradients a peer happens to have.
        Undoes the lookahead.

        Args:
            lr: for all groups, or one for each; by default each group's own.
        """
        self.undo_lookahead()
        self._shrink(self._rates(lr), [param.requires_grad for param in self._params()])

    def _shrink(self, rates: Sequence[float], which: Sequence[bool]) -> None:
        """Weight decay of the parameters of which ``which`` says so."""
        factors = [
            1 - rate * group["weight_decay"]
            for group, rate in zip(self.param_groups, rates, strict=True)
            for _ in group["params"]
        ]
        params = self._held()
        if self._run.lookahead.stale:
            params = self._run.lookahead.true_weights(params, [self.state[p][WEIGHT] for p in params])
        chosen = [
            (param, factor)
            for param, factor, decays in zip(params, factors, which, strict=True)
            if decays and factor != 1
        ]
        shrink_all([param for param, _ in chosen], [factor for _, factor in chosen])

    @torch.no_grad()
    def keep_own(self) -> None:
        """What was generated last was not sent, so it stays in the momentum. Otherwise it leaves in the next step."""
        for param in self._params():
            if OWN_VALUE in self.state[param]:
                self.state[param][OWN_VALUE].zero_()
            self._forget_direction(param)

    @torch.no_grad()
    @true_float32()
    def remove_own(self) -> None:
        """What was generated last was sent, and leaves the momentum now instead of in the next step.

        For a step that generates nothing. Undoes the lookahead. Without overlap there is nothing left to remove.
        """
        self.undo_lookahead()
        if self._overlap:
            engine = self._ready_engine()
            groups, tensors = len(self.param_groups), len(engine.plan)
            engine.extract(
                Intake(
                    [None] * tensors,
                    [self.state[p][DELTA] for p in self._params()],
                    in_coefficients=[False] * tensors,
                    lr=[0.0] * groups,
                    decay=[1.0] * groups,
                    quantize=self._quantize,
                    own=self._own_parts(),
                )
            )
            for param in self._params():
                self._forget_direction(param)

    def _own_parts(self) -> list[OwnPart]:
        return [OwnPart(self.state[p][OWN_INDEX], self.state[p][OWN_VALUE]) for p in self._params()]

    @uncompiled
    @torch.no_grad()
    @true_float32()
    def apply(self, updates: Sequence[CompressedUpdate], lr: Rates = None) -> None:
        """``p -= gain * lr * sign(decode(mean over senders))``, or by the group's other rule.

        Undoes the lookahead. No updates: nothing changes.

        Args:
            updates: everybody's, in the same order on every peer.
            lr: for all groups, or one for each; by default each group's own.

        Raises:
            ConfigurationError: an update was made for other parameters.
        """
        self.undo_lookahead()
        engine = self._ready_engine()
        _check_plans(updates, engine.plan)
        engine.merge(engine.upload(updates), self._held(), lr=self._rates(lr))

    @torch.no_grad()
    @true_float32()
    def take_back(
        self, weights: Sequence[Tensor], updates: Sequence[CompressedUpdate], lr: Rates, *, decayed: bool
    ) -> None:
        """What weights were before :meth:`apply`, or before :meth:`decay_weights`, up to their rounding.

        The optimizer and its parameters stay as they are.

        Args:
            weights: one per parameter, in its shape; changed in place.
            updates: that were applied; none for a decay.
            lr: as it was then.
            decayed: it was a decay.
        """
        rates = self._rates(lr)
        if decayed:
            factors = [
                1 / (1 - rate * group["weight_decay"]) if param.requires_grad else 1.0
                for group, rate in zip(self.param_groups, rates, strict=True)
                for param in group["params"]
            ]
            chosen = [(weight, factor) for weight, factor in zip(weights, factors, strict=True) if factor != 1]
            shrink_all([weight for weight, _ in chosen], [factor for _, factor in chosen])
            return
        engine = self._ready_engine()
        _check_plans(updates, engine.plan)
        engine.merge(engine.upload(updates), weights, lr=[-rate for rate in rates])

    def download(self, update: CompressedUpdate) -> CompressedUpdate:
        """What :meth:`generate` made, in main memory: for other threads and processes, which touch no device.

        :meth:`apply` takes it from there or from a device.
        """
        return self._ready_engine().download(update)

    @torch.no_grad()
    @true_float32()
    def decode(self, updates: Sequence[CompressedUpdate]) -> list[Tensor]:
        """The merged update before its sign: a tensor for every parameter, in its shape and in the dtype of ``delta``.

        Of DTensors they are DTensors.

        Changes nothing.

        Raises:
            ConfigurationError: an update was made for other parameters.
        """
        engine = self._ready_engine()
        _check_plans(updates, engine.plan)
        return engine.decode(engine.upload(updates))

    @torch.no_grad()
    def _look_ahead_again(self) -> None:
        """Puts the lookahead on at the learning rates it had last."""
        for group in self.param_groups:
            group["looks_ahead"] = True
        self._run.lookahead.put_on(*self._lookahead_args(), engine=self._ready_engine())

    def _stays_ahead(self) -> bool:
        """A step begins. Whether weights look ahead until :meth:`_apply_ahead`, for an engine that wants them so."""
        ahead, engine = self._run.lookahead, self._run.engine
        if not (self._run.renews and ahead.on and engine is not None and engine.merges_ahead):
            return False
        return ahead.stay(*self._lookahead_args())

    @true_float32()
    def _apply_ahead(self, updates: Sequence[CompressedUpdate]) -> bool:
        """:meth:`apply` and :meth:`lookahead` in one pass, where weights look ahead still; False leaves it to them."""
        ahead = self._run.lookahead
        if not ahead.stale:
            return False
        engine = self._ready_engine()
        _check_plans(updates, engine.plan)
        params, _, saved, _, _ = self._lookahead_args()
        true = ahead.true_weights(params, saved)
        shifted = [None if weight is param else param for param, weight in zip(params, true, strict=True)]
        rates = self._rates(None)
        if not engine.merge_ahead(engine.upload(updates), true, shifted, lr=rates, ahead_lr=rates):
            return False
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lookahead_lr"] = rate
        ahead.renewed(params, saved)
        return True

    def _lookahead_args(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[float], list[bool]]:
        params = self._params()
        if not all(WEIGHT in self.state.get(p, ()) for p in params):
            raise DistroError(
                "the optimizer's state was cleared while the weights looked ahead, and the true weights with it: load "
                "them from a checkpoint and make a new optimizer. To forget the momentum, call reset()"
            )
        by_delta = [group["ahead"] == "delta" for group in self.param_groups for _ in group["params"]]
        directions = [self.state[p].get(DIRECTION, self.state[p][DELTA]) for p in params]
        saved = [self.state[p][WEIGHT] for p in params]
        rates = [group["lookahead_lr"] for group in self.param_groups for _ in group["params"]]
        # Directions have the size of a sign; in delta they have their learning rates already.
        rates = [1.0 if by else rate for by, rate in zip(by_delta, rates, strict=True)]
        whole = [by or DIRECTION in self.state[p] for by, p in zip(by_delta, params, strict=True)]
        sharding = self._sharding
        if sharding is None:
            return params, directions, saved, rates, whole
        return sharding.look_ahead(directions, saved, rates, whole, on=self._run.lookahead.on)


def _fitting(group: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A group without what goes with its direction only, where ``settings`` bring another one."""
    same = settings.get("direction", group["direction"]) == group["direction"]
    return group if same else {**group, "ahead": None}


def _check_plans(updates: Sequence[CompressedUpdate], plan: TilePlan) -> None:
    for number, update in enumerate(updates):
        if update.plan.arithmetic != plan.arithmetic:
            raise ConfigurationError(
                f"updates[{number}] was made for arithmetic={update.plan.arithmetic!r}, this optimizer merges by "
                f"{plan.arithmetic!r}: give all peers the same arithmetic",
                name="updates",
            )
        if update.plan.layout != plan.layout:
            raise ConfigurationError(
                f"updates[{number}] was made for other parameters, another tiling or another top-k", name="updates"
            )
