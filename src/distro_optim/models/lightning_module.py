"""A language model for Lightning's Trainer: :class:`~distro_optim.models.causal_lm.CausalLM` with its hooks.

::

    model = PsycheCausalLM.from_folder("my-llama", "HfLlama", micro_batch_size=8)
    Trainer(strategy=PsycheStrategy(run="host:20000/my-run")).fit(model, data)
"""

from __future__ import annotations

from typing import Any, Final

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from typing_extensions import override

from ..coordinator.model import LLM, Distro, LearningRateSchedule, LLMArchitecture, OptimizerDefinition
from ..errors import ConfigurationError
from .accumulation import Fp32GradientAccumulator
from .batches import TokenBatch
from .causal_lm import CausalLM
from .config import ConfigSource, LanguageModelConfig
from .optimization import DEFAULT_OPTIMIZER, make_scheduler

__all__ = ["PsycheCausalLM"]

_DEFAULT_RATE: Final = 4e-4


class PsycheCausalLM(CausalLM, pl.LightningModule):
    """A language model that trains as in a Psyche run.

    Arguments are those of :class:`~distro_optim.models.causal_lm.CausalLM`, and:

    Args:
        lr: learning rate, where there is no schedule.
        lr_schedule: of the run; in a joined run the run's own counts.
        optimizer: of the run.
        micro_batch_size: sequences that are computed at a time; a larger batch is cut, and the gradients of its parts
            are added in float32. None for whole batches.

    It computes in the type of its parameters, bfloat16: leave the Trainer's ``precision`` as it is, or set
    ``"bf16-true"``.
    """

    def __init__(
        self,
        config: ConfigSource | LanguageModelConfig,
        architecture: LLMArchitecture | str = LLMArchitecture.HF_AUTO,
        *,
        lr: float = _DEFAULT_RATE,
        lr_schedule: LearningRateSchedule | None = None,
        optimizer: OptimizerDefinition = DEFAULT_OPTIMIZER,
        micro_batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ConfigurationError(
                f"micro_batch_size={micro_batch_size}: give a positive number, or None",
                name="micro_batch_size",
                value=micro_batch_size,
            )
        super().__init__(config, architecture, **{"accumulation": micro_batch_size is not None, **settings})
        self.lr = lr
        self.lr_schedule = lr_schedule
        self.optimizer_definition = optimizer
        self.micro_batch_size = micro_batch_size
        self._accumulator: Fp32GradientAccumulator | None = None
        # What load_from_checkpoint makes the same model from, in types that can be loaded without unpickling.
        kind = self.config.architecture.value
        self.save_hyperparameters(
            {"config": dict(self.config.values), "architecture": kind, "lr": lr, "micro_batch_size": micro_batch_size}
        )

    @classmethod
    @override
    def from_run(cls, run: LLM, source: Any, **settings: Any) -> PsycheCausalLM:
        """The model of a run with the run's optimizer and schedule; see :meth:`CausalLM.from_run`."""
        settings = {"optimizer": run.optimizer, "lr_schedule": run.lr_schedule, **settings}
        return super().from_run(run, source, **settings)

    # -- Lightning's hooks ---------------------------------------------------------------------------------------------

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """DisTrO with the run's settings, over the parameters in the order of Psyche's peers."""
        optimizer = self.make_optimizer(self.lr, self.optimizer_definition)
        if self.lr_schedule is None:
            return optimizer
        scheduler = make_scheduler(optimizer, self.lr_schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> TokenBatch:
        """Checked while still on the CPU: on a GPU a token outside the vocabulary ends the process."""
        tokens = TokenBatch.of(batch)
        if tokens.input_ids.device.type == "cpu":
            tokens.check_vocabulary(self.config.vocab_size)
        return tokens

    @override
    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        """The loss of a batch, whose backward pass puts its gradient into the parameters."""
        parts = TokenBatch.of(batch).micro_batches(self.micro_batch_size)
        loss = self(parts[0]).loss if len(parts) == 1 else self._in_parts(parts)
        self.log("loss", loss.detach(), prog_bar=True, batch_size=sum(map(len, parts)))
        return loss

    @override
    def validation_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        tokens = TokenBatch.of(batch)
        parts = tokens.micro_batches(self.micro_batch_size)
        weighted = [self(part).loss.detach() * len(part) for part in parts]
        loss = torch.stack(weighted).sum() / len(tokens)
        self.log("val_loss", loss, prog_bar=True, batch_size=len(tokens))
        return loss

    @override
    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """To the Trainer's ``gradient_clip_val``, or else to the run's ``clip_grad_norm``."""
        definition = self.optimizer_definition
        if gradient_clip_val is None and isinstance(definition, Distro) and definition.clip_grad_norm:
            gradient_clip_val, gradient_clip_algorithm = float(definition.clip_grad_norm), "norm"
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _in_parts(self, parts: list[TokenBatch]) -> Tensor:
        """Forward and backward over each part now; the backward pass of what is returned hands the sum over."""
        if self._accumulator is None:
            self._accumulator = Fp32GradientAccumulator(self.parameters())
        accumulator = self._accumulator
        accumulator.clear()
        # Of the batches before, if the Trainer accumulates too.
        aside = [(p, p.grad) for p in self.parameters()]
        for param, _ in aside:
            param.grad = None
        total = torch.zeros((), device=parts[0].input_ids.device)
        try:
            for part in parts:
                loss = self(part, loss_scale=len(parts)).loss
                loss.backward()
                value = loss.detach().float()
                total = total + torch.where(value.isfinite(), value, torch.zeros_like(value))
                accumulator.add()
        finally:
            for param, grad in aside:
                param.grad = grad
        anchor = torch.zeros((), device=total.device, requires_grad=True)
        deferred: Tensor = _Deferred.apply(anchor, total, accumulator)  # type: ignore[no-untyped-call]
        return deferred


class _Deferred(torch.autograd.Function):
    """A loss whose gradient is known already: going backward from it, times any factor, hands it over.

    Lightning clears the gradients between the forward and the backward pass.
    """

    @staticmethod
    @override
    def forward(ctx: Any, anchor: Tensor, loss: Tensor, accumulator: Fp32GradientAccumulator) -> Tensor:
        ctx.accumulator = accumulator
        return loss.clone()

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        ctx.accumulator.apply(grads[0])
        return torch.zeros_like(grads[0]), None, None
