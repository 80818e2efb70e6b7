"""Where a client computes. Several devices of a machine are one client, which trains one batch on all of them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError
from ..models.accumulation import Fp32GradientAccumulator, train_batch
from ..models.batches import TokenBatch
from ..models.causal_lm import CausalLM

__all__ = ["LocalTrainers", "parse_devices"]

_LIST: Final = re.compile(r"cuda:(\d+(?:,\d+)*)")
"""``--device`` with numbers of CUDA devices."""


def parse_devices(device: str, count: int) -> list[torch.device]:
    """The devices that ``--device`` and ``--data-parallelism`` mean, the first of which has the weights.

    Raises:
        ConfigurationError: this machine does not have these devices.
    """
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        if cuda:
            device = "cuda"
        else:
            device = "mps" if torch.backends.mps.is_available() else "cpu"
    match = _LIST.fullmatch(device)
    if match:
        numbers = [int(number) for number in match[1].split(",")]
        if len(numbers) == 1 and count > 1:
            numbers = list(range(numbers[0], numbers[0] + count))
        wrong = [number for number in numbers if number >= cuda]
        if wrong:
            raise ConfigurationError(
                f"--device {device}: this machine has {cuda} CUDA devices, and none is number {wrong[0]}",
                name="device",
                value=device,
            )
        if len(set(numbers)) != len(numbers):
            raise ConfigurationError(f"--device {device} names a device twice", name="device", value=device)
        if count not in (1, len(numbers)):
            raise ConfigurationError(
                f"--data-parallelism {count} does not fit the {len(numbers)} devices of --device {device}",
                name="data_parallelism",
                value=count,
            )
        return [torch.device("cuda", number) for number in numbers]
    if device == "cuda":
        if count > cuda or not cuda:
            raise ConfigurationError(
                f"--device cuda --data-parallelism {count}: this machine has {cuda} CUDA devices",
                name="data_parallelism",
                value=count,
            )
        return [torch.device("cuda", number) for number in range(count)]
    if device == "mps" and not torch.backends.mps.is_available():
        raise ConfigurationError("--device mps: this machine has no such device", name="device", value=device)
    if device not in ("cpu", "mps"):
        raise ConfigurationError(
            f"--device {device}: give auto, cpu, mps, cuda, cuda:N or cuda:X,Y,Z", name="device", value=device
        )
    # More than one on the CPU is only useful to try it out.
    return [torch.device(device)] * count


class LocalTrainers:
    """A model on one device, and copies of it on the others, which take a share of each batch.

    Samples are dealt out as Psyche deals them, as evenly as they go. The gradients of the shares, each a mean over its
    micro-batches, are averaged in float32 (``shared/modeling/src/trainer.rs``), weighted by the samples of a share so
    that every sample counts alike; so the first device alone needs an optimizer.

    Args:
        model: on the first device; its weights change between batches, and the copies follow.
        devices: at least one.
        micro_batch_size: sequences of a forward pass.
    """

    def __init__(self, model: CausalLM, devices: Sequence[torch.device], *, micro_batch_size: int) -> None:
        self._models = [model, *(copy.deepcopy(model).to(device) for device in devices[1:])]
        self._devices = list(devices)
        self._micro_batch_size = micro_batch_size
        self._accumulators = [Fp32GradientAccumulator(each.parameters()) for each in self._models]
        self._threads = ThreadPoolExecutor(len(devices), "trainer") if len(devices) > 1 else None

    def train(self, batch: TokenBatch, cancelled: Callable[[], bool]) -> float | None:
        """Forward and backward passes; the gradients are in the model afterwards.

        Returns:
            the loss, the mean over the samples; None if cancelled.
        """
        parts = _deal(batch, len(self._devices))
        if self._threads is None or len(parts) == 1:
            loss = self._train_on(0, parts[0], cancelled)
            return None if loss is None else float(loss)
        self._follow()
        futures = [self._threads.submit(self._train_on, n, part, cancelled) for n, part in enumerate(parts)]
        losses = [future.result() for future in futures]
        done = [float(loss) for loss in losses if loss is not None]
        if len(done) < len(losses):
            return None
        shares = [len(part) / len(batch) for part in parts]
        self._average(shares)
        return sum(loss * share for loss, share in zip(done, shares, strict=True))

    def close(self) -> None:
        """Ends the threads."""
        if self._threads is not None:
            self._threads.shutdown()

    def _train_on(self, number: int, part: TokenBatch, cancelled: Callable[[], bool]) -> Tensor | None:
        return train_batch(
            self._models[number],
            part.to(self._devices[number]),
            micro_batch_size=self._micro_batch_size,
            accumulator=self._accumulators[number],
            cancelled=cancelled,
        )

    @torch.no_grad()
    def _follow(self) -> None:
        for other in self._models[1:]:
            for mine, theirs in zip(_tensors(self._models[0]), _tensors(other), strict=True):
                theirs.copy_(mine)

    @torch.no_grad()
    def _average(self, shares: Sequence[float]) -> None:
        for params in zip(*(model.parameters() for model in self._models[: len(shares)]), strict=True):
            first = params[0]
            total: Tensor | None = None
            for param, share in zip(params, shares, strict=True):
                if param.grad is None:
                    continue
                part = param.grad.to(first.device, torch.promote_types(param.dtype, torch.float32)) * share
                total = part if total is None else total.add_(part)
                param.grad = None
            first.grad = None if total is None else total.to(first.dtype)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _deal(batch: TokenBatch, count: int) -> list[TokenBatch]:
    """The batch in at most ``count`` parts whose sizes differ by one at most."""
    size, larger = divmod(len(batch), count)
    parts = []
    start = 0
    for number in range(min(count, len(batch))):
        stop = start + size + (number < larger)
        parts.append(batch.rows(start, stop))
        start = stop
    return parts
