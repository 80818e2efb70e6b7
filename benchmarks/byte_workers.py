"""Four workers in one process that train the byte model in lock-step: with AdamW, with DisTrO, with its plain twin."""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# For what is not installed: the model of the examples.
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from examples.byte_model import ByteTransformer, next_byte_loss
from torch import Tensor, nn
from typing_extensions import override

from distro_optim import DisTrO
from distro_optim.comm.memory import MemoryExchange
from distro_optim.compress import Arithmetic, UpdateRule
from distro_optim.optim.reference import ReferenceTensor, Sent
from distro_optim.optim.rules import Direction

__all__ = ["WORKERS", "AdamWWorkers", "Batch", "DistroWorkers", "Method", "MuonWorkers", "PlainWorkers", "Workers"]

# Inputs and targets, (windows, context) int64.
Batch = tuple[Tensor, Tensor]

WORKERS = 4
CHUNK = 64
BF16_BYTES = 2


@dataclass(frozen=True)
class Method:
    """What is compared.

    Attributes:
        topk: coefficients sent per tile; 0 for AdamW.
    """

    name: str
    lr: float
    topk: int = 0
    decay: float = 0.0
    quantize: bool = False
    overlap: bool = False
    direction: Direction = "momentum"
    update: UpdateRule = "sign"
    gain: float | None = None


class Workers(ABC):
    """Four workers in one process, in lock-step."""

    @abstractmethod
    def step(self, batches: Sequence[Batch], lr: float) -> None:
        """One step of all workers, each on its batch."""

    @abstractmethod
    def model(self) -> nn.Module:
        """With the weights that all workers share, not those of a lookahead."""

    @abstractmethod
    def sent_per_step(self) -> float:
        """Bytes of update data that each worker has sent, per step."""


class AdamWWorkers(Workers):
    """Averaged gradients, as DistributedDataParallel computes them: the gradient of all batches together."""

    def __init__(self, method: Method) -> None:
        self._model = ByteTransformer()
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=method.lr, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self, batches: Sequence[Batch], lr: float) -> None:
        inputs, targets = zip(*batches, strict=True)
        self._optimizer.zero_grad()
        next_byte_loss(self._model, torch.cat(inputs), torch.cat(targets)).backward()
        self._optimizer.param_groups[0]["lr"] = lr
        self._optimizer.step()

    def model(self) -> nn.Module:
        return self._model

    def sent_per_step(self) -> float:
        return sum(p.numel() for p in self._model.parameters()) * BF16_BYTES


class MuonWorkers(AdamWWorkers):
    """Muon for matrices, embeddings too, and AdamW for vectors, on averaged gradients.

    Its learning rate is scaled as ``match_rms_adamw`` does, so that ``lr`` means to a matrix what it means to AdamW.

    Raises:
        SystemExit: PyTorch is older than 2.9.
    """

    def __init__(self, method: Method) -> None:
        super().__init__(method)
        if not hasattr(torch.optim, "Muon"):
            raise SystemExit("torch.optim.Muon came with PyTorch 2.9: run this with the versions of constraints.txt")
        matrices = [p for p in self._model.parameters() if p.ndim == 2]
        self._optimizer = torch.optim.AdamW(
            [p for p in self._model.parameters() if p.ndim != 2], lr=method.lr, betas=(0.9, 0.95), weight_decay=0.0
        )
        self._muon = torch.optim.Muon(matrices, lr=method.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    @override
    def step(self, batches: Sequence[Batch], lr: float) -> None:
        self._muon.zero_grad()
        super().step(batches, lr)
        self._muon.param_groups[0]["lr"] = lr
        self._muon.step()


def gradients(model: nn.Module, weights: Sequence[Tensor], batch: Batch) -> list[Tensor]:
    """Of the loss at ``weights``, in their dtype; the model itself computes in float32."""
    params = list(model.parameters())
    with torch.no_grad():
        for param, weight in zip(params, weights, strict=True):
            param.copy_(weight)
    grads = torch.autograd.grad(next_byte_loss(model, *batch), params)
    return [g.to(w.dtype) for g, w in zip(grads, weights, strict=True)]


class DistroWorkers(Workers):
    """Four optimizers, each with weights of its own in ``dtype``."""

    def __init__(self, method: Method, dtype: torch.dtype, arithmetic: Arithmetic = "exact") -> None:
        self._overlap = method.overlap
        self._steps = 0
        self._model = ByteTransformer()
        self._weights = [
            [nn.Parameter(p.detach().to(dtype, copy=True)) for p in self._model.parameters()] for _ in range(WORKERS)
        ]
        self._exchanges = MemoryExchange.group(WORKERS)
        self._optimizers = [
            DisTrO(
                weights,
                lr=method.lr,
                compression_decay=method.decay,
                compression_topk=method.topk,
                compression_chunk=CHUNK,
                quantize_1bit=method.quantize,
                overlap=method.overlap,
                direction=method.direction,
                update=method.update,
                gain=method.gain,
                exchange=exchange,
                arithmetic=arithmetic,
            )
            for weights, exchange in zip(self._weights, self._exchanges, strict=True)
        ]

    def step(self, batches: Sequence[Batch], lr: float) -> None:
        for weights, optimizer, batch in zip(self._weights, self._optimizers, batches, strict=True):
            optimizer.train()
            for weight, gradient in zip(weights, gradients(self._model, weights, batch), strict=True):
                weight.grad = gradient
            optimizer.param_groups[0]["lr"] = lr
            optimizer.begin_step()
        for optimizer in self._optimizers:
            optimizer.finish_step()
            if self._overlap:
                optimizer.lookahead()
        self._steps += 1

    @torch.no_grad()
    def model(self) -> nn.Module:
        for optimizer in self._optimizers:
            optimizer.eval()
        first, *others = self._weights
        if not all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True)):
            raise AssertionError("the workers' weights differ")
        for param, weight in zip(self._model.parameters(), first, strict=True):
            param.copy_(weight)
        return self._model

    def sent_per_step(self) -> float:
        return self._exchanges[0].bytes_sent / self._steps


class PlainWorkers(Workers):
    """One set of weights, since all workers' are equal, and of every tensor as many plain optimizers as workers."""

    def __init__(self, method: Method, dtype: torch.dtype) -> None:
        self._overlap = method.overlap
        self._model = ByteTransformer()
        self._weights = [p.detach().to(dtype, copy=True) for p in self._model.parameters()]
        self._peers = [[self._twin(weight, method) for weight in self._weights] for _ in range(WORKERS)]
        self._previous_lr = 0.0
        self._on_its_way: list[list[Sent]] = []

    def step(self, batches: Sequence[Batch], lr: float) -> None:
        sent: list[list[Sent]] = [[] for _ in self._weights]
        for peer, batch in zip(self._peers, batches, strict=True):
            own = gradients(self._model, [self._where(plain) for plain in peer], batch)
            for number, (plain, gradient) in enumerate(zip(peer, own, strict=True)):
                message = plain.generate(gradient, lr)
                if message is not None:
                    sent[number].append(message)
        arrived = self._on_its_way if self._overlap else sent
        for plain, messages in zip(self._peers[0], arrived, strict=bool(arrived)):
            plain.apply(messages, lr)  # to the weights they all share
        self._on_its_way, self._previous_lr = sent, lr

    @staticmethod
    def _twin(weight: Tensor, method: Method) -> ReferenceTensor:
        return ReferenceTensor(
            weight,
            torch.zeros_like(weight),
            method.decay,
            method.topk,
            CHUNK,
            "padded",
            method.quantize,
            method.overlap,
            direction=method.direction,
            update=method.update,
            gain=(2.0 if method.update == "rms" else 1.0) if method.gain is None else method.gain,
        )

    def _where(self, plain: ReferenceTensor) -> Tensor:
        """Where the gradient is taken."""
        return plain.looking_ahead(self._previous_lr) if self._overlap else plain.param

    @torch.no_grad()
    def model(self) -> nn.Module:
        for param, weight in zip(self._model.parameters(), self._weights, strict=True):
            param.copy_(weight)
        return self._model

    def sent_per_step(self) -> float:
        return math.nan  # twins send nothing
