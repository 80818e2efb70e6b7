"""Which gradients may touch the momentum, found out on the device: nothing waits for the answer."""

# mypy: disable-error-code="no-untyped-def,import-untyped,import-not-found"

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import address, place

__all__ = ["check_kernel"]


@triton.jit
def check_kernel(
    first, places, addresses, present,
    H: tl.constexpr, W: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, GRAD: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """``present[tensor] = 0`` if an element of the tile is not finite, or so large that its square is not: 2**63."""
    tile = first + tl.program_id(0).to(tl.int64)
    tensor, base, offsets, inside, _ = place(places, tile, H, W, BH, BW, ALIGNED)
    here = tl.load(present + tensor) != 0
    grad_ptr = address(addresses, tensor, 0, GRAD, ALIGNED) + base
    grad = tl.load(grad_ptr + offsets, mask=inside & here, other=0.0).to(tl.float32)
    bits = grad.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    # Several programs may write, and all of them the same.
    tl.store(present + tensor, 0, mask=tl.max(bits) >= (127 + 63) << 23)
