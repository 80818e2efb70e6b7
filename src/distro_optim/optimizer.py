"""DisTrO: an optimizer that exchanges a few bits per parameter instead of gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
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

# Psyche's wire holds the sides of a tile in 16 bits.
_MAX_CHUNK: Final = 65535


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
    ``overlap=True`` the weights are left looking ahead. Before you evaluate or save, call :meth:`eval`; before you
    go on, :meth:`train`. With a closure (as Lightning passes it) they look ahead only while it runs.

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
        _check_choice("tiling", tiling, TILINGS)
        _check_choice("transform", transform, TRANSFORMS)
        for name, flag in (("quantize_1bit", quantize_1bit), ("overlap", overlap)):
            if not isinstance(flag, bool):
                raise ConfigurationError(f"{name}={flag!r}: give True or False", name=name, value=flag)
        if exchange is not None and not isinstance(exchange, Exchange):
            raise ConfigurationError(
                f"exchange={exchange!r}: give a distro_optim.comm.exchange.Exchange, or None for the default process "
                "group",
                name="exchange",
                value=exchange,
            )
        if exchange is not None and process_group is not None:
            raise ConfigurationError(
                "exchange and process_group are both given: leave one of them out", name="process_group"
            )
        self._tiling: Tiling = tiling
        self._transform = transform
        self._quantize = quantize_1bit
        self._overlap = overlap
        self._explicit_exchange = exchange is not None
        self._reset_transients()
        self._exchange: Exchange | None = exchange
        self._process_group = process_group
        defaults = {
            "lr": lr,
            "compression_decay": compression_decay,
            "compression_topk": compression_topk,
            "compression_chunk": compression_chunk,
            "weight_decay": weight_decay,
            # Where the run stands, saved with it: equal in all groups.
            "training": True,
            "looks_ahead": False,
            "resumes_ahead": False,
            "lookahead_lr": 0.0,
            "in_flight": False,
        }
        super().__init__(_unique(params), defaults)

    # ------------------------------------------------------------------ construction and copies

    def _reset_transients(self) -> None:
        """What is not part of the optimizer's state: caches, scratch memory, what is on its way."""
        self._plan: TilePlan | None = None
        self._compressor: Compressor | None = None
        self._lookahead = Lookahead()
        self._started_with: TilePlan | None = None
        self._published = False
        self._arrived: list[CompressedUpdate] | None = None

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        settings = {**self.defaults, **{k: v for k, v in param_group.items() if k != "params"}}
        _check_settings(settings)
        ahead = self._lookahead.on
        self.undo_lookahead()
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if len(self.param_groups) > 1:
            for key in ("training", "looks_ahead", "resumes_ahead", "lookahead_lr", "in_flight"):
                group[key] = self.param_groups[0][key]
        for param in group["params"]:
            _check_param(param)
        self._plan = self._compressor = None
        plan = self._planned()
        first = len(plan) - len(group["params"])
        for number, param in enumerate(group["params"], start=first):
            self.state[param] = initial_state(param, plan, number, self._overlap)
        if ahead:
            self._look_ahead_again()

    def _planned(self) -> TilePlan:
        if self._plan is None:
            self._plan = make_plan(
                [
                    ParamSpec(
                        tuple(p.shape), p.dtype, p.device, number, group["compression_chunk"], group["compression_topk"]
                    )
                    for number, group in enumerate(self.param_groups)
                    for p in group["params"]
                ],
                self._tiling,
            )
        return self._plan

    @property
    def plan(self) -> TilePlan:
        """How the parameters are tiled; updates are made and applied on this plan."""
        return self._planned()

    def _compress(self) -> Compressor:
        params = self._params()
        plan = self._planned()
        if any(s.device != p.device or s.dtype != p.dtype for s, p in zip(plan.specs, params, strict=True)):
            # model.to(...) after construction: the parameters are the same objects on another device.
            self._plan = self._compressor = None
            plan = self._planned()
        if self._compressor is None:
            self._compressor = Compressor(plan, self._transform)
            for number, param in enumerate(params):
                self.state[param] = restore_state(self.state[param], param, plan, number, self._overlap)
        return self._compressor

    @override
    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        state: dict[str, Any] = super().__getstate__()
        keys = ("_tiling", "_transform", "_quantize", "_overlap", "_explicit_exchange", "_arrived")
        state.update({key: getattr(self, key) for key in keys})
        return state

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_tiling" in state:  # a copy or an unpickled optimizer, not load_state_dict
            self._reset_transients()
            self._exchange = None
            self._process_group = None
            if state["param_groups"] and state["param_groups"][0]["looks_ahead"]:
                self._lookahead = Lookahead(on=True)
        super().__setstate__(state)

    @property
    def exchange(self) -> Exchange | None:
        """What carries updates; None until the first step decides. Set it on a copy, which does not inherit it."""
        return self._exchange

    @exchange.setter
    def exchange(self, exchange: Exchange | None) -> None:
        self._settle()
        self._exchange = exchange
        self._explicit_exchange = exchange is not None
        self._started_with = None

    # ------------------------------------------------------------------ the three verbs

    @torch.no_grad()
    def lookahead(self, lr: float | None = None) -> None:
        """Shifts the weights by ``-lr * sign(delta)`` for the forward and backward pass. Does nothing if they are.

        Args:
            lr: for all groups; by default each group's own. Psyche gives that of the round before.
        """
        if not self._overlap:
            raise DistroError("lookahead() is for overlap=True: without overlap nothing is on its way")
        if self._lookahead.on:
            return
        self._compress()
        for group in self.param_groups:
            group["lookahead_lr"] = float(group["lr"]) if lr is None else lr
        self._look_ahead_again()

    @torch.no_grad()
    def undo_lookahead(self) -> None:
        """Puts the weights back, bit for bit. Does nothing if they are not shifted."""
        if self._lookahead.on:
            self._lookahead.take_off(*self._lookahead_args())
            for group in self.param_groups:
                group["looks_ahead"] = False

    @torch.no_grad()
    def generate(self, lr: float | None = None) -> CompressedUpdate:
        """Takes the gradients into the momentum and returns this peer's contribution to the step.

        Weight decay first, then ``delta = decay * delta + lr * grad``. A parameter without gradient, or whose
        gradient is not finite, keeps weight and ``delta`` and is absent from the update. Undoes the lookahead.

        Args:
            lr: for all groups; by default each group's own.
        """
        compressor = self._compress()
        self.undo_lookahead()
        params, rates = self._params(), self._rates(lr)
        grads = self._usable_gradients(params)
        shrink = [1 - rate * group["weight_decay"] for group, rate in zip(self.param_groups, rates, strict=True)]
        for param, grad, spec in zip(params, grads, compressor.plan.specs, strict=True):
            if grad is not None and shrink[spec.group] != 1:
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
        compressor = self._compress()
        self.undo_lookahead()
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
            if self._overlap:
                self.lookahead()
            try:
                with torch.enable_grad():
                    loss = closure()
            finally:
                self.undo_lookahead()
        else:
            self.undo_lookahead()
        self.begin_step()
        self.finish_step()
        if self._overlap and closure is None:
            self.lookahead()
        return loss

    def begin_step(self) -> None:
        """The first half of :meth:`step`: generates this peer's update and starts to send it."""
        self._require_training()
        self.undo_lookahead()
        exchange = self._connect()
        update = self.generate()
        if self._published:
            # The update of the step before is still out; with it collected, at most one is on its way.
            self._arrived = exchange.collect()
        exchange.publish(update)
        self._published = True

    def finish_step(self) -> None:
        """The second half: applies everybody's updates; with overlap those of the step before."""
        if not self._overlap:
            assert self._exchange is not None
            self._published = False
            self.apply(self._exchange.collect())
            return
        if self._arrived is not None:
            updates, self._arrived = self._arrived, None
            self.apply([self._on_current_plan(u) for u in updates])
        self._flag_in_flight(True)

    def eval(self) -> None:
        """Takes the lookahead off until :meth:`train`: for evaluating and saving. (As schedule-free optimizers do.)"""
        ahead = self._lookahead.on
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

        For the end of training, and before saving for another number of peers.
        """
        self._settle()
        if self._arrived is not None:
            updates, self._arrived = self._arrived, None
            self.apply([self._on_current_plan(u) for u in updates])
        self._flag_in_flight(False)

    @torch.no_grad()
    def reset(self) -> None:
        """Forgets the momentum and what was sent (Psyche's ``zero_optim`` on a cold start)."""
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
            if self._arrived is not None:
                updates = [self._on_current_plan(u) for u in self._arrived]
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
        self.undo_lookahead()
        saved = state_dict["state"]
        groups = [{**self.defaults, **group} for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})
        params = self._params()
        # The base class casts every tensor to its parameter's dtype; take the original ones.
        order = [n for group in groups for n in group["params"]]
        originals = [dict(saved.get(n, {})) for n in order]
        self._plan = self._compressor = None
        plan = self._planned()
        for number, (param, original) in enumerate(zip(params, originals, strict=True)):
            # Copies: the saved tensors may be those of an optimizer that goes on.
            copied = {key: value.clone() for key, value in original.items() if isinstance(value, Tensor)}
            self.state[param] = restore_state(copied, param, plan, number, self._overlap)
        self._published, self._arrived, self._started_with = False, None, None
        if self._overlap and self.param_groups[0]["in_flight"]:
            self._arrived = unpack_in_flight(plan, originals)
        if self.param_groups[0]["looks_ahead"]:
            for param, original in zip(params, originals, strict=True):
                if WEIGHT in original:
                    param.copy_(original[WEIGHT])
            if self._overlap:
                self._look_ahead_again()
            else:
                for group in self.param_groups:
                    group["looks_ahead"] = False

    # ------------------------------------------------------------------ inside

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _rates(self, lr: float | None) -> list[float]:
        return [float(group["lr"]) if lr is None else lr for group in self.param_groups]

    @torch.no_grad()
    def _look_ahead_again(self) -> None:
        """Puts the lookahead on at the learning rates it had last."""
        for group in self.param_groups:
            group["looks_ahead"] = True
        self._lookahead.put_on(*self._lookahead_args())

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

    def _flag_in_flight(self, flag: bool) -> None:
        for group in self.param_groups:
            group["in_flight"] = flag

    def _peers(self) -> int:
        if self._exchange is not None:
            return self._exchange.num_peers
        if self._explicit_exchange:
            return 1
        return ambient_process_group(self._process_group, initialize=False)[1]

    def _connect(self) -> Exchange:
        """The exchange, started on the current plan."""
        if self._exchange is None:
            if self._explicit_exchange:
                raise DistroError(
                    "this is a copy of an optimizer that has an exchange, which a copy does not inherit: set "
                    "optimizer.exchange"
                )
            group, peers = ambient_process_group(self._process_group, initialize=True, params=self._params())
            self._exchange = ProcessGroupExchange(group) if peers > 1 else LocalExchange()
        plan = self._planned()
        if self._started_with is None or self._started_with.layout != plan.layout:
            self._settle()
            self._exchange.start(plan, self._params())
            self._started_with = plan
        return self._exchange

    def _settle(self) -> None:
        """Waits for what is on its way, so that nothing but ``_arrived`` has to be remembered."""
        if self._published:
            assert self._exchange is not None
            self._arrived = self._exchange.collect()
            self._published = False

    def _on_current_plan(self, update: CompressedUpdate) -> CompressedUpdate:
        """An update from before ``add_param_group``, with nothing said about the new parameters."""
        plan = self._planned()
        if update.plan.layout == plan.layout:
            return update
        entries = update.tensors()
        return CompressedUpdate.from_tensors(
            plan, entries + CompressedUpdate.empty(plan, quantized=self._quantize).tensors()[len(entries) :]
        )


def _unique(params: Iterable[Any]) -> list[Any]:
    """Each tensor once: a tied weight that is listed twice is still one weight."""
    seen: set[int] = set()

    def first(item: Any) -> bool:
        tensor = item[1] if isinstance(item, tuple) else item
        known = id(tensor) in seen
        seen.add(id(tensor))
        return not known

    if isinstance(params, Tensor):
        raise TypeError("params is a single tensor: give an iterable of tensors, such as [tensor]")
    entries = list(params)
    if entries and isinstance(entries[0], dict):
        groups = []
        for group in entries:
            members = group["params"]
            members = [members] if isinstance(members, Tensor) else list(members)
            groups.append({**group, "params": [m for m in members if first(m)]})
        return groups
    return [e for e in entries if first(e)]


def _check_plans(updates: Sequence[CompressedUpdate], plan: TilePlan) -> None:
    for number, update in enumerate(updates):
        if update.plan.layout != plan.layout:
            raise ConfigurationError(
                f"updates[{number}] was made for other parameters, another tiling or another top-k", name="updates"
            )


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigurationError(f"{name}={value!r}: give one of {', '.join(choices)}", name=name, value=value)


def _check_settings(settings: dict[str, Any]) -> None:
    """Raises ConfigurationError for the first setting of a group that is out of its range."""

    def number(name: str, *, low: float, high: float, open_low: bool, advice: str) -> None:
        value = settings[name]
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigurationError(f"{name}={value!r}: give a number", name=name, value=value)
        if not math.isfinite(value) or value < low or (open_low and value == low) or value > high:
            raise ConfigurationError(f"{name}={value!r}: {advice}", name=name, value=value)

    def count(name: str, high: int, advice: str) -> None:
        value = settings[name]
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
            raise ConfigurationError(f"{name}={value!r}: {advice}", name=name, value=value)

    number("lr", low=0, high=math.inf, open_low=False, advice="give a learning rate of 0 or more")
    number(
        "compression_decay",
        low=0,
        high=1,
        open_low=True,
        advice="give what is left of the momentum after a step, above 0 and at most 1, such as 0.999",
    )
    number("weight_decay", low=0, high=math.inf, open_low=False, advice="give 0 or more")
    count("compression_topk", 1 << 31, "give a whole number of coefficients per tile, at least 1, such as 8")
    count("compression_chunk", _MAX_CHUNK, f"give the longest side of a tile, from 1 to {_MAX_CHUNK}, such as 64")


def _check_param(param: Tensor) -> None:
    if param.is_complex():
        raise ConfigurationError(
            f"params: a tensor of {param.dtype} cannot be compressed: use torch.view_as_real on it", name="params"
        )
    if not param.is_floating_point():
        raise ConfigurationError(f"params: a tensor of {param.dtype} cannot be trained", name="params")
    if hasattr(param, "device_mesh"):
        raise ConfigurationError(
            "params: a DTensor cannot be compressed: DisTrO needs whole parameters, so do not shard the model",
            name="params",
        )


def _is_finite(grad: Tensor) -> bool:
    return bool(grad.isfinite().all())
