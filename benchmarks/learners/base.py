"""What is compared, and what all workers can do, however they exchange what they learn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distro_optim.compress import UpdateRule
from distro_optim.optim.rules import Ahead, Direction

__all__ = ["BF16_BYTES", "CHUNK", "Batch", "Method", "Task", "Variation", "Workers", "gradients", "with_weights"]

# Inputs and targets, of as many samples.
Batch = tuple[Tensor, Tensor]

CHUNK = 64
BF16_BYTES = 2


@dataclass(frozen=True)
class Variation:
    """What is tried and not in ``DisTrO``; see :mod:`learners.varied`.

    Attributes:
        times: how far gradients are taken ahead, in times of what they are taken ahead by.
        applied_ahead: share of the mean of applied updates by which gradients are taken ahead as well.
        squarings: steps of Newton and Schulz.
        equal_rows: directions have rows of equal size, in the mean over time, as in NorMuon.
        shared: share of the mean of applied updates in what a direction is made of.
        sends_all: everything is sent, with all its digits: what compression costs.
        adds_up: signs at one position are added up, and their mean is not taken.
        orthogonal_after: Newton and Schulz once more, after merging.
        momentum_after: what stays of a momentum of merged updates.
        embedding_gain: times the gain, for the first two tensors, which are embeddings.
        tile_scale: what is sent of a tile has one size in 16 bits, the mean of its coefficients, and not the size 1.
        by_energy: the coefficients of a tensor go to where they are largest, in whichever tiles.
        coded: positions take as many bits as their combinations need, and not whole bytes.
        growing_over: in so many steps ``topk`` grows from half of it to three halves.
        adam_rows: matrices of so many rows go in Adam's direction: embedding and head, where that is the vocabulary.
    """

    times: float = 1.0
    applied_ahead: float = 0.0
    squarings: int = 5
    equal_rows: bool = False
    shared: float = 0.0
    sends_all: bool = False
    adds_up: bool = False
    orthogonal_after: bool = False
    momentum_after: float = 0.0
    embedding_gain: float = 1.0
    tile_scale: bool = False
    by_energy: bool = False
    coded: bool = False
    growing_over: int = 0
    adam_rows: int = 0


@dataclass(frozen=True)
class Method:
    """How workers exchange what they learn. What a method does not have is 0, or False.

    Attributes:
        lr: of the steps of an inner optimizer, where there is one.
        topk: coefficients sent per tile, or values per chunk of 4,096.
        decay: what stays of what was not sent.
        local_steps: of each worker between two exchanges.
        bits: of each value that is sent, where that can be chosen.
        outer_lr, outer_momentum: of the step that everybody makes of the mean of what was sent.
        chunk: longest side of a tile.
        momentum: what stays of Muon's momentum in a step.
        ahead: by what gradients are taken ahead; None for what goes with the direction.
        variation: what is other than in the recipe, where ``DisTrO`` does not have it.
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
    local_steps: int = 0
    bits: int = 0
    outer_lr: float = 0.0
    outer_momentum: float = 0.0
    chunk: int = CHUNK
    momentum: float = 0.95
    ahead: Ahead | None = None
    variation: Variation | None = None


@dataclass(frozen=True)
class Task:
    """A model and how good it is.

    Attributes:
        model: makes one, with the weights of torch's seed.
        loss: of a model on inputs and targets, the mean over them.
    """

    name: str
    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]


class Workers(ABC):
    """Some workers in one process, in lock-step."""

    @abstractmethod
    def step(self, batches: Sequence[Batch], lr: float) -> None:
        """One step of all workers, each on its batch."""

    @abstractmethod
    def model(self) -> nn.Module:
        """With the weights that all workers share, not those of a lookahead, and not one worker's own."""

    @abstractmethod
    def sent_per_step(self) -> float:
        """Bytes of update data that each worker has sent, per step."""


@torch.no_grad()
def with_weights(model: nn.Module, weights: Iterable[Tensor]) -> nn.Module:
    """The model itself, with a copy of these."""
    for param, weight in zip(model.parameters(), weights, strict=True):
        param.copy_(weight)
    return model


def gradients(task: Task, model: nn.Module, weights: Sequence[Tensor], batch: Batch) -> list[Tensor]:
    """Of the loss at ``weights``, in their dtype; the model itself computes in float32."""
    params = list(with_weights(model, weights).parameters())
    grads = torch.autograd.grad(task.loss(model, *batch), params)
    return [g.to(w.dtype) for g, w in zip(grads, weights, strict=True)]
