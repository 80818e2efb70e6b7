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
from typing import Final, NamedTuple

import torch
from torch import Tensor

from ..compress import TileGrid

__all__ = [
    "NEWTON_SCHULZ",
    "Matrices",
    "batches",
    "directions_of",
    "is_matrix",
    "look_ahead",
    "orthogonalize",
    "take_direction",
]

NEWTON_SCHULZ: Final = (3.4445, -4.7750, 2.0315)
"""Coefficients of Muon: steep at 0, so that five steps bring every singular value to between 0.7 and 1.2."""

STEPS: Final = 5

_LONG: Final = 2
"""Times as long as wide: from here on the way by the squares has fewer operations."""

_SMALLEST: Final = 0.4
"""The norm of a matrix below which its direction shrinks with it, as a power of the smallest number: 7e-16 in float32.
The squares of smaller ones are lost in the norm, and a matrix that is divided by too little has no finite direction.
The momentum of a matrix that gets no gradient any more comes by there on its way to 0."""

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
    look_ahead(grad, buffer, out, momentum=momentum, scale=scale)
    if not is_matrix(grid):
        out.sign_()
        return None
    return out.view(-1, grid.height, grid.width)


def look_ahead(grad: Tensor, buffer: Tensor, out: Tensor, *, momentum: float, scale: float) -> None:
    """:func:`take_direction` before matrices are made directions: element by element, so that parts will do."""
    share = (1 - momentum) / scale
    buffer.mul_(momentum).add_(grad, alpha=share)
    torch.mul(buffer, momentum, out=out).add_(grad, alpha=share)


def is_matrix(grid: TileGrid) -> bool:
    """Whether a tensor is one, or many of them; the direction of others is their sign."""
    return min(grid.height, grid.width) > 1 and grid.tiles > 0


class Matrices(NamedTuple):
    """Matrices ``[start, stop)`` of those of a tensor."""

    tensor: int
    start: int
    stop: int


def batches(tensors: Sequence[tuple[tuple[int, int, int], torch.dtype, torch.device]]) -> list[list[Matrices]]:
    """What is done together: matrices of one shape, as many as fit into some memory, at least one.

    Args:
        tensors: their shapes ``(n, rows, columns)``, types and devices.
    """
    kinds: dict[tuple[object, ...], list[int]] = {}
    for number, (shape, dtype, device) in enumerate(tensors):
        kinds.setdefault((shape[1:], dtype, device), []).append(number)
    made = []
    for numbers in kinds.values():
        (_, rows, columns), _, device = tensors[numbers[0]]
        limit = _ELEMENTS_CPU if device.type == "cpu" else _ELEMENTS_ACCELERATOR
        each = max(1, limit // (rows * columns))
        parts = []
        for number in numbers:
            count = tensors[number][0][0]
            parts += [Matrices(number, start, min(start + each, count)) for start in range(0, count, each)]
        while parts:
            together = [parts.pop()]
            count = together[0].stop - together[0].start
            while parts and count + parts[-1].stop - parts[-1].start <= each:
                together.append(parts.pop())
                count += together[-1].stop - together[-1].start
            made.append(together)
    return made


def orthogonalize(matrices: Sequence[Tensor]) -> None:
    """Replaces matrices ``(n, rows, columns)``, of any shapes, by their directions; those of one shape together."""
    for batch in batches([((len(m), m.shape[1], m.shape[2]), m.dtype, m.device) for m in matrices]):
        together = [matrices[part.tensor][part.start : part.stop] for part in batch]
        for part, direction in zip(together, directions_of(together), strict=True):
            part.copy_(direction)


def directions_of(together: Sequence[Tensor]) -> Sequence[Tensor]:
    """Of a batch: ``(n, rows, columns)`` each, and so are its directions."""
    directions = _directions(together[0] if len(together) == 1 else torch.cat(list(together)))
    parts: Sequence[Tensor] = directions.split([len(part) for part in together])
    return parts


def _directions(matrices: Tensor) -> Tensor:
    """``(n, rows, columns)`` to the same; a matrix of zeros stays one.

    In bfloat16 on an accelerator, as Muon: singular values need not come nearer to 1 than that. All products write to
    memory that is there, and so autocast leaves them alone.
    """
    _, rows, columns = matrices.shape
    size = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)
    x = matrices / size.clamp_min(torch.finfo(matrices.dtype).tiny ** _SMALLEST)
    if matrices.device.type != "cpu" and matrices.dtype == torch.float32:
        x = x.to(torch.bfloat16)
    wide = x.transpose(1, 2) if rows > columns else x
    if max(rows, columns) >= _LONG * min(rows, columns) and x.dtype != torch.bfloat16:
        x = _newton_schulz_of_long(wide)
    else:
        x = _newton_schulz(wide.contiguous())
    if rows > columns:
        x = x.transpose(1, 2)
    direction: Tensor = x.to(matrices.dtype) * max(rows, columns) ** 0.5
    return direction


def _newton_schulz(x: Tensor) -> Tensor:
    """``(n, rows, columns)`` with no more rows than columns, contiguous, overwritten."""
    a, b, c = NEWTON_SCHULZ
    gram = x.new_empty(len(x), x.shape[1], x.shape[1])
    polynomial, following = torch.empty_like(gram), torch.empty_like(x)
    for _ in range(STEPS):
        torch.bmm(x, x.transpose(1, 2), out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=polynomial)
        torch.baddbmm(x, polynomial, x, beta=a, out=following)
        x, following = following, x
    return x


def _newton_schulz_of_long(x: Tensor) -> Tensor:
    """The same by the squares ``x @ x.T`` alone, which are small: ten products with ``x`` are two.

    Each step multiplies ``x`` with a polynomial of its squares, and so the squares with that polynomial twice: all of
    them commute. What rounding of the squares does to small singular values is below a thousandth of all, in float32;
    bfloat16 would not do.
    """
    a, b, c = NEWTON_SCHULZ
    gram = x.new_empty(len(x), x.shape[1], x.shape[1])
    polynomial, product, spare = torch.empty_like(gram), torch.empty_like(gram), torch.empty_like(gram)
    torch.bmm(x, x.transpose(1, 2), out=gram)
    for step in range(STEPS):
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=polynomial).diagonal(dim1=1, dim2=2).add_(a)
        if step == 0:
            product.copy_(polynomial)
        else:
            product, spare = torch.bmm(polynomial, product, out=spare), product
        if step + 1 < STEPS:
            torch.bmm(polynomial, gram, out=spare)
            torch.bmm(spare, polynomial, out=gram)
    return torch.bmm(product, x, out=torch.empty_like(x))
