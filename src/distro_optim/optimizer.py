"""DisTrO: an optimizer that exchanges a few bits per hundred parameters instead of gradients.

Its parts lie in :mod:`distro_optim.optim`; :mod:`distro_optim.optim.reference` is the same algorithm without them, slow
and clear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from typing_extensions import override

from .comm.exchange import Exchange, LocalExchange
from .compress.dct import TRANSFORMS, TransformName
from .compress.engine import ENGINES, EngineName, check_engine
from .compress.engine.parts import ARITHMETICS
from .compress.plan import Arithmetic, UpdateRule
from .compress.tiling import TILINGS, Tiling
from .errors import ConfigurationError, DistroError
from .optim.arguments import check_choice, check_exchange, check_flag, check_process_group, normal_settings
from .optim.rules import Ahead, Direction
from .optim.run import Run
from .optim.saving import ResumableOptimizer
from .optim.state import DIRECTION, MOMENTUM_BUFFER, OWN_VALUE, QUARANTINED
from .optim.state import momentum as momentum_of
from .optim.uncompiled import uncompiled

__all__ = ["DisTrO"]


class DisTrO(ResumableOptimizer):
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

    Two of these lines can be chosen otherwise, for all parameters or for each group, and together they make a recipe
    that learns better from the same bytes (``docs/learning.md``)::

        direction="orthogonal"   delta <- beta * delta + lr * o,  with o of Muon: the momentum of g, orthogonalised
        update="rms"             p     <- p - gain * lr * u / rms(u),  with u = decode(mean over senders), per tensor

    Gradients are taken at ``p - lr * o`` then, at this peer's own direction that is on its way, or with
    ``ahead="delta"`` at ``p - delta``, which has what could not be sent as well. Matrices have Muon's direction,
    embeddings and heads too; convolutions are flattened as they are for their tiles; vectors and scalars have the sign
    of their momentum.

    Alone it trains alone. Under ``torchrun`` it uses the default process group, and makes one where the script has
    not; do not wrap the model in DistributedDataParallel then. With ``exchange`` it uses that.

    Args:
        params: parameters, named parameters, or dicts of parameter groups.
        lr: learning rate; the size of a weight's change in a step, since the update is a sign. In a schedule the
            current value of the group is used, for momentum and update alike.
        direction: what goes into the momentum that is sent: ``"momentum"``, the gradients, or ``"orthogonal"``, Muon's
            direction (Jordan et al., 2024; as in ``torch.optim.Muon``).
        update: what a step is made of: ``"sign"`` of the decoded update, or ``"rms"``, the update itself over its root
            mean square, tensor by tensor.
        gain: what the learning rate of a step is multiplied with; by default 1 with ``"sign"`` and 2 with ``"rms"``.
        momentum: with ``"orthogonal"``, the share of Muon's own momentum that a step keeps, in [0, 1).
        compression_decay: the share of the momentum that a step keeps, in (0, 1]; by default 0.999, and 0.7 with
            ``direction="orthogonal"``, whose directions have a momentum of their own.
        ahead: with ``"orthogonal"`` and ``overlap``, by what gradients are taken ahead: ``"direction"``, the last
            one, or ``"delta"``, all of this peer's directions that have not arrived. Each peer may have its own.
        compression_topk: coefficients sent per tile, at least 1.
        compression_chunk: longest side of a tile, in elements.
        weight_decay: decoupled, as in AdamW: ``p *= 1 - lr * weight_decay``.
        quantize_1bit: send signs instead of values.
        overlap: send while the next step computes, and look ahead meanwhile. Takes one more copy of the weights.
        tiling: ``"padded"`` compresses every shape alike; ``"divisor"`` is the published rule, which Psyche runs use
            (see :mod:`distro_optim.compress.tiling`).
        exchange: carries updates between peers; each peer gives its own. Not closed by the optimizer.
        process_group: the process group to use, instead of the default one.
        transform: ``"dct"``, or ``"identity"`` for plain top-k of the momentum itself.
        arithmetic: how everybody's coefficients become a step, alike on all peers. ``"exact"``: in integers, with equal
            weights on every machine. ``"float"``: by floating-point transforms, as published, with equal weights only
            on the same PyTorch on the same kind of machine. ``"psyche"``: as Psyche's clients compute, whose runs bring
            it themselves.
        engine: what carries out steps: ``"torch"``, ``"triton"``, or ``"auto"``, the fastest that has been tried on the
            kind of device. Each peer may have its own.

    Raises:
        ConfigurationError: an argument is out of its range, or parameters are of a kind that cannot be compressed.

    Between steps. Without a closure the next gradient is computed between two calls of :meth:`step`, so with
    ``overlap=True`` the weights keep looking ahead. Call :meth:`eval` before you evaluate, average or save the model,
    and :meth:`train` before you go on. Do the same before you write to weights: while they look ahead they are each
    peer's own guess, and what is written through ``.data`` may be lost. With a closure (as Lightning passes it) they
    look ahead only while it runs. In a loop that calls :meth:`train` before every gradient, as ``transformers.Trainer``
    does, they look ahead only from there to the step, and what it saves is true by itself. At the end of training,
    :meth:`flush` applies the last update, which is still on its way.

    Learning rate. An update changes each weight by ``lr``. A bfloat16 weight larger than 256 to 512 times ``lr`` is
    too coarse to change at all, a float16 one from 2048 to 4096 times: keep float32 weights under autocast.
    A sign cannot say 0: with ``quantize_1bit=True`` a tile without any gradient of its own, such as the rows
    of an embedding that the data never names, still moves in a tensor that has one; values do not move it.

    Memory, beside weights and gradients: ``delta``, and with ``overlap`` a copy of the weights; with
    ``direction="orthogonal"`` also Muon's momentum and, with ``overlap`` and without ``ahead="delta"``, the direction.
    Each is as large as the parameters in float32 (float64 for float64; the copy of the weights as they are).

    The momentum of a parameter is in ``state[p]["delta"]``, or as ``state[p]["coefficients"]``: :meth:`delta` is a copy
    of it in the shape of the parameter.

    Attributes:
        quarantined: non-finite gradients that were left out so far, all parameters together; per parameter in
            ``state[p]["quarantined"]``, which ``engine="triton"`` brings up to date where this is read.

    Sharded parameters (DTensors of FSDP2 or tensor parallelism): the ranks that hold a model together are one peer,
    with the updates and weights of the model that is not sharded. All of them must call what steps or saves.

    Not supported: sparse gradients, complex parameters.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        direction: Direction = "momentum",
        update: UpdateRule = "sign",
        gain: float | None = None,
        momentum: float = 0.95,
        ahead: Ahead | None = None,
        compression_decay: float | None = None,
        compression_topk: int = 8,
        compression_chunk: int = 64,
        weight_decay: float = 0.0,
        quantize_1bit: bool = True,
        overlap: bool = True,
        tiling: Tiling = "padded",
        exchange: Exchange | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
        transform: TransformName = "dct",
        arithmetic: Arithmetic = "exact",
        engine: EngineName = "auto",
    ) -> None:
        check_choice("tiling", tiling, TILINGS)
        check_choice("transform", transform, TRANSFORMS)
        check_choice("arithmetic", arithmetic, ARITHMETICS)
        check_choice("engine", engine, ENGINES)
        check_engine(engine)
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
        # What None stands for depends on the rules, which a parameter group may choose for itself.
        by_rule = {"gain": gain, "compression_decay": compression_decay, "ahead": ahead}
        settings = normal_settings(
            {
                "direction": direction,
                "update": update,
                "gain": gain,
                "momentum": momentum,
                "ahead": ahead,
                "lr": lr,
                "compression_decay": compression_decay,
                "compression_topk": compression_topk,
                "compression_chunk": compression_chunk,
                "weight_decay": weight_decay,
            }
        )
        settings |= {name: None for name, value in by_rule.items() if value is None}
        super().__init__(
            params,
            settings,
            Run(exchange, exchange is not None, process_group),
            quantize_1bit=quantize_1bit,
            overlap=overlap,
            tiling=tiling,
            transform=transform,
            arithmetic=arithmetic,
            engine=engine,
        )

    @property
    def overlap(self) -> bool:
        """Whether an update travels while the next step computes."""
        return self._overlap

    @property
    def tiling(self) -> Tiling:
        """How tensors are cut into tiles."""
        return self._tiling

    @property
    def transform(self) -> TransformName:
        """What tiles are transformed with."""
        return self._transform

    @property
    def arithmetic(self) -> Arithmetic:
        """By which definition everybody's coefficients become a step."""
        return self._arithmetic

    @property
    def quantize_1bit(self) -> bool:
        """Whether signs are sent instead of values."""
        return self._quantize

    @property
    def exchange(self) -> Exchange | None:
        """What carries updates; None until the first step decides. Set it on a copy, which does not inherit it."""
        return self._run.exchange

    @exchange.setter
    def exchange(self, exchange: Exchange | None) -> None:
        check_exchange(exchange)
        self._run.settle()
        self._run.exchange = exchange
        self._run.explicit_exchange = exchange is not None
        self._run.process_group = None
        self._run.started_with = None

    # -- torch.optim's manners -----------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @uncompiled
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
        if self._run.takes_step is not None:
            return self._run.takes_step(closure)
        loss = None
        if closure is not None:
            loss = self._evaluate(closure)
        looks_ahead = self._overlap and closure is None
        self._run.renews = looks_ahead and not self._run.requested()
        try:
            self.begin_step()
            self.finish_step()
        finally:
            self._run.renews = False
            if self._run.lookahead.stale:  # nothing had arrived, or not in time
                self.undo_lookahead()
        if looks_ahead:
            self._prepare_next_gradient()
        return loss

    def hand_over(self, takes_step: Callable[[Callable[[], float] | None], float | None] | None) -> None:
        """Lets another object take the steps: from now on :meth:`step` only calls ``takes_step(closure)``.

        For code that composes the verbs in another way, such as the rounds of a run, in loops that only know
        ``step()``. It is called with gradients disabled. Copies of the optimizer step on their own.

        Args:
            takes_step: None takes the steps back.
        """
        self._run.takes_step = takes_step

    @uncompiled
    @torch.no_grad()
    def begin_step(self) -> None:
        """The first half of :meth:`step`: generates this peer's update and starts to send it.

        For several optimizers in one thread: ``begin_step()`` on all of them, then :meth:`finish_step` on all.

        Raises:
            DistroError: the optimizer is in evaluation mode, its steps were handed over, or a step has begun already.
            ExchangeError: the peers could not be reached in time.
        """
        self._require_training()
        if self._run.takes_step is not None:
            raise DistroError("the steps were handed over: call step()")
        self._run.require_between_steps("begin_step()")
        exchange = self._connect()
        # Alone, without delay and in full values: nobody can have a say in the update.
        alone = exchange.num_peers == 1
        at_once = isinstance(exchange, LocalExchange) and alone and not self._overlap and not self._quantize
        at_once = at_once and all(group["update"] == "sign" for group in self.param_groups)
        update = self._generate(None, alone=alone, at_once=at_once)
        # The update of the step before may still be out; with it collected, at most one is on its way.
        self._run.collect()
        if not at_once:
            exchange.publish(update)
            self._run.published = exchange
        self._run.begun = True

    @uncompiled
    @torch.no_grad()
    def finish_step(self) -> None:
        """The second half: applies all peers' updates; with overlap those of the step before.

        Raises:
            DistroError: no step has begun.
            ExchangeError: the peers could not be reached in time.
        """
        if not self._run.begun:
            raise DistroError("finish_step() without begin_step(): call them in pairs")
        self._run.begun = False
        if self._overlap:
            self._flag_in_flight(True)
        else:
            self._run.collect()
        self._apply_arrived()

    @uncompiled
    def eval(self) -> None:
        """Puts the true weights back until :meth:`train`, to evaluate or save them, as schedule-free optimizers do."""
        ahead = self._run.lookahead.on
        self.undo_lookahead()
        for group in self.param_groups:
            if group["training"]:
                group["training"] = False
                group["resumes_ahead"] = ahead or group["resumes_ahead"]

    @uncompiled
    def train(self) -> None:
        """Back to training: puts the lookahead on again if :meth:`eval` took it off.

        A loop that calls this before every gradient, as ``transformers.Trainer`` does, has the true weights between
        steps by itself: there it is this call that puts the lookahead on.
        """
        self._run.asked_to_train = True
        self._run.asked_again = self._run.asked_again or self.param_groups[0]["training"]
        ahead = self.param_groups[0]["resumes_ahead"]
        for group in self.param_groups:
            group["training"], group["resumes_ahead"] = True, False
        if ahead:
            self._look_ahead_again()

    @uncompiled
    @torch.no_grad()
    def flush(self) -> None:
        """Applies what is on its way and leaves nothing in flight. All peers must call it together.

        For the end of training, and before saving for another number of peers. The weights no longer look ahead
        then.

        Raises:
            ExchangeError: the peers could not be reached in time.
        """
        self._run.settle()
        self._apply_arrived()
        self.undo_lookahead()
        self._flag_in_flight(False)

    @torch.no_grad()
    def reset(self) -> None:
        """Forgets the momentum (Psyche's ``zero_optim`` on a cold start).

        What is on its way is still applied, as the other peers do too; call :meth:`flush` before to avoid that.
        """
        self.undo_lookahead()
        for param in self._params():
            state = self.state[param]
            momentum_of(state).zero_()
            for key in (OWN_VALUE, MOMENTUM_BUFFER, DIRECTION):
                if key in state:
                    state[key].zero_()

    @property
    def quarantined(self) -> int:
        """Non-finite gradients left out so far."""
        self._settle_quarantine()
        return sum(int(self.state[p][QUARANTINED]) for p in self._params())

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler leaves out step() when it finds an inf. A peer that stays away from a step makes all others wait,
        # so with peers the scaler must call us always, and an overflow becomes an empty contribution. Alone, the
        # usual way is kept: Lightning clips gradients only for optimizers that let the scaler unscale.
        return self._run.num_peers > 1

    # -- inside --------------------------------------------------------------------------------------------------------

    def _connect(self) -> Exchange:
        """The exchange, started on the current plan."""
        held = self._held()
        exchange, plan = self._run.open(self._params()), self.plan
        if self._run.started_with is None or self._run.started_with.layout != plan.layout:
            self._run.settle()
            self.undo_lookahead()
            exchange.start(plan, held)
            self._run.started_with = plan
        return exchange

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

    def _prepare_next_gradient(self) -> None:
        """Looks ahead, unless :meth:`train` will be called before the next gradient as it was before all until now.

        A loop that calls it only once, before its first step, is found out by its second: the one gradient between them
        is taken at the true weights.
        """
        on_request = self._run.count_request()
        rates = self._rates(None)
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["resumes_ahead"], group["lookahead_lr"] = on_request, rate
        if not on_request:
            self.lookahead()

    def _apply_arrived(self) -> None:
        if self._run.arrived is not None:
            updates, self._run.arrived = self._run.arrived, None
            updates = [self._on_current_plan(u) for u in updates]
            if not self._apply_ahead(updates):
                self.apply(updates)

    def _require_training(self) -> None:
        if not self.param_groups[0]["training"]:
            raise DistroError("the optimizer is in evaluation mode: call optimizer.train() before the next step")
