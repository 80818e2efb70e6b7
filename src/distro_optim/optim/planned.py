"""The parameters of :class:`~distro_optim.optimizer.DisTrO`: how they are tiled, which part of them is here, what
carries out their steps, and what is remembered of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..compress import Arithmetic, ParamSpec, TilePlan, from_coefficients, make_plan
from ..compress.dct import TransformName
from ..compress.engine import Engine, EngineName, make_engine
from ..compress.exact.precision import true_float32
from ..compress.tiling import Tiling
from ..errors import ConfigurationError, DistroError
from .arguments import check_rate, unique_params
from .rules import is_orthogonal
from .run import ARITHMETIC, PROGRESS, Run, Seen
from .sharded_engine import ShardedEngine
from .sharding import Sharding, is_sharded
from .state import COEFFICIENTS, DELTA, restore_state
from .uncompiled import excluded_by_torch
from .workers import workers_of_a_step

__all__ = ["PlannedParameters", "Rates"]

Rates = float | Sequence[float] | None
"""A learning rate for all parameter groups, one for each, or each group's own."""


class PlannedParameters(Optimizer):
    """An optimizer's parameters on one plan. What is done with them is for subclasses.

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
        arithmetic: Arithmetic,
        engine: EngineName,
    ) -> None:
        self._arithmetic: Arithmetic = arithmetic
        self._engine: EngineName = engine
        self._tiling: Tiling = tiling
        self._transform = transform
        self._quantize = quantize_1bit
        self._overlap = overlap
        self._run = run
        super().__init__(unique_params(params), {**settings, **PROGRESS, ARITHMETIC: arithmetic})

    zero_grad = excluded_by_torch(Optimizer.zero_grad)
    state_dict = excluded_by_torch(Optimizer.state_dict)
    load_state_dict = excluded_by_torch(Optimizer.load_state_dict)

    def _restored(self, saved: dict[str, Any], number: int, param: Tensor) -> dict[str, Tensor]:
        rules = [group for group in self.param_groups for _ in group["params"]][number]
        plan, sharding = self.plan, self._sharding
        if sharding is not None:
            plan, param = sharding.plan, sharding.held_of(number)
        return restore_state(saved, param, plan, number, self._overlap, self._transform, rules)

    def _is_orthogonal(self) -> list[bool]:
        """Of every parameter, whether its group has Muon's direction."""
        return [is_orthogonal(group) for group in self.param_groups for _ in group["params"]]

    @property
    def plan(self) -> TilePlan:
        """How the parameters are tiled; updates are made and applied on this plan."""
        if self._run.plan is None:
            self._run.plan = make_plan(
                [
                    ParamSpec(
                        tuple(p.shape),
                        p.dtype,
                        p.device,
                        number,
                        group["compression_chunk"],
                        group["compression_topk"],
                        group["update"],
                        group["gain"],
                    )
                    for number, group in enumerate(self.param_groups)
                    for p in group["params"]
                ],
                self._tiling,
                # Coefficients of another transform mean nothing here; the default adds nothing to the layout.
                agreed=("" if self._transform == "dct" else self._transform) + self._other_directions(),
                arithmetic=self._arithmetic,
            )
        return self._run.plan

    def _other_directions(self) -> str:
        """Which groups have another direction than the published one; goes into the plan's layout."""
        numbers = [str(number) for number, group in enumerate(self.param_groups) if is_orthogonal(group)]
        return f"\0orthogonal {' '.join(numbers)}" if numbers else ""

    @property
    def _sharding(self) -> Sharding | None:
        """Which part of the model is here; None where parameters are whole."""
        run = self._run
        if run.sharding is None and not run.seen_whole.is_of(self.param_groups):
            params = self._params()
            if any(map(is_sharded, params)):
                directions = [group["direction"] for group in self.param_groups for _ in group["params"]]
                run.sharding, run.sharded = Sharding(self.plan, params, directions), True
            else:
                run.seen_whole = Seen(self.param_groups)
        return run.sharding

    def _held(self) -> list[Tensor]:
        """The parameters, or of DTensors the shards that are here."""
        sharding = self._sharding
        return self._params() if sharding is None else sharding.held()

    def _ready_engine(self) -> Engine:
        """What carries out steps of the parameters as they are now.

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
            for name, planned in (
                ("compression_topk", spec.topk),
                ("compression_chunk", spec.chunk),
                ("update", spec.update),
                ("gain", spec.gain),
            ):
                if group[name] != planned:
                    raise ConfigurationError(
                        f"{name}={group[name]!r} was set in a parameter group that began with {planned}: it cannot "
                        "change in mid-run, so set it back, or make a new optimizer",
                        name=name,
                        value=group[name],
                    )
        # Also where the state was cleared.
        if self._run.engine is None or not all(self.state.get(param) for param in params):
            # Other code may have put DTensors in the place of parameters (accelerate does).
            self._run.seen_whole = Seen()
            workers = workers_of_a_step()
            # Not as tensors of an inference mode that the caller may be in: they are changed in place for good.
            with torch.inference_mode(False), torch.no_grad():
                sharding = self._sharding

                def make(plan: TilePlan) -> Engine:
                    return make_engine(self._engine, plan, self._transform, workers.run, workers.count)

                self._run.engine = make(plan) if sharding is None else ShardedEngine(sharding, make)
                for number, param in enumerate(params):
                    self.state[param] = self._restored(self.state[param], number, param)
        return self._run.engine

    @torch.no_grad()
    @true_float32()
    def delta(self, param: Tensor) -> Tensor:
        """A copy of the momentum of ``param``, shaped as it, in float32, or float64 for a float64 parameter.

        Of a DTensor it is one, too, and all ranks that hold it must call.

        Raises:
            ConfigurationError: ``param`` does not belong to the optimizer.
        """
        self._ready_engine()
        for number, own in enumerate(self._params()):
            if own is param:
                delta, sharding = self._delta(number, param), self._sharding
                return delta.clone() if sharding is None else sharding.delta(number, delta)
        raise ConfigurationError(
            "param is not one of the optimizer's parameters", name="param", value=tuple(param.shape)
        )

    def _delta(self, number: int, param: Tensor) -> Tensor:
        state: dict[str, Tensor] = self.state[param]
        if COEFFICIENTS in state:
            plan = self.plan if self._sharding is None else self._sharding.plan
            return from_coefficients(state[COEFFICIENTS], plan.grids[number])
        return state[DELTA]

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _rates(self, lr: Rates) -> list[float]:
        """One learning rate per parameter group.

        Raises:
            ConfigurationError: a sequence of another length was given.
        """
        if lr is None:
            lr = [group["lr"] for group in self.param_groups]
        rates = list(lr) if isinstance(lr, Sequence) else [lr] * len(self.param_groups)
        if len(rates) != len(self.param_groups):
            raise ConfigurationError(
                f"lr has {len(rates)} values for {len(self.param_groups)} parameter groups", name="lr", value=lr
            )
        return [check_rate(rate) for rate in rates]
