"""AdamW and Muon on averaged gradients, as DistributedDataParallel computes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from learners.base import BF16_BYTES, Batch, Method, Task, Workers

__all__ = ["AdamWWorkers", "MuonWorkers"]

_BETAS = (0.9, 0.95)


class AdamWWorkers(Workers):
    """The gradient of all batches together, and a step of AdamW."""

    def __init__(self, task: Task, method: Method, workers: int) -> None:
        del workers  # as many as there are batches
        self._task = task
        self._model = task.model()
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=method.lr, betas=_BETAS, weight_decay=0.0)

    @override
    def step(self, batches: Sequence[Batch], lr: float) -> None:
        inputs, targets = zip(*batches, strict=True)
        self._model.zero_grad()
        self._task.loss(self._model, torch.cat(inputs), torch.cat(targets)).backward()
        self._optimizer.param_groups[0]["lr"] = lr
        self._optimizer.step()

    @override
    def model(self) -> nn.Module:
        return self._model

    @override
    def sent_per_step(self) -> float:
        return sum(p.numel() for p in self._model.parameters()) * BF16_BYTES


class MuonWorkers(AdamWWorkers):
    """Muon for matrices, embeddings and heads too, and AdamW for vectors.

    Its learning rate is scaled as ``match_rms_adamw`` does, so that ``lr`` means to a matrix what it means to AdamW.
    Convolutions are flattened to ``(out, in * height * width)``, since ``torch.optim.Muon`` takes matrices only.

    Raises:
        SystemExit: PyTorch is older than 2.9.
    """

    def __init__(self, task: Task, method: Method, workers: int) -> None:
        super().__init__(task, method, workers)
        if not hasattr(torch.optim, "Muon"):
            raise SystemExit("torch.optim.Muon came with PyTorch 2.9: run this with the versions of constraints.txt")
        params = list(self._model.parameters())
        self._flattened = [(p, nn.Parameter(p.detach().view(len(p), -1))) for p in params if p.ndim > 1]
        self._optimizer = torch.optim.AdamW(
            [p for p in params if p.ndim < 2], lr=method.lr, betas=_BETAS, weight_decay=0.0
        )
        matrices = [matrix for _, matrix in self._flattened]
        self._muon = torch.optim.Muon(matrices, lr=method.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    @override
    def step(self, batches: Sequence[Batch], lr: float) -> None:
        super().step(batches, lr)
        for param, matrix in self._flattened:  # which share their memory
            assert isinstance(param.grad, Tensor)
            matrix.grad = param.grad.view_as(matrix)
        self._muon.param_groups[0]["lr"] = lr
        self._muon.step()
