"""How a round of several batches goes through one step of Lightning's."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from ...errors import DistroError
from ...optimizer import DisTrO
from ..round import Round
from .lightning_checks import check_optimizers
from .lightning_machine import OneMachine
from .round_loader import RoundBatch

__all__ = ["RoundPasses"]


class RoundPasses(OneMachine):
    """Forward and backward passes over a :class:`~.round_loader.RoundBatch`, as one ``training_step``."""

    _round: Round | None
    _set_aside: list[tuple[Tensor, Tensor]]
    """Gradients of all passes but the last, while Lightning clears gradients."""
    _shown: tuple[RoundBatch, Any] | None
    """A round, and the one of its batches that hooks see now: the first before the passes, the last after them."""
    _beside_batch: tuple[Any, ...]
    """What ``training_step`` was given last beside the batch."""

    @property
    def _trainer(self) -> Any:
        return self._module.trainer

    @property
    def _module(self) -> Any:
        if (module := self.lightning_module) is None:
            raise DistroError("the strategy has a module only while a Trainer runs")
        return module

    @property
    def _optimizer(self) -> DisTrO:
        return check_optimizers(self.optimizers)

    @property
    def _open_round(self) -> Round:
        if self._round is None:
            raise DistroError("there is no round to train: the run is over, or not joined yet")
        return self._round

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        if isinstance(batch, RoundBatch):
            return batch
        return super().batch_to_device(batch, device, dataloader_idx)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        batch = args[0] if args else None
        self._beside_batch = args[1:]
        if not isinstance(batch, RoundBatch):
            return super().training_step(*args, **kwargs)
        results = self._trainer.fit_loop._results
        try:
            return self._train_round(batch, results, *args[1:])
        finally:
            results.batch, results.batch_size = batch, None

    def _train_round(self, batch: RoundBatch, results: Any, *args: Any) -> Any:
        """All forward passes of a round, and all backward passes but the last, which is left to Lightning.

        Returns:
            What ``training_step`` returned last, with the mean loss over the round in it. Its gradient is that of the
            last pass; those of the others are put aside, since Lightning clears gradients in between.
        """
        round_ = self._open_round
        self._optimizer.zero_grad(set_to_none=True)
        sum_of_losses: Any = 0.0
        output: Any = None
        for number, (piece, weight) in enumerate(batch.micro_batches(), start=1):
            if number > 1 or self._shown is None or self._shown[0] is not batch:
                self._shown = batch, self._prepared(piece)
            prepared = self._shown[1]
            results.batch, results.batch_size = prepared, None
            last = number == len(batch)
            with nullcontext() if last else self.block_backward_sync():
                output = super().training_step(prepared, *args)
                loss = _loss_of(output)
                if loss is not None and not last:
                    self.backward(loss * weight, self._optimizer)
            if loss is not None and last:
                self._put_gradients_aside()
                return _with_loss(output, loss * weight + sum_of_losses)
            if loss is not None:
                sum_of_losses = sum_of_losses + loss.detach() * weight
            if not last:
                self._heed_sigterm()
                if round_.cancelled:
                    break
        if not isinstance(sum_of_losses, Tensor):
            return None
        # Stopped before the last pass, or it gave no loss: nothing is left to differentiate.
        self._put_gradients_aside()
        return _with_loss(output, sum_of_losses.clone().requires_grad_())

    def _audit_loss(self, batch: Any) -> Tensor:
        """The loss of a batch as the user's loader makes it, by the module's own ``training_step``, which logs nothing.

        Only called where everything that it changes in the module is put back (:mod:`~...verify.quiet`).
        """
        module = self._module
        prepared = self._prepared(batch)
        vars(module)["log"] = vars(module)["log_dict"] = _log_nothing
        with self.precision_plugin.train_step_context():
            loss = _loss_of(module.training_step(prepared, *self._beside_batch))
        if loss is None:
            raise DistroError("training_step returned no loss")
        return loss

    def _heed_sigterm(self) -> None:
        """Lightning's handler only takes a note, to be read after a step, and a step can take a minute here."""
        if self._trainer.received_sigterm:
            raise import_module(f"{self._namespace}.utilities.exceptions").SIGTERMException

    def _prepared(self, batch: Any) -> Any:
        """What Lightning's loop does to a batch before ``training_step``."""
        batch = self.precision_plugin.convert_input(batch)
        batch = self._module._on_before_batch_transfer(batch, dataloader_idx=0)
        return self.batch_to_device(batch, dataloader_idx=0)

    def _shown_of(self, batch: RoundBatch) -> Any:
        """What hooks see in place of a round: a batch as ``training_step`` has it."""
        if self._shown is None or self._shown[0] is not batch:
            self._shown = batch, self._prepared(batch.first()) if len(batch) else batch
        return self._shown[1]

    def _put_gradients_aside(self) -> None:
        params = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._set_aside = [(p, p.grad) for p in params if p.grad is not None]
        for param in params:
            param.grad = None

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        for param, grad in self._set_aside:
            param.grad = grad
        self._set_aside = []
        super().pre_backward(closure_loss)

    def _spare_rounds_from_hooks(self, module: Any) -> None:
        """Keeps a script's ``on_before_batch_transfer`` from rounds: it is called with each batch in them instead."""
        hook = module._on_before_batch_transfer

        def spare_rounds(batch: Any, dataloader_idx: int = 0) -> Any:
            return batch if isinstance(batch, RoundBatch) else hook(batch, dataloader_idx)

        module._on_before_batch_transfer = spare_rounds


def _log_nothing(*_: Any, **__: Any) -> None:
    """In the place of a module's ``log`` and ``log_dict``."""


def _loss_of(output: Any) -> Tensor | None:
    """As Lightning reads it, which complains about the wrong ones."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return loss if isinstance(loss, Tensor) else None


def _with_loss(output: Any, loss: Tensor) -> Any:
    return {**output, "loss": loss} if isinstance(output, Mapping) else loss
