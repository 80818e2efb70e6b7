"""Muon's direction: the momentum of a matrix with all its singular values brought near 1.

Keller Jordan and others, 2024 (https://kellerjordan.github.io/posts/muon), as in ``torch.optim.Muon``: five steps of
Newton and Schulz, polynomials of the matrix that need nothing but products. The result is multiplied with
``sqrt(max(rows, columns))``, so that its elements have a root mean square of about 1, as signs have.

Tensors of more than two dimensions are the matrices of their tiling: under ``"padded"`` a convolution is one of
``(out, in * height * width)``, under ``"divisor"`` leading dimensions are a batch. Vectors, scalars and matrices of one
row or column have no such direction: theirs is the sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from ..compress import TileGrid

__all__ = ["NEWTON_SCHULZ", "orthogonalize", "take_direction"]

NEWTON_SCHULZ: Final = (3.4445, -4.7750, 2.0315)
"""Coefficients of Muon: steep at 0, so that five steps bring every singular value to between 0.7 and 1.2."""

STEPS: Final = 5

_ELEMENTS_CPU: Final = 1 << 22
"""Of matrices of one shape that are done together. Each takes three more of its kind: some 64 MB."""
_ELEMENTS_ACCELERATOR: Final = 1 << 26


def take_direction(
    grad: Tensor, buffer: Tensor, out: Tensor, *, momentum: float, scale: float, grid: TileGrid
) -> Tensor | None:
    """The gradient into Muon's momentum, and Nesterov's look at it into ``out``.

    Args:
        grad: shaped as the parameter, of any float type.
        buffer: ``momentum * buffer + (1 - momentum) * grad / scale`` in the end; shaped as it, of the compute dtype.
        out: as ``buffer``, overwritten.
        momentum: what stays of the buffer.
        scale: what gradients were multiplied with.
        grid: of the parameter.

    Returns:
        ``out`` as matrices ``(n, rows, columns)`` that are to be orthogonalised, or None if it is a direction already.
    """
    share = (1 - momentum) / scale
    buffer.mul_(momentum).add_(grad, alpha=share)
    torch.mul(buffer, momentum, out=out).add_(grad, alpha=share)
    if min(grid.height, grid.width) <= 1 or not out.numel():
        out.sign_()
        return None
    return out.view(-1, grid.height, grid.width)


def orthogonalize(matrices: Sequence[Tensor]) -> None:
    """Replaces matrices ``(n, rows, columns)``, of any shapes, by their directions; those of one shape together."""
    kinds: dict[tuple[object, ...], list[Tensor]] = {}
    for tensor in matrices:
        kinds.setdefault((tensor.shape[1:], tensor.dtype, tensor.device), []).append(tensor)
    for tensors in kinds.values():
        rows, columns = tensors[0].shape[1:]
        limit = _ELEMENTS_CPU if tensors[0].device.type == "cpu" else _ELEMENTS_ACCELERATOR
        each = max(1, limit // (rows * columns))
        parts = [part for tensor in tensors for part in tensor.split(each)]
        while parts:
            together = [parts.pop()]
            count = len(together[0])
            while parts and count + len(parts[-1]) <= each:
                together.append(parts.pop())
                count += len(together[-1])
            directions = _directions(together[0] if len(together) == 1 else torch.cat(together))
            for part, direction in zip(together, directions.split([len(t) for t in together]), strict=True):
                part.copy_(direction)


def _directions(matrices: Tensor) -> Tensor:
    """``(n, rows, columns)`` to the same; a matrix of zeros stays one.

    In bfloat16 on an accelerator, as Muon: singular values need not come nearer to 1 than that. All products write to
    memory that is there, and so autocast leaves them alone.
    """
    n, rows, columns = matrices.shape
    size = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)
    x = matrices / size.clamp_min(torch.finfo(matrices.dtype).tiny)
    if matrices.device.type != "cpu" and matrices.dtype == torch.float32:
        x = x.to(torch.bfloat16)
    if rows > columns:
        x = x.transpose(1, 2).contiguous()
    a, b, c = NEWTON_SCHULZ
    side = min(rows, columns)
    gram = torch.empty(n, side, side, dtype=x.dtype, device=x.device)
    polynomial, following = torch.empty_like(gram), torch.empty_like(x)
    for _ in range(STEPS):
        torch.bmm(x, x.transpose(1, 2), out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=polynomial)
        torch.baddbmm(x, polynomial, x, beta=a, out=following)
        x, following = following, x
    if rows > columns:
        x = x.transpose(1, 2)
    direction: Tensor = x.to(matrices.dtype) * max(rows, columns) ** 0.5
    return direction
