"""The mathematics of :class:`~distro_optim.optimizer.DisTrO` as verbs on a model's parameters, without any peers.

``lookahead``, ``generate``, ``apply``: a training loop that carries the updates itself calls these; ``step()`` only
composes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from .compress import CompressedUpdate, Compressor, OwnPart, ParamSpec, TilePlan, make_plan
from .compress.dct import TransformName
from .compress.tiling import Tiling
from .errors import ConfigurationError, DistroError
from .optimizer_arguments import check_param, normal_settings, unique_params
from .optimizer_run import PROGRESS, Run
from .optimizer_state import DELTA, OWN_INDEX, OWN_VALUE, QUARANTINED, WEIGHT, initial_state, restore_state
from .quarantine import usable_gradients
from .workers import MAX_WORKERS, Workers

__all__ = ["DecoupledMomentum"]


class DecoupledMomentum(Optimizer):
    """Momentum that leaves a peer only in compressed updates, and the verbs that make and apply them.

    Arguments are those of :class:`~distro_optim.optimizer.DisTrO`, checked there; ``settings`` are the defaults of
    the parameter groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        settings: dict[str, Any],
        run: Run,
        *,
        quantize_1bit: bool,
        overlap: bool,
        tiling: Tiling,
        transform: TransformName,
    ) -> None:
        self._tiling: Tiling = tiling
        self._transform = transform
        self._quantize = quantize_1bit
        self._overlap = overlap
        self._run = run
        super().__init__(unique_params(params), {**settings, **PROGRESS})

    # ------------------------------------------------------------------ the parameters and their plan

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for any optimizer, also in mid-run: the new parameters join the next step, on every peer alike."""
        if not isinstance(param_group, dict):
            raise TypeError(f'param_group={param_group!r}: give a dict with the key "params"')
        [group] = unique_params([param_group])
        group.update(normal_settings({**self.defaults, **group}))
        for member in group["params"]:
            check_param(member[1] if isinstance(member, tuple) else member)
        ahead = self._run.lookahead.on
        self.undo_lookahead()
        try:
            super().add_param_group(group)
            if len(self.param_groups) > 1:
                group.update({key: self.param_groups[0][key] for key in PROGRESS})
            self._run.forget_plan()
            plan = self.plan
            first = len(plan) - len(group["params"])
            for number, param in enumerate(group["params"], start=first):
                self.state[param] = initial_state(param, plan, number, self._overlap)
        finally:
            if ahead:
                self._look_ahead_again()

    @property
    def plan(self) -> TilePlan:
        """How the parameters are tiled; updates are made and applied on this plan."""
        if self._run.plan is None:
            self._run.plan = make_plan(
                [
                    ParamSpec(
                        tuple(p.shape), p.dtype, p.device, number, group["compression_chunk"], group["compression_topk"]
                    )
                    for number, group in enumerate(self.param_groups)
                    for p in group["params"]
                ],
                self._tiling,
            )
        return self._run.plan

    def _ready_compressor(self) -> Compressor:
        """The compressor for the parameters as they are now.

        Raises:
            DistroError: a parameter has changed its shape.
            ConfigurationError: a setting was changed that the plan depends on.
        """
        params = self._params()
        plan = self.plan
        if any(s.device != p.device or s.dtype != p.dtype for s, p in zip(plan.specs, params, strict=True)):
            # model.to(...) after construction: the parameters are the same objects on another device.
            self._run.forget_plan()
            plan = self.plan
        for number, (spec, param) in enumerate(zip(plan.specs, params, strict=True)):
            if param.shape != spec.shape:
                raise DistroError(
                    f"parameter {number} had shape {spec.shape} and has {tuple(param.shape)} now: make a new optimizer "
                    "after a model has changed its shape; sharding that frees parameters (FSDP, ZeRO) is not supported"
                )
        for spec in {spec.group: spec for spec in plan.specs}.values():
            group = self.param_groups[spec.group]
            for name, planned in (("compression_topk", spec.topk), ("compression_chunk", spec.chunk)):
                if group[name] != planned:
                    raise ConfigurationError(
                        f"{name}={group[name]!r} was set in a parameter group that began with {planned}: it cannot "
                        "change in mid-run, so set it back, or make a new optimizer",
                        name=name,
                        value=group[name],
                    )
        if self._run.compressor is None:
            workers = Workers(min(torch.get_num_threads(), MAX_WORKERS))
            self._run.compressor = Compressor(plan, self._transform, workers.run, workers.count)
            for number, param in enumerate(params):
                self.state[param] = restore_state(self.state[param], param, plan, number, self._overlap)
        return self._run.compressor

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _rates(self, lr: float | None) -> list[float]:
        return [float(group["lr"]) if lr is None else lr for group in self.param_groups]

    # ------------------------------------------------------------------ the verbs

    @torch.no_grad()
    def lookahead(self, lr: float | None = None) -> None:
        """Shifts the weights by ``-lr * sign(delta)`` for the forward and backward pass. Does nothing if they are.

        Args:
            lr: for all groups; by default each group's own. Psyche gives that of the round before.
        """
        if not self._overlap:
            raise DistroError("lookahead() is for overlap=True: without overlap nothing is on its way")
        if self._run.lookahead.on:
            return
        self._ready_compressor()
        for group in self.param_groups:
            group["lookahead_lr"] = float(group["lr"]) if lr is None else lr
        self._look_ahead_again()

    @torch.no_grad()
    def undo_lookahead(self) -> None:
        """Puts the weights back, bit for bit. Does nothing if they are not shifted.

        Weights that were written to meanwhile (clipped, or loaded from a checkpoint) keep what was written; a tensor
        of which only some elements were, gets the others back. What is written through ``.data`` goes unnoticed:
        use ``torch.no_grad()``, or call :meth:`eval` before.
        """
        self._undo_lookahead(keep_edited=False)

    def _undo_lookahead(self, *, keep_edited: bool) -> None:
        if self._run.lookahead.on:
            self._run.lookahead.take_off(*self._lookahead_args(), keep_edited=keep_edited)
            for group in self.param_groups:
                group["looks_ahead"] = False

    @torch.no_grad()
    def generate(self, lr: float | None = None) -> CompressedUpdate:
        """Takes the gradients into the momentum and returns this peer's contribution to the step.

        Weight decay first, then ``delta = decay * delta + lr * grad``. A parameter without gradient, or whose
        gradient is not finite, takes nothing into ``delta`` and is absent from the update. Its weight decays all the
        same if it requires a gradient, since other peers, who may have one, must end up with the same weights.
        Undoes the lookahead.

        Args:
            lr: for all groups; by default each group's own.
        """
        return self._generate(lr, alone=False, at_once=False)

    def _generate(self, lr: float | None, *, alone: bool, at_once: bool) -> CompressedUpdate:
        """:meth:`generate`; ``alone``, a parameter without gradient keeps its weight, as in torch.optim.

        With ``at_once`` the weights take the update in the same pass.
        """
        self.undo_lookahead()
        compressor = self._ready_compressor()
        params, rates = self._params(), self._rates(lr)
        # Set by GradScaler, like grad_scale below, if it leaves the unscaling to us.
        grads, bad = usable_gradients([p.grad for p in params], getattr(self, "found_inf", None))
        for number in bad:
            self.state[params[number]][QUARANTINED].add_(1)
        shrink = [1 - rate * group["weight_decay"] for group, rate in zip(self.param_groups, rates, strict=True)]
        for param, grad, spec in zip(params, grads, compressor.plan.specs, strict=True):
            if shrink[spec.group] != 1 and (grad is not None or (param.requires_grad and not alone)):
                param.mul_(shrink[spec.group])
        grad_scale = getattr(self, "grad_scale", None)
        scale = 1.0 if grad_scale is None else float(grad_scale)
        own = None
        if self._overlap:
            own = [OwnPart(self.state[p][OWN_INDEX], self.state[p][OWN_VALUE]) for p in params]
        return compressor.extract(
            grads,
            [self.state[p][DELTA] for p in params],
            lr=[rate / scale for rate in rates],
            decay=[group["compression_decay"] for group in self.param_groups],
            quantize=self._quantize,
            own=own,
            step=(params, rates) if at_once else None,
        )

    @torch.no_grad()
    def apply(self, updates: Sequence[CompressedUpdate], lr: float | None = None) -> None:
        """``p -= lr * sign(decode(mean over senders))``. Undoes the lookahead. No updates: nothing changes.

        Args:
            updates: everybody's, in the same order on every peer.
            lr: for all groups; by default each group's own.

        Raises:
            ConfigurationError: an update was made for other parameters.
        """
        self.undo_lookahead()
        compressor = self._ready_compressor()
        _check_plans(updates, compressor.plan)
        compressor.merge(updates, self._params(), lr=self._rates(lr))

    @torch.no_grad()
    def decode(self, updates: Sequence[CompressedUpdate]) -> list[Tensor]:
        """What :meth:`apply` takes the sign of, for every parameter, in the dtype of ``delta``. Changes nothing."""
        compressor = self._ready_compressor()
        _check_plans(updates, compressor.plan)
        return compressor.decode(updates)

    @torch.no_grad()
    def _look_ahead_again(self) -> None:
        """Puts the lookahead on at the learning rates it had last."""
        for group in self.param_groups:
            group["looks_ahead"] = True
        self._run.lookahead.put_on(*self._lookahead_args())

    def _lookahead_args(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[float]]:
        params = self._params()
        return (
            params,
            [self.state[p][DELTA] for p in params],
            [self.state[p][WEIGHT] for p in params],
            [group["lookahead_lr"] for group in self.param_groups for _ in group["params"]],
        )


def _check_plans(updates: Sequence[CompressedUpdate], plan: TilePlan) -> None:
    for number, update in enumerate(updates):
        if update.plan.layout != plan.layout:
            raise ConfigurationError(
                f"updates[{number}] was made for other parameters, another tiling or another top-k", name="updates"
            )
