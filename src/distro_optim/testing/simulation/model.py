"""A model of a few hundred weights that really trains: gradients, momentum, coefficients, and everybody's results.

Its loss is the squared distance from a point that all peers pull towards, each with noise of its own samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from blake3 import blake3
from torch import nn
from typing_extensions import override

from ...compress import CompressedUpdate, ParamSpec, make_plan
from ...coordinator.types import BatchId
from ...optimizer import DisTrO
from ...strategy.model.named_tensors import NamedTensors
from ...strategy.model.trainer import SwarmTrainer
from ...strategy.rounds.actions import TrainBatch
from ...strategy.rounds.results import encode_result
from ..updates import random_update
from .sharing import SharedWork

__all__ = ["LEARNING_RATE", "SmallModel", "charged_bytes"]

SIDE: Final = 16
LEARNING_RATE: Final = 0.01
NOISE: Final = 1.0
CHUNK: Final = 8
TOPK: Final = 4

LARGE_SIDE: Final = 768
LARGE_CHUNK: Final = 64
LARGE_TOPK: Final = 8
"""As transformers have them, with the settings of ``docs/benchmarks``."""

BYTES_OF_A_WEIGHT: Final = 4
"""Weights travel as they are kept, in float32."""


class MergingOnce(DisTrO):
    """Equal updates are merged into equal weights once for all peers, by the bytes of both.

    Args:
        work: done once for all.
        net: whose parameters are trained.
        options: of :class:`~distro_optim.optimizer.DisTrO`.
    """

    def __init__(
        self, work: SharedWork, net: nn.Module, *, lr: float, compression_chunk: int, compression_topk: int
    ) -> None:
        super().__init__(
            net.parameters(), lr=lr, compression_chunk=compression_chunk, compression_topk=compression_topk
        )
        self._work = work

    @override
    def apply(self, updates: Sequence[CompressedUpdate], lr: float | Sequence[float] | None = None) -> None:
        self.undo_lookahead()
        tensors = [tensor.detach() for group in self.param_groups for tensor in group["params"]]
        key = blake3(repr(lr).encode())
        for tensor in tensors:
            key.update(tensor.numpy().tobytes())
        for update in updates:
            key.update(self._hash_of(update))

        def merge() -> list[torch.Tensor]:
            super(MergingOnce, self).apply(updates, lr)
            return [tensor.clone() for tensor in tensors]

        for tensor, merged in zip(tensors, self._work.do(("merged", key.digest()), merge), strict=True):
            tensor.copy_(merged)

    def _hash_of(self, update: CompressedUpdate) -> bytes:
        def read() -> tuple[CompressedUpdate, bytes]:
            content = blake3(repr(update.present).encode())
            for tensor in (*update.index, *update.value):
                content.update(tensor.numpy().tobytes())
            return update, content.digest()

        # With the update, so that nothing else has its identity while that is remembered.
        return self._work.do(("update", id(update)), read)[1]


class SmallModel:
    """One peer's. All begin with equal weights.

    Args:
        work: done once for all.

    Attributes:
        trainer: carries out what the rounds want done with it.
    """

    def __init__(self, work: SharedWork) -> None:
        net = nn.Linear(SIDE, SIDE)
        with torch.no_grad():
            net.weight.fill_(1.0)
            net.bias.fill_(1.0)
        optimizer = MergingOnce(work, net, lr=LEARNING_RATE, compression_chunk=CHUNK, compression_topk=TOPK)
        self.trainer = SwarmTrainer(NamedTensors.of(net, optimizer), optimizer)

    def gradients(self, action: TrainBatch) -> None:
        """Of the batch, at the weights as they are."""
        draw = torch.Generator().manual_seed(action.batch.start)
        for tensor in self.trainer.tensors.trained.values():
            noise = torch.randn(tensor.shape, generator=draw) * NOISE / len(action.batch) ** 0.5
            tensor.grad = tensor.detach() + noise

    @torch.no_grad()
    def loss(self) -> float:
        """The mean squared distance from where it is pulled to."""
        tensors = self.trainer.tensors.trained.values()
        return float(sum(t.square().sum() for t in tensors)) / sum(t.numel() for t in tensors)

    def copy_from(self, other: SmallModel) -> None:
        """Takes another peer's weights; the momentum begins at zero."""
        self.trainer.load({name: tensor.clone() for name, tensor in other.trainer.tensors.trained.items()})


def charged_bytes(parameters: int | None) -> tuple[int | None, int]:
    """What a result and a model of so many parameters weigh on a line, in bytes; a result of None weighs what it has.

    A result is encoded to find that out; the model is taken to be square matrices.
    """
    if parameters is None:
        return None, BYTES_OF_A_WEIGHT * SIDE * (SIDE + 1)
    count = max(1, round(parameters / LARGE_SIDE**2))
    side = LARGE_SIDE if parameters >= LARGE_SIDE**2 else max(1, int(parameters**0.5))
    spec = ParamSpec((side, side), torch.float32, torch.device("cpu"), 0, LARGE_CHUNK, LARGE_TOPK)
    plan = make_plan([spec], "padded")
    blob, _ = encode_result(random_update(plan, quantized=True), step=1, trainer_nonce=0, batch=BatchId(0, 1))
    return count * len(blob), BYTES_OF_A_WEIGHT * parameters
