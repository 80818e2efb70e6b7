"""DisTrO: an optimizer that exchanges a few bits per parameter instead of gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from .comm.exchange import Exchange, LocalExchange
from .comm.process_group import ProcessGroupExchange, ambient_process_group
from .compress import CompressedUpdate, Compressor, OwnPart, ParamSpec, TilePlan, make_plan
from .compress.dct import TRANSFORMS, TransformName
from .compress.tiling import TILINGS, Tiling
from .errors import ConfigurationError, DistroError
from .lookahead import Lookahead
from .optimizer_arguments import (
    check_choice,
    check_exchange,
    check_flag,
    check_param,
    check_process_group,
    normal_settings,
    unique_params,
)
from .optimizer_state import (
    DELTA,
    OWN_INDEX,
    OWN_VALUE,
    QUARANTINED,
    WEIGHT,
    initial_state,
    pack_in_flight,
    restore_state,
    unpack_in_flight,
)

__all__ = ["DisTrO"]

# Where the run stands: saved in the groups with the hyper-parameters, equal in all of them.
_PROGRESS: Final = {
    "training": True,
    "looks_ahead": False,
    "resumes_ahead": False,
    "lookahead_lr": 0.0,
    "in_flight": False,
}


@dataclass(slots=True)
class _Run:
    """What is not part of the optimizer's state: caches, scratch memory, the network, what is on its way.

    One object, never an attribute of the optimizer itself: the wrappers of Lightning and Fabric hand on reads of
    attributes but keep writes, so that ``wrapper.flush()`` would leave the optimizer behind.
    """

    exchange: Exchange | None = None
    explicit_exchange: bool = False
    process_group: torch.distributed.ProcessGroup | None = None
    plan: TilePlan | None = None
    compressor: Compressor | None = None
    lookahead: Lookahead = field(default_factory=Lookahead)
    started_with: TilePlan | None = None
    begun: bool = False
    published: bool = False
    arrived: list[CompressedUpdate] | None = None


class DisTrO(Optimizer):
    r"""The DeMo / DisTrO family: decoupled momentum, of which each step sends only the largest DCT coefficients.

    With learning rate :math:`\eta`, decay :math:`\beta` and the gradient :math:`g_t` of this peer's own batch::

        delta  <- beta * delta + lr * g                      momentum, different on every peer
        q      <- the k largest DCT coefficients of each tile of delta
        delta  <- delta - decode(q)                          what is sent leaves the momentum
        send q, or its signs; receive the others'
        p      <- p - lr * sign(decode(mean over senders))   the same on every peer

    ``overlap=False, quantize_1bit=False`` is DeMo (Peng et al., 2024, arXiv:2411.19870; bloc97/DeMo). With
    ``overlap=True`` it is DisTrO as Psyche runs it (PsycheFoundation/psyche ``shared/modeling/src/distro.rs``): what
    was generated in one step travels while the next one computes and is applied at its end, what was sent leaves
    ``delta`` one step later, and gradients are taken at ``p - lr * sign(delta)`` to make up for the delay.

    Alone it trains alone. Under ``torchrun`` it uses the default process group, and makes one where the script has
    not; do not wrap the model in DistributedDataParallel then. With ``exchange`` it uses that.

    Args:
        params: parameters, named parameters, or dicts of parameter groups.
        lr: learning rate; the size of a weight's change in a step, since the update is a sign. In a schedule the
            current value of the group is used, for momentum and update alike.
        compression_decay: what is left of the momentum after a step, in (0, 1].
        compression_topk: coefficients sent per tile.
        compression_chunk: longest side of a tile.
        weight_decay: decoupled, as in AdamW: ``p *= 1 - lr * weight_decay``.
        quantize_1bit: send signs instead of values.
        overlap: send while the next step computes, and look ahead meanwhile. Takes one more copy of the weights.
        tiling: ``"padded"`` compresses every shape alike; ``"divisor"`` is the published rule, which Psyche runs use
            (see :mod:`distro_optim.compress.tiling`).
        exchange: carries updates between peers; each peer gives its own. Not closed by the optimizer.
        process_group: the process group to use, instead of the default one.
        transform: ``"dct"``, or ``"identity"`` for plain top-k of the momentum itself.

    Raises:
        ConfigurationError: an argument is out of its range, or parameters are of a kind that cannot be compressed.

    Between steps. Without a closure the next gradient is computed between two calls of :meth:`step`, so with
    ``overlap=True`` the weights are left looking ahead. Before you evaluate, average or save the model, call
    :meth:`eval`; before you go on, :meth:`train`. With a closure (as Lightning passes it) they look ahead only while
    it runs. At the end of training :meth:`flush` applies the last update, which is still on its way.

    Learning rate. An update changes each weight by ``lr``. A bfloat16 weight larger than 256 to 512 times ``lr`` is
    too coarse to change at all, a float16 one from 2048 to 4096 times: keep float32 weights under autocast.
    A sign cannot say 0: with ``quantize_1bit=True`` a tile without any gradient of its own, such as the rows
    of an embedding that the data never names, still moves in a tensor that has one; values do not move it.

    Attributes:
        quarantined: non-finite gradients that were left out so far, all parameters together; per parameter in
            ``state[p]["quarantined"]``.

    Not supported: sparse gradients, complex parameters, DTensors.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        compression_decay: float = 0.999,
        compression_topk: int = 8,
        compression_chunk: int = 64,
        weight_decay: float = 0.0,
        quantize_1bit: bool = True,
        overlap: bool = True,
        tiling: Tiling = "padded",
        exchange: Exchange | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
        transform: TransformName = "dct",
    ) -> None:
        check_choice("tiling", tiling, TILINGS)
        check_choice("transform", transform, TRANSFORMS)
        check_flag("quantize_1bit", quantize_1bit)
        check_flag("overlap", overlap)
        check_exchange(exchange)
        check_process_group(process_group)
        if exchange is not None and process_group is not None:
            raise ConfigurationError(
                f"exchange={exchange!r} and process_group={process_group!r}: leave one of them out",
                name="process_group",
                value=process_group,
            )
        self._tiling: Tiling = tiling
        self._transform = transform
        self._quantize = quantize_1bit
        self._overlap = overlap
        self._run = _Run(exchange, exchange is not None, process_group)
        settings = normal_settings(
            {
                "lr": lr,
                "compression_decay": compression_decay,
                "compression_topk": compression_topk,
                "compression_chunk": compression_chunk,
                "weight_decay": weight_decay,
            }
        )
        super().__init__(unique_params(params), {**settings, **_PROGRESS})

    # ------------------------------------------------------------------ construction and copies

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
                group.update({key: self.param_groups[0][key] for key in _PROGRESS})
            self._run.plan = self._run.compressor = None
            plan = self._planned()
            first = len(plan) - len(group["params"])
            for number, param in enumerate(group["params"], start=first):
                self.state[param] = initial_state(param, plan, number, self._overlap)
        finally:
            if ahead:
                self._look_ahead_again()

    def _planned(self) -> TilePlan:
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

    @property
    def plan(self) -> TilePlan:
        """How the parameters are tiled; updates are made and applied on this plan."""
        return self._planned()

    def _compress(self) -> Compressor:
        params = self._params()
        plan = self._planned()
        if any(s.device != p.device or s.dtype != p.dtype for s, p in zip(plan.specs, params, strict=True)):
            # model.to(...) after construction: the parameters are the same objects on another device.
            self._run.plan = self._run.compressor = None
            plan = self._planned()
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
            self._run.compressor = Compressor(plan, self._transform)
            for number, param in enumerate(params):
                self.state[param] = restore_state(self.state[param], param, plan, number, self._overlap)
        return self._run.compressor

    @override
    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        state: dict[str, Any] = super().__getstate__()
        state.update({key: getattr(self, key) for key in ("_tiling", "_transform", "_quantize", "_overlap")})
        # Neither exchange nor process group: two optimizers that publish on one of them would mix up their steps.
        run = self._run
        explicit = run.explicit_exchange or run.process_group is not None
        state["_run"] = _Run(explicit_exchange=explicit, arrived=run.arrived)
        return state

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_run" in state:  # a copy or an unpickled optimizer, not load_state_dict
            self._run.lookahead = Lookahead(on=bool(self.param_groups and self.param_groups[0]["looks_ahead"]))

    @property
    def overlap(self) -> bool:
        """Whether an update travels while the next step computes."""
        return self._overlap

    @property
    def exchange(self) -> Exchange | None:
        """What carries updates; None until the first step decides. Set it on a copy, which does not inherit it."""
        return self._run.exchange

    @exchange.setter
    def exchange(self, exchange: Exchange | None) -> None:
        check_exchange(exchange)
        self._settle()
        self._run.exchange = exchange
        self._run.explicit_exchange = exchange is not None
        self._run.process_group = None
        self._run.started_with = None

    # ------------------------------------------------------------------ the three verbs

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
        self._compress()
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
        compressor = self._compress()
        params, rates = self._params(), self._rates(lr)
        grads = self._usable_gradients(params)
        shrink = [1 - rate * group["weight_decay"] for group, rate in zip(self.param_groups, rates, strict=True)]
        for param, grad, spec in zip(params, grads, compressor.plan.specs, strict=True):
            if shrink[spec.group] != 1 and (grad is not None or (param.requires_grad and not alone)):
                param.mul_(shrink[spec.group])
        grad_scale = getattr(self, "grad_scale", None)  # set by GradScaler if it leaves the unscaling to us
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
        compressor = self._compress()
        _check_plans(updates, compressor.plan)
        compressor.merge(updates, self._params(), lr=self._rates(lr))

    @torch.no_grad()
    def decode(self, updates: Sequence[CompressedUpdate]) -> list[Tensor]:
        """What :meth:`apply` takes the sign of, for every parameter, in the dtype of ``delta``. Changes nothing."""
        compressor = self._compress()
        _check_plans(updates, compressor.plan)
        return compressor.decode(updates)

    # ------------------------------------------------------------------ torch.optim's manners

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    @override
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One optimization step, together with all peers.

        Args:
            closure: recomputes the loss and its gradients, and returns the loss. Called first, with gradients
                enabled and the weights looking ahead.

        Raises:
            ExchangeError: the peers could not be reached in time.
            DistroError: the optimizer is in evaluation mode.
        """
        self._require_training()
        loss = None
        if closure is not None:
            loss = self._evaluate(closure)
        self.begin_step()
        self.finish_step()
        if self._overlap and closure is None:
            self.lookahead()
        return loss

    @torch.no_grad()
    def begin_step(self) -> None:
        """The first half of :meth:`step`: generates this peer's update and starts to send it.

        For several optimizers in one thread: ``begin_step()`` on all of them, then :meth:`finish_step` on all.
        """
        self._require_training()
        self._require_between_steps("begin_step()")
        exchange = self._connect()
        # Alone, without delay and in full values: nobody can have a say in the update.
        at_once = isinstance(exchange, LocalExchange) and not self._overlap and not self._quantize
        update = self._generate(None, alone=exchange.num_peers == 1, at_once=at_once)
        if self._run.published:
            # The update of the step before is still out; with it collected, at most one is on its way.
            self._run.arrived = self._collect()
        if not at_once:
            exchange.publish(update)
            self._run.published = True
        self._run.begun = True

    @torch.no_grad()
    def finish_step(self) -> None:
        """The second half: applies everybody's updates; with overlap those of the step before."""
        if not self._run.begun:
            raise DistroError("finish_step() without begin_step(): call them in pairs")
        self._run.begun = False
        if self._overlap:
            self._flag_in_flight(True)
        elif self._run.published:
            self._run.arrived = self._collect()
        self._apply_arrived()

    def eval(self) -> None:
        """Takes the lookahead off until :meth:`train`: for evaluating and saving. (As schedule-free optimizers do.)"""
        ahead = self._run.lookahead.on
        self.undo_lookahead()
        for group in self.param_groups:
            if group["training"]:
                group["training"] = False
                group["resumes_ahead"] = ahead

    def train(self) -> None:
        """Back to training: puts the lookahead on again if :meth:`eval` took it off."""
        ahead = self.param_groups[0]["resumes_ahead"]
        for group in self.param_groups:
            group["training"], group["resumes_ahead"] = True, False
        if ahead:
            self._look_ahead_again()

    @torch.no_grad()
    def flush(self) -> None:
        """Applies what is on its way and leaves nothing in flight. All peers must call it together.

        For the end of training, and before saving for another number of peers. The weights no longer look ahead
        then.
        """
        self._settle()
        self._apply_arrived()
        self.undo_lookahead()
        self._flag_in_flight(False)

    @torch.no_grad()
    def reset(self) -> None:
        """Forgets the momentum (Psyche's ``zero_optim`` on a cold start).

        What is on its way is still applied, as it is by the other peers; :meth:`flush` before, if that is not wanted.
        """
        self.undo_lookahead()
        for param in self._params():
            for key in (DELTA, OWN_VALUE):
                if key in self.state[param]:
                    self.state[param][key].zero_()

    @property
    def quarantined(self) -> int:
        """Non-finite gradients left out so far."""
        return sum(int(self.state[p][QUARANTINED]) for p in self._params())

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler leaves out step() when it finds an inf. A peer that stays away from a step makes all others wait,
        # so with peers the scaler must call us always, and an overflow becomes an empty contribution. Alone, the
        # usual way is kept: Lightning clips gradients only for optimizers that let the scaler unscale.
        return self._peers() > 1

    # ------------------------------------------------------------------ saving and loading

    @override
    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """As for any optimizer, and what is on its way. Loading it continues bit for bit.

        Every peer's is different: ``delta`` is its own. Weights saved beside it need no :meth:`eval` first, since
        the true ones are in here while the lookahead is on; weights saved for others do.
        """
        self._settle()
        self._compress()
        packed: dict[str, Any] = super().state_dict()
        if self._overlap:
            plan = self._planned()
            updates = None
            if self._run.arrived is not None:
                updates = [self._on_current_plan(u) for u in self._run.arrived]
            extra = pack_in_flight(plan, updates, self._quantize, self._peers())
            packed["state"] = {n: {**entry, **extra[n]} for n, entry in packed["state"].items()}
        return packed

    @override
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where the saved optimizer stood. Replaces the weights if it was looking ahead.

        Raises:
            ConfigurationError: the state belongs to parameters of other shapes.
        """
        self._settle()
        ahead = self._run.lookahead.on
        # What was written to the weights is the checkpoint of the model, so nothing of them is taken back.
        self._undo_lookahead(keep_edited=True)
        before = self.state, self.param_groups
        try:
            originals = self._load_base(state_dict)
            self._run.plan = self._run.compressor = None
            plan = self._planned()
            for number, (param, original) in enumerate(zip(self._params(), originals, strict=True)):
                # Copies: the saved tensors may be those of an optimizer that goes on.
                copied = {key: value.clone() for key, value in original.items() if isinstance(value, Tensor)}
                self.state[param] = restore_state(copied, param, plan, number, self._overlap)
            in_flight = self._overlap and self.param_groups[0]["in_flight"]
            arrived = unpack_in_flight(plan, originals) if in_flight else None
        except BaseException:
            self.state, self.param_groups = before
            self._run.plan = self._run.compressor = None
            if ahead:
                self._look_ahead_again()
            raise
        self._run.arrived, self._run.started_with = arrived, None
        self._flag_in_flight(arrived is not None)
        if self.param_groups[0]["looks_ahead"]:
            for param, original in zip(self._params(), originals, strict=True):
                if WEIGHT in original:
                    param.copy_(original[WEIGHT])
            if self._overlap:
                self._look_ahead_again()
        if not self._overlap:
            for group in self.param_groups:
                group["looks_ahead"] = group["resumes_ahead"] = False

    def _load_base(self, state_dict: dict[str, Any]) -> list[dict[str, Any]]:
        """Loads as the base class does, and returns each parameter's saved state as it was saved.

        The base class casts every tensor to the dtype of its parameter, and ``delta`` would lose its lower bits.
        """
        seen: dict[str, Any] = {}

        def complete_and_keep(_: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            groups = [{**self.defaults, **group} for group in loaded["param_groups"]]
            seen.update(loaded, param_groups=groups)
            return seen

        # The last of the hooks: what the user's own make of the state is what counts.
        hook = self.register_load_state_dict_pre_hook(complete_and_keep)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        return [dict(seen["state"].get(n, {})) for group in seen["param_groups"] for n in group["params"]]

    # ------------------------------------------------------------------ inside

    def _evaluate(self, closure: Callable[[], float]) -> float:
        """The closure's loss and gradients, with the weights looking ahead."""
        # Starting gives all peers the same weights: the first gradient should be of those.
        self._connect()
        if self._overlap:
            self.lookahead()
        try:
            with torch.enable_grad():
                return closure()
        finally:
            self.undo_lookahead()

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _rates(self, lr: float | None) -> list[float]:
        return [float(group["lr"]) if lr is None else lr for group in self.param_groups]

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

    def _usable_gradients(self, params: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients that may touch ``delta``; the others are counted and left out."""
        grads = [p.grad for p in params]
        for number, grad in enumerate(grads):
            if grad is not None and (grad.is_sparse or grad.layout != torch.strided):
                raise DistroError(f"parameter {number} has a sparse gradient: build its layer with sparse=False")
        found_inf = getattr(self, "found_inf", None)  # set by GradScaler if it leaves the unscaling to us
        if found_inf is not None and float(found_inf) > 0:
            self._quarantine(params, [n for n, g in enumerate(grads) if g is not None and not _is_finite(g)])
            return [None] * len(grads)
        # One number per tensor, then one look at all of them. The norm also catches finite gradients so large that
        # their squares overflow: their transform would.
        norms = [
            torch.linalg.vector_norm(g, dtype=torch.float64 if g.dtype == torch.float64 else torch.float32)
            for g in grads
            if g is not None and g.numel()
        ]
        if not norms:
            return grads
        device = norms[0].device
        finite = torch.stack([n.to(device=device, dtype=torch.float64) for n in norms]).isfinite().tolist()
        verdicts = iter(finite)
        bad = [n for n, g in enumerate(grads) if g is not None and g.numel() and not next(verdicts)]
        self._quarantine(params, bad)
        for number in bad:
            grads[number] = None
        return grads

    def _quarantine(self, params: Sequence[Tensor], numbers: Sequence[int]) -> None:
        for number in numbers:
            self.state[params[number]][QUARANTINED].add_(1)

    def _require_training(self) -> None:
        if not self.param_groups[0]["training"]:
            raise DistroError("the optimizer is in evaluation mode: call optimizer.train() before the next step")

    def _require_between_steps(self, what: str) -> None:
        if self._run.begun:
            raise DistroError(f"{what} is not possible between begin_step() and finish_step(): finish the step first")

    def _flag_in_flight(self, flag: bool) -> None:
        for group in self.param_groups:
            group["in_flight"] = flag

    def _peers(self) -> int:
        if self._run.exchange is not None:
            return self._run.exchange.num_peers
        if self._run.explicit_exchange:
            return 1
        return ambient_process_group(self._run.process_group, initialize=False)[1]

    def _connect(self) -> Exchange:
        """The exchange, started on the current plan."""
        if self._run.exchange is None:
            if self._run.explicit_exchange:
                raise DistroError(
                    "this is a copy of an optimizer that has an exchange, which a copy does not inherit: set "
                    "optimizer.exchange"
                )
            group, peers = ambient_process_group(self._run.process_group, initialize=True, params=self._params())
            self._run.exchange = ProcessGroupExchange(group) if peers > 1 else LocalExchange()
        plan = self._planned()
        if self._run.started_with is None or self._run.started_with.layout != plan.layout:
            self._settle()
            self.undo_lookahead()
            self._run.exchange.start(plan, self._params())
            self._run.started_with = plan
        return self._run.exchange

    def _settle(self) -> None:
        """Waits for what is on its way, so that nothing but ``arrived`` has to be remembered."""
        self._require_between_steps("this")
        if self._run.published:
            self._run.arrived = self._collect()

    def _collect(self) -> list[CompressedUpdate]:
        assert self._run.exchange is not None
        # First, so that the optimizer can still be saved where the exchange has failed.
        self._run.published = False
        return self._run.exchange.collect()

    def _apply_arrived(self) -> None:
        if self._run.arrived is not None:
            updates, self._run.arrived = self._run.arrived, None
            self.apply([self._on_current_plan(u) for u in updates])

    def _on_current_plan(self, update: CompressedUpdate) -> CompressedUpdate:
        """An update from before ``add_param_group``, with nothing said about the new parameters."""
        plan = self._planned()
        if update.plan.layout == plan.layout:
            return update
        entries = update.tensors()
        return CompressedUpdate.from_tensors(
            plan, entries + CompressedUpdate.empty(plan, quantized=self._quantize).tensors()[len(entries) :]
        )


def _check_plans(updates: Sequence[CompressedUpdate], plan: TilePlan) -> None:
    for number, update in enumerate(updates):
        if update.plan.layout != plan.layout:
            raise ConfigurationError(
                f"updates[{number}] was made for other parameters, another tiling or another top-k", name="updates"
            )


def _is_finite(grad: Tensor) -> bool:
    return bool(grad.isfinite().all())
