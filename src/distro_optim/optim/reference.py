"""The algorithm of :class:`~distro_optim.DisTrO`, slow and clear: one tensor at a time, every formula written out.

Read this file to understand the optimizer. It shares no code with the fast one, and the tests hold the two against
each other in float64. From top to bottom: tiles, their transform, which coefficients are sent, one step of one tensor
(:class:`ReferenceTensor`), and an optimizer for scripts (:class:`ReferenceDisTrO`).

With learning rate ``lr``, decay ``beta`` and the gradient ``g`` of this peer's own batch, a step is::

    delta <- beta * delta + lr * g                     momentum, different on every peer
    q     <- the k largest DCT coefficients of each tile of delta
    delta <- delta - idct(q)                           what is sent leaves the momentum
    send q, or the signs of q; receive the q of the other peers
    p     <- p - lr * sign(idct(mean of q over those who sent it))     the same on every peer

That is DeMo (Peng et al., 2024, https://arxiv.org/abs/2411.19870; bloc97/DeMo ``demo.py``). DisTrO as Psyche runs it
(PsycheFoundation/psyche ``shared/modeling/src/distro.rs``) differs in three points, here under ``overlap=True``:
``q`` leaves ``delta`` one step later, ``p`` changes one step later, and to make up for that delay the gradient is taken
at ``p - lr * sign(delta)`` (``error_correction`` there).

Two lines can be other ones. ``direction="orthogonal"`` puts Muon's direction ``o`` in the place of ``g`` (Jordan et
al., 2024, https://kellerjordan.github.io/posts/muon), and gradients are taken at ``p - lr * o``::

    m < -mu * m + (1 - mu) * g
    o < -sqrt(max(rows, columns)) * newton_schulz(mu * m + (1 - mu) * g)

or with ``ahead="delta"`` at ``p - delta``, where all of these directions are that have not arrived. ``update="rms"``
steps by the decoded update itself, in a size that is fixed::

    p     <- p - gain * lr * u / rms(u)                u = idct(mean of q over those who sent it)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.optim import Optimizer
from typing_extensions import override

__all__ = ["Ahead", "Direction", "Exchange", "ReferenceDisTrO", "ReferenceTensor", "Sent", "Tiling", "Update"]

Tiling = Literal["padded", "divisor"]

Direction = Literal["momentum", "orthogonal"]

Ahead = Literal["direction", "delta"]

Update = Literal["sign", "rms"]

Sent = tuple[Tensor, Tensor]
"""What one peer sends of one tensor: positions in their tiles ``(tiles, k) int64``, and values ``(tiles, k)``. A value
is a bool, True for negative, where only signs are sent."""

Exchange = Callable[[list[Sent | None]], list[list[Sent | None]]]
"""Takes what this peer sends, one entry per parameter (None: nothing), and returns what each peer sent in this step,
this one included, in the same order on every peer."""


# -- tiles -------------------------------------------------------------------------------------------------------------


def tile_side(size: int, chunk: int, tiling: Tiling) -> int:
    """The length of a tile along a dimension of ``size``, at most ``chunk``.

    ``"divisor"`` is the rule of DeMo and Psyche: tiles fit exactly, so that a prime dimension gets tiles of 1.
    ``"padded"`` fills the last tile up with zeros.
    """
    if tiling == "padded":
        return min(size, chunk)
    return max(d for d in range(1, min(size, chunk) + 1) if size % d == 0)


def as_matrices(x: Tensor, tiling: Tiling) -> Tensor:
    """A tensor of any shape as ``(matrices, height, width)``; a vector is a matrix of one row."""
    if x.ndim <= 1:
        return x.reshape(1, 1, -1)
    if tiling == "padded":
        return x.reshape(1, x.shape[0], -1)
    return x.reshape(-1, *x.shape[-2:])


def to_tiles(x: Tensor, chunk: int, tiling: Tiling) -> Tensor:
    """``(tiles, h, w)``, in row-major order of (matrix, tile row, tile column); 0 beyond the edges of ``x``."""
    x = as_matrices(x, tiling)
    h, w = tile_side(x.shape[1], chunk, tiling), tile_side(x.shape[2], chunk, tiling)
    x = pad(x, (0, -x.shape[2] % w, 0, -x.shape[1] % h))
    x = x.reshape(x.shape[0], x.shape[1] // h, h, x.shape[2] // w, w)
    return x.transpose(2, 3).reshape(-1, h, w)


def from_tiles(tiles: Tensor, like: Tensor, tiling: Tiling) -> Tensor:
    """The inverse of :func:`to_tiles`: ``(tiles, h, w)`` to the shape of ``like``, without the padding."""
    matrices, height, width = as_matrices(like, tiling).shape
    h, w = tiles.shape[1:]
    rows, cols = -(-height // h), -(-width // w)
    x = tiles.reshape(matrices, rows, cols, h, w).transpose(2, 3).reshape(matrices, rows * h, cols * w)
    return x[:, :height, :width].reshape(like.shape)


# -- the transform -----------------------------------------------------------------------------------------------------


def dct_matrix(n: int, like: Tensor) -> Tensor:
    """``F[j, k] = s_k cos(pi (2j + 1) k / 2n)``, ``s_0 = sqrt(1/n)``, else ``s_k = sqrt(2/n)``: ``(n, n)``.

    Orthonormal, so that its transpose is its inverse. Computed in float64, returned as ``like``.
    """
    j, k = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)[None, :]
    basis = torch.cos(math.pi * (2 * j + 1) * k / (2 * n)) * math.sqrt(2 / n)
    basis[:, 0] = math.sqrt(1 / n)
    return basis.to(like)


def encode(tiles: Tensor) -> Tensor:
    """The two-dimensional DCT-II of each tile, ``(tiles, h, w)``."""
    f_h, f_w = dct_matrix(tiles.shape[1], tiles), dct_matrix(tiles.shape[2], tiles)
    return torch.einsum("nij,ia,jb->nab", tiles, f_h, f_w)


def decode(coefficients: Tensor) -> Tensor:
    """The inverse of :func:`encode`, ``(tiles, h, w)``."""
    f_h, f_w = dct_matrix(coefficients.shape[1], coefficients), dct_matrix(coefficients.shape[2], coefficients)
    return torch.einsum("nab,ia,jb->nij", coefficients, f_h, f_w)


# -- what is sent ------------------------------------------------------------------------------------------------------


def largest(coefficients: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Positions ``(tiles, k) int64`` and values ``(tiles, k)`` of the ``k`` largest magnitudes of each tile."""
    flat = coefficients.flatten(1)
    index = flat.abs().topk(min(k, flat.shape[1])).indices
    return index, flat.gather(1, index)


def placed(index: Tensor, value: Tensor, tiles: Tensor) -> Tensor:
    """Coefficients ``(tiles, h, w)`` with ``value`` at ``index`` and 0 elsewhere, shaped as ``tiles``.

    A position that several peers name gets the mean of their values: of those who sent it, not of all peers.
    """
    flat = torch.zeros_like(tiles).flatten(1)
    return flat.scatter_reduce(1, index, value, reduce="mean", include_self=False).view_as(tiles)


# -- another direction -------------------------------------------------------------------------------------------------


def newton_schulz(matrix: Tensor) -> Tensor:
    """``(rows, columns)`` with all singular values brought near 1; of zeros, zeros."""
    x: Tensor = matrix / matrix.norm().clamp_min(torch.finfo(matrix.dtype).tiny ** 0.4)
    if x.shape[0] > x.shape[1]:
        return newton_schulz(matrix.T).T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def orthogonal(x: Tensor, tiling: Tiling) -> Tensor:
    """Muon's direction of a tensor of any shape, in a size like that of signs; where it is no matrix, its signs."""
    matrices = as_matrices(x, tiling)
    rows, columns = matrices.shape[1:]
    if min(rows, columns) <= 1:
        return x.sign()
    size = math.sqrt(max(rows, columns))
    return torch.stack([size * newton_schulz(matrix) for matrix in matrices]).reshape(x.shape)


# -- one tensor --------------------------------------------------------------------------------------------------------


@dataclass
class ReferenceTensor:
    """One peer's optimizer of one tensor.

    Attributes:
        param: the weights, of any shape with elements; changed in place.
        delta: the momentum, shaped as ``param``; float32, or float64 for float64 weights.
        decay: what is left of the momentum after a step.
        topk: coefficients sent per tile.
        chunk: longest side of a tile.
        tiling: see :func:`tile_side`.
        quantize: send signs instead of values.
        overlap: Psyche's variant; False is DeMo.
        weight_decay: as in AdamW.
        own: what was sent last and is still in ``delta``, with values before quantization. Only with ``overlap``.
        direction, update: the rules; see the module.
        gain: of a step.
        momentum: what stays of ``buffer``.
        ahead: by what an ``"orthogonal"`` one looks ahead; see the module.
        buffer: Muon's momentum, shaped as ``param``, of the type of ``delta``; None before the first gradient.
        last: Muon's direction that is on its way, shaped alike; None if there is none.
        select: chooses coefficients, as :func:`largest` does; a test may settle ties.
    """

    param: Tensor
    delta: Tensor
    decay: float
    topk: int
    chunk: int
    tiling: Tiling
    quantize: bool
    overlap: bool
    weight_decay: float = 0.0
    own: Sent | None = None
    direction: Direction = "momentum"
    update: Update = "sign"
    gain: float = 1.0
    momentum: float = 0.95
    ahead: Ahead = "direction"
    buffer: Tensor | None = None
    last: Tensor | None = None
    select: Callable[[Tensor, int], Sent] = largest

    def looking_ahead(self, previous_lr: float) -> Tensor:
        """The weights at which the gradient is taken with ``overlap``, of the shape and type of ``param``."""
        shift = previous_lr * self.delta.sign()
        if self.direction == "orthogonal" and self.ahead == "delta":
            shift = self.delta
        elif self.direction == "orthogonal":
            shift = torch.zeros_like(self.delta) if self.last is None else previous_lr * self.last
        return (self.param.to(self.delta.dtype) - shift).to(self.param.dtype)

    def generate(self, grad: Tensor | None, lr: float, *, alone: bool = True) -> Sent | None:
        """Takes ``grad``, shaped as ``param``, into the momentum and returns what is sent, or None for nothing.

        A gradient that is not finite is left out, as if there were none. The weights of a parameter without gradient
        keep their size where a peer is ``alone``, and decay all the same where other peers may have a gradient.
        """
        if self.own is not None:
            self.delta = self.delta - self._decoded(*self.own)
            self.own = None
        usable = grad is not None and bool(grad.isfinite().all())
        if usable or not alone:
            self.param.mul_(1 - lr * self.weight_decay)
        self.last = None
        if grad is None or not usable:
            return None
        taken = grad.to(self.delta.dtype)
        if self.direction == "orthogonal":
            before = torch.zeros_like(taken) if self.buffer is None else self.buffer
            self.buffer = self.momentum * before + (1 - self.momentum) * taken
            taken = orthogonal(self.momentum * self.buffer + (1 - self.momentum) * taken, self.tiling)
            self.last = taken
        self.delta = self.decay * self.delta + lr * taken
        index, value = self.select(encode(to_tiles(self.delta, self.chunk, self.tiling)), self.topk)
        if not self.quantize:
            limit = torch.finfo(self.param.dtype).max  # of float16, that is 65504
            value = value.clamp(-limit, limit).to(self.param.dtype).to(self.delta.dtype)  # as it is sent
        if self.overlap:
            self.own = index, value
        else:
            self.delta = self.delta - self._decoded(index, value)
        if not self.quantize:
            return index, value
        # A sign cannot say 0: the weights would move.
        return (index, torch.signbit(value)) if bool(value.any()) else None

    def decoded(self, sent: Sequence[Sent]) -> Tensor:
        """The update before its sign, shaped as ``param`` in the dtype of ``delta``; 0 where nobody sent anything."""
        if not sent:
            return torch.zeros_like(self.delta)
        return self._decoded(*self._together(sent))

    def apply(self, sent: Sequence[Sent], lr: float) -> None:
        """``p -= gain * lr * sign(decoded)``, with what all peers sent of this tensor, in the same order everywhere."""
        step = self.decoded(sent).sign() if self.update == "sign" else self._of_fixed_size(sent)
        moved = self.param.to(self.delta.dtype) - self.gain * lr * step
        self.param.copy_(moved.to(self.param.dtype))

    def _together(self, sent: Sequence[Sent]) -> Sent:
        index = torch.cat([i for i, _ in sent], dim=1)
        value = torch.cat([1.0 - 2.0 * v.to(self.delta.dtype) if v.dtype == torch.bool else v for _, v in sent], dim=1)
        return index, value.to(self.delta.dtype)

    def _of_fixed_size(self, sent: Sequence[Sent]) -> Tensor:
        """The update over its root mean square, which is that of whole tiles: what lies beyond the tensor counts."""
        if not sent:
            return torch.zeros_like(self.delta)
        tiles = to_tiles(torch.zeros_like(self.delta), self.chunk, self.tiling)
        whole = decode(placed(*self._together(sent), tiles))
        size = whole.square().mean().sqrt()
        return from_tiles(whole / size, self.delta, self.tiling) if size > 0 else torch.zeros_like(self.delta)

    def _decoded(self, index: Tensor, value: Tensor) -> Tensor:
        tiles = to_tiles(torch.zeros_like(self.delta), self.chunk, self.tiling)
        return from_tiles(decode(placed(index, value, tiles)), self.delta, self.tiling)


# -- a model -----------------------------------------------------------------------------------------------------------


class ReferenceDisTrO(Optimizer):
    """What :class:`~distro_optim.DisTrO` does, to read and to compare with: several times as slow, and it needs several
    temporaries as large as each tensor.

    Arguments are those of DisTrO and are not checked. ``exchange`` is a function here; None trains alone. With
    ``overlap=True`` the weights look ahead between two calls of :meth:`step`, as they do there: call :meth:`eval`
    before you evaluate or save the model, and :meth:`flush` at the end of training.

    Attributes:
        tensors: one per parameter that has elements, in order.

    Not supported: saving and loading, parameter groups that are added later, and writing to weights that look ahead.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        direction: Direction = "momentum",
        update: Update = "sign",
        gain: float | None = None,
        momentum: float = 0.95,
        ahead: Ahead = "direction",
        compression_decay: float | None = None,
        compression_topk: int = 8,
        compression_chunk: int = 64,
        weight_decay: float = 0.0,
        quantize_1bit: bool = True,
        overlap: bool = True,
        tiling: Tiling = "padded",
        exchange: Exchange | None = None,
    ) -> None:
        settings = {
            "lr": lr,
            "direction": direction,
            "update": update,
            "gain": (2.0 if update == "rms" else 1.0) if gain is None else gain,
            "momentum": momentum,
            "compression_decay": (0.7 if direction == "orthogonal" else 0.999)
            if compression_decay is None
            else compression_decay,
            "compression_topk": compression_topk,
            "compression_chunk": compression_chunk,
            "weight_decay": weight_decay,
        }
        super().__init__(params, settings)
        self._overlap = overlap
        self._exchange = exchange
        self.tensors = [
            ReferenceTensor(
                param.detach(),  # the same memory
                torch.zeros_like(param, dtype=torch.float64 if param.dtype == torch.float64 else torch.float32),
                group["compression_decay"],
                group["compression_topk"],
                group["compression_chunk"],
                tiling,
                quantize_1bit,
                overlap,
                direction=group["direction"],
                update=group["update"],
                gain=group["gain"],
                momentum=group["momentum"],
                ahead=ahead,
            )
            for param, group in self._params()
        ]
        self._on_its_way: list[list[Sent | None]] = []
        self._true_weights: list[Tensor] | None = None

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step together with all peers. ``closure`` is called first and returns the loss."""
        loss = None
        if closure is not None:
            self.train()
            with torch.enable_grad():
                loss = closure()
        self.eval()
        sent = []
        for tensor, (param, group) in zip(self.tensors, self._params(), strict=True):
            tensor.decay, tensor.weight_decay = group["compression_decay"], group["weight_decay"]
            alone = self._exchange is None or not param.requires_grad
            sent.append(tensor.generate(param.grad, group["lr"], alone=alone))
        everybody = [sent] if self._exchange is None else self._exchange(sent)
        arrived, self._on_its_way = (self._on_its_way, everybody) if self._overlap else (everybody, [])
        self._apply(arrived)
        if closure is None:
            self.train()
        return loss

    @torch.no_grad()
    def train(self) -> None:
        """With ``overlap`` the weights look ahead from now on: ``p - lr * sign(delta)``."""
        if self._overlap and self._true_weights is None:
            self._true_weights = [tensor.param.clone() for tensor in self.tensors]
            for tensor, (_, group) in zip(self.tensors, self._params(), strict=True):
                tensor.param.copy_(tensor.looking_ahead(group["lr"]))

    @torch.no_grad()
    def eval(self) -> None:
        """Puts the true weights back, bit for bit: subtracting what was added would round."""
        if self._true_weights is not None:
            for tensor, weights in zip(self.tensors, self._true_weights, strict=True):
                tensor.param.copy_(weights)
            self._true_weights = None

    @torch.no_grad()
    def flush(self) -> None:
        """Applies the update that is still on its way; all peers call it together. The weights no longer look ahead."""
        self.eval()
        self._apply(self._on_its_way)
        self._on_its_way = []

    def _params(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """Every parameter that has elements, with its group."""
        return [(p, group) for group in self.param_groups for p in group["params"] if p.numel()]

    def _apply(self, everybody: Sequence[list[Sent | None]]) -> None:
        for number, (tensor, (_, group)) in enumerate(zip(self.tensors, self._params(), strict=True)):
            sent = [peer[number] for peer in everybody]
            tensor.apply([message for message in sent if message is not None], group["lr"])
