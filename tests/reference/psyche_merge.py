"""Psyche's merge in the very operations of its source, tensor by tensor: slow, and the authority for the fast one.

PsycheFoundation/psyche ``shared/modeling/src/distro.rs``: ``CompressDCT::batch_decompress``, ``TransformDCT::decode``,
``Distro::apply``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distro_optim.compress import CompressedTensor, CompressedUpdate
from distro_optim.compress.psyche import inverse_basis

Product = Callable[[Tensor, Tensor], Tensor]
"""Of two matrices, in their dtype."""


def product_in_order(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of bfloat16 or float16: float32 sums in the order of PyTorch on a CPU without such products."""
    (rows, inner), columns = left.shape, right.shape[1]
    sums = 4 if rows * inner * columns >= 400 else 1
    running = [torch.zeros(rows, columns) for _ in range(sums)]
    for number in range(inner):
        which = number % sums if number < inner // sums * sums else 0
        running[which] += left[:, number : number + 1].float() * right[number : number + 1].float()
    total = running[0]
    for other in running[1:]:
        total = total + other
    return total.to(left.dtype)


def sums_in_that_order() -> bool:
    """Whether this machine's own product does so; those with instructions for bfloat16 have orders of their own.

    Some of them take these only for matrices of certain shapes.
    """
    return all(_sums_in_that_order(columns) for columns in (64, 44))


def _sums_in_that_order(columns: int) -> bool:
    generator = torch.Generator().manual_seed(3)
    left = torch.randn(64, 64, generator=generator) * torch.exp2(torch.randint(-9, 9, (64, 64), generator=generator))
    right = torch.cat([torch.randn(32, columns, generator=generator)] * 2)
    left[:, 32:] = -left[:, :32].roll(1, 1)
    pair = left.bfloat16(), right.bfloat16()
    return torch.equal(pair[0] @ pair[1], product_in_order(*pair))


def mean_of(results: Sequence[CompressedTensor], dtype: torch.dtype) -> Tensor:
    """Everybody's coefficients of one tensor, of the shape of the encoded tensor."""
    index = torch.cat([r.index.long() for r in results], -1)
    values = [r.value.to(dtype) * -2 + 1 if r.value.dtype == torch.bool else r.value for r in results]
    shape = results[0].shape
    merged = torch.zeros(shape, dtype=dtype)
    if len(shape) > 2:
        merged = merged.view(*shape[:-2], -1)
    merged.scatter_reduce_(-1, index, torch.cat(values, -1).to(dtype), "mean", include_self=False)
    return merged.reshape(shape)


def decode_by_einsum(x: Tensor) -> Tensor:
    """The tensor whose coefficients ``x`` are."""
    right = inverse_basis(x.shape[-1], x.dtype, x.device)
    if x.dim() == 2:
        return torch.einsum("...ij,jb->...ib", x, right).reshape(-1)
    left = inverse_basis(x.shape[-2], x.dtype, x.device)
    y = torch.einsum("...ijkl,kb,ld->...ibjd", x, left, right)
    return y.reshape(*y.shape[:-4], y.shape[-4] * y.shape[-3], y.shape[-2] * y.shape[-1])


def decode_by_product(x: Tensor, product: Product) -> Tensor:
    """The same in products of matrices, as ``einsum`` makes them."""
    right = inverse_basis(x.shape[-1], x.dtype, x.device)
    if x.dim() == 2:
        return product(x, right).reshape(-1)
    *lead, h, w = x.shape
    left = inverse_basis(h, x.dtype, x.device)
    y = product(x.transpose(-1, -2).reshape(-1, h), left).view(*lead, w, h).transpose(-1, -2)
    z = product(y.reshape(-1, w), right).view(*lead, h, w).transpose(-3, -2)
    return z.reshape(*lead[:-2], lead[-2] * h, lead[-1] * w)


def apply(
    params: Sequence[Tensor],
    updates: Sequence[CompressedUpdate],
    lr: float,
    decode: Callable[[Tensor], Tensor] = decode_by_einsum,
) -> None:
    """A step on ``params``, in place."""
    everybody = [update.tensors() for update in updates]
    for number, param in enumerate(params):
        results = [tensors[number] for tensors in everybody if tensors[number].index.numel()]
        if results:
            param.add_(decode(mean_of(results, param.dtype)).sign(), alpha=-lr)
